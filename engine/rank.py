"""The rank: a worker's muscle. Holds weights, pools and sampler state, and carries out step plans.

Made by `engine.rank_process`, which gives it one `StepPlan` after another and sends each `StepResult` back, strictly in
order. It decides nothing: which pages, slots, records and tokens is the host's business.

Drafts are made (`engine.drafter`) and verified within one step, as rows of its one forward, since only the rank knows
a sequence's newest token in time. What they are wrong about is never undone: everything is addressed by position, so
that later tokens overwrite it before it can be read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.drafter import Drafter, DraftWish
from engine.host_memory import HostMemory
from engine.plan import (
    PromptScores,
    Sampled,
    Segment,
    SlotOpen,
    StepPlan,
    StepResult,
    Verified,
)
from engine.rank_transfer import PageDigest, StateDigests
from engine.runner import Runner, SegmentTokens
from engine.sampler import Continuation, Sampler
from engine.state_report import NOTHING, Reached, StateReport, report_state
from rorqual.model_config import PAGE_TOKENS

SCORED_ROWS = 32
"""Prompt logprobs are computed this many tokens at a time: 32 x 129,280 f32 logits are 16 MiB."""


class Rank:
    """Everything between two frames. Tests drive it without a process."""

    def __init__(
        self,
        runner: Runner,
        *,
        sampler: Sampler,
        page_digest: PageDigest,
        drafter: Drafter | None = None,
        host_memory: HostMemory | None = None,
    ) -> None:
        self.digests = StateDigests(runner.pools, runner.records, page_digest=page_digest)
        self.record_bytes = runner.record_bytes
        self.runner = runner
        self._sampler = sampler
        self._drafter = drafter
        self.host_memory = host_memory
        self._slots: dict[int, _Slot] = {}

    def step(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        for slot in plan.closes:
            self._sampler.close(slot)
            self.runner.close(slot)
            del self._slots[slot]
        copied = started
        if plan.demote or plan.promote or plan.spills or plan.unspills:
            self._copy(plan)
            copied = time.perf_counter()
        for item in plan.opens:
            self._open(item)
        done = self._compute(plan.segments)
        if self.host_memory is not None:
            self.host_memory.wait()
        spilled = self.runner.tables.spilled
        return StepResult(
            number=plan.number,
            sampled=tuple(done.sampled),
            prompt_scores=tuple(done.scores),
            step_ms=(time.perf_counter() - started) * 1e3,
            lent=done.state.lent,
            verified=tuple(done.verified),
            completed=done.state.completed,
            tailed=done.state.tailed,
            copy_ms=(copied - started) * 1e3,
            hot=spilled.take_uses() if spilled is not None else (),
        )

    def _copy(self, plan: StepPlan) -> None:
        """Between the device and host memory."""
        assert self.host_memory is not None, "a plan copies, and there is no host memory"
        self.host_memory.demote(plan.demote)
        spilled = self.runner.tables.spilled
        for item in plan.spills:
            assert spilled is not None, "a plan spills, and there is no hot buffer"
            spilled.spill(item)
        self.host_memory.promote(plan.promote)
        for item in plan.unspills:
            assert spilled is not None, "a plan unspills, and there is no hot buffer"
            spilled.unspill(item.slot, item.pages)
        self.host_memory.mark()

    def _open(self, item: SlotOpen) -> None:
        assert item.slot not in self._slots, f"slot {item.slot} is open"
        self._sampler.open(item)
        if (known := item.restore) is None:
            self.runner.open(item.slot)
        else:
            self.runner.restore(item.slot, known.num_computed, known.pages, known.record)
            if known.host_pages:
                assert self.runner.tables.spilled is not None, "a sequence begins spilled, and nothing can be"
                self.runner.tables.spilled.restore(item.slot, known.buffer, known.host_pages)
        if self._drafter is not None:
            self._drafter.open(item.slot, num_computed=0 if known is None else known.num_computed)
        tokens = np.frombuffer(item.tokens, dtype="<i4")
        buffer = torch.empty(len(tokens) + PAGE_TOKENS, dtype=torch.int64)
        buffer[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        self._slots[item.slot] = _Slot(
            tokens=buffer,
            num_tokens=len(tokens),
            num_prompt=item.num_prompt,
            num_tokens_max=item.tokens_max,
            prompt_logprobs=item.sampling.prompt_logprobs,
        )

    @torch.inference_mode()
    def _compute(self, segments: Sequence[Segment]) -> _Done:
        """Draft, then one ragged forward of everything, then choose and verify."""
        done = _Done()
        for segment in segments:
            if segment.pages:
                self.runner.extend(segment.slot, segment.pages)
        parts = self._with_drafts([self._part(segment) for segment in segments])
        self._forward([part for part in parts if part.count or part.is_hit], done)
        counts = Counter(item.slot for item in done.sampled)
        done.verified = [
            Verified(
                slot=part.segment.slot,
                num_drafts=len(part.drafts),
                num_accepted=max(counts[part.segment.slot] - 1, 0),
            )
            for part in parts
            if part.segment.drafts
        ]
        done.state = report_state(self.runner, self.digests, [self._reached(part) for part in parts])
        return done

    def _part(self, segment: Segment) -> _Part:
        """What to compute for a segment, still without drafts: nothing of a slot that is full."""
        slot = self._slots[segment.slot]
        end = segment.start + segment.count
        self._check_rebuilt(segment)
        if segment.count == 0:
            assert segment.sample, f"slot {segment.slot}: no token to compute, and none to sample"
            assert end == slot.num_tokens, f"slot {segment.slot} knows {slot.num_tokens} tokens, not {end}"
            is_hit = slot.num_tokens < slot.num_tokens_max
            return _Part(segment=segment, start=end, count=0, is_hit=is_hit)
        if not _is_decode(segment):
            assert end <= slot.num_tokens, f"slot {segment.slot} knows {slot.num_tokens} tokens, not {end}"
            return _Part(segment=segment, start=segment.start, count=segment.count)
        newest = slot.num_tokens - 1
        assert segment.start <= newest, f"slot {segment.slot} knows {slot.num_tokens} tokens"
        is_anywhere = segment.start < newest
        assert not (is_anywhere and segment.lend), "a decode that may be anywhere is not lent"
        assert not ((is_anywhere or segment.drafts) and segment.tails), "tails of a decode have a tail_record"
        return _Part(segment=segment, start=newest, count=int(slot.num_tokens < slot.num_tokens_max))

    def _check_rebuilt(self, segment: Segment) -> None:
        """While a sequence is rebuilt its rows are not what they were: they must not reach anybody."""
        least, end = self.runner.rebuilt_at(segment.slot), segment.start + segment.count
        assert segment.replay or segment.start >= least, f"slot {segment.slot} is not rebuilt before {least}"
        assert not (segment.replay and segment.drafts), "drafts behind tokens that are replayed"
        wanted = [point.num_tokens for point in segment.tails]
        wanted += [end] if segment.sample or segment.record >= 0 else []
        assert min(wanted, default=least) >= least, f"slot {segment.slot} is not rebuilt before {least}"

    def _with_drafts(self, parts: list[_Part]) -> list[_Part]:
        wishes: list[DraftWish] = []
        for part in parts:
            segment, slot = part.segment, self._slots[part.segment.slot]
            assert _is_decode(segment) or not segment.drafts, "drafts behind a prompt's tokens"
            assert not (segment.drafts and segment.lend), "drafts of a sequence that is lent"
            # The last draft is computed too, and a token sampled behind it.
            num_drafts = min(segment.drafts, slot.num_tokens_max - slot.num_tokens - 1)
            if num_drafts > 0:
                wishes.append(DraftWish(slot=segment.slot, tokens=slot.known, num_drafts=num_drafts))
        if not wishes:
            return parts
        assert self._drafter is not None, "drafts were asked for, and there is no drafter"
        drafted = self._drafter.draft(wishes)
        drafts = {wish.slot: found for wish, found in zip(wishes, drafted, strict=True)}
        return [replace(part, drafts=drafts.get(part.segment.slot, ())) for part in parts]

    def _forward(self, parts: list[_Part], done: _Done) -> None:
        """Compute, and sample what is wanted. Parts without a token to compute are sampled from what is kept."""
        work = [item for part in parts for item in self._slots[part.segment.slot].work(part)]
        streams, rows_of_work = self._streams(parts, work) if work else (torch.empty(0), [])
        rows = iter(rows_of_work)
        wanted: list[Continuation] = []
        chosen: list[Tensor] = []
        for part in parts:
            segment, slot = part.segment, self._slots[part.segment.slot]
            position = part.start + part.count
            if part.is_hit:
                chosen.append(self.runner.kept_streams([segment.slot], [position - 1]))
            else:
                known_rows, *draft_rows = islice(rows, 1 + len(part.drafts))
                if slot.wants_scores:
                    done.scores += self._score_prompt(segment, streams, known_rows)
                    known_rows = known_rows[-1:]
                if segment.sample:
                    chosen.append(streams[torch.cat((known_rows, *draft_rows))])
            if segment.sample:
                wanted.append(Continuation(slot=segment.slot, position=position, drafts=part.drafts))
        if not wanted:
            return
        logits_RV = self.runner.model.logits(torch.cat(chosen))
        for item, accepted in zip(wanted, self._sampler.verify(wanted, logits_RV), strict=True):
            for index, sampled in enumerate(accepted):
                self._slots[item.slot].append(sampled.token_id, item.position + index)
            done.sampled += accepted

    def _streams(self, parts: list[_Part], work: list[SegmentTokens]) -> tuple[Tensor, list[Tensor]]:
        """One ragged forward, which the drafter follows."""
        streams, rows_of_work = self.runner.streams(work)
        if self._drafter is not None:
            prompts: dict[int, int] = {}
            for part in parts:
                segment, ends = part.segment, [point.num_tokens for point in part.segment.tails]
                ends += [part.start + part.count] if segment.record >= 0 else []
                if part.count and (ends or not _is_decode(segment)):
                    prompts[segment.slot] = min((self._slots[segment.slot].num_tokens, *ends))
            self._drafter.follow(work, streams, prompts)
        self.runner.keep_streams(streams)
        return streams, rows_of_work

    def _reached(self, part: _Part) -> Reached:
        """How far the part has taken its sequence, drafts that were not accepted left out."""
        end = part.start + part.count
        if part.count and part.segment.sample:
            end = self._slots[part.segment.slot].num_tokens - 1
        return Reached(segment=part.segment, start=part.start, end=end)

    def _score_prompt(self, segment: Segment, streams: Tensor, rows: Tensor) -> list[PromptScores]:
        """Logprobs of the prompt tokens that follow this segment's tokens."""
        slot = self._slots[segment.slot]
        assert slot.prompt_logprobs is not None
        # Of a decode nothing: it stands at or behind the prompt's last token.
        num_scored = min(segment.count, slot.num_prompt - 1 - segment.start)
        parts: list[PromptScores] = []
        for first in range(0, num_scored, SCORED_ROWS):
            last = min(first + SCORED_ROWS, num_scored)
            position = segment.start + first + 1
            parts.append(
                self._sampler.prompt_scores(
                    segment.slot,
                    first_position=position,
                    logits_RV=self.runner.model.logits(streams[rows[first:last]]),
                    token_ids=slot.tokens[position : position + last - first].tolist(),
                    num_alternatives=slot.prompt_logprobs,
                )
            )
        return parts


@dataclass(slots=True)
class _Done:
    """What a step's segments have given."""

    sampled: list[Sampled] = field(default_factory=list[Sampled])
    scores: list[PromptScores] = field(default_factory=list[PromptScores])
    verified: list[Verified] = field(default_factory=list[Verified])
    state: StateReport = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is computed for a segment: tokens start .. start+count-1, which are known, and `drafts` behind them. A hit
    computes nothing, and samples from the streams that are kept."""

    segment: Segment
    start: int
    count: int
    drafts: tuple[int, ...] = ()
    is_hit: bool = False


@dataclass(slots=True, kw_only=True)
class _Slot:
    """Tokens of the sequence in a slot: given by the host, then extended by the sampler."""

    tokens: Tensor  # i64, longer than needed
    num_tokens: int
    num_tokens_max: int
    num_prompt: int
    prompt_logprobs: int | None

    @property
    def wants_scores(self) -> bool:
        return self.prompt_logprobs is not None

    @property
    def known(self) -> Tensor:
        return self.tokens[: self.num_tokens]

    def work(self, part: _Part) -> list[SegmentTokens]:
        """The known tokens together, then every draft as a segment of its own, so that it is computed as a decode."""
        slot, end = part.segment.slot, part.start + part.count
        if not part.count:
            return []
        known = SegmentTokens(
            slot=slot,
            start=part.start,
            tokens=self.tokens[part.start : end],
            all_logits=self.wants_scores,
            replay=part.segment.replay,
            tails=part.segment.tails,
        )
        drafts = torch.tensor(part.drafts, dtype=torch.int64).split(1) if part.drafts else ()
        return [
            known,
            *(
                SegmentTokens(slot=slot, start=end + index, tokens=draft)
                for index, draft in enumerate(drafts)
            ),
        ]

    def append(self, token: int, position: int) -> None:
        assert position == self.num_tokens, "a token was sampled out of turn"
        if position == len(self.tokens):
            self.tokens = torch.cat((self.tokens, torch.empty_like(self.tokens)))
        self.tokens[position] = token
        self.num_tokens = position + 1


def _is_decode(segment: Segment) -> bool:
    """Of the newest token, wherever that is: `start` is a lower bound."""
    return segment.sample and segment.count == 1

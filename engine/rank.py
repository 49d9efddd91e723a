"""The rank: a worker's muscle. Loads the model, holds weights, pools and sampler state, and carries out step plans.

Runs as `python -m engine.rank --fd N`, started by `engine.worker.rank_link`; reads `RankSettings`, answers
`RankProgress` while loading and `RankReady`, then one `StepResult` per `StepPlan`, strictly in order, until `Shutdown`
or the end of the host. With a transfer, others read from its pools and it reads from theirs meanwhile
(`engine.rank_transfer`). It decides nothing: which pages, slots, records and tokens is the host's business.

Drafts are made (`engine.drafter`) and verified within one step, as rows of its one forward, since only the rank knows
a sequence's newest token in time. What they are wrong about is never undone: everything is addressed by position, so
that later tokens overwrite it before it can be read.
"""

from __future__ import annotations

import argparse
import gc
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.identity import weights_id
from engine.checkpoint.reader import Checkpoint, open_checkpoint
from engine.drafter import Drafter, DraftWish, MtpDrafter
from engine.exactness import check_exactness
from engine.frames import FrameWriter, join_host, read_frame, write_frame
from engine.host_memory import HostMemory
from engine.kernels import registry
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.model.weights import ModelWeights, allocate_weights
from engine.plan import (
    PromptScores,
    RankFailed,
    RankProgress,
    RankReady,
    RankSettings,
    Sampled,
    Segment,
    SlotOpen,
    StepPlan,
    StepResult,
    Verified,
)
from engine.rank_budget import device_budget, host_budget
from engine.rank_transfer import PageDigest, PlanQueue, RankTransfer, StateDigests, ThreadFailed, read_host
from engine.runner import Runner, SegmentTokens
from engine.sampler import Continuation, Sampler
from engine.state_report import NOTHING, Reached, StateReport, report_state
from engine.warm_up import warm_up
from kvstore.handover import rebuild_tokens, wire_id
from kvstore.layout import DRAFTS_MAX, Numerics
from kvstore.pools import plain_memory
from kvstore.transfer.contract import Transfer
from kvstore.transfer.opening import TransferBuilder, open_transfer
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS

Made = TypeVar("Made")

SCORED_ROWS = 32
"""Prompt logprobs are computed this many tokens at a time: 32 x 129,280 f32 logits are 16 MiB."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A worker's compute process; started by its host, not by hand."
    )
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the host")
    connection = join_host(parser.parse_args().fd)
    try:
        return _serve(connection)
    except ConnectionError:
        return 0  # the host is gone while it was written to, and with it whoever would read more


def _serve(connection: socket.socket) -> int:
    """The exit status. Raises ConnectionError when the host goes away."""
    settings = read_frame(connection)
    if settings is None:
        return 0
    assert isinstance(settings, RankSettings), "the first frame must be the settings"
    try:
        loaded = _load(settings, connection)
    except RorqualError as error:
        write_frame(connection, RankFailed(message=str(error)))
        return 1
    write_frame(connection, loaded.ready)
    # Weights and code live as long as the process: the collector need not walk them again.
    gc.collect()
    gc.freeze()
    try:
        if loaded.engine is not None:
            return _serve_with_transfer(connection, loaded.rank, loaded.engine)
        while isinstance(plan := read_frame(connection), StepPlan):
            write_frame(connection, loaded.rank.step(plan))
        return 0
    finally:
        if loaded.rank.host_memory is not None:
            loaded.rank.host_memory.close()


def _serve_with_transfer(connection: socket.socket, rank: Rank, engine: Transfer) -> int:
    """As `_serve`, with two threads beside this one, which computes."""
    writer = FrameWriter(connection)
    plans = PlanQueue()
    transfer = RankTransfer(
        engine,
        rank.digests,
        record_bytes=rank.record_bytes,
        tell=writer.write,
        fail=plans.fail,
        clock=SystemClock(),
    )
    # A daemon: when a step fails here, the process does not wait for the host to say more.
    threading.Thread(target=read_host, args=(connection, plans, transfer), name="host", daemon=True).start()
    try:
        while (plan := plans.next()) is not None:
            writer.write(rank.step(plan))
    except ThreadFailed as error:
        writer.write(RankFailed(message=str(error)))
        return 1
    finally:
        transfer.stop()
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    rank: Rank
    ready: RankReady
    engine: Transfer | None


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
            del self._slots[slot]
        copied = started
        if plan.demote or plan.promote:
            assert self.host_memory is not None, "a plan copies, and there is no host memory"
            self.host_memory.copy(demote=plan.demote, promote=plan.promote)
            copied = time.perf_counter()
        for item in plan.opens:
            self._open(item)
        done = self._compute(plan.segments)
        if self.host_memory is not None:
            self.host_memory.wait()
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
        )

    def _open(self, item: SlotOpen) -> None:
        assert item.slot not in self._slots, f"slot {item.slot} is open"
        self._sampler.open(item)
        if (known := item.restore) is None:
            self.runner.open(item.slot)
        else:
            self.runner.restore(item.slot, known.num_computed, known.pages, known.record)
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


def _make_model(
    settings: RankSettings, numerics: Numerics, checkpoint: Checkpoint, weights: ModelWeights
) -> Model:
    return Model(
        checkpoint.config,
        weights,
        numerics=numerics,
        kernels=choose_kernels("cpu", settings.kernels),
        exact=settings.exact,
    )


def _load(settings: RankSettings, connection: socket.socket) -> _Loaded:
    # One thread in exact mode: with more, sums are cut by the number of threads.
    torch.set_num_threads(1 if settings.exact else settings.threads)
    checkpoint = open_checkpoint(Path(settings.model))
    config = checkpoint.config
    numerics = Numerics(settings.numerics or ("served" if config.quantised else "float32"))
    # What is wrong with an option is told before weights are read for minutes.
    implementations = registry.choose("cpu", settings.kernels)
    drafts_max = _drafts_max(settings, checkpoint)
    budget = device_budget(config, numerics, settings, drafts=drafts_max > 0)
    below = host_budget(config, numerics, settings, budget, drafts=drafts_max > 0)
    builder = _open_transfer(settings, connection)
    weights = _allocated("the weights", lambda: allocate_weights(config))
    checkpoint.load_into(weights.named.__getitem__, _Progress(connection, stage="weights").report)
    weights.check(config)
    model = _make_model(settings, numerics, checkpoint, weights)
    _tell(connection, "warming up")
    page_digest = implementations["page_digest"].function
    warm_up(model, page_digest, drafts=drafts_max > 0)
    if settings.exact:
        _tell(connection, "testing exactness")
        check_exactness(model)
    sampler = Sampler(vocab_size=config.vocab_size, device=torch.device("cpu"), kernels=implementations)
    sampler.warm_up()
    runner = _allocated(
        "the pools (fewer --pages or --slots need less)",
        lambda: Runner(
            model,
            num_pages=budget.num_pages,
            num_slots=settings.num_slots,
            num_records=budget.num_records,
            drafts=drafts_max > 0,
            allocate=plain_memory if builder is None else builder.allocate,
        ),
    )
    host_memory = _allocated(
        "host memory (a smaller --host-pages or --host-bytes needs less)",
        lambda: HostMemory(
            runner.pools,
            runner.records,
            num_pages=below.num_pages,
            num_records=below.num_records,
            agent=f"{settings.agent}/host" if settings.shares_host_memory else "",
        ),
    )
    drafter = MtpDrafter(runner, sampler) if drafts_max else None
    rank = Rank(runner, sampler=sampler, page_digest=page_digest, drafter=drafter, host_memory=host_memory)
    engine = None if builder is None else builder.start()
    ready = _ready(
        rank,
        checkpoint,
        engine,
        kernels=tuple((name, item.name) for name, item in implementations.items()),
        weight_bytes=weights.num_bytes,
        drafts_max=drafts_max,
        exact=settings.exact,
    )
    return _Loaded(rank=rank, ready=ready, engine=engine)


def _ready(
    rank: Rank,
    checkpoint: Checkpoint,
    engine: Transfer | None,
    *,
    kernels: tuple[tuple[str, str], ...],
    weight_bytes: int,
    drafts_max: int,
    exact: bool,
) -> RankReady:
    config, runner, host_memory = checkpoint.config, rank.runner, rank.host_memory
    fingerprint, layout = f"{config.fingerprint()}-{weights_id(checkpoint.stored)}", runner.layout
    return RankReady(
        num_pages=runner.pools.num_pages,
        num_slots=runner.pools.num_slots,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        model_fingerprint=fingerprint,
        numerics=layout.numerics.value,
        kernels=kernels,
        weight_bytes=weight_bytes,
        state_bytes=runner.pools.num_bytes + runner.records.nbytes,
        has_mtp=checkpoint.has_mtp,
        wire_id=wire_id(layout, fingerprint, drafts=runner.drafts, exact=exact),
        endpoint=None if engine is None else engine.endpoint,
        num_records=len(runner.records),
        num_page_components=len(rank.digests.components),
        notices=checkpoint.notices,
        drafts_max=drafts_max,
        page_bytes=layout.page_bytes,
        record_bytes=runner.records.shape[1],
        rebuild_tokens=rebuild_tokens(layout),
        num_host_pages=host_memory.num_pages if host_memory is not None else 0,
        num_host_records=host_memory.num_records if host_memory is not None else 0,
        host_memory=host_memory.shared if host_memory is not None else None,
    )


def _open_transfer(settings: RankSettings, connection: socket.socket) -> TransferBuilder | None:
    if not settings.transfer:
        return None
    assert settings.num_records > 0, "a transfer without records"
    builder = open_transfer(settings.transfer, agent=settings.agent)
    _tell(connection, f"state is read by {builder.reason}")
    return builder


def _drafts_max(settings: RankSettings, checkpoint: Checkpoint) -> int:
    """Of a segment. Raises RorqualError where drafts are required and there is nothing to draft with."""
    assert 0 <= settings.drafts_max <= DRAFTS_MAX, f"rings have no room for {settings.drafts_max} drafts"
    if checkpoint.has_mtp:
        return settings.drafts_max
    if settings.drafts_required:
        raise RorqualError(
            f"--drafts {settings.drafts_max}: {settings.model} has no MTP block to draft with;"
            " choose --drafts 0, or auto, which drafts where it can"
        )
    return 0


def _allocated(what: str, make: Callable[[], Made]) -> Made:
    """torch reports memory that is not to be had as a RuntimeError, shared memory as an OSError."""
    try:
        return make()
    except (MemoryError, OSError, RuntimeError) as error:
        raise RorqualError(f"no memory for {what}: {str(error).splitlines()[0]}") from None


def _tell(connection: socket.socket, stage: str) -> None:
    write_frame(connection, RankProgress(stage=stage, done=0, total=0, unit=""))


class _Progress:
    """Loading progress, at most every half second."""

    def __init__(self, connection: socket.socket, *, stage: str) -> None:
        self._connection = connection
        self._stage = stage
        self._told_at = 0.0

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._told_at < 0.5:
            return
        self._told_at = now
        gigabyte = 1e9
        message = RankProgress(stage=self._stage, done=done / gigabyte, total=total / gigabyte, unit="GB")
        write_frame(self._connection, message)


if __name__ == "__main__":
    raise SystemExit(main())

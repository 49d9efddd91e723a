"""A rank in this process whose decodes verify drafts, and drafters that know what will be sampled.

Called by the tests of speculation. Everything stands on exact models over memory that is NaN until it is written, so
that a bit that differs or a row that was never made is found wherever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.drafter import Drafter, DraftWish, MtpDrafter
from engine.handover import pack_record
from engine.kernels.registry import choose
from engine.model.forward import Model
from engine.plan import Restore, Sampled, Segment, SlotOpen, StepPlan, StepResult, Verified
from engine.rank import Rank
from engine.runner import Runner, SegmentTokens
from engine.sampler import Continuation, Sampler
from kvstore.handover import record_bytes_max
from kvstore.layout import IndexSpace, Numerics
from kvstore.pages import pages_for
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from tests.harness.models import build_model, config_of
from tests.reference.weights import random_tensors

GREEDY = SamplingParams(seed=0, temperature=0.0, logprobs=3)
EVERYTHING = SamplingParams(
    seed=11,
    temperature=0.9,
    top_p=0.95,
    top_k=60,
    min_p=0.001,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    logit_bias=((3, 1.5), (7, -2.0)),
    logprobs=4,
)


def exact_model(raw: Mapping[str, Any], numerics: Numerics, *, seed: int = 3) -> Model:
    config = config_of(raw, num_mtp_blocks=1)
    return build_model(config, random_tensors(config, seed=seed), numerics=numerics, exact=True)


class HeardSampler(Sampler):
    """Remembers the logits that every draft was chosen from, by slot and position."""

    def __init__(self, *, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size, device=torch.device("cpu"), kernels=choose("cpu", {}))
        self.heard: dict[tuple[int, int], tuple[Continuation, Tensor]] = {}

    def draft(self, wanted: Sequence[Continuation], logits_RV: Tensor) -> list[int]:
        for item, row in zip(wanted, logits_RV, strict=True):
            self.heard[item.slot, item.position + len(item.drafts)] = item, row.clone()
        return super().draft(wanted, logits_RV)


class Oracle:
    """Drafts `hits` tokens that will be sampled, then others. `truth` holds the tokens of a slot's sequence; `hits`
    says of a slot, and of how many tokens are known of it, how many drafts shall be right. What goes on in `inner` is
    that drafter's."""

    def __init__(
        self, inner: Drafter | None, truth: Mapping[int, Sequence[int]], hits: Callable[[int, int], int]
    ) -> None:
        self._inner = inner
        self._truth = truth
        self._hits = hits

    def open(self, slot: int, *, num_computed: int) -> None:
        if self._inner is not None:
            self._inner.open(slot, num_computed=num_computed)

    def follow(self, work: Sequence[SegmentTokens], streams_TSD: Tensor, prompts: Mapping[int, int]) -> None:
        if self._inner is not None:
            self._inner.follow(work, streams_TSD, prompts)

    def draft(self, wishes: Sequence[DraftWish]) -> list[tuple[int, ...]]:
        drafts: list[tuple[int, ...]] = []
        for wish in wishes:
            known, truth = len(wish.tokens), self._truth[wish.slot]
            assert wish.tokens.tolist() == list(truth[:known]), "the sequence went another way"
            hits = self._hits(wish.slot, known)
            tokens = [truth[position] for position in range(known, known + wish.num_drafts)]
            wrong = [(token + 1) % 97 for token in tokens[hits:]]
            drafts.append((*tokens[:hits], *wrong))
        return drafts


class Speculating:
    """A rank and its host. `make_drafter` is given its runner and sampler."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int = 1,
        num_pages: int = 3,
        make_drafter: Callable[[Runner, Sampler], Drafter | None] = MtpDrafter,
        drafts: bool = True,
        num_records: int = 0,
    ) -> None:
        self.model = model
        self.runner = Runner(
            model, num_pages=num_pages, num_slots=num_slots, num_records=num_records, drafts=drafts
        )
        self.runner.pools.fill(0xFF)
        self.runner.records.fill_(0xFF)
        self.sampler = HeardSampler(vocab_size=model.config.vocab_size)
        self.rank = Rank(
            self.runner,
            sampler=self.sampler,
            page_digest=choose("cpu", {})["page_digest"].function,
            drafter=make_drafter(self.runner, self.sampler),
        )
        self.tokens: dict[int, list[int]] = {}
        self.said: dict[int, list[Sampled]] = {}
        self.verified: dict[int, list[Verified]] = {}
        self._tokens_max: dict[int, int] = {}
        self._num_prompt: dict[int, int] = {}
        self.pages_free = list(range(num_pages))
        self._held: dict[int, int] = {}
        self._num_plans = 0

    def begin(
        self,
        slot: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        tokens_max: int = 1 << 20,
        num_prompt: int | None = None,
        restore: Restore | None = None,
    ) -> None:
        self.tokens[slot], self.said[slot], self.verified[slot] = list(prompt), [], []
        self._tokens_max[slot] = tokens_max
        if restore is not None:
            self.pages_free = [page for page in self.pages_free if page not in restore.pages]
        self._held[slot] = 0 if restore is None else len(restore.pages)
        opened = SlotOpen(
            slot=slot,
            tokens=np.array(prompt, dtype="<i4").tobytes(),
            num_prompt=len(prompt) if num_prompt is None else num_prompt,
            sampling=sampling,
            tokens_max=tokens_max,
            restore=restore,
        )
        self.step(opens=(opened,))

    def step(
        self, *segments: Segment, opens: tuple[SlotOpen, ...] = (), closes: tuple[int, ...] = ()
    ) -> StepResult:
        self._num_plans += 1
        result = self.rank.step(
            StepPlan(number=self._num_plans, closes=closes, opens=opens, segments=segments)
        )
        for item in result.sampled:
            self.tokens[item.slot].append(item.token_id)
            self.said[item.slot].append(item)
        for item in result.verified:
            self.verified[item.slot].append(item)
        return result

    def pages(self, slot: int, num_tokens: int) -> tuple[int, ...]:
        """New pages for a slot, so that it holds as many as `num_tokens` need."""
        missing = max(pages_for(num_tokens) - self._held[slot], 0)
        self._held[slot] += missing
        # From the end: no slot's pages are where a mistaken row id would look first.
        return tuple(self.pages_free.pop() for _ in range(missing))

    def close(self, slot: int, *, keep_pages: bool = False) -> None:
        """Its pages are free again, but for those that another slot holds, or that the caller keeps."""
        mine = self.pages_of(slot, PAGE_TOKENS * self._held[slot])
        others = {
            page
            for other, count in self._held.items()
            if other != slot
            for page in self.pages_of(other, PAGE_TOKENS * count)
        }
        self._held[slot] = 0
        if not keep_pages:
            self.pages_free += [page for page in mine if page not in others]
        self.step(closes=(slot,))

    def share(self, slot: int, pages: Sequence[int]) -> tuple[int, ...]:
        """Pages of another slot, for a segment that appends them to this one's."""
        self._held[slot] += len(pages)
        return tuple(pages)

    def pages_of(self, slot: int, num_tokens: int) -> tuple[int, ...]:
        """The pages that hold the slot's first `num_tokens` tokens."""
        return tuple(self.runner.tables.pages_SP[slot, : pages_for(num_tokens)].tolist())

    def record(self, record: int, num_tokens: int) -> bytes:
        """What a record of so many tokens holds."""
        num_bytes = self.runner.record_bytes(num_tokens)
        return self.runner.records[record, :num_bytes].numpy().tobytes()

    def prefill(self, slots: Iterable[int], *, chunk: int = 1 << 20) -> None:
        """Compute all prompts, in chunks of so many tokens, and sample their first tokens."""
        left = dict.fromkeys(slots, 0)
        while left:
            segments: list[Segment] = []
            for slot, start in list(left.items()):
                known = len(self.tokens[slot])
                count = min(chunk, known - start)
                left[slot] = start + count
                if start + count == known:
                    del left[slot]
                segments.append(
                    Segment(
                        slot=slot,
                        start=start,
                        count=count,
                        pages=self.pages(slot, start + count),
                        sample=start + count == known,
                    )
                )
            self.step(*segments)

    def decode(self, drafts: Mapping[int, int]) -> StepResult:
        """One step: of each slot its newest token with so many drafts. Pages as a host would give that knows nothing
        about the last step but the least it must have done."""
        return self.step(
            *(
                Segment(
                    slot=slot,
                    start=len(self.tokens[slot]) - 1,
                    count=1,
                    pages=self.pages(slot, min(len(self.tokens[slot]) + count, self._tokens_max[slot] - 1)),
                    sample=True,
                    drafts=count,
                )
                for slot, count in drafts.items()
            )
        )

    def state(self, slot: int) -> tuple[int, bytes]:
        """How many tokens have been computed, and every byte of the main model's state that their successor can see:
        full pages in order, then a record."""
        num_computed = len(self.tokens[slot]) - 1
        pages = self.runner.tables.pages_SP[slot, : num_computed // PAGE_TOKENS].tolist()
        parts = [
            self.runner.pools[item.component].bytes_ulb[page].numpy().tobytes()
            for item in self.runner.layout.descriptors
            if item.space is IndexSpace.PAGE
            for page in pages
        ]
        layout = self.runner.layout
        record = torch.zeros(record_bytes_max(layout, drafts=False), dtype=torch.uint8)
        size = pack_record(self.runner.tables, slot, num_computed, record, drafts=False)
        return num_computed, b"".join(parts) + record[:size].numpy().tobytes()


class Truth:
    """What is sampled without drafts, token by token, from a prompt on, and the state after each."""

    def __init__(
        self, model: Model, prompt: Sequence[int], sampling: SamplingParams, *, num_tokens: int
    ) -> None:
        known = len(prompt) + num_tokens
        plain = Speculating(
            model, num_pages=pages_for(known), make_drafter=lambda runner, sampler: None, drafts=False
        )
        plain.begin(0, prompt, sampling)
        plain.prefill([0])
        self.states = dict([plain.state(0)])
        while len(plain.tokens[0]) < known:
            plain.decode({0: 0})
            self.states.update([plain.state(0)])
        self.prompt = list(prompt)
        self.sampling = sampling
        self.tokens = plain.tokens[0]
        self.said = plain.said[0]

    def check(self, rank: Speculating, slot: int) -> None:
        """The slot has said the same so far, and is in the same state."""
        count = len(rank.said[slot])
        found = [(item.token_id, item.logprob, item.alternatives) for item in rank.said[slot]]
        wanted = [(item.token_id, item.logprob, item.alternatives) for item in self.said[:count]]
        assert found == wanted, f"slot {slot}"
        num_computed, state = rank.state(slot)
        assert state == self.states[num_computed], f"slot {slot}: state after {num_computed} tokens"

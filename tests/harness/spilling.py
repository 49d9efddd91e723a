"""A decode worker in this process whose sequences spill, over a real rank: hot buffers so small that every step misses,
and NaN in whatever page or host page nobody has. Its prompts are computed here, or handed over by a prefill worker.

Called by the tests that hold what spilled sequences answer to what resident ones do, bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from engine.model.forward import Model
from engine.worker.events import Adoption, LentEvent, PagesEvent, SequenceKey, TokenEvent
from kvstore.layout import IndexSpace
from rorqual.sampling import SamplingParams
from rorqual.session import Role
from tests.harness.neighbours import POISON, Neighbour
from tests.harness.reusing import FIRST_HOST_ID, Reusing


class Spiller(Neighbour):
    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
        self.num_reads = 0  # of C4 rows for a chunk behind spilled pages
        self._poisoned_thin: set[int] = set()
        self._poisoned_host: set[int] = set()
        if self.spilled is not None:
            self._read = self.spilled.read
            self.spilled.read = self._counted_read

    def _counted_read(self, *args: Any) -> Tensor:
        self.num_reads += 1
        return self._read(*args)

    def poison(self) -> None:
        super().poison()
        scheduler = self.scheduler
        thin, tier = scheduler._holdings._thin, scheduler.host_tier
        free = {page for page in thin._free if thin.last_plan((page,)) <= scheduler.last_applied}
        for item in self.runner.pools.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                pool = self.runner.pools[item.component].bytes_ulb
                gone = [page for page in free - self._poisoned_thin if page < len(pool)]
                pool[gone] = POISON
        self._poisoned_thin = free
        if tier is None:
            return
        kept = {page.page for page in tier.index.pages()}
        every = range(FIRST_HOST_ID, FIRST_HOST_ID + tier.config.num_pages)
        gone = {
            page for page in every if page not in kept and tier._plans.get(page, 0) <= scheduler.last_applied
        }
        self.host_memory.pages[list(self.host_memory.placed(sorted(gone - self._poisoned_host)))] = POISON
        self._poisoned_host = gone


class HandOver:
    """One sequence, computed up to its first token by a prefill worker that has nothing else to do."""

    def __init__(
        self,
        prefill: Reusing,
        decode: Spiller,
        prompt: list[int],
        num_tokens: int,
        *,
        sampling: SamplingParams,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._key = prefill.open(prompt, num_tokens, sampling=sampling)
        self._pages: list[int] = []
        self._digests: list[tuple[int, ...]] = []
        self._lent: LentEvent | None = None
        self._first: list[TokenEvent] = []
        self._adoption: Adoption | None = None
        self.key = len(decode.answers)
        decode.answers[self.key] = []
        while self._lent is None:
            self._compute()
        decode.scheduler.open(
            SequenceKey(self.key),
            prompt=np.array(prompt, dtype=np.int32),
            max_tokens=num_tokens,
            ignore_eos=True,
            sampling=sampling,
            adopt=True,
        )

    def advance(self) -> bool:
        """Read it into the decode worker as soon as there is room; False when it runs there."""
        scheduler = self._decode.scheduler
        if self._adoption is None:
            return True
        if self._adoption.after > scheduler.last_applied:
            return True
        self._read(self._adoption)
        first = self._first[0]
        self._decode.answers[self.key].append((first.token_id, first.logprob))
        scheduler.adopted(SequenceKey(self.key), (first.token_id,), self._digests)
        assert self._lent is not None
        self._prefill.scheduler.take_surrendered()
        self._prefill.scheduler.take_back(self._lent.record)
        return False

    def take(self, adoptions: list[Adoption]) -> None:
        for item in adoptions:
            if item.key == self.key:
                self._adoption = item

    def _compute(self) -> None:
        plan = self._prefill.scheduler.plan()
        assert plan is not None
        size = len(self._prefill.rank.digests.components)
        for event in self._prefill.scheduler.apply(self._prefill.rank.step(plan)):
            match event:
                case PagesEvent():
                    self._pages += event.pages
                    found = event.digests
                    self._digests += [found[at : at + size] for at in range(0, len(found), size)]
                case LentEvent():
                    self._lent = event
                case TokenEvent():
                    self._first.append(event)

    def _read(self, adoption: Adoption) -> None:
        assert self._lent is not None
        first, mine, theirs = adoption.num_present, self._decode.runner, self._prefill.runner
        targets, sources = list(adoption.pages[first : len(self._pages)]), self._pages[first:]
        for item in theirs.pools.layout.descriptors:
            if item.space is IndexSpace.PAGE:
                source = theirs.pools[item.component].bytes_ulb[sources]
                mine.pools[item.component].bytes_ulb[targets] = source
        size = self._lent.record_bytes
        mine.records[adoption.record, :size] = theirs.records[self._lent.record, :size]


def a_prefill_worker(model: Model, **options: Any) -> Reusing:
    return Reusing(model, role=Role.PREFILL, num_pages=48, num_slots=1, num_records=4, keeps=False, **options)

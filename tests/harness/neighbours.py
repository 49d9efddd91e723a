"""Workers in this process that keep prefixes and read them from each other: real ranks, schedulers and caches, while
what lies between hosts is the test's, which moves every read on by hand.

Called by the tests that hold what was read from a peer to what is computed, bit by bit. A page or record that is free
and used by no plan is poisoned at once: who reads it, gets NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import numpy as np

from engine.model.forward import Model
from engine.worker.cache.prefix_cache import KeyLoan, PageFacts, PrefixCache
from engine.worker.events import SequenceKey
from kvstore.keys import PageKey
from kvstore.layout import IndexSpace
from kvstore.store.contract import tenant_label
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Role
from tests.harness.reusing import Reusing

POISON = 0xFF


class Neighbour(Reusing):
    """It computes whole sequences, as a decode worker does whose prompts came alone: so it knows digests of its pages,
    and lends them."""

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, role=Role.DECODE, **options)
        self.num_pages_poisoned = 0
        self._poisoned: set[int] = set()
        self._poisoned_records: set[int] = set()

    @property
    def cache(self) -> PrefixCache:
        assert self.scheduler.cache is not None
        return self.scheduler.cache

    def keys_of(self, prompt: Sequence[int]) -> tuple[PageKey, ...]:
        return self.cache.keys_of(np.array(prompt, dtype=np.int32), salt="")

    def paged(self) -> list[Any]:
        """Memory of the paged components, uint8 [pages, ..]."""
        pools = self.runner.pools
        return [
            pools[item.component].bytes_ulb
            for item in pools.layout.descriptors
            if item.space is IndexSpace.PAGE
        ]

    def step(self) -> bool:
        did = super().step()
        self.poison()
        return did

    def poison(self) -> None:
        """What nobody holds and no plan in flight uses."""
        holdings = self.scheduler._holdings
        pages = {page for page in holdings._pages._free if not self._is_used(page)}
        for page in pages - self._poisoned:
            for bytes_ulb in self.paged():
                bytes_ulb[page] = POISON
            self.num_pages_poisoned += 1
        self._poisoned = pages
        copied, last = holdings._record_plans, self.scheduler.last_applied
        records = {record for record in holdings._records._free if copied.get(record, 0) <= last}
        for record in records - self._poisoned_records:
            self.runner.records[record] = POISON
        self._poisoned_records = records

    def _is_used(self, page: int) -> bool:
        return self.scheduler._holdings._pages._last_plans[page] > self.scheduler.last_applied


class Stage(Enum):
    BEGUN = auto()
    LEASED = auto()
    READ = auto()
    OVER = auto()


class PeerRead:
    """One sequence's read, stage by stage, as `engine.worker.sharing.peer_reading` goes about it: room, a lease, the
    bytes, and into the cache. In between anything may happen at either worker. With `spoils` the bytes that come are
    not the owner's, which their digests show."""

    def __init__(
        self,
        reader: Neighbour,
        owner: Neighbour,
        prompt: Sequence[int],
        *,
        key: int | None = None,
        num_pages: int | None = None,
        wants_tail: bool = True,
        spoils: bool = False,
    ) -> None:
        """`key`: of the sequence that waits."""
        self.num_pages_read = 0
        self.tail_depth = 0
        self._reader, self._owner, self._key, self._spoils = reader, owner, key, spoils
        self._loan: KeyLoan | None = None
        self._is_good = False
        keys = reader.keys_of(prompt)
        self._item = reader.scheduler.imports.begin(keys[:num_pages], with_record=wants_tail)
        self.stage = Stage.BEGUN
        if self._item is None:
            self._end()

    def advance(self) -> bool:
        """One stage further, unless it has to wait for plans in flight; False when it is over."""
        match self.stage:
            case Stage.BEGUN:
                self._lease()
            case Stage.LEASED if self._item.after <= self._reader.scheduler.last_applied:
                self._read()
            case Stage.READ:
                self._end()
        return self.stage is not Stage.OVER

    def run(self) -> None:
        while self.advance():
            pass

    def _lease(self) -> None:
        item = self._item
        self._loan = self._owner.cache.lend(item.keys, first=item.first, wants_tail=item.record is not None)
        self.stage = Stage.LEASED
        if self._loan is None:
            self._end()

    def _read(self) -> None:
        item, loan = self._item, self._loan
        assert loan is not None
        targets = item.pages[: len(loan.pages)]
        for mine, theirs in zip(self._reader.paged(), self._owner.paged(), strict=True):
            mine[list(targets)] = theirs[list(loan.pages)]
        if self._spoils:
            for mine in self._reader.paged():
                mine[list(targets)] = POISON
        digests = self._reader.rank.digests
        self._is_good = tuple(digests.of_pages(targets)) == loan.digests
        if loan.packed is not None:
            size = loan.packed.num_bytes
            records = self._reader.runner.records
            records[item.record, :size] = self._owner.runner.records[loan.record, :size]
            if self._spoils:
                records[item.record] = POISON
            self._is_good &= digests.of_record(item.record, size) == loan.packed.digest
        assert self._is_good != self._spoils, "digests say nothing"
        self.stage = Stage.READ

    def _end(self) -> None:
        item, loan = self._item, self._loan
        if item is not None:
            if loan is not None and self._is_good:
                size = len(self._reader.rank.digests.components)
                self.num_pages_read, self.tail_depth = len(loan.pages), loan.tail_depth
                self._reader.scheduler.imports.end(
                    item,
                    facts=[
                        PageFacts(digests=loan.digests[at : at + size], tenant=tenant_label(""))
                        for at in range(0, len(loan.digests), size)
                    ],
                    tail_depth=loan.tail_depth,
                    packed=loan.packed,
                )
            else:
                self._reader.scheduler.imports.end(item)
        if loan is not None:
            self._owner.cache.take_back(loan.pin)
        if self._key is not None:
            self._reader.scheduler.fetched(SequenceKey(self._key))
        self.stage = Stage.OVER


def pages_of(length: int) -> int:
    """Full ones."""
    return length // PAGE_TOKENS

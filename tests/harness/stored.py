"""A worker over host memory that a store reads and writes, beside the plans of its scheduler: as `engine.worker.host`
does it with a store, but in the test's own time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from fake_state import Rows, Slot, page_digests

from engine.worker.tiers.host_tier import HostTier, Room
from kvstore.keys import PageKey
from kvstore.store.contract import tenant_label
from kvstore.tiers import HostPage
from rorqual.sampling import SamplingParams
from tests.harness.storms import Alone


@dataclass(kw_only=True, eq=False)
class _Fill:
    room: Room
    keys: tuple[PageKey, ...]
    rows: list[Rows]


class Stored(Alone):
    """Moves "fill", which takes places in host memory for a prompt's pages, "fill on", which writes into them once that
    may be, and "write", which reads what has landed there."""

    def __init__(self, bench) -> None:
        super().__init__(bench)
        self.fills: list[_Fill] = []
        self.num_filled = 0
        self.num_written = 0

    @property
    def tier(self) -> HostTier:
        tier = self.bench.scheduler.host_tier
        assert tier is not None
        return tier

    def move(self, name: str, value) -> None:
        match name:
            case "fill" if self.opened:
                self.fill(self.opened[value % len(self.opened)][0])
            case "fill on" if self.fills:
                self.fill_on(self.fills[value % len(self.fills)])
            case "write":
                for _ in range(value):
                    self.write()
            case _:
                super().move(name, value)

    def fill(self, prompt: list[int]) -> None:
        cache = self.bench.scheduler.cache
        assert cache is not None
        keys = cache.keys_of(np.array(prompt, dtype=np.int32), salt="")
        room = self.tier.reserve(min(len(keys), 3), with_record=False)
        slot = Slot(tokens=prompt, num_prompt=1, sampling=SamplingParams(seed=0), tokens_max=len(prompt))
        slot.compute(len(prompt))
        self.fills.append(_Fill(room=room, keys=keys, rows=slot.rows))
        self.bench.scheduler.check_all()

    def fill_on(self, fill: _Fill) -> None:
        if fill.room.after > self.bench.scheduler.last_applied:
            return
        self.fills.remove(fill)
        parent = PageKey(b"")
        for page, key, rows in zip(fill.room.pages, fill.keys, fill.rows, strict=False):
            self.bench.rank.host_memory.pages[page] = rows
            self.num_filled += self.tier.index.admit_page(
                HostPage(
                    key=key,
                    parent=parent,
                    page=page,
                    digests=page_digests(rows),
                    stamp=0,
                    hits=0,
                    worth=1.0,
                    tenant=tenant_label(""),
                )
            )
            parent = key
        self.bench.scheduler.check_all()

    def write(self) -> None:
        """What a store is given is what it is named by: its digests go with it."""
        item = self.tier.next_landed()
        if item is None:
            return
        if isinstance(item, HostPage):
            rows = self.bench.rank.host_memory.pages[item.page]
            assert rows is not None
            assert page_digests(rows) == item.digests, f"host page {item.page} with digests of another"
            self.num_written += 1
        self.tier.written(item)
        self.bench.scheduler.check_all()

    def finish(self) -> None:
        while self.fills or self.reads or self.tier.num_held or not self.bench.scheduler.is_idle:
            before = self._left
            self.bench.drain()
            for fill in list(self.fills):
                assert fill.room.after <= self.bench.scheduler.last_applied, "nobody else can end the wait"
                self.fill_on(fill)
            for read in list(self.reads):
                self.read_on(read)
            for _ in range(self.tier.num_held):
                self.write()
            assert self._left != before, "nothing comes about any more"
        super().finish()

    @property
    def _left(self) -> tuple[int, ...]:
        begun = sum(read.is_begun for read in self.reads)
        scheduler = self.bench.scheduler
        held = self.tier.num_held
        return len(self.fills), len(self.reads), begun, held, scheduler.last_applied, scheduler.is_idle

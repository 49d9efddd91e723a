"""Sequences of a fake rank whose C4 rows are in host memory: spills are held to the contract of `engine.plan`, and what
a spilled sequence reads to what it has put there. Used by `fake_rank`.

A page's content stands for all its components. Of a thin page, and of a whole one that takes hot rows, it stands for
all but C4: who reads the C4 rows of such a page reads a host page instead, which must hold the very content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fake_host_memory import FakeHostMemory
from fake_state import PAGE_TOKENS, Rows, Slot

from engine.plan import HotUse, Spill, Unspill


@dataclass
class _Spilled:
    buffer: int
    host_pages: list[int] = field(default_factory=list)
    held: list[Rows | None] = field(default_factory=list)  # in its pages, when they were spilled


class FakeSpills:
    """`memory` is the rank's: whole pages first, then thin ones. `slots` are those that are open."""

    def __init__(
        self,
        *,
        num_pages: int,
        num_buffers: int,
        num_hot_pages: int,
        memory: list[Rows | None],
        host_memory: FakeHostMemory,
        slots: dict[int, Slot],
    ) -> None:
        self.num_pages = num_pages
        self.num_buffers = num_buffers
        self.num_hot_pages = num_hot_pages
        self._memory = memory
        self._host = host_memory
        self._slots = slots
        self._spilled: dict[int, _Spilled] = {}
        self.num_spills = 0
        self.num_pages_moved = 0

    @property
    def hot_pages(self) -> set[int]:
        return {page for slot in self._spilled for page in self._slots[slot].pages[: self.num_hot_pages]}

    def spill(self, item: Spill, *, taken: set[int]) -> None:
        """`taken`: pages that may not be written, which others have."""
        slot = self._slots.get(item.slot)
        assert slot is not None, f"slot {item.slot} is spilled and not open"
        end = item.first + len(item.pages)
        assert len(item.pages) == len(item.host_pages) > 0, "a spill of nothing"
        assert len(set(item.pages)) == len(item.pages), "a page is spilled into twice"
        assert end * PAGE_TOKENS <= slot.num_computed, "a page is spilled that is not full"
        if item.first == 0:
            assert item.slot not in self._spilled, f"slot {item.slot} is spilled twice"
            assert item.buffer not in self._buffers(), f"hot buffer {item.buffer} is in use"
            assert 0 <= item.buffer < self.num_buffers
            assert end >= self.num_hot_pages, "less is spilled than a hot buffer holds"
            self._spilled[item.slot] = _Spilled(item.buffer)
            self.num_spills += 1
        state = self._spilled[item.slot]
        assert (state.buffer, len(state.host_pages)) == (item.buffer, item.first), "spilled out of turn"
        for number, page in enumerate(item.pages, start=item.first):
            assert self._is_thin(page) == (number >= self.num_hot_pages), f"page {page} of the wrong kind"
        sources = slot.pages[item.first : end]
        assert not any(map(self._is_thin, sources)), "a thin page is moved"
        moved = [self._memory[page] for page in sources]
        for source, target, rows in zip(sources, item.pages, moved, strict=True):
            if source != target:
                assert target not in taken, f"page {target} is moved to while others have it"
                self._memory[target] = rows
                self.num_pages_moved += 1
        slot.pages[item.first : end] = item.pages
        state.held += [self._memory[page] for page in item.pages]
        state.host_pages += item.host_pages
        self.check(item.slot)

    def restore(self, number: int, buffer: int, host_pages: Iterable[int]) -> None:
        """A slot that was just opened is spilled from its start."""
        assert buffer not in self._buffers(), f"hot buffer {buffer} is in use"
        slot, state = self._slots[number], _Spilled(buffer, list(host_pages))
        assert len(state.host_pages) > self.num_hot_pages, "less is spilled than a hot buffer holds"
        assert len(slot.pages) >= self.num_hot_pages, "hot rows have no pages yet"
        state.held = [self._memory[page] for page in slot.pages[: len(state.host_pages)]]
        self._spilled[number] = state
        self.check(number)

    def unspill(self, item: Unspill, *, written: set[int]) -> None:
        """`written`: pages that are others' in this plan already."""
        state = self._spilled.get(item.slot)
        assert state is not None, f"slot {item.slot} comes back and is not spilled"
        assert len(item.pages) == len(state.host_pages), f"not all of slot {item.slot} comes back"
        assert not any(map(self._is_thin, item.pages)), "a slot comes back into thin pages"
        slot = self._slots[item.slot]
        self._forget(item.slot, written=written)
        slot.pages[: len(item.pages)] = item.pages
        for page, rows in zip(item.pages, slot.rows, strict=False):
            assert self._memory[page] == rows, f"page {page} does not hold what comes back"

    def close(self, slot: int) -> None:
        if slot in self._spilled:
            self._forget(slot, written=set())

    def check(self, number: int) -> None:
        """What the slot reads is where it was told to read it."""
        state, slot = self._spilled.get(number), self._slots[number]
        num_spilled = len(state.host_pages) if state is not None else 0
        assert not any(map(self._is_thin, slot.pages[num_spilled:])), "C4 rows are wanted of a thin page"
        if state is None:
            return
        for host_page, rows in zip(state.host_pages, slot.rows, strict=False):
            held = self._host.pages[host_page]
            assert held == rows, f"host page {host_page} does not hold what slot {number} reads there"

    def uses(self, slots: Iterable[int]) -> tuple[HotUse, ...]:
        """Each of these that is spilled has missed as many rows as it has pages, and hit one."""
        return tuple(
            HotUse(
                slot=slot,
                num_hits=1,
                num_misses=len(self._spilled[slot].host_pages),
                num_useful=0,
                num_wasted=0,
            )
            for slot in slots
            if slot in self._spilled
        )

    def _forget(self, slot: int, *, written: set[int]) -> None:
        """What the pages have held is of use to nobody: there were never C4 rows, or others are in their place. They
        may have been read into since, or copied to."""
        state = self._spilled.pop(slot)
        for page, rows in zip(self._slots[slot].pages, state.held, strict=False):
            if page not in written and self._memory[page] is rows:
                self._memory[page] = None

    def _buffers(self) -> set[int]:
        return {state.buffer for state in self._spilled.values()}

    def _is_thin(self, page: int) -> bool:
        return page >= self.num_pages

"""Who owns which page and which slot: plain accounting of ids, no bytes.

The scheduler owns one allocator of each kind and is the only one to call them; the rank's pools follow its
plans. Every id is either free or in use, and giving back what is not in use is a broken invariant.
"""

from __future__ import annotations

from collections.abc import Iterable

from rorqual.ids import PageId, SlotId
from rorqual.model_config import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that hold the first `num_tokens` tokens of a sequence."""
    return -(-num_tokens // PAGE_TOKENS)


class PageAllocator:
    """Ids 0 .. num_total-1. The page given back last is handed out first, since it is likeliest to be in a
    cache."""

    def __init__(self, num_total: int) -> None:
        assert num_total > 0
        self.num_total = num_total
        self._free = [PageId(page) for page in reversed(range(num_total))]
        self._in_use: set[PageId] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return len(self._in_use)

    def allocate(self, count: int) -> tuple[PageId, ...] | None:
        """`count` pages, or None (and nothing taken) when fewer are free."""
        assert count >= 0
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        self._in_use.update(pages)
        return pages

    def free(self, pages: Iterable[PageId]) -> None:
        for page in pages:
            assert page in self._in_use, f"page {page} is given back but not in use"
            self._in_use.remove(page)
            self._free.append(page)

    def check(self) -> None:
        assert self.num_free + self.num_in_use == self.num_total, "pages free and in use do not add up"


class SlotAllocator:
    """Ids 0 .. num_total-1, the lowest free one first, so that live slots stay close together."""

    def __init__(self, num_total: int) -> None:
        assert num_total > 0
        self.num_total = num_total
        self._free = [SlotId(slot) for slot in reversed(range(num_total))]
        self._in_use: set[SlotId] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return len(self._in_use)

    def allocate(self) -> SlotId | None:
        """A slot, or None when all are in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._in_use.add(slot)
        return slot

    def free(self, slot: SlotId) -> None:
        assert slot in self._in_use, f"slot {slot} is given back but not in use"
        self._in_use.remove(slot)
        self._free.append(slot)
        self._free.sort(reverse=True)

    def check(self) -> None:
        assert self.num_free + self.num_in_use == self.num_total, "slots free and in use do not add up"

"""Who owns which page, slot and record: plain accounting of ids, no bytes.

The scheduler owns one allocator of each kind and is the only one to call them; the rank's pools follow its
plans. Every id is either free or in use, and giving back what is not in use is a broken invariant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from rorqual.ids import PageId
from rorqual.model_config import PAGE_TOKENS

Id = TypeVar("Id", bound=int)


def pages_for(num_tokens: int) -> int:
    """Pages that hold the first `num_tokens` tokens of a sequence."""
    return -(-num_tokens // PAGE_TOKENS)


class PageAllocator:
    """Ids first .. first + num_total - 1. The page given back last is handed out first, since it is likeliest to be in
    a cache; or last, to those who want pages that no plan in flight can be using."""

    def __init__(self, num_total: int, *, first: int = 0) -> None:
        assert num_total >= 0
        self.num_total = num_total
        self._first = first
        self._free = deque(PageId(first + page) for page in reversed(range(num_total)))  # coldest first
        self._in_use: set[PageId] = set()
        self._last_plans = [0] * num_total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return len(self._in_use)

    def allocate(self, count: int, *, cold: bool = False) -> tuple[PageId, ...] | None:
        """`count` pages, or None (and nothing taken) when fewer are free. With `cold` those that have been
        free for longest."""
        assert count >= 0
        if count > len(self._free):
            return None
        take = self._free.popleft if cold else self._free.pop
        pages = tuple(take() for _ in range(count))
        self._in_use.update(pages)
        return pages

    def free(self, pages: Iterable[PageId], *, last_plan: int = 0) -> None:
        """`last_plan`: the number of the last plan that may use them; 0: none of this owner's may."""
        for page in pages:
            assert page in self._in_use, f"page {page} is given back but not in use"
            self._in_use.remove(page)
            self._free.append(page)
            number = page - self._first
            self._last_plans[number] = max(self._last_plans[number], last_plan)

    def last_plan(self, pages: Iterable[PageId]) -> int:
        """The last plan of former owners that may use any of these pages; 0 if there was none."""
        return max((self._last_plans[page - self._first] for page in pages), default=0)

    def check(self) -> None:
        assert self.num_free + self.num_in_use == self.num_total, "pages free and in use do not add up"


class IdAllocator(Generic[Id]):
    """Ids 0 .. num_total-1 of one kind, the lowest free one first, so that live ones stay close together."""

    def __init__(self, num_total: int, *, make: Callable[[int], Id]) -> None:
        assert num_total >= 0
        self.num_total = num_total
        self._free = [make(number) for number in reversed(range(num_total))]
        self._in_use: set[Id] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return len(self._in_use)

    def allocate(self) -> Id | None:
        """An id, or None when all are in use."""
        if not self._free:
            return None
        taken = self._free.pop()
        self._in_use.add(taken)
        return taken

    def free(self, taken: Id) -> None:
        assert taken in self._in_use, f"{taken} is given back but not in use"
        self._in_use.remove(taken)
        self._free.append(taken)
        self._free.sort(reverse=True)

    def check(self) -> None:
        assert self.num_free + self.num_in_use == self.num_total, "ids free and in use do not add up"

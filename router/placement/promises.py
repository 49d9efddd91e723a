"""Prompts on their way: what workers will keep once they have computed what they were given. Pure.

Belongs to one policy. Workers tell of pages when these are there; prompts that arrive together would else be placed as
if none of them existed. A promise ends when the prompt is computed: by then the picture knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.keys import PageKey
from router.placement.cache import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    keys: tuple[PageKey, ...]  # that the worker does not have yet
    worker: int


class Promises:
    """Bounded by `prompts_max`: beyond, the oldest promise is forgotten. Costs a few look-ups of a dict for each page
    that is not there yet."""

    def __init__(self, *, prompts_max: int = 20_000) -> None:
        self._prompts_max = prompts_max
        self._by_number: dict[int, _Promise] = {}
        self._counts: dict[PageKey, dict[int, int]] = {}  # of promises, by worker
        self._ends: dict[PageKey, dict[int, int]] = {}  # the same for the last two pages of a prompt

    def __len__(self) -> int:
        return len(self._by_number)

    def promise(self, number: int, *, worker: int, keys: tuple[PageKey, ...], num_present: int = 0) -> None:
        """`num_present` leading pages are there already, or promised before."""
        assert number not in self._by_number, f"request {number} is promised already"
        if num_present >= len(keys):
            return
        if len(self._by_number) >= self._prompts_max:
            self.forget(next(iter(self._by_number)))
        promise = _Promise(keys=keys[num_present:], worker=worker)
        self._by_number[number] = promise
        for key in promise.keys:
            _add(self._counts, key, worker)
        for key in promise.keys[-ENDS:]:
            _add(self._ends, key, worker)

    def forget(self, number: int) -> None:
        """A number that is not promised is ignored: it had no new page, or was too old."""
        promise = self._by_number.pop(number, None)
        if promise is None:
            return
        for key in promise.keys:
            _remove(self._counts, key, promise.worker)
        for key in promise.keys[-ENDS:]:
            _remove(self._ends, key, promise.worker)

    def added_to(self, found: Found, keys: Sequence[PageKey]) -> Found:
        """What will be there once all promises are kept: of leading pages, and of boundaries to resume behind, which
        are those at the ends of promised prompts. `found` is what is there now; it is not changed."""
        pages_W, tail_W = found.pages_W.copy(), found.tail_W.copy()
        num_there = int(pages_W.max(initial=0))
        for depth, key in enumerate(keys, start=1):
            workers = self._counts.get(key)
            if workers:
                for worker in workers:
                    if pages_W[worker] == depth - 1:
                        pages_W[worker] = depth
                for worker in self._ends.get(key, ()):
                    if pages_W[worker] >= depth:
                        tail_W[worker] = max(tail_W[worker], depth)
            elif depth > num_there:
                break
        return Found(pages_W=pages_W, tail_W=tail_W)


ENDS = 2
"""A tail may be taken behind the last page or the one before it: both count as ends of a prompt."""


def _add(counts: dict[PageKey, dict[int, int]], key: PageKey, worker: int) -> None:
    workers = counts.setdefault(key, {})
    workers[worker] = workers.get(worker, 0) + 1


def _remove(counts: dict[PageKey, dict[int, int]], key: PageKey, worker: int) -> None:
    workers = counts[key]
    workers[worker] -= 1
    if not workers[worker]:
        del workers[worker]
        if not workers:
            del counts[key]

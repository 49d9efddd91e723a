"""Prompts on their way: what workers will keep once they have computed what they were given. Pure.

Belongs to one policy. Workers tell of pages when these are there; prompts that arrive together would else be placed as
if none of them existed. A promise ends when the prompt is computed: by then the picture knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.keys import PageKey
from router.placement.cache import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promise:
    keys: tuple[PageKey, ...]
    worker: int


class Promises:
    """Bounded by `prompts_max`: beyond, the oldest promise is forgotten. Costs a few lookups of a dict per page."""

    def __init__(self, *, prompts_max: int = 20_000) -> None:
        self._prompts_max = prompts_max
        self._by_number: dict[int, _Promise] = {}
        self._counts: dict[PageKey, dict[int, int]] = {}  # of promises, by worker
        self._ends: dict[PageKey, dict[int, int]] = {}  # the same for the last page of a prompt

    def __len__(self) -> int:
        return len(self._by_number)

    def promise(self, number: int, *, worker: int, keys: tuple[PageKey, ...]) -> None:
        assert number not in self._by_number, f"request {number} is promised already"
        if not keys:
            return
        if len(self._by_number) >= self._prompts_max:
            self.forget(next(iter(self._by_number)))
        self._by_number[number] = _Promise(keys=keys, worker=worker)
        for key in keys:
            _add(self._counts, key, worker)
        for key in keys[-2:]:
            _add(self._ends, key, worker)

    def forget(self, number: int) -> None:
        """A number that is not promised is ignored: it had no full page, or was too old."""
        promise = self._by_number.pop(number, None)
        if promise is None:
            return
        for key in promise.keys:
            _remove(self._counts, key, promise.worker)
        for key in promise.keys[-2:]:
            _remove(self._ends, key, promise.worker)

    def look_up(self, keys: Sequence[PageKey], *, num_workers: int) -> Found:
        """Leading pages, and the deepest boundary at an end of a promised prompt, once all promises are kept."""
        pages_W = np.zeros(num_workers, np.int32)
        tail_W = np.zeros(num_workers, np.int32)
        for depth, key in enumerate(keys, start=1):
            workers = self._counts.get(key)
            if not workers:
                break
            for worker in workers:
                pages_W[worker] = depth  # promises are whole prefixes, so nothing before is missing
            for worker in self._ends.get(key, ()):
                tail_W[worker] = depth
        return Found(pages_W=pages_W, tail_W=tail_W)


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

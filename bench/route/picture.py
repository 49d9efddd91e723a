"""What the simulated router sees: an exact picture of every worker's cache, from the changes that indexes report, and
of the store that all of them share.

Called by `bench.route.fleet`. A dictionary from page key to a bit mask of workers: a look-up walks the keys of a prompt
once, whatever the number of workers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from bench.route.store import SharedStore
from kvstore.keys import PageKey
from kvstore.shadow_radix import Changes
from router.placement.cache import Found


class ExactPicture:
    """Always what the workers have: it is told of every change at once."""

    def __init__(self, num_workers: int, store: SharedStore | None = None) -> None:
        self._num_workers = num_workers
        self._store = store
        self._pages: dict[PageKey, int] = {}
        self._tails: dict[PageKey, int] = {}

    def apply(self, worker: int, changes: Changes) -> None:
        assert not changes.is_overflowed, "the simulation takes changes often enough"
        bit = 1 << worker
        for masks, added, removed in (
            (self._pages, changes.pages_added, changes.pages_removed),
            (self._tails, changes.tails_added, changes.tails_removed),
        ):
            for key in added:
                masks[key] = masks.get(key, 0) | bit
            for key in removed:
                left = masks[key] & ~bit
                if left:
                    masks[key] = left
                else:
                    del masks[key]

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        pages_W = np.zeros(self._num_workers, np.int32)
        tail_W = np.zeros(self._num_workers, np.int32)
        present = (1 << self._num_workers) - 1
        pages, tails = self._pages, self._tails
        depth = 0
        for key in keys:
            now = present & pages.get(key, 0)
            if now != present:
                _set(pages_W, present & ~now, depth)
                present = now
                if not now:
                    break
            depth += 1
            if (alive := tails.get(key, 0) & present) != 0:
                _set(tail_W, alive, depth)
        _set(pages_W, present, depth)
        store_pages, store_tail = 0, 0
        if self._store is not None:
            store_pages = self._store.reach(keys)
            store_tail = self._store.deepest_tail(keys[:store_pages])
        return Found(pages_W=pages_W, tail_W=tail_W, store_pages=store_pages, store_tail=store_tail)

    def memory_bytes(self) -> int:
        """Of the tables with their keys and masks."""
        entry = sys.getsizeof(b"" * 16) + 16 + sys.getsizeof(1)
        tables = sys.getsizeof(self._pages) + sys.getsizeof(self._tails)
        return tables + entry * (len(self._pages) + len(self._tails))


def _set(depth_W: np.ndarray[tuple[int, ...], np.dtype[np.int32]], mask: int, depth: int) -> None:
    while mask:
        lowest = mask & -mask
        depth_W[lowest.bit_length() - 1] = depth
        mask ^= lowest

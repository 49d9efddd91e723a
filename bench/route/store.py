"""A simulated store that all workers share, as Redis is one: pages and tails under one budget of bytes, least recently
used first; and one worker's link to it.

`bench.route.fleet` owns the store of a race and says when what was written is there; each `bench.route.worker` has a
link. Neither reads a clock. Asking what is there is free and no use of it; reading and writing are uses.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

from bench.route.trace import BLOCK_PAGES, Request
from kvstore.keys import PageKey
from kvstore.shadow_radix import Costs
from rorqual.performance import PerformanceModel

StoreItem = NewType("StoreItem", bytes)
"""What stands for a page (its key) or for the tail behind it (its key and one byte more)."""

STAGED_SECONDS_MAX = 2.0
"""Of reading, and of writing, that a worker may have begun: bounds the host memory that waits for it. What is beyond is
computed, or not written."""


class StoreWrite(enum.Enum):
    """When a worker writes what the store lacks."""

    PROMPT_END = "prompt_end"  # pages and new tails of a prompt, when it has been computed
    EVICTION = "eviction"  # what its own cache gives up


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Its speed is part of the performance model: the router predicts with it.

    Besides the tails that a worker keeps (ends and branches), it may take some for the store alone, written with the
    prompt: where another prompt may part from this one for the first time. In Mooncake's traces that is one block
    before the end more often than anywhere else, and elsewhere a tail every 16 pages saves most of a rebuild. The LRU
    drops those that nobody used.
    """

    budget_bytes: int
    write: StoreWrite = StoreWrite.PROMPT_END
    tail_before_end: int = BLOCK_PAGES  # pages; 0: none
    tails_every: int = 16  # pages, counted back from the end; 0: none
    tails_max: int = (
        8  # of one prompt for the store alone, deepest first: each takes a record until it is written
    )

    def extra_tails(self, end: int) -> tuple[int, ...]:
        """Depths of the tails for the store alone, of a prompt that ends at depth `end`."""
        depths = {end - self.tail_before_end} if self.tail_before_end else set[int]()
        if self.tails_every:
            depths.update(range(end - self.tails_every, 0, -self.tails_every))
        return tuple(sorted((depth for depth in depths if depth > 0), reverse=True))


def page_item(key: PageKey) -> StoreItem:
    return StoreItem(key)


def tail_item(key: PageKey) -> StoreItem:
    return StoreItem(key + b"t")


class SharedStore:
    """Exact LRU. Pages are single values: one may be there without those before it, and serves nobody meanwhile."""

    def __init__(self, *, budget_bytes: int, costs: Costs) -> None:
        self._budget_bytes = budget_bytes
        self._page_bytes, self._tail_bytes = costs.page_bytes, costs.tail_bytes
        self._items: OrderedDict[StoreItem, int] = OrderedDict()  # bytes of each, least recently used first
        self.num_bytes = 0

    def __contains__(self, item: StoreItem) -> bool:
        return item in self._items

    def reach(self, keys: Sequence[PageKey], *, first: int = 0) -> int:
        """The depth up to which all pages behind `first` are there; `first` when none is."""
        depth, items = first, self._items
        while depth < len(keys) and keys[depth] in items:
            depth += 1
        return depth

    def deepest_tail(self, keys: Sequence[PageKey]) -> int:
        """The deepest of these boundaries that has a tail, 0 for none."""
        items = self._items
        return next((depth for depth in range(len(keys), 0, -1) if keys[depth - 1] + b"t" in items), 0)

    def touch(self, items: Iterable[StoreItem]) -> list[StoreItem]:
        """A use of each, in this order. Returns those that are not there."""
        missing: list[StoreItem] = []
        for item in items:
            if item in self._items:
                self._items.move_to_end(item)
            else:
                missing.append(item)
        return missing

    def put(self, items: Iterable[StoreItem]) -> None:
        """Write in this order; the least recently used go for it. What is larger than all room is not taken."""
        for item in items:
            if item in self._items:
                self._items.move_to_end(item)
                continue
            num_bytes = self.size(item)
            if num_bytes > self._budget_bytes:
                continue
            while self.num_bytes + num_bytes > self._budget_bytes:
                self.num_bytes -= self._items.popitem(last=False)[1]
            self._items[item] = num_bytes
            self.num_bytes += num_bytes

    def size(self, item: StoreItem) -> int:
        return self._page_bytes if len(item) == PAGE_KEY_BYTES else self._tail_bytes


PAGE_KEY_BYTES = 16


class StoreLink:
    """One worker's reads and writes: each kind one behind the other, at the speed of the model."""

    def __init__(self, store: SharedStore, config: StoreConfig, model: PerformanceModel) -> None:
        self.store = store
        self.config = config
        self.num_refused = 0  # reads and writes that were not made: too much was on its way
        self._model = model
        self._reading_until = 0.0
        self._writing_until = 0.0
        self._writing: set[StoreItem] = set()

    def read_seconds(self, now: float, num_bytes: int) -> float:
        """Until so many bytes would be here, behind the reads that have begun. Infinity: too much is on its way."""
        ahead = max(self._reading_until - now, 0.0)
        if ahead > STAGED_SECONDS_MAX:
            self.num_refused += 1
            return float("inf")
        return ahead + float(self._model.store_seconds(num_bytes))

    def begin_read(self, now: float, items: Iterable[StoreItem], *, seconds: float) -> float:
        """`seconds` are those that `read_seconds` has just told. Returns when they are here."""
        missing = self.store.touch(items)
        assert not missing, "what is read is there: the caller has just looked"
        self._reading_until = now + seconds - self._model.store.latency_seconds
        return now + seconds

    def begin_write(self, now: float, items: Iterable[StoreItem]) -> tuple[float, list[StoreItem]] | None:
        """Use those that are there, and begin to write those that are not. Returns when they will be there, and
        which; None when there is nothing to write or no room to stage it."""
        missing = [item for item in self.store.touch(items) if item not in self._writing]
        if not missing:
            return None
        ahead = max(self._writing_until - now, 0.0)
        if ahead > STAGED_SECONDS_MAX:
            self.num_refused += 1
            return None
        num_bytes = sum(self.store.size(item) for item in missing)
        self._writing.update(missing)
        self._writing_until = now + ahead + num_bytes / self._model.store.bytes_per_second
        return self._writing_until + self._model.store.latency_seconds, missing

    def written(self, items: Iterable[StoreItem]) -> None:
        self._writing.difference_update(items)


def lru_hit_rate(requests: Iterable[Request], *, num_pages: int) -> float:
    """The share of full prompt pages that one LRU cache of so many pages has: given every prompt's pages in order of
    arrival, each there as soon as it was asked for, without tails. A bound to compare the store with."""
    cache: OrderedDict[PageKey, None] = OrderedDict()
    num_asked, num_hits = 0, 0
    for request in requests:
        for key in request.keys:
            num_asked += 1
            if key in cache:
                num_hits += 1
                cache.move_to_end(key)
                continue
            if len(cache) == num_pages:
                cache.popitem(last=False)
            cache[key] = None
    return num_hits / max(num_asked, 1)

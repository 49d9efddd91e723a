"""What goes first: what pages and tails are worth, and queues that hand out the least. Called by `index`, and by the
index of the tier below (`kvstore.tiers.host_index`), which knows what they were worth when they left this one.

Two orders. LRU: by last use alone. VALUE: by computing saved per byte,

    value = uses x pages of computing saved / bytes in pages x exp(-age / tau)

with age since the last use. The exponential makes the order constant in time: least value first is least
`last use + tau x ln(uses x saved / bytes)` first, so a priority changes only when something happens to its item. Ages
and tau are counted in operations of the index, and tau is a share of how long a page stays unused before it is evicted,
so that it fits every size of cache. A small share leaves LRU with a preference; a large one keeps for ever what was
used often.

The unit of saving is one page of computing for the bytes of one page, so that pages and tails share one scale.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from kvstore.shadow_radix.node import Node, Tail, TailKind


class Queued(Protocol):
    entry: int  # its live entry in the queue, for the queue only; 0: none


Item = TypeVar("Item", bound=Queued)

# Chosen on Mooncake's conversation and synthetic traces, prompts sent by session to eight caches of the bytes of 8,000
# Flash pages, tails at ends and branches: pages not computed rise from 32.7 to 33.1 % and from 62.6 to 63.3 % against
# LRU. Shares from 0.1 to 0.3 gain on both; 0.5 gains nothing on conversations any more, and 1 loses much there.
TAU_SHARE = 0.3
TAU_GAIN = 0.01
INNER_FACTOR = 0.3
"""Of a tail that one path goes on from: that path's next turn resumes deeper."""
TAILLESS_FACTOR = 0.05


class EvictionOrder(Enum):
    LRU = "lru"
    VALUE = "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What keeping costs, and what a tail can save at most."""

    page_bytes: int
    tail_bytes: int
    rebuild_pages: int  # pages of computing that make a lost tail again from pages alone

    def __post_init__(self) -> None:
        assert self.page_bytes > 0
        assert self.tail_bytes > 0
        assert self.rebuild_pages > 0


class EvictionQueue(Generic[Item]):
    """Items by priority. What was used since it was queued is queued anew when it comes up, so a use costs nothing.

    An item has at most one live entry; entries of others are dropped when they come up, or all at once when they are
    the majority: beyond a few the queue is never longer than twice its items.
    """

    def __init__(self, priority: Callable[[Item], float]) -> None:
        self._priority = priority
        self._heap: list[tuple[float, int, Item]] = []
        self._num_live = 0
        self._num_made = 0  # entries ever; orders what is equal, first in first out

    def __len__(self) -> int:
        return self._num_live

    @property
    def num_entries(self) -> int:
        """Live ones and those not dropped yet."""
        return len(self._heap)

    def add(self, item: Item) -> None:
        """Queue it, or queue it anew by what it is worth now."""
        if not item.entry:
            self._num_live += 1
        self._num_made += 1
        item.entry = self._num_made
        heapq.heappush(self._heap, (self._priority(item), item.entry, item))
        self._compact()

    def remove(self, item: Item) -> None:
        """It may not be evicted now. Nothing happens when it is not queued."""
        if item.entry:
            item.entry = 0
            self._num_live -= 1
            self._compact()

    def first(self) -> tuple[float, Item] | None:
        """The item to evict first and its priority; it stays queued."""
        heap = self._heap
        while heap:
            queued, entry, item = heap[0]
            if item.entry != entry:
                heapq.heappop(heap)
                continue
            priority = self._priority(item)
            if priority <= queued:
                return queued, item
            heapq.heapreplace(heap, (priority, entry, item))
        return None

    def items(self) -> list[Item]:
        return [item for _, entry, item in self._heap if item.entry == entry]

    def _compact(self) -> None:
        if len(self._heap) > 2 * self._num_live + 64:
            self._heap = [row for row in self._heap if row[2].entry == row[1]]
            heapq.heapify(self._heap)


class Ageing:
    """The clock of one index, and what age leaves of what its items are worth."""

    def __init__(self, order: EvictionOrder) -> None:
        self._order = order
        self._tau = 0.0
        self.clock = 0  # operations so far

    def used(self) -> None:
        self.clock += 1

    def evicted(self, stamp: int) -> None:
        """A page goes that was last used then: how long it was not used tells how long pages stay."""
        if self._order is EvictionOrder.VALUE:
            self._tau += TAU_GAIN * (TAU_SHARE * (self.clock - stamp) - self._tau)

    def priority(self, stamp: int, value: float) -> float:
        """Of what was last used then. `value` is above 0: uses x pages of computing saved / bytes in pages. Lower goes
        first."""
        return stamp + self._tau * math.log(value) if self._tau else stamp


class Valuation(Ageing):
    """The priorities of what is in one index."""

    def __init__(self, order: EvictionOrder, costs: Costs) -> None:
        super().__init__(order)
        self._tail_pages = costs.tail_bytes / costs.page_bytes
        self._rebuild_pages = costs.rebuild_pages

    def page_priority(self, node: Node) -> float:
        """Of a leaf, which takes its tail along."""
        tail = node.tail
        stamp = node.stamp if tail is None else max(node.stamp, tail.stamp)
        return self.priority(stamp, (1 + node.hits) * self.page_worth(node)) if self._tau else stamp

    def tail_priority(self, tail: Tail) -> float:
        if not self._tau:
            return tail.stamp
        return self.priority(tail.stamp, (1 + tail.hits) * self.tail_worth(tail))

    def page_worth(self, node: Node) -> float:
        """Pages of computing saved for its bytes in pages, of a leaf with its tail."""
        if node.tail is not None:
            return (1 + self._tail_saves(node)) / (1 + self._tail_pages)
        if self._gap(node) >= self._rebuild_pages:
            return 1.0  # itself, in a rebuild
        return TAILLESS_FACTOR  # from the tail before, or the start, all is computed with it or without

    def tail_worth(self, tail: Tail) -> float:
        """Pages of computing saved for its bytes in pages."""
        node = tail.node
        worth = self._tail_saves(node) / self._tail_pages
        if node.num_children and not node.is_branch and tail.kind is not TailKind.BRANCH:
            worth *= INNER_FACTOR
        return worth

    def _tail_saves(self, node: Node) -> int:
        """Pages of computing: from the tail before, from the start, or by a rebuild, whichever is least. At least 1."""
        assert node.parent is not None
        return min(self._gap(node.parent) + 1, self._rebuild_pages)

    def _gap(self, node: Node) -> int:
        """Pages from `node` back to a tail or the start, at most what a rebuild takes."""
        gap = 0
        while node.tail is None and gap < self._rebuild_pages and node.parent is not None:
            node = node.parent
            gap += 1
        return gap

"""What goes first: priorities of pages and tails, and queues that hand out the lowest. Called by `index` only.

Two orders. LRU: by last use. VALUE: what saves least computing per byte goes first, by the GreedyDual-Size-Frequency
rule (Young 1994; Cao and Irani 1997; Cherkasova 1998): priority = clock at the last use + uses x saved / bytes, where
the clock is the priority of the last victim. What is worth little must be used again soon to stay; and since the clock
rises, nothing stays for ever because it was worth much once.

The unit of saving is one page of computing for the bytes of one page, so that pages and tails share one scale.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from kvstore.shadow_radix.node import Node, Tail, TailKind

Item = TypeVar("Item", Node, Tail)


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
    the majority: the queue is never longer than twice its items.
    """

    def __init__(self, priority: Callable[[Item], float]) -> None:
        self._priority = priority
        self._heap: list[tuple[float, int, Item]] = []
        self._num_live = 0
        self._num_entries = 0  # ever made; orders what is equal, first in first out

    def __len__(self) -> int:
        return self._num_live

    def add(self, item: Item) -> None:
        """Queue it, or queue it anew by what it is worth now."""
        if not item.entry:
            self._num_live += 1
        self._num_entries += 1
        item.entry = self._num_entries
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


class Valuation:
    """The eviction clock and what things are worth by it, for one index."""

    def __init__(self, order: EvictionOrder, costs: Costs) -> None:
        self._is_lru = order is EvictionOrder.LRU
        self._tail_pages = costs.tail_bytes / costs.page_bytes
        self._rebuild_pages = costs.rebuild_pages
        self.clock: float = 0

    def used(self) -> None:
        """By uses LRU's clock advances."""
        if self._is_lru:
            self.clock += 1

    def evicted(self, priority: float) -> None:
        """By evictions that of VALUE."""
        if not self._is_lru:
            self.clock = max(self.clock, priority)

    def page_priority(self, node: Node) -> float:
        """Of a leaf, which takes its tail along."""
        if self._is_lru:
            return node.stamp
        uses = 1 + node.hits
        if node.tail is None:
            return node.stamp + uses * self._page_saves(node)
        saved = (1 + self._tail_saves(node)) / (1 + self._tail_pages)
        return max(node.stamp, node.tail.stamp) + uses * saved

    def tail_priority(self, tail: Tail) -> float:
        if self._is_lru:
            return tail.stamp
        uses = 1.0 + tail.hits
        if tail.node.num_children and tail.kind is not TailKind.BRANCH and not tail.node.is_branch:
            uses *= _INNER  # the prompt went on from here: its next turn resumes deeper
        return tail.stamp + uses * self._tail_saves(tail.node) / self._tail_pages

    def _tail_saves(self, node: Node) -> int:
        """Pages of computing: from the tail before, from the start, or by a rebuild, whichever is least."""
        return self._gap(node.parent) + 1

    def _page_saves(self, node: Node) -> float:
        """A leaf without a tail saves its own page in a rebuild; where none pays, nothing."""
        return 1.0 if self._gap(node) >= self._rebuild_pages else 0.0

    def _gap(self, node: Node | None) -> int:
        """Pages from `node` back to a tail or the start, at most what a rebuild takes."""
        gap = 0
        while (
            node is not None and node.parent is not None and node.tail is None and gap < self._rebuild_pages
        ):
            node = node.parent
            gap += 1
        return gap


_INNER = 0.1

"""The index: a hash map of page keys to nodes of a tree, pins on them, and eviction. Pure; one caller, no threads.

A key stands for a whole prefix, so a look-up needs no walk through token ids: one dictionary access per page. Pages go
leaf first, therefore every page present has all pages before it, and pinning the deepest holds a whole path.

Ids are the caller's. It hands one over with each page or tail that is taken in, and gets it back exactly once: from
an eviction, or at once when the index has the same content already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvstore.keys import PageKey
from kvstore.shadow_radix.changes import ChangeLog, Changes
from kvstore.shadow_radix.eviction import Costs, EvictionOrder, EvictionQueue, Valuation
from kvstore.shadow_radix.node import Match, Node, Pin, Tail, TailKind
from rorqual.feed import ABSENT, HOST_PAGE, HOST_TAIL, PAGE, TAIL
from rorqual.ids import PageId, RecordId

_ROOT_KEY = PageKey(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictedPage:
    """What was known of it: for a tier below, which may keep it."""

    page: PageId
    key: PageKey
    parent: PageKey  # key of the page before it; empty: it was the first
    hits: int
    worth: float  # pages of computing saved for its bytes in pages, with its tail


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictedTail:
    record: RecordId
    key: PageKey  # of the page before it
    kind: TailKind
    hits: int
    worth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """Ids that are the caller's again, in the order in which they went."""

    page_items: tuple[EvictedPage, ...] = ()
    tail_items: tuple[EvictedTail, ...] = ()

    @property
    def pages(self) -> tuple[PageId, ...]:
        return tuple(item.page for item in self.page_items)

    @property
    def tails(self) -> tuple[RecordId, ...]:
        return tuple(item.record for item in self.tail_items)


class ShadowRadix:
    """The prefixes one worker keeps. Every call is O(1) for each page it names, eviction O(log pages)."""

    def __init__(
        self,
        *,
        costs: Costs,
        order: EvictionOrder = EvictionOrder.VALUE,
        num_changes_max: int = 1 << 16,
    ) -> None:
        """`num_changes_max`: keys that may change between two `take_changes`; beyond, the feed starts over. 0: no
        feed."""
        self._costs = costs
        self._value = Valuation(order, costs)
        self._root = Node(_ROOT_KEY, None, PageId(-1), 0)
        self._nodes: dict[PageKey, Node] = {}
        self._leaves = EvictionQueue[Node](self._value.page_priority)  # childless and not held
        self._tails = EvictionQueue[Tail](self._value.tail_priority)  # not pinned
        self._log = ChangeLog(num_keys_max=num_changes_max)
        self._below: Callable[[PageKey], tuple[bool, bool]] = _nothing
        self._num_tails = 0
        self._num_held = 0
        self._num_tails_pinned = 0
        self._num_pins = 0

    @property
    def num_pages(self) -> int:
        return len(self._nodes)

    @property
    def num_tails(self) -> int:
        return self._num_tails

    @property
    def num_pins(self) -> int:
        """Not released yet."""
        return self._num_pins

    @property
    def num_pages_pinned(self) -> int:
        """Pages on pinned paths; all others can be evicted, though leaf first."""
        return self._num_held

    @property
    def num_pages_evictable(self) -> int:
        return len(self._nodes) - self._num_held

    @property
    def num_tails_evictable(self) -> int:
        return self._num_tails - self._num_tails_pinned

    @property
    def num_bytes(self) -> int:
        """Of pages and tails together."""
        return len(self._nodes) * self._costs.page_bytes + self._num_tails * self._costs.tail_bytes

    def join(self, below: Callable[[PageKey], tuple[bool, bool]]) -> None:
        """From now on changes are those of this index and of host memory below it together: what either has is there.
        `below` says whether that tier has a key's page, and its tail; before it changes it calls `note`."""
        self._below = below

    def note(self, key: PageKey) -> None:
        """What the tier below has of this key is about to change."""
        self._log.note_page(key, self.flags(key))

    def flags(self, key: PageKey) -> int:
        """For the feed: of a key's page and tail, here or below; a tail counts with its page alone. What is in both is
        here."""
        node = self._nodes.get(key)
        if node is not None and node.tail is not None:
            return PAGE | TAIL
        has_page, has_tail = self._below(key)
        if node is None:
            if not has_page:
                return ABSENT
            return PAGE | HOST_PAGE | TAIL | HOST_TAIL if has_tail else PAGE | HOST_PAGE
        return PAGE | TAIL | HOST_TAIL if has_tail else PAGE

    def has_page(self, key: PageKey) -> bool:
        """Here, not below."""
        return key in self._nodes

    def has_tail(self, key: PageKey) -> bool:
        """Here, not below."""
        node = self._nodes.get(key)
        return node is not None and node.tail is not None

    def look(self, key: PageKey) -> tuple[EvictedPage, EvictedTail | None] | None:
        """A page and its tail, as they would be evicted now. Changes nothing. None: it is not here."""
        node = self._nodes.get(key)
        if node is None:
            return None
        return self._left(node), None if node.tail is None else self._tail_left(node.tail)

    def match(self, keys: Sequence[PageKey]) -> Match:
        """What is there of the prefix that these keys, from its first page on, stand for. Changes nothing."""
        get = self._nodes.get
        num_pages = 0
        tails: list[int] = []
        last = self._root
        for key in keys:
            node = get(key)
            if node is None:
                break
            num_pages += 1
            if node.tail is not None:
                tails.append(num_pages)
            last = node
        is_branch = last.num_children > 0 and num_pages > 0
        return Match(num_pages=num_pages, tail_depths=tuple(tails), is_branch=is_branch)

    def num_pages_to_hold(self, keys: Sequence[PageKey], *, num_pages: int) -> int:
        """Pages that can be evicted now, and could not with a pin on the first `num_pages` of these keys."""
        node = self._nodes[keys[num_pages - 1]] if num_pages else self._root
        count = 0
        while node is not self._root and not node.num_holds:
            count += 1
            assert node.parent is not None
            node = node.parent
        return count

    def num_pages_let_go(self, pin: Pin) -> int:
        """Pages that cannot be evicted now, and could without this pin."""
        node, count = pin.node, 0
        assert node is not None, "a released pin holds nothing"
        while node is not self._root and node.num_holds == 1:
            count += 1
            assert node.parent is not None
            node = node.parent
        return count

    def is_tail_pinned(self, key: PageKey) -> bool:
        """Of a key that has a tail."""
        tail = self._nodes[key].tail
        assert tail is not None, "no tail at this key"
        return tail.num_pins > 0

    def pin(self, keys: Sequence[PageKey], *, num_pages: int, tail_depth: int = 0) -> Pin:
        """Hold the first `num_pages` pages and the tail at `tail_depth` (0: none); a `match` has just shown them.

        Counts as a use of all of them. With `num_pages` 0 the pin is where a first page can be put.
        """
        assert 0 <= tail_depth <= num_pages <= len(keys)
        self._value.used()
        stamp = self._value.clock
        node = self._root
        pages: list[PageId] = []
        tail: Tail | None = None
        for depth in range(1, num_pages + 1):
            node = self._nodes[keys[depth - 1]]
            node.stamp = stamp
            node.hits += 1
            pages.append(node.page)
            if depth == tail_depth:
                tail = node.tail
                assert tail is not None, f"no tail at depth {depth}"
        assert node.depth == num_pages, "keys are not one path"
        if tail is not None:
            self._pin_tail(tail)
        self._hold(node)
        self._num_pins += 1
        return Pin(node, pages, tail)

    def extend(self, pin: Pin, key: PageKey, page: PageId) -> PageId:
        """Put the page behind the pinned path and move the pin to it. Returns the id that stands for the key now.

        When that is another one, the page was there already and the id given stays the caller's.
        """
        parent = pin.node
        assert parent is not None, "a released pin is extended"
        self._value.used()
        node = self._nodes.get(key)
        if node is None:
            self._log.note_page(key, self.flags(key))
            node = Node(key, parent, page, self._value.clock)
            self._nodes[key] = node
            parent.num_children += 1
            if parent.num_children > 1:
                parent.is_branch = True
            tail = parent.tail
            if tail is not None and tail.entry:
                self._tails.add(tail)  # worth less now that the path goes on
        else:
            assert node.parent is parent, "a key has two parents"
            node.stamp = self._value.clock
            node.hits += 1
        self._hold(node)
        self._unhold(parent)
        pin.node = node
        pin.pages.append(node.page)
        return node.page

    def insert_tail(self, key: PageKey, record: RecordId, *, kind: TailKind) -> RecordId | None:
        """Keep a record as the tail behind this key's page. Returns the id that stays the caller's: None when it was
        taken; the one given when the page is gone, or has a tail already, which is as good: equal keys, equal bytes."""
        node = self._nodes.get(key)
        if node is None:
            return record
        self._value.used()
        if node.tail is not None:
            node.tail.kind = max(node.tail.kind, kind)
            node.tail.stamp = self._value.clock
            return record
        self._log.note_tail(key, self.flags(key))
        node.tail = Tail(node, record, kind, self._value.clock)
        self._num_tails += 1
        self._tails.add(node.tail)
        return None

    def release_tail(self, pin: Pin) -> None:
        """The tail has been read; the pages stay pinned. Nothing happens when the pin holds none."""
        tail, pin.pinned_tail = pin.pinned_tail, None
        if tail is None:
            return
        tail.num_pins -= 1
        if tail.num_pins == 0:
            self._num_tails_pinned -= 1
            tail.stamp = self._value.clock
            self._tails.add(tail)

    def release(self, pin: Pin) -> None:
        """Hold nothing any more. Counts as a use of the deepest page and of the tail."""
        node, pin.node = pin.node, None
        assert node is not None, "a pin is released twice"
        self._value.used()
        self.release_tail(pin)
        self._num_pins -= 1
        node.stamp = self._value.clock
        self._unhold(node)

    def evict_pages(self, count: int) -> Evicted:
        """Up to `count` pages, with their tails: fewer when the others are pinned."""
        pages: list[EvictedPage] = []
        tails: list[EvictedTail] = []
        while len(pages) < count and (first := self._leaves.first()) is not None:
            self._drop_page(first[1], pages, tails)
        return Evicted(page_items=tuple(pages), tail_items=tuple(tails))

    def evict_tails(self, count: int) -> Evicted:
        """Up to `count` tails; their pages stay."""
        tails: list[EvictedTail] = []
        while len(tails) < count and (first := self._tails.first()) is not None:
            tails.append(self._drop_tail(first[1]))
        return Evicted(tail_items=tuple(tails))

    def evict_cheapest(self, num_bytes: int) -> Evicted:
        """Pages and tails, the least worth for its bytes first, until so many bytes are free; fewer when the rest is
        pinned. For a budget that both share."""
        pages: list[EvictedPage] = []
        tails: list[EvictedTail] = []
        page_bytes, tail_bytes = self._costs.page_bytes, self._costs.tail_bytes
        while len(pages) * page_bytes + len(tails) * tail_bytes < num_bytes:
            leaf, tail = self._leaves.first(), self._tails.first()
            if tail is not None and (leaf is None or tail[0] < leaf[0]):
                tails.append(self._drop_tail(tail[1]))
            elif leaf is not None:
                self._drop_page(leaf[1], pages, tails)
            else:
                break
        return Evicted(page_items=tuple(pages), tail_items=tuple(tails))

    def take_changes(self) -> Changes:
        """What is different from the last time this was called; at first from an empty index."""
        return self._log.take(self.flags)

    def contents(self) -> Iterator[tuple[PageKey, bool]]:
        """Every key with a page here and whether it has a tail here, parents before children. The index must not change
        meanwhile."""
        return ((key, node.tail is not None) for key, node in self._nodes.items())

    def check(self) -> None:
        """Assert that everything adds up. O(pages): for tests."""
        children = dict.fromkeys(self._nodes.values(), 0)
        holds = dict.fromkeys(self._nodes.values(), 0)
        for key, node in self._nodes.items():
            assert node.key == key
            parent = node.parent
            assert parent is not None
            assert node.depth == parent.depth + 1
            if parent is not self._root:
                assert self._nodes.get(parent.key) is parent, "a page is orphaned"
                children[parent] += 1
                holds[parent] += node.num_holds > 0
        for node, count in children.items():
            assert node.num_children == count
            assert node.num_holds >= holds[node]
            assert bool(node.entry) == (count == 0 and node.num_holds == 0), (
                "queued, or not, against the rule"
            )
            assert node.tail is None or node.tail.node is node
            assert node.tail is None or bool(node.tail.entry) == (node.tail.num_pins == 0)
        tails = [node.tail for node in self._nodes.values() if node.tail is not None]
        assert self._num_tails == len(tails)
        assert self._num_tails_pinned == sum(tail.num_pins > 0 for tail in tails)
        assert self._num_held == sum(node.num_holds > 0 for node in self._nodes.values())
        assert (
            len(self._leaves)
            == len(self._leaves.items())
            == sum(node.entry > 0 for node in self._nodes.values())
        )
        assert len(self._tails) == len(self._tails.items()) == sum(tail.entry > 0 for tail in tails)
        assert len({node.page for node in self._nodes.values()}) == len(self._nodes), (
            "a page id is owned twice"
        )
        assert len({tail.record for tail in tails}) == len(tails), "a record id is owned twice"

    def _hold(self, node: Node) -> None:
        """One pin more ends here. Walks up only through pages that nobody held."""
        step: Node | None = node
        while step is not None:
            step.num_holds += 1
            if step.num_holds > 1 or step is self._root:
                return
            self._num_held += 1
            self._leaves.remove(step)
            step = step.parent

    def _unhold(self, node: Node) -> None:
        step: Node | None = node
        while step is not None:
            assert step.num_holds > 0
            step.num_holds -= 1
            if step.num_holds or step is self._root:
                return
            self._num_held -= 1
            if not step.num_children:
                self._leaves.add(step)
            step = step.parent

    def _pin_tail(self, tail: Tail) -> None:
        tail.num_pins += 1
        tail.hits += 1
        tail.stamp = self._value.clock
        if tail.num_pins == 1:
            self._num_tails_pinned += 1
            self._tails.remove(tail)

    def _drop_page(self, node: Node, pages: list[EvictedPage], tails: list[EvictedTail]) -> None:
        self._value.evicted(node.stamp)
        parent = node.parent
        assert parent is not None
        assert not node.num_children
        assert not node.num_holds
        self._leaves.remove(node)
        pages.append(self._left(node))
        if node.tail is not None:
            tails.append(self._drop_tail(node.tail))
        self._log.note_page(node.key, self.flags(node.key))
        del self._nodes[node.key]
        parent.num_children -= 1
        parent.stamp = max(parent.stamp, node.stamp)
        if not parent.num_children and not parent.num_holds and parent is not self._root:
            self._leaves.add(parent)

    def _drop_tail(self, tail: Tail) -> EvictedTail:
        assert not tail.num_pins, "a pinned tail is evicted"
        self._log.note_tail(tail.node.key, PAGE | TAIL)
        left = self._tail_left(tail)
        self._tails.remove(tail)
        tail.node.tail = None
        self._num_tails -= 1
        if tail.node.entry:
            self._leaves.add(tail.node)  # worth less now that nothing resumes behind it
        return left

    def _left(self, node: Node) -> EvictedPage:
        assert node.parent is not None
        return EvictedPage(
            page=node.page,
            key=node.key,
            parent=node.parent.key,
            hits=node.hits,
            worth=self._value.page_worth(node),
        )

    def _tail_left(self, tail: Tail) -> EvictedTail:
        return EvictedTail(
            record=tail.record,
            key=tail.node.key,
            kind=tail.kind,
            hits=tail.hits,
            worth=self._value.tail_worth(tail),
        )


def _nothing(key: PageKey) -> tuple[bool, bool]:
    """There is no tier below."""
    del key
    return False, False

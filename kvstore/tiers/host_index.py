"""Which pages and tails a worker keeps in host memory, and what goes first. Pure, no torch; one caller, no threads.

`engine.worker.tiers.host_tier` owns one, on behalf of a worker's scheduler. It is told of everything that the device's
index (`kvstore.shadow_radix`) gives up, hands out the id of a page or a record in host memory for what is worth
keeping, and names it again by key. It never sees a byte: the copies are made by the rank, in the order of its plans.

Keys stand in flat maps, since what is here of a path may begin anywhere on it: the pages before are on the device, or
gone. The device gives up the deepest page of a path first, so pages come here before those they stand on; they leave
in that order too, since a page leaves only when none that follows on it is here. What came from here to the device
stays: when the device gives it up again, nothing needs to be copied. A tail is of use while its page is here or on the
device, and goes with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.keys import PageKey
from kvstore.shadow_radix import Ageing, EvictedPage, EvictedTail, EvictionOrder, EvictionQueue, TailKind
from kvstore.store.contract import NO_TENANT, TenantLabel
from rorqual.ids import HostPageId, HostRecordId


class Above(Protocol):
    """The tier above, which has pages of the same keys: a worker's device."""

    def has_page(self, key: PageKey) -> bool: ...

    def note(self, key: PageKey) -> None:
        """What is below of this key is about to change."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class HostPage:
    """One page. Only the index changes it."""

    key: PageKey
    parent: PageKey
    page: HostPageId
    digests: tuple[int, ...] | None  # one for each paged component; None: they are not known
    stamp: int  # the index's clock when the device last gave it up, or it was last used from here
    hits: int
    worth: float  # pages of computing saved for its bytes in pages
    tenant: TenantLabel = NO_TENANT  # whose prompts it is of; empty: unknown
    num_pins: int = 0
    entry: int = 0  # its live entry in the eviction queue; 0: none


@dataclass(slots=True, kw_only=True, eq=False)
class HostTail:
    """One tail. Only the index changes it."""

    key: PageKey  # of the page before it
    record: HostRecordId
    kind: TailKind
    num_bytes: int  # of the record
    digest: int  # of these bytes, unsigned 64 bits
    stamp: int
    hits: int
    worth: float
    tenant: TenantLabel = NO_TENANT
    num_pins: int = 0
    entry: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMatch:
    """What is here of one path. Depths are in pages from the start of the path."""

    num_pages: int  # that follow on one another from the page asked for
    tail_depths: tuple[int, ...]  # ascending


@dataclass(slots=True, kw_only=True)
class HostCounts:
    """Since the worker started."""

    pages_taken: int = 0  # from the device, by a copy
    tails_taken: int = 0
    pages_read: int = 0  # from a store
    tails_read: int = 0
    pages_kept: int = 0  # given up by the device while they were here already: nothing was copied
    tails_kept: int = 0
    pages_refused: int = 0  # worth less than all that is here, or all that is here is in use
    tails_refused: int = 0
    pages_evicted: int = 0
    tails_evicted: int = 0
    pages_hit: int = 0  # gone back to the device
    tails_hit: int = 0


class HostIndex:
    """Bounded by the pages and records there are. Every call is O(1) for each key it names, eviction O(log items)."""

    def __init__(
        self,
        *,
        num_pages: int,
        num_records: int,
        above: Above,
        order: EvictionOrder = EvictionOrder.VALUE,
        first_id: int = 0,
    ) -> None:
        """Ids of pages and of records begin at `first_id`."""
        self.counts = HostCounts()
        self._above = above
        self._ages = Ageing(order)
        self._pages: dict[PageKey, HostPage] = {}
        self._tails: dict[PageKey, HostTail] = {}
        self._num_following: Counter[PageKey] = (
            Counter()
        )  # pages here that follow on a key, which may be elsewhere
        self._page_ids = _Ids(first_id, num_pages)
        self._record_ids = _Ids(first_id, num_records)
        self._reserved_pages: set[HostPageId] = set()  # of nobody: somebody writes into them
        self._reserved_records: set[HostRecordId] = set()
        self._leaves = EvictionQueue[HostPage](self._priority)  # not pinned, and none here follows on them
        self._loose = EvictionQueue[HostTail](self._priority)  # not pinned

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def num_tails(self) -> int:
        return len(self._tails)

    @property
    def clock(self) -> int:
        """Grows with everything that comes here or is used from here."""
        return self._ages.clock

    def state(self, key: PageKey) -> tuple[bool, bool]:
        """Whether the page of this key is here, and its tail."""
        return key in self._pages, key in self._tails

    def worth(self, key: PageKey) -> float | None:
        """Of the page of this key; None: it is not here."""
        page = self._pages.get(key)
        return None if page is None else page.worth

    def pages(self) -> Iterator[HostPage]:
        return iter(self._pages.values())

    def tails(self) -> Iterator[HostTail]:
        return iter(self._tails.values())

    def contents(self) -> Iterator[tuple[PageKey, bool]]:
        """Every page that is here, and whether its tail is."""
        for key in self._pages:
            yield key, key in self._tails

    def match(self, keys: Sequence[PageKey], first: int) -> HostMatch:
        """What is here of the path that these keys stand for: pages from number `first` on, as far as they follow on
        one another, and tails behind any page up to the last of those. Changes nothing."""
        end = first
        while end < len(keys) and keys[end] in self._pages:
            end += 1
        tails = tuple(depth for depth in range(1, end + 1) if keys[depth - 1] in self._tails)
        return HostMatch(num_pages=end - first, tail_depths=tails)

    def put_page(
        self,
        left: EvictedPage,
        digests: tuple[int, ...] | None,
        tenant: TenantLabel = NO_TENANT,
        *,
        is_needed: bool = False,
    ) -> HostPageId | None:
        """The device has given up a page: where it is to be copied to. None: nowhere, since it is here already, or is
        worth too little, which one that is needed never is, or all that is here is in use."""
        self._ages.used()
        page = self._pages.get(left.key)
        if page is not None:
            self.counts.pages_kept += 1
            page.stamp, page.worth = self._ages.clock, left.worth
            page.hits += left.hits
            return None
        page = HostPage(
            key=left.key,
            parent=left.parent,
            page=HostPageId(-1),
            digests=digests,
            stamp=self._ages.clock,
            hits=left.hits,
            worth=left.worth,
            tenant=tenant,
        )
        if not self._page_ids.num_free and not self._make_room_for(page, is_needed=is_needed):
            self.counts.pages_refused += 1
            self._drop_orphan(left.key)
            return None
        self.counts.pages_taken += 1
        self._add_page(page, HostPageId(self._page_ids.take()))
        return page.page

    def put_tail(
        self, left: EvictedTail, *, num_bytes: int, digest: int, tenant: TenantLabel = NO_TENANT
    ) -> HostRecordId | None:
        """As `put_page`. Its page has been offered before, or is on the device still."""
        self._ages.used()
        tail = self._tails.get(left.key)
        if tail is not None:
            self.counts.tails_kept += 1
            tail.stamp, tail.worth = self._ages.clock, left.worth
            tail.kind = max(tail.kind, left.kind)
            tail.hits += left.hits
            return None
        tail = HostTail(
            key=left.key,
            record=HostRecordId(-1),
            kind=left.kind,
            num_bytes=num_bytes,
            digest=digest,
            stamp=self._ages.clock,
            hits=left.hits,
            worth=left.worth,
            tenant=tenant,
        )
        is_of_use = left.key in self._pages or self._above.has_page(left.key)
        if not is_of_use or (not self._record_ids.num_free and not self._make_room_for_tail(tail)):
            self.counts.tails_refused += 1
            return None
        self.counts.tails_taken += 1
        self._add_tail(tail, HostRecordId(self._record_ids.take()))
        return tail.record

    def touch(self, keys: Sequence[PageKey]) -> None:
        """Pages and tails that are here are about to be used."""
        self._ages.used()
        for key in keys:
            for item in (self._pages.get(key), self._tails.get(key)):
                if item is not None:
                    item.stamp = self._ages.clock

    def reserve_page(self) -> HostPageId | None:
        """A place of no page, for bytes from elsewhere: until `admit_page` or `give_back_page`. What is worth least
        goes for it. None: all that is here is in use."""
        if not self._page_ids.num_free:
            first = self._leaves.first()
            if first is None:
                return None
            self._drop_page(first[1])
        page = HostPageId(self._page_ids.take())
        self._reserved_pages.add(page)
        return page

    def admit_page(self, page: HostPage) -> bool:
        """The place it has, which was reserved, holds it now. False: it is here already, and the place free again."""
        if page.key in self._pages:
            self.give_back_page(page.page)
            return False
        self._ages.used()
        self._reserved_pages.remove(page.page)
        self.counts.pages_read += 1
        page.stamp = self._ages.clock
        self._add_page(page, page.page)
        return True

    def give_back_page(self, page: HostPageId) -> None:
        self._reserved_pages.remove(page)
        self._page_ids.give_back(page)

    def reserve_tail(self) -> HostRecordId | None:
        """As `reserve_page`."""
        if not self._record_ids.num_free:
            first = self._loose.first()
            if first is None:
                return None
            self._drop_tail(first[1])
        record = HostRecordId(self._record_ids.take())
        self._reserved_records.add(record)
        return record

    def admit_tail(self, tail: HostTail) -> bool:
        """As `admit_page`; of no use without its page, too."""
        is_of_use = tail.key in self._pages or self._above.has_page(tail.key)
        if tail.key in self._tails or not is_of_use:
            self.give_back_tail(tail.record)
            return False
        self._ages.used()
        self._reserved_records.remove(tail.record)
        self.counts.tails_read += 1
        tail.stamp = self._ages.clock
        self._add_tail(tail, tail.record)
        return True

    def give_back_tail(self, record: HostRecordId) -> None:
        self._reserved_records.remove(record)
        self._record_ids.give_back(record)

    def hold_page(self, key: PageKey) -> HostPage:
        """As `pin_page`, but no use: its bytes are read for a tier below."""
        page = self._pages[key]
        page.num_pins += 1
        self._leaves.remove(page)
        return page

    def hold_tail(self, key: PageKey) -> HostTail:
        tail = self._tails[key]
        tail.num_pins += 1
        self._loose.remove(tail)
        return tail

    def pin_page(self, key: PageKey) -> HostPage:
        """Hold a page that is here until `unpin_page`: it is copied to the device. Counts as a use."""
        self._ages.used()
        page = self._pages[key]
        page.num_pins += 1
        page.hits += 1
        page.stamp = self._ages.clock
        self._leaves.remove(page)
        return page

    def unpin_page(self, page: HostPage) -> None:
        assert page.num_pins > 0, "a page is unpinned twice"
        page.num_pins -= 1
        self._queue_if_leaf(page)

    def pin_tail(self, key: PageKey) -> HostTail:
        """As `pin_page`."""
        self._ages.used()
        tail = self._tails[key]
        tail.num_pins += 1
        tail.hits += 1
        tail.stamp = self._ages.clock
        self._loose.remove(tail)
        return tail

    def unpin_tail(self, tail: HostTail) -> None:
        assert tail.num_pins > 0, "a tail is unpinned twice"
        tail.num_pins -= 1
        if tail.num_pins:
            return
        self._loose.add(tail)
        self._drop_orphan(tail.key)

    def check(self) -> None:
        """Assert that everything adds up. O(items): for tests."""
        following = Counter(page.parent for page in self._pages.values())
        assert +self._num_following == following, "pages that follow are counted wrongly"
        for key, page in self._pages.items():
            assert page.key == key
            is_leaf = not page.num_pins and not following[key]
            assert bool(page.entry) == is_leaf, "queued, or not, against the rule"
        for key, tail in self._tails.items():
            assert tail.key == key
            assert bool(tail.entry) == (not tail.num_pins), "queued, or not, against the rule"
            is_of_use = key in self._pages or self._above.has_page(key)
            assert is_of_use or tail.num_pins, "a tail without its page"
        self._page_ids.check([*(page.page for page in self._pages.values()), *self._reserved_pages])
        self._record_ids.check([*(tail.record for tail in self._tails.values()), *self._reserved_records])
        assert len(self._leaves) == sum(page.entry > 0 for page in self._pages.values())
        assert len(self._loose) == sum(tail.entry > 0 for tail in self._tails.values())

    def _add_page(self, page: HostPage, number: HostPageId) -> None:
        self._above.note(page.key)
        page.page = number
        self._pages[page.key] = page
        self._num_following[page.parent] += 1
        parent = self._pages.get(page.parent)
        if parent is not None:
            self._leaves.remove(parent)
        self._queue_if_leaf(page)

    def _add_tail(self, tail: HostTail, number: HostRecordId) -> None:
        self._above.note(tail.key)
        tail.record = number
        self._tails[tail.key] = tail
        self._loose.add(tail)

    def _priority(self, item: HostPage | HostTail) -> float:
        return self._ages.priority(item.stamp, (1 + item.hits) * item.worth)

    def _make_room_for(self, page: HostPage, *, is_needed: bool) -> bool:
        """What others here follow on is taken in whatever it is worth: without it they are worth nothing."""
        first = self._leaves.first()
        if first is None:
            return False
        is_worth_less = self._priority(page) < first[0] and not self._num_following[page.key]
        if is_worth_less and not is_needed:
            return False
        self._drop_page(first[1])
        return True

    def _make_room_for_tail(self, tail: HostTail) -> bool:
        first = self._loose.first()
        if first is None or self._priority(tail) < first[0]:
            return False
        self._drop_tail(first[1])
        return True

    def _queue_if_leaf(self, page: HostPage) -> None:
        if not page.num_pins and not self._num_following[page.key]:
            self._leaves.add(page)

    def _drop_page(self, page: HostPage) -> None:
        self.counts.pages_evicted += 1
        self._ages.evicted(page.stamp)
        self._above.note(page.key)
        self._leaves.remove(page)
        del self._pages[page.key]
        self._page_ids.give_back(page.page)
        self._num_following[page.parent] -= 1
        if not self._num_following[page.parent]:
            del self._num_following[page.parent]
            parent = self._pages.get(page.parent)
            if parent is not None:
                self._queue_if_leaf(parent)
        self._drop_orphan(page.key)

    def _drop_orphan(self, key: PageKey) -> None:
        """The tail of a page that is nowhere any more, unless it is in use."""
        tail = self._tails.get(key)
        if tail is None or tail.num_pins or key in self._pages or self._above.has_page(key):
            return
        self._drop_tail(tail)

    def _drop_tail(self, tail: HostTail) -> None:
        self.counts.tails_evicted += 1
        self._above.note(tail.key)
        self._loose.remove(tail)
        del self._tails[tail.key]
        self._record_ids.give_back(tail.record)


class _Ids:
    """Numbers from `first` on: there may be millions, most of which are never taken."""

    def __init__(self, first: int, num_total: int) -> None:
        self._first = first
        self._num_total = num_total
        self._num_made = 0
        self._free: list[int] = []

    @property
    def num_free(self) -> int:
        return self._num_total - self._num_made + len(self._free)

    def take(self) -> int:
        """One is free."""
        if self._free:
            return self._free.pop()
        assert self._num_made < self._num_total, "no number is free"
        self._num_made += 1
        return self._first + self._num_made - 1

    def give_back(self, number: int) -> None:
        self._free.append(number)

    def check(self, taken: list[int]) -> None:
        made = range(self._first, self._first + self._num_made)
        assert sorted([*taken, *self._free]) == list(made), "host ids do not add up"

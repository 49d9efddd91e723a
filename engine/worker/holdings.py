"""Who holds the worker's pages, slots and records: sequences, the prefix cache, readers elsewhere, or reads that may
still be running.

`engine.worker.scheduler` owns it; it, `engine.worker.admission` and `engine.worker.drafts.speculation`, which takes
pages for drafts by `grow`, are the only ones to call it. What the host has been told of may have been lent: it comes
back by `take_back` alone. What state is read into comes back when the read is settled. What the cache keeps and nobody
has pinned is as good as free: it is evicted when it is needed, and offered to the tier below
(`engine.worker.tiers.host_tier`), if there is one, to which the next plan copies it before anything else. Everything
of every kind is free or has one holder; `check` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.worker.cache.prefix_cache import Departed, Found, Packed, PrefixCache
from engine.worker.events import SequenceKey, Surrender
from engine.worker.sequences import Sequence
from engine.worker.tiers.host_tier import HostTier
from kvstore.keys import PageKey
from kvstore.pages import IdAllocator, PageAllocator
from kvstore.shadow_radix import Pin, Start, TailKind
from kvstore.store.contract import TenantLabel
from rorqual.ids import PageId, RecordId, SlotId


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lent:
    """What is out under one record."""

    pages: tuple[PageId, ...]  # that no index has
    pin: Pin | None


class Holdings:
    def __init__(
        self,
        *,
        num_pages: int,
        num_slots: int,
        num_records: int,
        num_thin: int = 0,
        cache: PrefixCache | None = None,
        tier: HostTier | None = None,
    ) -> None:
        self.num_pages = num_pages
        self._pages = PageAllocator(num_pages)
        self._thin = PageAllocator(num_thin, first=num_pages)
        self._slots = IdAllocator(num_slots, make=SlotId)
        self._records = IdAllocator(num_records, make=RecordId)
        self._cache = cache
        self._tier = tier
        self.newest_plan = 0
        self._is_moving = False  # the next plan, which is sure to come, reads pages that are free now
        self._num_pages_returning = 0
        self._record_plans: dict[RecordId, int] = {}  # the last plan that copies it to the tier below
        self._lent: dict[RecordId, _Lent] = {}
        self._surrenders: list[Surrender] = []  # not taken yet
        self._num_pages_imported = 0  # held by imports, as the next
        self._num_records_imported = 0
        self._quarantined: dict[SequenceKey, tuple[list[PageId], RecordId]] = {}

    @property
    def num_pages_free(self) -> int:
        """Of nobody, or in the cache and to be had."""
        return self._pages.num_free + (self._cache.num_pages_evictable if self._cache else 0)

    @property
    def num_slots_free(self) -> int:
        return self._slots.num_free

    @property
    def num_records_free(self) -> int:
        """Of nobody, or tails in the cache and to be had."""
        return self._records.num_free + (self._cache.num_tails_evictable if self._cache else 0)

    @property
    def num_lent_pages(self) -> int:
        """A page that several sequences lend counts as many times."""
        return sum(len(item.pages) + (item.pin.num_pages if item.pin else 0) for item in self._lent.values())

    @property
    def num_quarantined(self) -> int:
        """Sequences that were cancelled while their state may have been read into what they held."""
        return len(self._quarantined)

    @property
    def num_quarantined_pages(self) -> int:
        return sum(len(pages) for pages, _ in self._quarantined.values())

    @property
    def is_clear(self) -> bool:
        """Nothing is lent, surrendered, in quarantine or being imported."""
        is_importing = self._num_pages_imported or self._num_records_imported
        return not (self._lent or self._surrenders or self._quarantined or is_importing)

    def planned(self, number: int) -> None:
        """So many plans have been made: any of them may use what is freed from now on."""
        self.newest_plan = number
        self._is_moving = False

    @property
    def num_thin_free(self) -> int:
        return self._thin.num_free

    def is_thin(self, page: PageId) -> bool:
        return page >= self.num_pages

    def num_pages_let_go(self, sequence: Sequence) -> int:
        """Whole pages that are to be had once it needs none of those that it has of the cache: those that others hold
        too are not."""
        pin, cache = sequence.pin, self._cache
        assert pin is not None
        assert cache is not None
        num_own = sum(page != shared for page, shared in zip(sequence.pages, pin.pages, strict=False))
        return num_own + cache.num_pages_let_go(pin)

    def spill(self, sequence: Sequence, num_pages: int, *, num_hot: int) -> bool:
        """Its first pages, which are all that it has of the cache, become `num_hot` whole pages of its own and thin
        ones. The next plan copies what stays on the device. False, and nothing has changed: they are not to be had."""
        pin, cache = sequence.pin, self._cache
        assert pin is not None
        assert cache is not None
        assert pin.num_pages == num_pages
        own = [page for number, page in enumerate(sequence.pages[:num_pages]) if pin.pages[number] != page]
        cached = sequence.num_pages_cached
        cache.release(sequence)
        if self.num_pages_free + len(own) < num_hot or self._thin.num_free < num_pages - num_hot:
            sequence.pin = cache.hold(sequence.keys, num_pages=num_pages)
            sequence.num_pages_cached = cached
            return False
        self._is_moving = True
        self._free(own)
        hot, thin = self._take_pages(num_hot), self._thin.allocate(num_pages - num_hot)
        assert hot is not None
        assert thin is not None
        sequence.pages[:num_pages] = (*hot, *thin)
        sequence.num_pages_shared = 0
        return True

    def start_spilled(self, sequence: Sequence, start: Start, *, num_hot: int) -> bool:
        """Give a waiting sequence all it needs to start with what it reuses spilled: as many whole pages as hot rows
        take, thin ones for the others, whole ones for what it computes, and a record for its tail. Or nothing."""
        num_thin = start.reuse_depth - num_hot
        num_whole = num_hot + max(0, sequence.num_pages_to_start - start.reuse_depth)
        has_record = not start.tail_depth or self.num_records_free > 0
        if num_whole > self.num_pages_free or num_thin > self._thin.num_free or not has_record:
            return False
        slot, whole, thin = self._slots.allocate(), self._take_pages(num_whole), self._thin.allocate(num_thin)
        assert slot is not None
        assert whole is not None
        assert thin is not None
        sequence.start(slot, (*whole[:num_hot], *thin, *whole[num_hot:]), None, start=start)
        sequence.num_pages_cached = 0
        if start.tail_depth:
            sequence.record = self.take_record()
            assert sequence.record is not None
            self._record_plans[sequence.record] = self.newest_plan + 1
        return True

    def thin(self, sequence: Sequence, number: int) -> None:
        """A whole page of its own becomes a thin one: one is free."""
        taken = self._thin.allocate(1)
        assert taken is not None
        self._is_moving = True
        self._free((sequence.pages[number],))
        sequence.pages[number] = taken[0]

    def begin_return(self, num_pages: int, pages: list[PageId]) -> bool:
        """So many whole pages, to be copied into. False: they are not to be had."""
        taken = self._take_pages(num_pages)
        if taken is None:
            return False
        self._num_pages_returning += num_pages
        pages.extend(taken)
        return True

    def unspill(self, sequence: Sequence, pages: tuple[PageId, ...]) -> None:
        """Its first pages are these now, which were taken for it."""
        self._is_moving = True
        self._num_pages_returning -= len(pages)
        self._free(sequence.pages[: len(pages)])
        sequence.pages[: len(pages)] = pages

    def end_return(self, pages: Iterable[PageId]) -> None:
        """Nobody returns into them."""
        returned = tuple(pages)
        self._num_pages_returning -= len(returned)
        self._free(returned)

    def start(self, sequence: Sequence, found: Found | None, *, pages_reserved: int) -> bool:
        """Give a waiting sequence all it needs to start, leaving `pages_reserved` free; or nothing, and False.
        `found`: what of it the cache has, just now."""
        start = found.start if found is not None else None
        num_shared = start.reuse_depth if start is not None else 0
        num_pages = max(0, sequence.num_pages_to_start - num_shared)
        num_pages_free, num_records_free = self.num_pages_free, self.num_records_free
        if self._cache is not None and start is not None:
            num_pages_free -= self._cache.num_pages_to_hold(sequence.keys, num_pages=start.reuse_depth)
            num_records_free -= self._cache.is_tail_evictable(sequence, start)
        if not self._slots.num_free or num_pages + pages_reserved > num_pages_free:
            return False
        if sequence.needs_record and not num_records_free:
            return False
        slot = self._slots.allocate()
        assert slot is not None
        shared = self._cache.pin(sequence, start) if self._cache and start else ()
        # Bytes from elsewhere are written outside the order of plans: rather where no plan in flight still works.
        pages = self._take_pages(num_pages, cold=sequence.is_adopting)
        assert pages is not None
        record = self.take_record() if sequence.needs_record else None
        sequence.start(slot, (*shared, *pages), record, start=start)
        return True

    def take_record(self) -> RecordId | None:
        """A record that is free, or that the cache can do without best."""
        if not self._records.num_free and self._cache is not None:
            self._free_evicted(self._cache.evict_tail())
        return self._records.allocate()

    def last_plan(self, sequence: Sequence) -> int:
        """Number of the last plan that may use the pages and the record of a sequence that has had no plan itself, but
        for pages that it shares. It may be the plan that comes next."""
        return self._last_plan(sequence.pages[sequence.num_pages_shared :], sequence.record)

    def grow(self, sequence: Sequence) -> bool:
        """One page more, if one is to be had."""
        pages = self._take_pages(1)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def free_slot(self, sequence: Sequence) -> SlotId:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        self._slots.free(slot)
        return slot

    def free_pages(self, sequence: Sequence, *, first: int) -> None:
        """Its pages from number `first` on, which are its own and which the host has not been told of."""
        assert first >= sequence.num_pages_told
        assert sequence.pin is None or first >= sequence.pin.num_pages, "a page of the cache is freed"
        self._free(sequence.pages[first:])
        del sequence.pages[first:]

    def free_state(self, sequence: Sequence) -> None:
        """All pages and the record: free, in the cache, or surrendered where the host has been told of them."""
        pin, pages = sequence.pin, sequence.pages
        num_told = sequence.num_pages_told
        own = [
            (number, page)
            for number, page in enumerate(pages)
            if pin is None or number >= pin.num_pages or pin.pages[number] != page
        ]
        assert len(own) == sequence.num_pages_private, "pages are private that the cache owns, or the reverse"
        if sequence.is_told:
            self._surrender(sequence, tuple(page for number, page in own if number < num_told))
            own = [(number, page) for number, page in own if number >= num_told]
        else:
            if self._cache is not None:
                self._cache.release(sequence)
            if sequence.record is not None:
                self._records.free(sequence.record)
        self._free(page for _, page in own)
        sequence.pages = []
        sequence.record = None

    def free_record(self, record: RecordId) -> None:
        """The plan that has used it is done."""
        self._records.free(record)

    def demote_tail(
        self, record: RecordId, key: PageKey, *, kind: TailKind, packed: Packed, tenant: TenantLabel
    ) -> None:
        """The record, which is about to be free, holds a tail that the tier below may keep."""
        if self._tier is not None and self._tier.keep_tail(
            record, key, kind=kind, packed=packed, tenant=tenant
        ):
            self._record_plans[record] = self.newest_plan + 1

    def take_surrendered(self) -> list[Surrender]:
        taken, self._surrenders = self._surrenders, []
        return taken

    def take_back(self, record: RecordId) -> None:
        """Nobody can be reading any more what was lent under this record."""
        assert record in self._lent, f"record {record} is taken back but not lent"
        item = self._lent.pop(record)
        self._pages.free(item.pages, last_plan=self.newest_plan)
        if item.pin is not None:
            assert self._cache is not None
            self._cache.take_back(item.pin)
        self._records.free(record)

    def take_for_import(
        self, num_pages: int, *, with_record: bool
    ) -> tuple[tuple[PageId, ...], RecordId | None, int] | None:
        """Pages and a record to be read into, and the last plan that may still use them; None, and nothing is taken,
        when they are not to be had."""
        if with_record and not self.num_records_free:
            return None
        pages = self._take_pages(num_pages, cold=True)
        if pages is None:
            return None
        record = self.take_record() if with_record else None
        self._num_pages_imported += len(pages)
        self._num_records_imported += record is not None
        return pages, record, self._last_plan(pages, record)

    def end_import(
        self,
        pages: Iterable[PageId],
        record: RecordId | None,
        *,
        unused: Iterable[PageId],
        unused_record: RecordId | None,
    ) -> None:
        """All of an import; what is not unused is the cache's now."""
        self._num_pages_imported -= len(tuple(pages))
        self._num_records_imported -= record is not None
        self._pages.free(unused)
        if unused_record is not None:
            self._records.free(unused_record)

    def quarantine(self, sequence: Sequence) -> None:
        """Record and own pages of a sequence into which state may be read still. Nothing is read into shared ones."""
        assert sequence.record is not None
        pages = sequence.pages[sequence.num_pages_shared :]
        if self._cache is not None:
            self._cache.release(sequence)
        self._quarantined[sequence.key] = (pages, sequence.record)
        sequence.pages = []
        sequence.record = None

    def settle(self, key: SequenceKey) -> None:
        assert key in self._quarantined, f"sequence {key} is settled but not in quarantine"
        pages, record = self._quarantined.pop(key)
        self._pages.free(pages)
        self._records.free(record)

    def check(self, sequences: Iterable[Sequence], *, num_records_planned: int) -> None:
        """`sequences`: at least those that hold something; `num_records_planned`: held by plans in flight, or for
        when they are done."""
        num_pages = num_slots = num_records = 0
        for sequence in sequences:
            num_pages += sequence.num_pages_private
            num_slots += sequence.slot is not None
            num_records += (sequence.record is not None) + (sequence.tail_record is not None)
        num_pages += sum(len(item.pages) for item in self._lent.values()) + self.num_quarantined_pages
        num_records += len(self._lent) + self.num_quarantined + num_records_planned
        num_pages += self._num_pages_imported + self._num_pages_returning
        num_records += self._num_records_imported
        if self._cache is not None:
            num_pages += self._cache.num_pages
            num_records += self._cache.num_tails
        self._pages.check()
        self._thin.check()
        self._slots.check()
        self._records.check()
        num_in_use = self._pages.num_in_use + self._thin.num_in_use
        assert num_pages == num_in_use, f"{num_pages} pages are held, {num_in_use} in use"
        assert num_slots == self._slots.num_in_use, "slots in use are not the running sequences'"
        assert num_records == self._records.num_in_use, "records in use are not those held"

    def _take_pages(self, count: int, *, cold: bool = False) -> tuple[PageId, ...] | None:
        num_missing = count - self._pages.num_free
        if num_missing > 0 and self._cache is not None:
            self._free_evicted(self._cache.evict_pages(num_missing))
        return self._pages.allocate(count, cold=cold)

    def _free_evicted(self, departed: Departed) -> None:
        is_copied = self._tier is not None and self._tier.take(departed)
        last_plan = self._last_plan_of_free
        if is_copied or (self._tier is not None and self._tier.config.takes_turns):
            # Also by a plan in flight, when its turn ended.
            self._record_plans.update((item.record, last_plan) for item, _, _ in departed.tails)
        self._pages.free((item.page for item, _ in departed.pages), last_plan=last_plan)
        for item, _, _ in departed.tails:
            self._records.free(item.record)

    def _free(self, pages: Iterable[PageId]) -> None:
        """Whole or thin ones of nobody any more."""
        last_plan = self._last_plan_of_free
        for page in pages:
            (self._thin if self.is_thin(page) else self._pages).free((page,), last_plan=last_plan)

    @property
    def _last_plan_of_free(self) -> int:
        """The last plan that may use what is freed now: also the next one, if that copies anything."""
        is_copying = self._is_moving or (self._tier is not None and not self._tier.is_idle)
        return self.newest_plan + is_copying

    def _last_plan(self, pages: Iterable[PageId], record: RecordId | None) -> int:
        """Of those that may use these pages or this record. A record needs a look for what copies it away alone: it
        becomes free when no plan uses it in another way."""
        of_record = self._record_plans.get(record, 0) if record is not None else 0
        return max(self._pages.last_plan(pages), of_record)

    def _surrender(self, sequence: Sequence, pages: tuple[PageId, ...]) -> None:
        """`pages`: those that no index has, of the pages that the host was told of."""
        assert sequence.record is not None
        told = tuple(sequence.pages[: sequence.num_pages_told])
        pin = self._cache.surrender(sequence) if self._cache is not None else None
        self._lent[sequence.record] = _Lent(pages=pages, pin=pin)
        self._surrenders.append(Surrender(key=sequence.key, pages=told, record=sequence.record))

"""What the prefix cache gives up goes to host memory: which copies the next plan makes. Pure; owned by the scheduler.

`engine.worker.holdings` tells it of everything that is evicted; what the host index (`kvstore.tiers`) finds worth
keeping is copied at the start of the next plan, before anything may write to what was freed. Copies are made in the
order of plans, so nothing has to be held for them: a host page given to another page meanwhile is copied to by a later
plan, or by the same one instead. What comes back, and for whom, is `engine.worker.tiers.restoring`'s.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.plan import NO_COPIES, Copies, PageCopy, RecordCopy
from engine.worker.cache.prefix_cache import Departed, Packed, PrefixCache
from kvstore.keys import PageKey
from kvstore.shadow_radix import EvictedTail, TailKind
from kvstore.store.contract import TenantLabel
from kvstore.tiers import HostCounts, HostIndex, HostPage, HostTail
from rorqual.ids import HostPageId, HostRecordId, PageId, RecordId

COPY_BYTES_MAX = 64 * 1024 * 1024
"""Brought back by one plan: 1.3 ms at 50 GB/s, of a PCIe 5 link, and 70 pages of Flash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    num_pages: int
    num_records: int
    copy_bytes_max: int = (
        COPY_BYTES_MAX  # brought back by one plan, so that it is not held up; one page at least
    )
    sequences_max: int = 4  # of the queue, for which something is brought back before they can start
    first_id: int = 0  # of host pages and records: tests keep them apart from the device's
    keeps_landed: bool = False  # what has been copied here, until the host has written it to a store
    takes_turns: bool = (
        False  # what a sequence leaves behind is copied here when it ends, not only when it is evicted
    )
    turn_bytes_max: int = 16 * 1024 * 1024  # of that, by one plan


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierState:
    """For whoever watches a worker. Of a tier that is off: nothing."""

    num_pages: int = 0
    num_tails: int = 0
    num_pages_total: int = 0
    num_records_total: int = 0
    num_bytes: int = 0  # of pages and tails
    counts: HostCounts = field(default_factory=HostCounts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Places in host memory for bytes from elsewhere, which may be written once the result of plan `after` is in."""

    pages: tuple[HostPageId, ...]
    record: HostRecordId | None
    after: int


class HostTier:
    """With `keeps_landed` it holds what was copied here until `written`; half of what there is at most, and what comes
    beyond that is not written."""

    def __init__(self, config: HostTierConfig, cache: PrefixCache) -> None:
        self.config = config
        self.index = HostIndex(
            num_pages=config.num_pages,
            num_records=config.num_records,
            above=cache,
            first_id=config.first_id,
        )
        cache.join(self.index)
        self._costs = cache.config.costs
        # By target, so that one that is given away again before its copy was planned is copied to once.
        self._pages: dict[HostPageId, PageId] = {}
        self._records: dict[HostRecordId, tuple[RecordId, int]] = {}
        self._plans: dict[HostPageId, int] = {}  # the newest one that copies from there or to there
        self._record_plans: dict[HostRecordId, int] = {}
        self._held: list[HostPage | HostTail] = []  # whose copies are not planned yet
        self._landing: deque[tuple[int, HostPage | HostTail]] = deque()  # with the plan that copies
        self._landed: deque[HostPage | HostTail] = deque()
        self._num_pages_held = 0
        self._num_tails_held = 0
        self.num_not_held = 0  # copied here so far, and not to be written

    @property
    def is_idle(self) -> bool:
        """No copy waits for a plan."""
        return not (self._pages or self._records)

    @property
    def state(self) -> HostTierState:
        index, costs = self.index, self._costs
        return HostTierState(
            num_pages=index.num_pages,
            num_tails=index.num_tails,
            num_pages_total=self.config.num_pages,
            num_records_total=self.config.num_records,
            num_bytes=index.num_pages * costs.page_bytes + index.num_tails * costs.tail_bytes,
            counts=index.counts,
        )

    def take(self, departed: Departed) -> bool:
        """Keep what is worth it. True: the next plan, which is sure to come, reads some of it on the device."""
        is_copied = False
        for page, facts in departed.pages:
            host_page = self.index.put_page(page, facts.digests, facts.tenant)
            if host_page is not None:
                self._pages[host_page] = page.page
                is_copied = True
                self._hold_page(page.key, is_clear=facts.digests is not None)
        for tail, packed, tenant in departed.tails:
            if packed is None:
                continue  # nobody could tell how much of it to copy
            host_record = self.index.put_tail(
                tail, num_bytes=packed.num_bytes, digest=packed.digest, tenant=tenant
            )
            if host_record is not None:
                self._records[host_record] = (tail.record, packed.num_bytes)
                is_copied = True
                self._hold_tail(tail.key)
        return is_copied

    def keep(self, departed: Departed) -> bool:
        """As `take` for pages that are read here from now on, whatever all that is here is worth; but all or nothing of
        what is in use stays. Whether they are here."""
        for page, facts in departed.pages:
            host_page = self.index.put_page(page, facts.digests, facts.tenant, is_needed=True)
            if host_page is None:
                return False
            self._pages[host_page] = page.page
            self._hold_page(page.key, is_clear=facts.digests is not None)
        return True

    def keep_tail(
        self, record: RecordId, key: PageKey, *, kind: TailKind, packed: Packed, tenant: TenantLabel
    ) -> bool:
        """The tail behind a page that is here. Whether the next plan copies it."""
        worth = self.index.worth(key)
        if worth is None:
            return False
        tail = EvictedTail(record=record, key=key, kind=kind, hits=0, worth=worth)
        return self.take(Departed(tails=((tail, packed, tenant),)))

    @property
    def may_hold(self) -> bool:
        """Whether what is copied here now would be held until it is written."""
        return self._num_pages_held < self._num_pages_held_max and self._num_tails_held < max(
            1, self.config.num_records // 2
        )

    def take_copies(self, number: int) -> Copies:
        """For plan `number`, which is being made."""
        self._landing.extend((number, item) for item in self._held)
        self._held.clear()
        self._plans.update(dict.fromkeys(self._pages, number))
        self._record_plans.update(dict.fromkeys(self._records, number))
        if self.is_idle:
            return NO_COPIES
        copies = Copies(
            pages=tuple(PageCopy(page=page, host_page=host) for host, page in self._pages.items()),
            records=tuple(
                RecordCopy(record=record, host_record=host, num_bytes=num_bytes)
                for host, (record, num_bytes) in self._records.items()
            ),
        )
        self._pages.clear()
        self._records.clear()
        return copies

    def used(self, item: HostPage | HostTail, number: int) -> None:
        """Plan `number` copies it to the device."""
        if isinstance(item, HostPage):
            self._plans[item.page] = max(number, self._plans.get(item.page, 0))
        else:
            self._record_plans[item.record] = max(number, self._record_plans.get(item.record, 0))

    def landed(self, number: int) -> None:
        """The result of plan `number` is in: what it has copied here is here."""
        while self._landing and self._landing[0][0] <= number:
            self._landed.append(self._landing.popleft()[1])

    def next_landed(self) -> HostPage | HostTail | None:
        """What is to be written; it stays where it is until `written`."""
        return self._landed.popleft() if self._landed else None

    @property
    def num_held(self) -> int:
        """Not written yet."""
        return self._num_pages_held + self._num_tails_held

    def written(self, item: HostPage | HostTail) -> None:
        if isinstance(item, HostPage):
            self._num_pages_held -= 1
            self.index.unpin_page(item)
        else:
            self._num_tails_held -= 1
            self.index.unpin_tail(item)

    def reserve(self, num_pages: int, *, with_record: bool) -> Room:
        """As many of these places as can be had; each ends in the index's `admit` or `give_back`."""
        pages: list[HostPageId] = []
        while len(pages) < num_pages and (page := self.index.reserve_page()) is not None:
            # Of a page that has been given up since: its copy is not wanted any more.
            self._pages.pop(page, None)
            pages.append(page)
        record = self.index.reserve_tail() if with_record else None
        if record is not None:
            self._records.pop(record, None)
        last = self._record_plans.get(record, 0) if record is not None else 0
        after = max([last, *(self._plans.get(page, 0) for page in pages)])
        return Room(pages=tuple(pages), record=record, after=after)

    @property
    def _num_pages_held_max(self) -> int:
        return max(1, self.config.num_pages // 2)

    def _hold_page(self, key: PageKey, *, is_clear: bool) -> None:
        if not self.config.keeps_landed:
            return
        if not is_clear or self._num_pages_held >= self._num_pages_held_max:
            self.num_not_held += 1
            return
        self._num_pages_held += 1
        self._held.append(self.index.hold_page(key))

    def _hold_tail(self, key: PageKey) -> None:
        if not self.config.keeps_landed:
            return
        if self._num_tails_held >= max(1, self.config.num_records // 2):
            self.num_not_held += 1
            return
        self._num_tails_held += 1
        self._held.append(self.index.hold_tail(key))

"""What the prefix cache gives up goes to host memory: which copies the next plan makes. Pure; owned by the scheduler.

`engine.worker.holdings` tells it of everything that is evicted; what the host index (`kvstore.tiers`) finds worth
keeping is copied at the start of the next plan, before anything may write to what was freed. Copies are made in the
order of plans, so nothing has to be held for them: a host page given to another page meanwhile is copied to by a later
plan, or by the same one instead. What comes back, and for whom, is `engine.worker.restoring`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.plan import NO_COPIES, Copies, PageCopy, RecordCopy
from engine.worker.prefix_cache import Departed, PrefixCache
from kvstore.tiers import HostCounts, HostIndex
from rorqual.ids import HostPageId, HostRecordId, PageId, RecordId

COPY_BYTES_MAX = 64 * 1024 * 1024
"""Brought back by one plan: 1.3 ms at 50 GB/s, of a PCIe 5 link, and 70 pages of Flash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """By default bringing back takes no time, and so is always worth it."""

    num_pages: int
    num_records: int
    copy_bytes_max: int = (
        COPY_BYTES_MAX  # brought back by one plan, so that it is not held up; one page at least
    )
    bytes_per_second: float = math.inf  # of copies
    seconds_per_token: float = 0.0  # of computing
    sequences_max: int = 4  # of the queue, for which something is brought back before they can start
    first_id: int = 0  # of host pages and records: tests keep them apart from the device's


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierState:
    """For whoever watches a worker. Of a tier that is off: nothing."""

    num_pages: int = 0
    num_tails: int = 0
    num_pages_total: int = 0
    num_records_total: int = 0
    num_bytes: int = 0  # of pages and tails
    counts: HostCounts = field(default_factory=HostCounts)


class HostTier:
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
        for page, digests in departed.pages:
            host_page = self.index.put_page(page, digests)
            if host_page is not None:
                self._pages[host_page] = page.page
                is_copied = True
        for tail, packed in departed.tails:
            if packed is None:
                continue  # nobody could tell how much of it to copy
            host_record = self.index.put_tail(tail, num_bytes=packed.num_bytes, digest=packed.digest)
            if host_record is not None:
                self._records[host_record] = (tail.record, packed.num_bytes)
                is_copied = True
        return is_copied

    def take_copies(self) -> Copies:
        """For the plan that is being made."""
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

"""What a prefill worker has lent, and until when: the owner's half of the lease protocol, as a plain state machine.

The host of a prefill worker owns one ledger and is the only one to call it: as sequences become readable or end, as
readers renew and release, and when time has passed. It performs no I/O and reads no clock: `now` is in seconds on the
owner's monotonic clock and never goes back. It may never name a page or a record as returned while somebody who
started to read in good order could still be reading it.

A lease is HELD from its grant. Released by its reader, everything returns at once. Ended by its time or by its owner,
it is COOLING for the longest transfer, `transfer_seconds_max`, and only then returns what it covered: no reader starts
a read whose own deadline is longer than that, or longer than what is left of the lease. A lease that has ended is
never live again; its record's next lease has another generation, and so another name.

Leases may have pages in common, since sequences may: what a lease returns is its own claim to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rorqual.ids import Incarnation, LeaseName, PageId, RecordId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """Nobody can be reading these under this lease any more."""

    name: LeaseName
    pages: tuple[PageId, ...]
    record: RecordId
    expired: bool  # it had run out; False: released by its reader or revoked by its owner


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What time has brought."""

    expired: tuple[LeaseName, ...]  # ran out since the last time; what they cover is cooling
    returned: tuple[Returned, ...]  # cooled down; none together with expired ones: ask again


class LeaseLedger:
    """All leases of one worker. A lease's id is its record's: one record is in one lease at most."""

    def __init__(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        *,
        num_records: int,
        lease_seconds: float,
        transfer_seconds_max: float,
    ) -> None:
        assert lease_seconds > 0
        assert transfer_seconds_max > 0
        self.lease_seconds = lease_seconds
        self.transfer_seconds_max = transfer_seconds_max
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._generations = [0] * num_records
        # All leases are as long and time never goes back: both are in the order of their ends.
        self._held: dict[LeaseName, _Lease] = {}
        self._cooling: dict[LeaseName, _Lease] = {}
        self._expired: list[LeaseName] = []  # not told of yet
        self._records: dict[RecordId, _Lease] = {}  # of both
        self._pages: Counter[PageId] = Counter()  # leases that cover each
        self._now = float("-inf")

    @property
    def num_leases(self) -> int:
        """Held ones."""
        return len(self._held)

    @property
    def num_records(self) -> int:
        """In leases that are held or cooling."""
        return len(self._records)

    @property
    def num_pages(self) -> int:
        """In leases that are held or cooling, each counted once."""
        return len(self._pages)

    @property
    def next_deadline(self) -> float | None:
        """When `advance` has something to do, on the owner's clock. None: not until something is called."""
        if self._expired:
            return self._now
        ends = [lease.end for lease in _first(self._held)]
        ends += [lease.end + self.transfer_seconds_max for lease in _first(self._cooling)]
        return min(ends, default=None)

    def grant(self, record: RecordId, now: float) -> LeaseName:
        """Start a lease that covers a record and, so far, no pages. The record is in no other one."""
        self._expire(now)
        assert record not in self._records, f"record {record} is lent twice"
        self._generations[record] += 1
        name = LeaseName(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            lease_id=record,
            generation=self._generations[record],
        )
        lease = _Lease(record=record, end=now + self.lease_seconds)
        self._held[name] = self._records[record] = lease
        return name

    def extend(self, name: LeaseName, pages: Iterable[PageId], now: float) -> bool:
        """Cover these pages too; the lease ends no later for it. False, and they are the owner's still, when it
        has ended."""
        self._expire(now)
        lease = self._held.get(name)
        if lease is None:
            return False
        for page in pages:
            self._pages[page] += 1
            lease.pages.append(page)
        return True

    def renew(self, name: LeaseName, now: float) -> float | None:
        """Seconds the lease has left, counted from now. None when no such lease is live: no right to read."""
        self._expire(now)
        lease = self._held.pop(name, None)
        if lease is None:
            return None
        lease.end = now + self.lease_seconds
        self._held[name] = lease
        return self.lease_seconds

    def release(self, name: LeaseName, now: float) -> Returned | None:
        """The reader is done: everything is the owner's again at once. None when no such lease is live."""
        self._expire(now)
        lease = self._held.pop(name, None)
        return self._return(name, lease, expired=False) if lease is not None else None

    def revoke(self, name: LeaseName, now: float) -> bool:
        """The owner ends the lease: it cools from now on. False when it was not live; then it is cooling since its
        time ran out, which the owner is not told any more, or it is gone."""
        self._expire(now)
        lease = self._held.pop(name, None)
        if lease is None:
            if name in self._expired:
                self._expired.remove(name)
            return False
        lease.end = now
        self._cooling[name] = lease
        return True

    def advance(self, now: float) -> Due:
        """End what has run out and return what has cooled down."""
        self._expire(now)
        expired, self._expired = tuple(self._expired), []
        returned: list[Returned] = []
        if expired:
            # After a standstill a lease may have cooled down already: first its owner ends what still uses it.
            return Due(expired=expired, returned=())
        while self._cooling:
            name, lease = next(iter(self._cooling.items()))
            if lease.end + self.transfer_seconds_max > now:
                break
            del self._cooling[name]
            returned.append(self._return(name, lease, expired=lease.is_expired))
        return Due(expired=expired, returned=tuple(returned))

    def pages_of(self, record: RecordId) -> tuple[PageId, ...] | None:
        """Pages that the record's lease covers, held or cooling; None when the record is in no lease."""
        lease = self._records.get(record)
        return None if lease is None else tuple(lease.pages)

    def is_live(self, name: LeaseName, now: float) -> bool:
        self._expire(now)
        return name in self._held

    def _expire(self, now: float) -> None:
        """Before anything else is decided: a lease whose end has come is not live, told of or not."""
        assert now >= self._now, f"time went back from {self._now} to {now}"
        self._now = now
        while self._held:
            name, lease = next(iter(self._held.items()))
            if lease.end > now:
                return
            del self._held[name]
            lease.is_expired = True
            self._cooling[name] = lease
            self._expired.append(name)

    def _return(self, name: LeaseName, lease: _Lease, *, expired: bool) -> Returned:
        del self._records[lease.record]
        for page in lease.pages:
            self._pages[page] -= 1
            if not self._pages[page]:
                del self._pages[page]
        return Returned(name=name, pages=tuple(lease.pages), record=lease.record, expired=expired)


@dataclass(slots=True, kw_only=True)
class _Lease:
    record: RecordId
    end: float  # of the right to start reads; on the owner's clock
    pages: list[PageId] = field(default_factory=list[PageId])
    is_expired: bool = False


def _first(leases: dict[LeaseName, _Lease]) -> list[_Lease]:
    return [next(iter(leases.values()))] if leases else []

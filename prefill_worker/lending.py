"""What a prefill worker adds to its host: state is offered under a lease until somebody has read it.

Made by `prefill_worker.process`, called by the host (`engine.worker.role`) and, for readers, by
`engine.worker.sharing.lending_server`. It owns the lease ledger, and through it everything that is out; the scheduler
keeps it until `take_back`, which names the lease's record: pages may be out under several leases. It computes nothing
and reads nobody's memory.

A lease begins with the first pages of a prompt that can be read, grows with the prompt, and is renewed by the router
until a decode worker is bound, then by that worker. When it ends badly (cancelled, expired, the router gone) its pages
stay out for as long as a read begun in good order may still take.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass

from engine.plan import Expose, FromTransfer
from engine.worker.events import LentEvent, PagesEvent, SequenceKey
from engine.worker.role import HandlerHost
from engine.worker.sharing.exposure import Exposure
from engine.worker.sharing.lease_deadlines import keep_deadlines
from kvstore.leases import LeaseLedger, Returned
from prefill_worker.metrics import LendingMetrics
from rorqual.clock import Clock
from rorqual.errors import InvalidRequest
from rorqual.ids import Incarnation, LeaseName, PageId, WorkerId
from rorqual.session import Credit, ErrorCode, Offer, Open, RecordOffer, Role, Take
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LenderConfig:
    worker_id: WorkerId
    incarnation: Incarnation
    wire_id: str
    num_records: int
    lease_seconds: float = 15.0
    transfer_seconds_max: float = 10.0  # the longest read; no reader begins one with less of its lease left

    def __post_init__(self) -> None:
        assert self.lease_seconds > self.transfer_seconds_max > 0


class Lender:
    """The role handler of a prefill worker."""

    role = Role.PREFILL

    def __init__(
        self,
        config: LenderConfig,
        *,
        clock: Clock,
        metrics: LendingMetrics,
        exposure: Exposure | None = None,
    ) -> None:
        self.config = config
        self._clock = clock
        self._metrics = metrics
        self._exposure = exposure or Exposure()
        self._ledger = LeaseLedger(
            config.worker_id,
            config.incarnation,
            num_records=config.num_records,
            lease_seconds=config.lease_seconds,
            transfer_seconds_max=config.transfer_seconds_max,
        )
        self._loans: dict[SequenceKey, _Loan] = {}  # of open sequences
        self._keys: dict[LeaseName, SequenceKey] = {}  # of leases that run
        self._host: HandlerHost | None = None
        self._changed = asyncio.Event()
        metrics.watch(
            num_leases=lambda: self._ledger.num_records,
            num_pages=lambda: self._ledger.num_pages,
        )

    @property
    def host(self) -> HandlerHost:
        assert self._host is not None
        return self._host

    @property
    def is_idle(self) -> bool:
        return self._ledger.num_records == 0

    def attach(self, host: HandlerHost) -> None:
        self._host = host

    async def run(self) -> None:
        """Let leases end when their time has come."""
        await keep_deadlines(
            self._ledger,
            clock=self._clock,
            host=self.host,
            changed=self._changed,
            advance=self._advance,
        )

    async def finish(self) -> None:
        pass

    def credit(self, *, num_sessions: int, keys: Collection[SequenceKey]) -> Credit | None:
        return None

    def check(self, command: Open) -> None:
        if command.source is not None:
            raise InvalidRequest("a prefill worker reads no state", field="source")

    def fetches(self, command: Open) -> bool:
        return False

    def opened(self, key: SequenceKey, command: Open, *, fetching: bool) -> None:
        pass

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        now = self._clock.monotonic()
        loan = self._loans.get(event.key)
        if loan is None:
            loan = _Loan(name=self._ledger.grant(event.record, now))
            self._loans[event.key] = loan
            self._keys[loan.name] = event.key
            self._metrics.leases_granted.inc()
            self._note_change()
        if isinstance(event, PagesEvent):
            assert event.first_page == loan.num_pages, "pages were offered out of turn"
            first_page, loan.num_pages = loan.num_pages, loan.num_pages + len(event.pages)
            if not self._ledger.extend(loan.name, event.pages, now):
                return None  # it has expired, which `_advance` is about to find
            return self._offer(loan, first_page=first_page, pages=event.pages, digests=event.digests)
        loan.is_lent = True
        self.host.send(Expose(active=True))  # again: a read is near
        if not self._ledger.is_live(loan.name, now):
            return None
        record = RecordOffer(
            record=event.record,
            num_tokens=event.num_tokens,
            num_bytes=event.record_bytes,
            digest=event.record_digest,
        )
        return self._offer(loan, first_page=loan.num_pages, record=record)

    def landed(self, key: SequenceKey) -> None:
        pass

    def renew(self, key: SequenceKey) -> None:
        loan = self._loans.get(key)
        if loan is not None and self._ledger.renew(loan.name, self._clock.monotonic()) is not None:
            self._metrics.leases_renewed.labels("router").inc()

    def take(self, key: SequenceKey, command: Take) -> None:
        raise InvalidRequest("a prefill worker reads no state", field="offer")

    def ended(self, key: SequenceKey) -> None:
        """Cancelled, failed or finished with its first token: whatever of it was offered must not be used again yet."""
        loan = self._loans.pop(key, None)
        if loan is None:
            return
        self._keys.pop(loan.name, None)
        now = self._clock.monotonic()
        if not loan.has_reader and (returned := self._ledger.release(loan.name, now)) is not None:
            # A reader renews before it reads, and is refused from now on: nobody can be reading.
            if loan.is_surrendered:
                self._take_back(returned)
        elif self._ledger.revoke(loan.name, now):
            self._metrics.leases_revoked.inc()
        self._note_change()

    def turned(self) -> None:
        """What is under a lease comes back with it; the rest has nobody to wait for."""
        scheduler = self.host.scheduler
        for item in scheduler.take_surrendered():
            loan = self._loans.get(item.key)
            if loan is not None:
                loan.is_surrendered = True
            if self._ledger.pages_of(item.record) is None:
                scheduler.take_back(item.record)

    def take_from_rank(self, message: FromTransfer) -> None:
        raise AssertionError(f"a prefill worker's rank sent {type(message).__name__}")

    def renew_for_reader(self, name: LeaseName) -> float | None:
        """Seconds that remain; None when the lease has ended."""
        remaining = self._ledger.renew(name, self._clock.monotonic())
        key = self._keys.get(name)
        if remaining is not None and key is not None:
            self._loans[key].has_reader = True
        self._metrics.leases_renewed.labels("reader" if remaining is not None else "refused").inc()
        self._note_change()
        return remaining

    def release_for_reader(self, name: LeaseName) -> bool:
        """The reader is done. False when the lease had ended before: what was read since is worth nothing."""
        key = self._keys.get(name)
        if key is None or not self._loans[key].is_lent:
            return False
        returned = self._ledger.release(name, self._clock.monotonic())
        if returned is None:
            return False
        del self._keys[name], self._loans[key]
        self._metrics.leases_released.inc()
        self.host.enqueue(lambda: self._hand_over(key, returned))
        self._note_change()
        return True

    def _hand_over(self, key: SequenceKey, returned: Returned) -> None:
        self._take_back(returned)
        self.host.hand_over(key)

    def _advance(self) -> None:
        """In the host's own task."""
        moved = self._ledger.advance(self._clock.monotonic())
        for name in moved.expired:
            key = self._keys.pop(name)
            self._metrics.leases_expired.inc()
            log.warning("let a lease expire %s", fields(lease=name.lease_id, generation=name.generation))
            text = f"the lease of the state expired: nobody renewed it for {self.config.lease_seconds:g} s"
            self.host.fail(key, ErrorCode.FAILED, text)
        for returned in moved.returned:
            self._take_back(returned)
        self._note_change()

    def _take_back(self, returned: Returned) -> None:
        self.host.scheduler.take_back(returned.record)

    def _offer(
        self,
        loan: _Loan,
        *,
        first_page: int,
        pages: tuple[PageId, ...] = (),
        digests: tuple[int, ...] = (),
        record: RecordOffer | None = None,
    ) -> Offer:
        return Offer(
            lease=loan.name,
            wire_id=self.config.wire_id,
            lease_seconds=self.config.lease_seconds,
            transfer_seconds=self.config.transfer_seconds_max,
            first_page=first_page,
            pages=pages,
            digests=digests,
            record=record,
        )

    def _note_change(self) -> None:
        self._changed.set()
        self._exposure.set("hand-overs", active=self._ledger.num_records > 0, send=self.host.send)


@dataclass(slots=True, kw_only=True)
class _Loan:
    name: LeaseName
    num_pages: int = 0  # offered
    is_lent: bool = False  # its record has been offered too: the sequence has left the scheduler
    is_surrendered: bool = False  # the scheduler has given up all of it
    has_reader: bool = False  # somebody other than the router has renewed it

"""What a worker keeps of prefixes, lent by key to whoever asks: the owner's side of reads between peers.

Made by the commands of workers with a transfer engine and called by `engine.worker.sharing.lending_server`; the role
handler that goes with it is `engine.worker.sharing.handler`. A lease covers pages of the cache from one page on, and
perhaps a tail; they stay pinned until the reader releases it, or until it has ended and no read begun in good order
can be under way. What is lent is never written: pages in the cache are full, tails complete. It holds nothing back
from the worker's own sequences but those pins, which are bounded, and promises nothing: an answer may always be "not
now".
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from engine.worker.cache.prefix_cache import KeyLoan
from engine.worker.role import HandlerHost
from engine.worker.sharing.exposure import Exposure
from engine.worker.sharing.lease_deadlines import keep_deadlines
from engine.worker.wire import LeaseKeysRequest
from kvstore.leases import LeaseLedger, Returned
from rorqual.clock import Clock
from rorqual.ids import Incarnation, LeaseName, RecordId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Offer, RecordOffer

FIRST_ID = 1 << 32
"""Ids of its leases begin here: those of hand-overs are records."""

NAME = "keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLenderConfig:
    worker_id: WorkerId
    incarnation: Incarnation
    wire_id: str
    lease_seconds: float = 15.0
    transfer_seconds_max: float = 10.0
    leases_max: int = 32  # running, or cooling
    pages_share_max: float = 0.5  # of all pages, in leases together; one that is in several counts for each


class KeyLendingMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "rorqual_worker_key_leases",
            "Requests for kept pages by other workers: granted, or refused since nothing is there or too much is out.",
            ["outcome"],
            registry=registry,
        )
        self.pages_lent = Counter(
            "rorqual_worker_key_lease_pages", "Kept pages offered to other workers.", registry=registry
        )
        self.ended = Counter(
            "rorqual_worker_key_leases_ended",
            "Leases of kept pages that ended: released by their readers, or expired.",
            ["how"],
            registry=registry,
        )
        self.leases = Gauge(
            "rorqual_worker_key_leases_open", "Leases of kept pages, running or cooling.", registry=registry
        )


class KeyLender:
    def __init__(
        self, config: KeyLenderConfig, *, clock: Clock, metrics: KeyLendingMetrics, exposure: Exposure
    ) -> None:
        self.config = config
        self._clock = clock
        self._metrics = metrics
        self._exposure = exposure
        self._ledger = LeaseLedger(
            config.worker_id,
            config.incarnation,
            num_records=config.leases_max,
            lease_seconds=config.lease_seconds,
            transfer_seconds_max=config.transfer_seconds_max,
            first_id=FIRST_ID,
        )
        self._loans: dict[RecordId, KeyLoan] = {}  # by the number of the lease, which stands for a record
        self._free = [RecordId(number) for number in reversed(range(config.leases_max))]
        self._num_pages = 0
        self._host: HandlerHost | None = None
        self._changed = asyncio.Event()
        metrics.leases.set_function(lambda: float(len(self._loans)))

    @property
    def host(self) -> HandlerHost:
        assert self._host is not None
        return self._host

    @property
    def is_idle(self) -> bool:
        return not self._loans

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

    async def lease(self, request: LeaseKeysRequest) -> Offer | None:
        """What of it can be read. None: nothing, or not now."""
        answer: asyncio.Future[Offer | None] = asyncio.get_running_loop().create_future()

        def grant() -> None:
            if not answer.done():  # else nobody waits for it any more
                answer.set_result(self._lease(request))

        self.host.enqueue(grant)
        return await answer

    def renew_for_reader(self, name: LeaseName) -> float | None:
        """Seconds that remain; None when it is no lease of these, or has ended."""
        remaining = self._ledger.renew(name, self._clock.monotonic())
        self._note_change()
        return remaining

    def release_for_reader(self, name: LeaseName) -> bool:
        """The reader is done. False when it is no lease of these, or had ended."""
        returned = self._ledger.release(name, self._clock.monotonic())
        if returned is None:
            return False
        self._metrics.ended.labels("released").inc()
        self.host.enqueue(lambda: self._take_back(returned))
        self._note_change()
        return True

    def _lease(self, request: LeaseKeysRequest) -> Offer | None:
        """In the host's own task."""
        cache = self.host.scheduler.cache
        num_pages_max = self.config.pages_share_max * self.host.scheduler.config.num_pages
        loan = None
        if not self._free or self._num_pages + len(request.keys) > num_pages_max:
            self._metrics.requests.labels("full").inc()
            return None
        if cache is not None:
            loan = cache.lend(request.keys, first=request.first_page, wants_tail=request.wants_tail)
        if loan is None:
            self._metrics.requests.labels("gone").inc()
            return None
        assert cache is not None
        return self._grant(request, loan)

    def _grant(self, request: LeaseKeysRequest, loan: KeyLoan) -> Offer:
        number = self._free.pop()
        now = self._clock.monotonic()
        name = self._ledger.grant(number, now)
        self._loans[number] = loan
        self._num_pages += loan.pin.num_pages
        self._metrics.requests.labels("granted").inc()
        self._metrics.pages_lent.inc(len(loan.pages))
        self._note_change()
        record = None
        if loan.record is not None:
            assert loan.packed is not None
            record = RecordOffer(
                record=loan.record,
                num_tokens=loan.tail_depth * PAGE_TOKENS,
                num_bytes=loan.packed.num_bytes,
                digest=loan.packed.digest,
            )
        return Offer(
            lease=name,
            wire_id=self.config.wire_id,
            lease_seconds=self.config.lease_seconds,
            transfer_seconds=self.config.transfer_seconds_max,
            first_page=request.first_page,
            pages=loan.pages,
            digests=loan.digests,
            record=record,
        )

    def _advance(self) -> None:
        """In the host's own task."""
        moved = self._ledger.advance(self._clock.monotonic())
        self._metrics.ended.labels("expired").inc(len(moved.expired))
        for returned in moved.returned:
            self._take_back(returned)
        self._note_change()

    def _take_back(self, returned: Returned) -> None:
        loan = self._loans.pop(returned.record)
        self._num_pages -= loan.pin.num_pages
        self._free.append(returned.record)
        cache = self.host.scheduler.cache
        assert cache is not None
        cache.take_back(loan.pin)
        self._note_change()

    def _note_change(self) -> None:
        self._changed.set()
        self._exposure.set(NAME, active=self._ledger.num_records > 0, send=self.host.send)

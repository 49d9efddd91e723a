"""Prefill and decode workers in one process: real hosts with real role handlers over strict fake ranks.

Called by the tests of the role handlers, under `tests.harness.virtual`. Three things only are not the workers' own: the
rank, the calls of decode workers to prefill workers (`LocalLenders`), which reach the `Lender` itself, and the clock,
which is the loop's. What one worker lends, its rank refuses to write into until it has been taken back.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fake_rank import FakeRank
from fake_reads import ReadingLink
from fake_state import answer

from decode_worker.borrowing import Borrower, BorrowerConfig
from decode_worker.metrics import BorrowingMetrics
from engine.worker.events import LentEvent, PagesEvent
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.role import HandlerHost, RoleHandler
from engine.worker.session import Session
from engine.worker.sharing.lenders import LendingFailed, LendingRefused
from kvstore.transfer.contract import Endpoint
from prefill_worker.lending import Lender, LenderConfig
from prefill_worker.metrics import LendingMetrics
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason, Offer, Open, SequenceReport, Source, Take
from tests.harness.virtual import LoopClock

LEASE_SECONDS = 3.0
TRANSFER_SECONDS = 1.0
CALL_SECONDS = 0.5
OFFER_SECONDS = 20.0
CHUNK_TOKENS = 512

Seconds = Callable[[], float]


def no_time() -> float:
    return 0.0


class WatchedLender(Lender):
    """Tells its rank what is lent, and what has been taken back."""

    def __init__(self, rank: FakeRank, config: LenderConfig, **parts: Any) -> None:
        super().__init__(config, **parts)
        self._rank = rank
        self._lent: dict[int, list[int]] = {}  # pages that are out, by record

    def attach(self, host: HandlerHost) -> None:
        super().attach(_Watched(host, take_back=self._hear))

    def _hear(self, record: int) -> None:
        self._rank.take_back(tuple(self._lent.pop(record, ())), record)

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        offer = super().lend(event)
        if offer is not None:
            self._rank.lend(offer.pages, offer.record.record if offer.record is not None else None)
            self._lent.setdefault(offer.lease.lease_id, []).extend(offer.pages)
        return offer


class _Watched:
    """A host, or its scheduler, whose `take_back` is heard."""

    def __init__(self, watched: Any, *, take_back: Callable[..., None]) -> None:
        self._watched = watched
        self._hear = take_back

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)

    @property
    def scheduler(self) -> Any:
        return _Watched(self._watched.scheduler, take_back=self._hear)

    def take_back(self, record: int) -> None:
        self._hear(record)
        self._watched.take_back(record)


@dataclass
class Worker:
    """`address` is where it is reached by everybody."""

    address: str
    host: Host
    link: ReadingLink
    handler: RoleHandler
    metrics: WorkerMetrics
    serving: asyncio.Task[None] | None = None

    @property
    def rank(self) -> FakeRank:
        return self.link.rank

    def connect(self) -> Ear:
        return Ear(self.host.connect("router"))

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"rorqual_worker_{name}", labels) or 0.0

    def check_empty(self) -> None:
        load = self.host.load()
        assert self.host.is_idle
        assert (load.pages_free, load.slots_free) == (load.pages_total, load.slots_total)
        assert load.pages_leased == 0
        assert self.host.scheduler.num_records_free == self.rank.num_records
        assert not self.rank.slots
        assert not self.rank.fetches
        assert not self.rank.is_exposed
        assert self.count("leases") == self.count("lease_pages") == self.count("fetches_open") == 0

    async def empty(self) -> None:
        await until(lambda: self.host.is_idle)
        self.check_empty()


@dataclass
class PrefillWorker(Worker):
    lender: Lender = field(kw_only=True)


@dataclass
class DecodeWorker(Worker):
    borrower: Borrower = field(kw_only=True)


class LocalLenders:
    """Calls from decode workers, carried to the lender at the address, or to nobody. They take `call_seconds()`."""

    def __init__(self) -> None:
        self.lenders: dict[str, tuple[Lender, Endpoint]] = {}
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, LendingFailed] = {}  # by method, for every call from now on
        self.call_seconds: Seconds = no_time
        self._gates: dict[str, asyncio.Event] = {}

    def shut(self, method: str) -> None:
        """Calls of it are not answered any more."""
        self._gates[method] = asyncio.Event()

    def open(self, method: str) -> None:
        self._gates.pop(method).set()

    async def attach(self, source: Source, *, seconds_max: float) -> Endpoint:
        lender, endpoint = await self._reach("attach", source, seconds_max)
        if source.lease.incarnation != lender.config.incarnation or source.wire_id != lender.config.wire_id:
            raise LendingRefused(f"attach at {source.address} failed with FAILED_PRECONDITION")
        return endpoint

    async def renew(self, source: Source, *, seconds_max: float) -> float | None:
        lender, _ = await self._reach("renew", source, seconds_max)
        return lender.renew_for_reader(source.lease)

    async def release(self, source: Source, *, seconds_max: float) -> bool:
        lender, _ = await self._reach("release", source, seconds_max)
        return lender.release_for_reader(source.lease)

    async def _reach(self, method: str, source: Source, seconds_max: float) -> tuple[Lender, Endpoint]:
        self.calls[method] += 1
        try:
            async with asyncio.timeout(seconds_max):
                await asyncio.sleep(self.call_seconds())
                if method in self._gates:
                    await self._gates[method].wait()
        except TimeoutError:
            text = f"{method} at {source.address} failed with DEADLINE_EXCEEDED"
            raise LendingFailed(text, is_overdue=True) from None
        if method in self.failures:
            raise self.failures[method]
        if source.address not in self.lenders:
            raise LendingFailed(f"{method} at {source.address} failed with UNAVAILABLE")
        return self.lenders[source.address]


class World:
    """Workers that can reach each other."""

    def __init__(self) -> None:
        self.lenders = LocalLenders()
        self.owners: dict[str, FakeRank] = {}  # by agent
        self.workers: dict[str, Worker] = {}
        self.step_seconds: Seconds = no_time
        self.read_seconds: Seconds = no_time
        self._incarnations = itertools.count(1)

    def start_prefill(
        self,
        address: str = "prefill",
        *,
        num_pages: int = 16,
        num_slots: int = 4,
        num_records: int = 8,
        lease_seconds: float = LEASE_SECONDS,
        **options: Any,
    ) -> PrefillWorker:
        rank, config = self._rank(address, num_pages, num_slots, num_records, options)
        metrics = WorkerMetrics()
        ready = rank.ready()
        lender = WatchedLender(
            rank,
            LenderConfig(
                worker_id=config.worker_id,
                incarnation=config.incarnation,
                wire_id=ready.wire_id,
                num_records=num_records,
                lease_seconds=lease_seconds,
                transfer_seconds_max=TRANSFER_SECONDS,
            ),
            clock=LoopClock(),
            metrics=LendingMetrics(metrics.registry),
        )
        link = self._link(rank)
        host = Host(link=link, ready=ready, config=config, metrics=metrics, handler=lender)
        worker = PrefillWorker(address, host, link, lender, metrics, lender=lender)
        assert ready.endpoint is not None
        self.lenders.lenders[address] = (lender, ready.endpoint)
        self.owners[rank.agent] = rank
        self._serve(worker)
        return worker

    def start_decode(
        self,
        address: str = "decode",
        *,
        num_pages: int = 16,
        num_slots: int = 4,
        num_records: int = 8,
        **options: Any,
    ) -> DecodeWorker:
        rank, config = self._rank(address, num_pages, num_slots, num_records, options)
        metrics = WorkerMetrics()
        ready = rank.ready()
        borrower = Borrower(
            BorrowerConfig(
                wire_id=ready.wire_id,
                num_slots=num_slots,
                num_page_components=ready.num_page_components,
                transfer_seconds_max=TRANSFER_SECONDS,
                call_seconds_max=CALL_SECONDS,
                offer_seconds_max=OFFER_SECONDS,
            ),
            lenders=self.lenders,
            clock=LoopClock(),
            metrics=BorrowingMetrics(metrics.registry),
        )
        link = self._link(rank)
        host = Host(link=link, ready=ready, config=config, metrics=metrics, handler=borrower)
        worker = DecodeWorker(address, host, link, borrower, metrics, borrower=borrower)
        self._serve(worker)
        return worker

    def lose(self, address: str) -> None:
        """It is gone, and nothing answers where it was."""
        worker = self.workers.pop(address)
        self.owners.pop(worker.rank.agent, None)
        self.lenders.lenders.pop(address, None)
        assert worker.serving is not None
        if worker.serving.done():
            worker.serving.result()
        worker.serving.cancel()

    async def empty(self) -> None:
        for worker in self.workers.values():
            await worker.empty()

    async def close(self) -> None:
        serving = [worker.serving for worker in self.workers.values() if worker.serving is not None]
        for task in serving:
            task.cancel()
        for ended in await asyncio.gather(*serving, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                assert isinstance(ended, BaseException)
                raise ended

    def _rank(
        self, address: str, num_pages: int, num_slots: int, num_records: int, options: dict[str, Any]
    ) -> tuple[FakeRank, HostConfig]:
        incarnation = Incarnation(next(self._incarnations))
        rank = FakeRank(
            num_pages=num_pages,
            num_slots=num_slots,
            prefill_tokens_max=CHUNK_TOKENS,
            num_records=num_records,
            agent=f"{address}#{incarnation}",
            drafts_max={"auto": 4}.get(drafts := options.get("drafts", 0), drafts),
        )
        config = HostConfig(
            worker_id=WorkerId(address),
            incarnation=incarnation,
            exact=False,
            prefill_tokens_max=CHUNK_TOKENS,
            **options,
        )
        return rank, config

    def _link(self, rank: FakeRank) -> ReadingLink:
        return ReadingLink(
            rank,
            self.owners,
            step_seconds=lambda: self.step_seconds(),
            read_seconds=lambda: self.read_seconds(),
        )

    def _serve(self, worker: Worker) -> None:
        worker.serving = asyncio.create_task(worker.host.run())
        self.workers[worker.address] = worker


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    """Every worker that was not lost must be well at the end."""
    world = World()
    try:
        yield world
    except BaseException:
        # The broken invariant of a worker is what the test would otherwise wait for in vain.
        for worker in world.workers.values():
            if worker.serving is not None and worker.serving.done() and not worker.serving.cancelled():
                worker.serving.result()
        raise
    await asyncio.sleep(0)
    await world.close()


class Ear:
    """A router's session that is always read."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.reports: dict[int, list[SequenceReport]] = {}
        self._listening = asyncio.create_task(self._listen())

    def submit(self, command: Any) -> None:
        self.session.submit(command)

    def close(self) -> None:
        self._listening.cancel()
        self.session.close()

    def of(self, number: int) -> list[SequenceReport]:
        if self._listening.done():
            self._listening.result()
        return self.reports.get(number, [])

    def tokens(self, number: int) -> list[int]:
        return [token for report in self.of(number) for token in report.token_ids]

    def offers(self, number: int) -> list[Offer]:
        return [report.offer for report in self.of(number) if report.offer is not None]

    def is_bound(self, number: int) -> bool:
        return any(report.bound for report in self.of(number))

    def has_ended(self, number: int) -> bool:
        return bool(self.of(number)) and self.of(number)[-1].finish_reason is not None

    async def end(self, number: int) -> SequenceReport:
        """The last report of a sequence."""
        await until(lambda: self.has_ended(number))
        return self.of(number)[-1]

    async def ended(self, number: int, reason: FinishReason) -> SequenceReport:
        report = await self.end(number)
        assert report.finish_reason is reason, report
        return report

    async def _listen(self) -> None:
        while not self.session.closed.is_set():
            for report in (await self.session.next_report()).sequences:
                own = self.reports.setdefault(report.sequence_id, [])
                assert not (own and own[-1].finish_reason), "a report came after the last one"
                if report.token_ids:
                    begin = next((item.first_index for item in own if item.token_ids), report.first_index)
                    expected = begin + len(self.tokens(report.sequence_id))
                    assert report.first_index == expected, "tokens were left out, or came twice"
                own.append(report)


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A prompt that a prefill worker has computed and lends."""

    command: Open
    offers: list[Offer]
    tokens: tuple[int, ...]  # the first one
    address: str

    @property
    def source(self) -> Source:
        return Source(address=self.address, lease=self.offers[0].lease, wire_id=self.offers[0].wire_id)

    def takes(self, number: int | None = None) -> list[Take]:
        """All there is to say about it, for a sequence of this number or its own."""
        sequence_id = self.command.sequence_id if number is None else SequenceId(number)
        return [
            Take(
                sequence_id=sequence_id,
                offer=offer,
                token_ids=self.tokens if offer.record is not None else (),
            )
            for offer in self.offers
        ]


async def computed(worker: PrefillWorker, ear: Ear, command: Open) -> Computed:
    """Have a prompt computed, to the end of it."""
    ear.submit(command)
    number = command.sequence_id
    await until(lambda: bool(ear.offers(number)) and ear.offers(number)[-1].record is not None)
    return Computed(
        command=command,
        offers=ear.offers(number),
        tokens=tuple(ear.tokens(number)),
        address=worker.address,
    )


def an_open(
    number: int, *, length: int = 300, max_tokens: int = 10, source: Source | None = None, **sampling: int
) -> Open:
    return Open(
        sequence_id=SequenceId(number),
        request_id=f"r{number}",
        prompt=(np.arange(length, dtype=np.int32) * 7 + number) % 90,
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=number, **sampling),
        source=source,
    )


def the_answer(command: Open) -> list[int]:
    return answer(
        command.prompt.tolist(), command.max_tokens, command.sampling, ignore_eos=command.ignore_eos
    )


async def until(condition: Callable[[], bool], *, seconds_max: float = 30.0) -> None:
    """Looks every millisecond of the loop's time."""
    async with asyncio.timeout(seconds_max):
        while not condition():
            await asyncio.sleep(0.001)

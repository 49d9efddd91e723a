"""One worker, seen from the router: its session, reconnected whenever lost, and the sequences open on it.

Made and run by `router.fleet`. The wire stands behind `Transport`: `router.session_client` speaks gRPC, tests connect a
host in the same process. It decides nothing about placement and retries no sequence: a lost session ends its sequences
with an error report, and whoever opened them decides.

Delivery is exactly-once by token numbers: a token that comes twice is dropped, one that is missing ends its
sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual import __version__
from rorqual.errors import Overloaded, RorqualError
from rorqual.ids import SequenceId
from rorqual.session import (
    PROTOCOL,
    RENEWALS_PER_LEASE,
    Cancel,
    Command,
    Credit,
    Hello,
    Offer,
    Open,
    Renew,
    Role,
    SequenceReport,
    StepReport,
    Take,
    Welcome,
)
from rorqual.telemetry import fields
from router.credit import CreditLedger, CreditUse
from router.fleet_metrics import FleetMetrics
from router.members import Members
from router.picture import Picture
from router.placement import FleetTable
from router.sequences import RemoteSequence, SequenceRequest, Sink, without_first
from router.worker_feed import WorkerFeed

log = logging.getLogger(__name__)

RENEW_SECONDS_MIN = 0.01  # whatever a worker says


class SessionLost(RorqualError):
    """The session with a worker could not be opened or has ended; the text says why."""


class Channel(Protocol):
    """One open stream to a worker. `send` and `receive` raise SessionLost, and may be used by two tasks."""

    async def send(self, command: Hello | Command) -> None: ...

    async def receive(self) -> Welcome | StepReport: ...

    async def close(self) -> None: ...


class Transport(Protocol):
    async def connect(self, address: str) -> Channel:
        """Start a stream; it need not be established yet. Raises SessionLost."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    connect_seconds_max: float = 10.0  # from the attempt to the Welcome
    # A worker reports at least every second. Shorter than half a lease, so that a lease that a decode worker renewed
    # before it stood still can be renewed for another one.
    silence_seconds_max: float = 8.0
    write_seconds_max: float = 30.0
    backoff_seconds_min: float = 0.1
    backoff_seconds_max: float = 5.0
    healthy_seconds_min: float = 5.0  # a session that ends earlier counts as one more failed attempt
    sequences_per_worker_max: int = 1024
    commands_queued_max: int = 4096  # opens are refused beyond it; all else is bounded by what is open
    credit_waiting_max: int = 1024  # sequences that wait for credit of a decode worker


class Owner(Protocol):
    """What a link needs of its fleet."""

    transport: Transport
    config: FleetConfig
    metrics: FleetMetrics
    router_id: str
    randomness: random.Random
    credit: CreditLedger
    picture: Picture
    table: FleetTable
    members: Members

    def check_model(self, address: str, welcome: Welcome) -> None:
        """Raises SessionLost when the worker does not answer as the others do."""
        ...

    def next_session_number(self) -> int: ...

    def announce_change(self) -> None:
        """A worker has connected, left, or changed its mind about draining."""
        ...

    def tend(self) -> None:
        """The picture of caches has changed."""
        ...


class WorkerLink:
    """One worker: its session, while there is one, and the sequences open on it. Whatever placement goes by it writes
    into the worker's row of the fleet's table as soon as it changes."""

    def __init__(self, owner: Owner, address: str) -> None:
        self.welcome: Welcome | None = None
        self.failure = ""  # of the last attempt
        self.stays = True  # while there is no session, too
        self._address = address
        self._session_number = 0  # over all workers; 0 before the first
        self._owner = owner
        self._draining = False
        self._credit: Credit | None = None  # of a decode worker, as it last said
        self._sequences: dict[SequenceId, RemoteSequence] = {}
        self._leases: dict[SequenceId, float] = {}  # to be renewed; seconds of each
        self._have_leases = asyncio.Event()
        self._next_id = 1
        self._num_reports = 0
        self._welcomed_at = 0.0  # on the loop's clock
        self._commands: deque[Command] = deque()
        self._have_commands = asyncio.Event()
        self._tokens_outstanding = 0
        self._prompt_tokens_outstanding = 0
        self._prompt_tokens_sent = 0
        metrics = owner.metrics
        self.feed = WorkerFeed(owner.picture.join(), address=address, metrics=metrics)
        self._row = self.feed.index
        owner.table.join(self._row, address)
        self._sessions_lost = metrics.sessions_lost.labels(address)
        metrics.sequences_outstanding.labels(address).set_function(lambda: float(len(self._sequences)))
        metrics.tokens_outstanding.labels(address).set_function(lambda: float(self._tokens_outstanding))

    @property
    def address(self) -> str:
        return self._address

    @property
    def session_number(self) -> int:
        return self._session_number

    async def run(self) -> None:
        """Keep a session up, for as long as the router runs, or until one is over while the worker is not to stay. One
        that welcomes us and is gone at once is as bad as one that cannot be reached, and is left alone for as long."""
        num_failures = 0
        told = ""  # in the log, of the failures since the last session
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._run_session()
            except SessionLost as error:
                self.failure = str(error)
            was_connected = self.welcome is not None
            if was_connected and loop.time() - self._welcomed_at >= self._owner.config.healthy_seconds_min:
                num_failures = 0
            num_failures += 1
            self._sessions_lost.inc()
            if was_connected or self.failure != told:
                log.warning("found a worker gone %s", fields(worker=self._address, error=self.failure))
                told = self.failure
            else:
                log.debug("failed to connect %s", fields(worker=self._address, error=self.failure))
            self._lose()
            if not self.stays:
                return
            await asyncio.sleep(self._backoff_seconds(num_failures))

    def leave(self) -> None:
        """Give back the row and the place in the picture, once `run` has ended. The link is of no use afterwards."""
        assert self.welcome is None, "a worker was forgotten that has a session"
        assert not self._sequences, "a worker was forgotten that has sequences"
        self._owner.table.leave(self._row)
        self._owner.picture.leave(self.feed.content)
        self._owner.metrics.forget(self._address)

    def open(self, request: SequenceRequest, *, sink: Sink, tag: int) -> RemoteSequence:
        """Raises Overloaded when a bound is reached or the worker is not connected."""
        config = self._owner.config
        if self.welcome is None:
            raise Overloaded(f"worker {self._address} is not connected")
        if (
            len(self._sequences) >= config.sequences_per_worker_max
            or len(self._commands) >= config.commands_queued_max
        ):
            raise Overloaded(f"worker {self._address} has {len(self._sequences)} sequences outstanding")
        sequence_id = SequenceId(self._next_id)
        self._next_id += 1
        sequence = RemoteSequence(
            link=self,
            role=self.welcome.role,
            sequence_id=sequence_id,
            request=request,
            sink=sink,
            tag=tag,
        )
        self._sequences[sequence_id] = sequence
        self._count(sequence, +1)
        self._note_outstanding()
        self._owner.metrics.sequences_opened.labels(self._address).inc()
        self._send(
            Open(
                sequence_id=sequence_id,
                request_id=request.request_id,
                prompt=request.prompt,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                sampling=request.sampling,
                source=request.source,
                cache_salt=request.cache_salt,
                fetch=request.fetch,
            )
        )
        return sequence

    def cancel(self, sequence: RemoteSequence) -> None:
        """See `router.sequences.RemoteSequence.cancel`."""
        if self._is_open(sequence):
            self._drop(sequence)
            self._owner.metrics.sequences_cancelled.inc()
            self._send(Cancel(sequence_id=sequence.sequence_id))

    def take(self, sequence: RemoteSequence, offer: Offer, token_ids: tuple[int, ...]) -> None:
        """See `router.sequences.RemoteSequence.take`."""
        if self._is_open(sequence):
            self._send(Take(sequence_id=sequence.sequence_id, offer=offer, token_ids=token_ids))

    def keep_lease(self, sequence: RemoteSequence, lease_seconds: float | None, *, at_once: bool) -> None:
        """See `router.sequences.RemoteSequence.keep_lease`."""
        if lease_seconds is None:
            self._leases.pop(sequence.sequence_id, None)
        elif self._is_open(sequence):
            self._leases[sequence.sequence_id] = lease_seconds
            self._have_leases.set()
            if at_once:
                self._renew((sequence.sequence_id,))

    def _is_open(self, sequence: RemoteSequence) -> bool:
        # Its numbers are never used again, on a later session neither: it is open, or it has ended.
        return sequence.sequence_id in self._sequences

    def _send(self, command: Command) -> None:
        if self.welcome is not None:  # else the session is over, and what was open on it too
            self._commands.append(command)
            self._have_commands.set()

    async def _run_session(self) -> None:
        """One session from Hello to its end, which is always SessionLost."""
        channel = await self._owner.transport.connect(self._address)
        try:
            await self._greet(channel)
            tasks = [
                asyncio.create_task(work)
                for work in (
                    self._read(channel),
                    self._write(channel),
                    self._keep_renewing(),
                    self.feed.keep(self._send),
                )
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended: list[asyncio.Task[Any]] = [task for task in tasks if task.done()]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for task in ended:
                task.result()
        finally:
            with contextlib.suppress(SessionLost):
                await channel.close()

    async def _greet(self, channel: Channel) -> None:
        seconds = self._owner.config.connect_seconds_max
        try:
            async with asyncio.timeout(seconds):
                hello = Hello(protocol=PROTOCOL, router_id=self._owner.router_id, version=__version__)
                await channel.send(hello)
                welcome = await channel.receive()
        except TimeoutError:
            self._owner.metrics.stages_overdue.labels("connect").inc()
            raise SessionLost(f"{self._address} did not welcome us within {seconds:g} s") from None
        if not isinstance(welcome, Welcome):
            raise SessionLost(f"{self._address} sent a report before its welcome")
        if welcome.role is Role.DECODE and welcome.credit is None:
            raise SessionLost(f"{self._address} is a decode worker and grants no credit")
        self._owner.check_model(self._address, welcome)
        self._session_number = self._owner.next_session_number()
        self._welcomed_at = asyncio.get_running_loop().time()
        self.welcome, self._draining, self._num_reports = welcome, False, 0
        self._owner.members.join(self._address, welcome)
        self._owner.table.connect(
            self._row,
            session_number=self._session_number,
            role=welcome.role,
            sequences_max=welcome.sequences_max,
            # Workers of both roles have no engine of transfers.
            can_share=welcome.role is not Role.BOTH and bool(welcome.wire_id),
            load=welcome.load,
        )
        if welcome.role is Role.DECODE:
            self._watch_credit()
            self._grant(welcome.credit)
        self._send(self.feed.begin(welcome.incarnation))
        self._note_pages()
        self._owner.metrics.sessions_opened.labels(self._address).inc()
        self._owner.metrics.describe_worker(self._address, role=welcome.role, version=welcome.version)
        log.info(
            "connected to a worker %s",
            fields(
                worker=self._address,
                role=welcome.role.value,
                id=welcome.worker_id,
                incarnation=f"{welcome.incarnation:x}",
                version=welcome.version or None,
            ),
        )
        self._owner.announce_change()

    async def _read(self, channel: Channel) -> None:
        seconds = self._owner.config.silence_seconds_max
        while True:
            try:
                async with asyncio.timeout(seconds):
                    report = await channel.receive()
            except TimeoutError:
                self._owner.metrics.stages_overdue.labels("report").inc()
                raise SessionLost(f"{self._address} said nothing for {seconds:g} s") from None
            if not isinstance(report, StepReport):
                raise SessionLost(f"{self._address} sent a second welcome")
            self._take_in(report)

    async def _write(self, channel: Channel) -> None:
        seconds = self._owner.config.write_seconds_max
        while True:
            await self._have_commands.wait()
            self._have_commands.clear()
            while self._commands:
                try:
                    async with asyncio.timeout(seconds):
                        await channel.send(self._commands.popleft())
                except TimeoutError:
                    self._owner.metrics.stages_overdue.labels("command").inc()
                    raise SessionLost(f"{self._address} took no command for {seconds:g} s") from None

    async def _keep_renewing(self) -> None:
        """One Renew for all leases that are kept, as often as the shortest needs; of a worker they are all equally
        long, so one that joins in between is renewed sooner than it needs."""
        while True:
            await self._have_leases.wait()
            if not self._leases:
                self._have_leases.clear()
                continue
            await asyncio.sleep(max(min(self._leases.values()) / RENEWALS_PER_LEASE, RENEW_SECONDS_MIN))
            self._renew(tuple(self._leases))

    def _renew(self, sequence_ids: tuple[SequenceId, ...]) -> None:
        # A worker that takes no commands for so long is about to be given up.
        if sequence_ids and len(self._commands) < self._owner.config.commands_queued_max:
            self._send(Renew(sequence_ids=sequence_ids))
            self._owner.metrics.leases_renewed.inc(len(sequence_ids))

    def _take_in(self, report: StepReport) -> None:
        self._num_reports += 1
        if report.number != self._num_reports:
            raise SessionLost(f"{self._address} sent report {report.number} as number {self._num_reports}")
        self._owner.table.set_load(self._row, report.load)
        if report.feed:
            # Before its sequences: who is told of a first token can count on the pages before it.
            self.feed.take(report.feed)
            self._note_pages()
            self._owner.tend()
        if report.draining != self._draining:
            self._draining = report.draining
            self._owner.table.set_draining(self._row, report.draining)
            log.info("saw a worker drain %s", fields(worker=self._address, draining=report.draining))
            self._grant(report.credit)
            self._owner.announce_change()
        elif self._credit is not None and report.credit not in (None, self._credit):
            self._grant(report.credit)
        for item in report.sequences:
            sequence = self._sequences.get(item.sequence_id)
            if sequence is not None:  # else it was cancelled here while this was on its way
                self._deliver(sequence, item)

    def _grant(self, credit: Credit | None) -> None:
        """Tell the ledger what a decode worker says; it never gets more than this router would open on it."""
        self._credit = credit or self._credit
        if self._credit is None:
            return  # no decode worker
        sequences = min(self._credit.sequences, self._owner.config.sequences_per_worker_max)
        self._owner.credit.set_limit(
            self._address,
            Credit(sequences=sequences, pages=self._credit.pages),
            session_number=self._session_number,
            is_draining=self._draining,
        )

    def _watch_credit(self) -> None:
        def use() -> CreditUse | None:
            return self._owner.credit.use_of(self._address)

        metrics = self._owner.metrics
        metrics.credit_sequences.labels(self._address).set_function(lambda: float(_sequences_of(use())))
        metrics.credit_pages.labels(self._address).set_function(lambda: float(_pages_of(use())))

    def _deliver(self, sequence: RemoteSequence, report: SequenceReport) -> None:
        missing = sequence.left_out(report)
        if missing:
            self.cancel(sequence)
            sequence.deliver(sequence.failure(f"{self._address} left out {missing}"))
            return
        num_duplicate = sequence.num_received - report.first_index
        if num_duplicate > 0 and report.token_ids:
            self._owner.metrics.tokens_duplicate.inc(min(num_duplicate, len(report.token_ids)))
            report = without_first(report, num_duplicate)
        self._count(sequence, -1)
        sequence.count(report)
        self._count(sequence, +1)
        self._note_outstanding()
        # Before it is delivered, since the sink may cancel it.
        if report.finish_reason is not None:
            self._drop(sequence)
        is_wanted = sequence.deliver(report)
        if not is_wanted and report.finish_reason is None:
            self._owner.metrics.sequences_unread.inc()
            self.cancel(sequence)

    def _drop(self, sequence: RemoteSequence) -> None:
        del self._sequences[sequence.sequence_id]
        self._leases.pop(sequence.sequence_id, None)
        self._count(sequence, -1)
        self._note_outstanding()

    def _count(self, sequence: RemoteSequence, sign: int) -> None:
        """Around what changes it; `_note_outstanding` follows."""
        self._tokens_outstanding += sign * sequence.tokens_outstanding
        self._prompt_tokens_outstanding += sign * sequence.prompt_tokens_outstanding
        self._prompt_tokens_sent += sign * sequence.prompt_tokens_sent

    def _note_outstanding(self) -> None:
        self._owner.table.set_outstanding(
            self._row,
            sequences=len(self._sequences),
            tokens=self._tokens_outstanding,
            prompt_tokens=self._prompt_tokens_outstanding,
            prompt_tokens_sent=self._prompt_tokens_sent,
        )

    def _note_pages(self) -> None:
        self._owner.table.set_pages_cached(self._row, self.feed.reader.num_entries)

    def _lose(self) -> None:
        """The session is over: so is all that was open on it."""
        was_connected = self.welcome is not None
        self.welcome = self._credit = None
        self._owner.members.leave(self._address)
        self._owner.table.disconnect(self._row)
        self._commands.clear()
        self._have_commands.clear()
        self.feed.end()
        self._note_pages()
        # Before its sequences hear of it: they may ask for credit, and it has none to give.
        self._owner.credit.drop(self._address)
        while self._sequences:
            sequence = next(iter(self._sequences.values()))
            self._drop(sequence)
            sequence.deliver(sequence.failure(f"worker {self._address} was lost: {self.failure}"))
        assert self._tokens_outstanding == 0, "tokens are outstanding on a session that is over"
        assert self._prompt_tokens_outstanding == 0, "a prompt is outstanding on a session that is over"
        assert self._prompt_tokens_sent == 0, "a prompt is outstanding on a session that is over"
        if was_connected:
            self._owner.metrics.worker_info.remove_by_labels({"worker": self._address})
            self._owner.announce_change()

    def _backoff_seconds(self, num_failures: int) -> float:
        """Doubling up to the cap, half of it drawn: routers that lost a worker together come back apart."""
        config = self._owner.config
        ceiling = min(config.backoff_seconds_max, config.backoff_seconds_min * 2 ** min(num_failures - 1, 30))
        return ceiling * (0.5 + 0.5 * self._owner.randomness.random())


def _sequences_of(use: CreditUse | None) -> int:
    return 0 if use is None else use.sequences


def _pages_of(use: CreditUse | None) -> int:
    return 0 if use is None else use.pages

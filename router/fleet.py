"""The router's sessions with its workers: one each, reconnected whenever lost, and what is open on them.

Run by `router.process`; `router.dispatch` looks at `view` and opens sequences. The wire stands behind
`Transport`: `router.session_client` speaks gRPC, tests connect a host in the same process. It decides
nothing about placement and retries no sequence: a lost session ends its sequences with an error report, and
the dispatcher decides.

Delivery is exactly-once by token numbers: a token that comes twice is dropped, one that is missing ends its
sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual.errors import Overloaded, RorqualError
from rorqual.ids import SequenceId
from rorqual.sampling import SamplingParams
from rorqual.session import (
    PROTOCOL,
    Cancel,
    ErrorCode,
    FinishReason,
    Hello,
    Load,
    Open,
    SequenceReport,
    StepReport,
    TokenArray,
    Welcome,
)
from rorqual.telemetry import fields
from router.fleet_metrics import FleetMetrics
from router.placement import WorkerView

log = logging.getLogger(__name__)


class SessionLost(RorqualError):
    """The session with a worker could not be opened or has ended; the text says why."""


class Channel(Protocol):
    """One open stream to a worker. `send` and `receive` raise SessionLost, and may be used by two tasks."""

    async def send(self, command: Hello | Open | Cancel) -> None: ...

    async def receive(self) -> Welcome | StepReport: ...

    async def close(self) -> None: ...


class Transport(Protocol):
    async def connect(self, address: str) -> Channel:
        """Start a stream; it need not be established yet. Raises SessionLost."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    connect_seconds_max: float = 10.0  # from the attempt to the Welcome
    silence_seconds_max: float = 20.0  # a worker reports at least every second
    write_seconds_max: float = 30.0
    backoff_seconds_min: float = 0.1
    backoff_seconds_max: float = 5.0
    healthy_seconds_min: float = 5.0  # a session that ends earlier counts as one more failed attempt
    sequences_per_worker_max: int = 1024
    commands_queued_max: int = 4096  # opens are refused beyond it; cancels are bounded by what is open


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """A sequence to open."""

    request_id: str
    prompt: TokenArray
    max_tokens: int
    ignore_eos: bool
    sampling: SamplingParams


class Mailbox:
    """Reports for one request, of all its sequences, in order of arrival.

    Holds `values_max` tokens and alternatives that nobody has taken. With more it spills: it empties itself,
    keeps nothing from then on, and the fleet cancels each of its sequences.
    """

    def __init__(self, *, values_max: int) -> None:
        self.has_spilled = False
        self._values_max = values_max
        self._num_values = 0
        self._reports: list[tuple[int, SequenceReport]] = []
        self._news = asyncio.Event()

    @property
    def has_news(self) -> bool:
        return self._news.is_set()

    def put(self, tag: int, report: SequenceReport) -> None:
        self._news.set()
        if self.has_spilled:
            return
        self._num_values += report.num_values
        self._reports.append((tag, report))
        if self._num_values > self._values_max:
            self.has_spilled = True
            self._reports.clear()

    async def wait(self) -> None:
        await self._news.wait()

    def take(self) -> list[tuple[int, SequenceReport]]:
        """Everything since the last time, each with the tag of its sequence."""
        self._news.clear()
        self._num_values = 0
        reports, self._reports = self._reports, []
        return reports


class RemoteSequence:
    """A sequence open on a worker. Its reports go to the mailbox under `tag`; the last has a finish
    reason."""

    def __init__(
        self,
        *,
        link: WorkerLink,
        sequence_id: SequenceId,
        request: SequenceRequest,
        mailbox: Mailbox,
        tag: int,
    ) -> None:
        self.session_number = link.session_number
        self.sequence_id = sequence_id
        self.num_received = 0
        self._num_scored = 0  # prompt tokens whose logprobs have come
        self._num_scores_wanted = 0 if request.sampling.prompt_logprobs is None else len(request.prompt) - 1
        self._link = link
        self._mailbox = mailbox
        self._tag = tag
        self._prompt_tokens = len(request.prompt)
        self._max_tokens = request.max_tokens

    @property
    def tokens_outstanding(self) -> int:
        prompt = 0 if self.num_received else self._prompt_tokens
        return prompt + self._max_tokens - self.num_received

    def cancel(self) -> None:
        """Tell the worker at once. No report comes after this; nothing happens when it has ended already."""
        self._link.cancel(self)

    def deliver(self, report: SequenceReport) -> bool:
        """False when nobody wants to hear more: the mailbox has spilled."""
        self.num_received += len(report.token_ids)
        if report.prompt_logprobs is not None:
            self._num_scored += len(report.prompt_logprobs.logprobs)
        self._mailbox.put(self._tag, report)
        return not self._mailbox.has_spilled

    def left_out(self, report: SequenceReport) -> str:
        """What should have come before this report and did not; empty when it follows on."""
        if report.token_ids and report.first_index > self.num_received:
            return f"tokens {self.num_received}..{report.first_index - 1}"
        scores = report.prompt_logprobs
        num_scored = self._num_scored
        if scores is not None:
            if scores.first != num_scored + 1:
                return f"logprobs of the prompt between {num_scored + 1} and {scores.first}"
            num_scored += len(scores.logprobs)
        if report.token_ids and num_scored != self._num_scores_wanted:
            return f"logprobs of the prompt, of which {num_scored} came for {self._num_scores_wanted}"
        return ""


class Fleet:
    """All workers. `run` must be awaited by a task of the caller and keeps the sessions up until
    cancelled."""

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        transport: Transport,
        config: FleetConfig,
        metrics: FleetMetrics,
        router_id: str,
        randomness: random.Random,
    ) -> None:
        assert len(set(addresses)) == len(addresses)
        self.config = config
        self.metrics = metrics
        self.transport = transport
        self.router_id = router_id
        self.randomness = randomness
        self._links = {address: WorkerLink(self, address) for address in addresses}
        self._num_sessions = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for link in self._links.values():
                tasks.create_task(link.run())

    def view(self) -> list[WorkerView]:
        """The connected workers."""
        return [link.view() for link in self._links.values() if link.welcome is not None]

    def welcomes(self) -> list[Welcome]:
        return [link.welcome for link in self._links.values() if link.welcome is not None]

    def failures(self) -> list[str]:
        """Why each worker that is not connected is not, as far as is known."""
        return [
            link.failure or f"{link.address}: no answer"
            for link in self._links.values()
            if link.welcome is None
        ]

    def open(self, address: str, request: SequenceRequest, *, mailbox: Mailbox, tag: int) -> RemoteSequence:
        """Open a sequence on a connected worker. Raises Overloaded when its bounds are reached."""
        return self._links[address].open(request, mailbox=mailbox, tag=tag)

    @property
    def next_change(self) -> asyncio.Event:
        """Set once a worker connects, leaves or changes its mind about draining. Take it in the same breath
        as the look at the fleet that it is to follow."""
        return self._changed

    async def wait_for_change(self) -> None:
        """Return at the next change after this call."""
        await self.next_change.wait()

    def announce_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self.metrics.workers_connected.set(len(self.welcomes()))

    def next_session_number(self) -> int:
        self._num_sessions += 1
        return self._num_sessions

    def check_model(self, address: str, welcome: Welcome) -> None:
        """Workers of one fleet answer alike: another model among them is refused. Raises SessionLost."""
        for other in self.welcomes():
            if _identity(other) != _identity(welcome):
                raise SessionLost(
                    f"{address} serves {' '.join(map(str, _identity(welcome)))},"
                    f" the others {' '.join(map(str, _identity(other)))} (model, vocabulary, numerics, exact)"
                )


class WorkerLink:
    """One worker: its session, while there is one, and the sequences open on it."""

    def __init__(self, fleet: Fleet, address: str) -> None:
        self.address = address
        self.welcome: Welcome | None = None
        self.session_number = 0  # over all workers; 0 before the first
        self.failure = ""  # of the last attempt
        self._fleet = fleet
        self._load: Load | None = None
        self._draining = False
        self._sequences: dict[SequenceId, RemoteSequence] = {}
        self._next_id = 1
        self._num_reports = 0
        self._welcomed_at = 0.0  # on the loop's clock
        self._commands: deque[Open | Cancel] = deque()
        self._have_commands = asyncio.Event()
        self._tokens_outstanding = 0
        metrics = fleet.metrics
        self._sessions_lost = metrics.sessions_lost.labels(address)
        metrics.sequences_outstanding.labels(address).set_function(lambda: float(len(self._sequences)))
        metrics.tokens_outstanding.labels(address).set_function(lambda: float(self._tokens_outstanding))

    def view(self) -> WorkerView:
        assert self.welcome is not None
        assert self._load is not None
        return WorkerView(
            address=self.address,
            session_number=self.session_number,
            draining=self._draining,
            sequences_outstanding=len(self._sequences),
            sequences_outstanding_max=self._fleet.config.sequences_per_worker_max,
            tokens_outstanding=self._tokens_outstanding,
            sequences_max=self.welcome.sequences_max,
            load=self._load,
        )

    async def run(self) -> None:
        """Keep a session up, for as long as the router runs. One that welcomes us and is gone at once is as
        bad as one that cannot be reached, and is left alone for as long."""
        num_failures = 0
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._run_session()
            except SessionLost as error:
                self.failure = str(error)
            was_connected = self.welcome is not None
            if was_connected and loop.time() - self._welcomed_at >= self._fleet.config.healthy_seconds_min:
                num_failures = 0
            num_failures += 1
            self._sessions_lost.inc()
            if was_connected or num_failures == 1:
                log.warning("found a worker gone %s", fields(worker=self.address, error=self.failure))
            else:
                log.debug("failed to connect %s", fields(worker=self.address, error=self.failure))
            self._lose()
            await asyncio.sleep(self._backoff_seconds(num_failures))

    def open(self, request: SequenceRequest, *, mailbox: Mailbox, tag: int) -> RemoteSequence:
        config = self._fleet.config
        if self.welcome is None:
            raise Overloaded(f"worker {self.address} is not connected")
        if (
            len(self._sequences) >= config.sequences_per_worker_max
            or len(self._commands) >= config.commands_queued_max
        ):
            raise Overloaded(f"worker {self.address} has {len(self._sequences)} sequences outstanding")
        sequence_id = SequenceId(self._next_id)
        self._next_id += 1
        sequence = RemoteSequence(
            link=self, sequence_id=sequence_id, request=request, mailbox=mailbox, tag=tag
        )
        self._sequences[sequence_id] = sequence
        self._tokens_outstanding += sequence.tokens_outstanding
        self._fleet.metrics.sequences_opened.labels(self.address).inc()
        self._send(
            Open(
                sequence_id=sequence_id,
                request_id=request.request_id,
                prompt=request.prompt,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
                sampling=request.sampling,
            )
        )
        return sequence

    def cancel(self, sequence: RemoteSequence) -> None:
        # Its numbers are never used again, on a later session neither: it is open, or it has ended.
        if sequence.sequence_id in self._sequences:
            self._drop(sequence)
            self._fleet.metrics.sequences_cancelled.inc()
            self._send(Cancel(sequence_id=sequence.sequence_id))

    def _send(self, command: Open | Cancel) -> None:
        self._commands.append(command)
        self._have_commands.set()

    async def _run_session(self) -> None:
        """One session from Hello to its end, which is always SessionLost."""
        channel = await self._fleet.transport.connect(self.address)
        try:
            await self._greet(channel)
            reading = asyncio.create_task(self._read(channel))
            writing = asyncio.create_task(self._write(channel))
            try:
                await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended: list[asyncio.Task[Any]] = [task for task in (reading, writing) if task.done()]
                for task in (reading, writing):
                    task.cancel()
                await asyncio.gather(reading, writing, return_exceptions=True)
            for task in ended:
                task.result()
        finally:
            with contextlib.suppress(SessionLost):
                await channel.close()

    async def _greet(self, channel: Channel) -> None:
        seconds = self._fleet.config.connect_seconds_max
        try:
            async with asyncio.timeout(seconds):
                await channel.send(Hello(protocol=PROTOCOL, router_id=self._fleet.router_id))
                welcome = await channel.receive()
        except TimeoutError:
            self._fleet.metrics.stages_overdue.labels("connect").inc()
            raise SessionLost(f"{self.address} did not welcome us within {seconds:g} s") from None
        if not isinstance(welcome, Welcome):
            raise SessionLost(f"{self.address} sent a report before its welcome")
        self._fleet.check_model(self.address, welcome)
        self.session_number = self._fleet.next_session_number()
        self._welcomed_at = asyncio.get_running_loop().time()
        self.welcome, self._load, self._draining, self._num_reports = welcome, welcome.load, False, 0
        self._fleet.metrics.sessions_opened.labels(self.address).inc()
        log.info(
            "connected to a worker %s",
            fields(worker=self.address, id=welcome.worker_id, incarnation=f"{welcome.incarnation:x}"),
        )
        self._fleet.announce_change()

    async def _read(self, channel: Channel) -> None:
        seconds = self._fleet.config.silence_seconds_max
        while True:
            try:
                async with asyncio.timeout(seconds):
                    report = await channel.receive()
            except TimeoutError:
                self._fleet.metrics.stages_overdue.labels("report").inc()
                raise SessionLost(f"{self.address} said nothing for {seconds:g} s") from None
            if not isinstance(report, StepReport):
                raise SessionLost(f"{self.address} sent a second welcome")
            self._take(report)

    async def _write(self, channel: Channel) -> None:
        seconds = self._fleet.config.write_seconds_max
        while True:
            await self._have_commands.wait()
            self._have_commands.clear()
            while self._commands:
                try:
                    async with asyncio.timeout(seconds):
                        await channel.send(self._commands.popleft())
                except TimeoutError:
                    self._fleet.metrics.stages_overdue.labels("command").inc()
                    raise SessionLost(f"{self.address} took no command for {seconds:g} s") from None

    def _take(self, report: StepReport) -> None:
        self._num_reports += 1
        if report.number != self._num_reports:
            raise SessionLost(f"{self.address} sent report {report.number} as number {self._num_reports}")
        self._load = report.load
        if report.draining != self._draining:
            self._draining = report.draining
            log.info("saw a worker drain %s", fields(worker=self.address, draining=report.draining))
            self._fleet.announce_change()
        for item in report.sequences:
            sequence = self._sequences.get(item.sequence_id)
            if sequence is not None:  # else it was cancelled here while this was on its way
                self._deliver(sequence, item)

    def _deliver(self, sequence: RemoteSequence, report: SequenceReport) -> None:
        missing = sequence.left_out(report)
        if missing:
            self.cancel(sequence)
            sequence.deliver(_failure(sequence, f"{self.address} left out {missing}"))
            return
        num_duplicate = sequence.num_received - report.first_index
        if num_duplicate > 0 and report.token_ids:
            self._fleet.metrics.tokens_duplicate.inc(min(num_duplicate, len(report.token_ids)))
            report = without_first(report, num_duplicate)
        before = sequence.tokens_outstanding
        is_wanted = sequence.deliver(report)
        self._tokens_outstanding += sequence.tokens_outstanding - before
        if report.finish_reason is not None:
            self._drop(sequence)
        elif not is_wanted:
            self._fleet.metrics.sequences_unread.inc()
            self.cancel(sequence)

    def _drop(self, sequence: RemoteSequence) -> None:
        del self._sequences[sequence.sequence_id]
        self._tokens_outstanding -= sequence.tokens_outstanding

    def _lose(self) -> None:
        """The session is over: so is all that was open on it."""
        was_connected = self.welcome is not None
        self.welcome = self._load = None
        self._commands.clear()
        self._have_commands.clear()
        for sequence in list(self._sequences.values()):
            self._drop(sequence)
            sequence.deliver(_failure(sequence, f"worker {self.address} was lost: {self.failure}"))
        assert self._tokens_outstanding == 0, "tokens are outstanding on a session that is over"
        if was_connected:
            self._fleet.announce_change()

    def _backoff_seconds(self, num_failures: int) -> float:
        """Doubling up to the cap, half of it drawn: routers that lost a worker together come back apart."""
        config = self._fleet.config
        ceiling = min(config.backoff_seconds_max, config.backoff_seconds_min * 2 ** min(num_failures - 1, 30))
        return ceiling * (0.5 + 0.5 * self._fleet.randomness.random())


def _identity(welcome: Welcome) -> tuple[str, int, str, bool]:
    """What must be equal for two workers to give the same answers."""
    return welcome.model_fingerprint, welcome.vocab_size, welcome.numerics, welcome.exact


def without_first(report: SequenceReport, count: int) -> SequenceReport:
    """The report without its first `count` tokens, which have been delivered before."""
    return dataclasses.replace(
        report,
        first_index=report.first_index + min(count, len(report.token_ids)),
        token_ids=report.token_ids[count:],
        logprobs=report.logprobs[count:],
        alternatives=report.alternatives[count:],
    )


def _failure(sequence: RemoteSequence, text: str) -> SequenceReport:
    return SequenceReport(
        sequence_id=sequence.sequence_id,
        first_index=sequence.num_received,
        finish_reason=FinishReason.ERROR,
        error=text,
        error_code=ErrorCode.FAILED,
    )

"""The host of a worker: carries the scheduler's plans to the rank and its tokens to the sessions.

Made by `engine.worker.process` once the rank is ready; sessions come from `engine.worker.session_server`, or
straight from tests. It owns the scheduler: only its own tasks touch it, so a broken invariant there ends the process
instead of one call. One report per engine step goes down each session with that session's sequences. It
never imports torch or gRPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from engine.plan import FromRank, RankFailed, RankReady, StepPlan, StepResult, ToRank
from engine.worker.metrics import WorkerMetrics
from engine.worker.rank_link import RankLost
from engine.worker.scheduler import Scheduler, SchedulerConfig, ScoresEvent, SequenceKey, TokenEvent
from rorqual.errors import InvalidRequest, Overloaded, RorqualError
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import (
    Cancel,
    Command,
    ErrorCode,
    FinishReason,
    Load,
    Open,
    SequenceReport,
    StepReport,
    Welcome,
    alternatives_of,
)
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


class RankLink(Protocol):
    """The host's view of its rank. `send` queues and never blocks; `receive` raises RorqualError when the
    rank is gone.
    """

    def send(self, message: ToRank) -> None: ...

    async def receive(self) -> FromRank: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    worker_id: WorkerId
    incarnation: Incarnation
    exact: bool
    prefill_tokens_max: int
    plans_inflight_max: int = 2
    sequences_waiting_max: int = 1024
    sessions_max: int = 64
    session_sequences_max: int = 4096  # open at once on one session
    session_reports_max: int = 32768  # unread by the router; at the bound the session is closed as slow
    session_values_max: int = 2 * 1024 * 1024  # of those reports, tokens and alternatives: 150 MB
    message_values_max: int = 32 * 1024  # of one message, or one report: 0.3 MB, 25 ms to encode
    heartbeat_seconds: float = 1.0
    step_seconds_max: float = 600.0


class SessionRefused(RorqualError):
    """The host does not take this session, or ends it: the router broke a rule or the worker has no room."""


class Host:
    """Serves sessions until its rank is lost. `run` must be awaited by a task of the caller."""

    def __init__(
        self, *, link: RankLink, ready: RankReady, config: HostConfig, metrics: WorkerMetrics
    ) -> None:
        self.config = config
        self.metrics = metrics
        self._ready = ready
        self._link = link
        self._scheduler = Scheduler(scheduler_config(ready, config))
        self._sessions: set[Session] = set()
        self._owners: dict[SequenceKey, tuple[Session, SequenceId]] = {}
        self._next_key = 1
        self._commands: deque[Callable[[], None]] = deque()  # bounded by what sessions may have open
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_inflight = 0
        self._step_deadline: asyncio.Timeout | None = None
        self._draining = False
        self._failure = ""
        metrics.watch(load=self._scheduler.load, num_preemptions=lambda: self._scheduler.num_preemptions)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def is_idle(self) -> bool:
        """Nothing open, in flight, or left open on the rank."""
        return not self._owners and not self._commands and self._scheduler.is_idle

    def load(self) -> Load:
        return self._scheduler.load()

    def connect(self, router_id: str) -> Session:
        """A new session. Raises SessionRefused when there are too many."""
        if len(self._sessions) >= self.config.sessions_max:
            raise SessionRefused(f"worker has {len(self._sessions)} sessions already")
        session = Session(self, router_id)
        self._sessions.add(session)
        self.metrics.sessions.inc()
        log.info("opened a session %s", fields(router=router_id))
        return session

    async def run(self) -> None:
        """Plan, send, receive, report; returns only by raising: RorqualError when the rank is lost, after
        every open sequence has been given its error report.
        """
        planning = asyncio.create_task(self._plan_when_there_is_work())
        receiving = asyncio.create_task(self._receive_results())
        try:
            done, _ = await asyncio.wait({planning, receiving}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except RorqualError as error:
            self._fail_all(f"the worker failed: {error}")
            raise
        finally:
            planning.cancel()
            receiving.cancel()
            await asyncio.gather(planning, receiving, return_exceptions=True)

    async def drain(self, *, seconds_max: float) -> bool:
        """Take no more sequences, let the open ones finish; after the deadline the rest end with an error.
        True when all of them finished.
        """
        self._draining = True
        self.metrics.draining.set(1)
        log.info("started to drain %s", fields(sequences=len(self._owners)))
        for session in self._sessions:
            session.announce()
        try:
            async with asyncio.timeout(seconds_max):
                await self._idle.wait()
                return True
        except TimeoutError:
            log.warning("ended sequences at the drain deadline %s", fields(sequences=len(self._owners)))
            self._fail_all("the worker is shutting down")
            return False

    async def flush(self, *, seconds_max: float) -> None:
        """Wait until every session has taken its reports, or the deadline."""
        waits = [asyncio.create_task(session.flushed.wait()) for session in self._sessions]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds_max)
            for task in late:
                task.cancel()

    def welcome(self) -> Welcome:
        ready = self._ready
        return Welcome(
            worker_id=self.config.worker_id,
            incarnation=self.config.incarnation,
            model_fingerprint=ready.model_fingerprint,
            numerics=self._ready.numerics,
            exact=self.config.exact,
            vocab_size=ready.vocab_size,
            sequence_tokens_max=self._scheduler.config.sequence_tokens_max,
            eos_token_ids=ready.eos_token_ids,
            sequences_max=ready.num_slots,
            load=self.load(),
        )

    def open(self, session: Session, command: Open) -> None:
        """From a session: queued, since only the host's own tasks touch the scheduler."""
        self._enqueue(lambda: self._open(session, command))

    def cancel(self, session: Session, sequence_id: SequenceId) -> None:
        self._enqueue(lambda: self._cancel(session, sequence_id))

    def forget(self, session: Session) -> None:
        """The session has ended, however it ended: so does every sequence opened on it."""
        if session not in self._sessions:
            return
        self._sessions.remove(session)
        self.metrics.sessions.dec()
        log.info("closed a session %s", fields(router=session.router_id, sequences=len(session.keys)))
        self._enqueue(lambda: self._cancel_all(session))

    def _enqueue(self, effect: Callable[[], None]) -> None:
        self._commands.append(effect)
        self._work.set()

    async def _plan_when_there_is_work(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            self._turn()

    async def _receive_results(self) -> None:
        try:
            async with asyncio.timeout(None) as deadline:
                self._step_deadline = deadline
                self._set_step_deadline()
                while True:
                    self._take(await self._link.receive())
        except TimeoutError:
            self.metrics.steps_overdue.inc()
            raise RankLost(
                f"the rank did not answer a step within {self.config.step_seconds_max:g} s"
            ) from None

    def _take(self, message: FromRank) -> None:
        match message:
            case StepResult():
                self._num_inflight -= 1
                self._set_step_deadline()
                self.metrics.step_seconds.observe(message.step_ms / 1000)
                # Before the turn: a cancel in it would take away the owner of an event.
                self._report(self._scheduler.apply(message))
                self._turn()
            case RankFailed():
                raise RankLost(f"the rank failed: {message.message}")
            case _:
                raise RankLost(f"the rank sent {type(message).__name__} in the middle of serving")

    def _turn(self) -> None:
        """Carry out what sessions have asked for, then keep the rank fed."""
        while self._commands:
            self._commands.popleft()()
        while (plan := self._scheduler.plan()) is not None:
            self._link.send(plan)
            self._num_inflight += 1
            if self._num_inflight == 1:
                self._set_step_deadline()
            self._count(plan)

    def _set_step_deadline(self) -> None:
        if self._step_deadline is None:
            return  # `_receive_results` has not started; it sets the deadline when it does
        now = asyncio.get_running_loop().time()
        self._step_deadline.reschedule(now + self.config.step_seconds_max if self._num_inflight else None)

    def _count(self, plan: StepPlan) -> None:
        num_decode = sum(1 for segment in plan.segments if segment.count == 1)
        num_all = sum(segment.count for segment in plan.segments)
        self.metrics.tokens_computed.labels("decode").inc(num_decode)
        self.metrics.tokens_computed.labels("prefill").inc(num_all - num_decode)

    def _open(self, session: Session, command: Open) -> None:
        if session not in self._sessions:
            return
        if self._failure or self._draining:
            text = self._failure or "the worker is draining"
            self._refuse(session, command, ErrorCode.FAILED if self._failure else ErrorCode.OVERLOADED, text)
            return
        key = SequenceKey(self._next_key)
        try:
            self._scheduler.open(
                key,
                prompt=command.prompt,
                max_tokens=command.max_tokens,
                ignore_eos=command.ignore_eos,
                sampling=command.sampling,
            )
        except InvalidRequest as error:
            self._refuse(session, command, ErrorCode.INVALID, str(error))
            return
        except Overloaded as error:
            self._refuse(session, command, ErrorCode.OVERLOADED, str(error))
            return
        self._next_key += 1
        self._owners[key] = (session, command.sequence_id)
        session.keys[command.sequence_id] = key
        self._idle.clear()
        self.metrics.sequences_opened.inc()
        log.debug(
            "opened a sequence %s",
            fields(request=command.request_id, sequence=command.sequence_id, tokens=len(command.prompt)),
        )

    def _refuse(self, session: Session, command: Open, code: ErrorCode, text: str) -> None:
        self.metrics.sequences_refused.labels(code.value).inc()
        log.info("refused a sequence %s", fields(request=command.request_id, code=code.value, error=text))
        session.release(command.sequence_id)
        session.push([_error_report(command.sequence_id, code, text)])

    def _cancel(self, session: Session, sequence_id: SequenceId) -> None:
        key = session.keys.get(sequence_id)
        if key is None:
            return  # its last report is on its way to the router, or already there
        was_open = self._scheduler.cancel(key)
        assert was_open, f"sequence {key} has an owner and is not open"
        self._drop(key, "cancelled")
        session.push(
            [SequenceReport(sequence_id=sequence_id, first_index=0, finish_reason=FinishReason.CANCELLED)]
        )

    def _cancel_all(self, session: Session) -> None:
        keys = list(session.keys.values())
        self._scheduler.cancel_all(keys)
        for key in keys:
            self._drop(key, "session_ended")

    def _fail_all(self, text: str) -> None:
        """Give every open sequence its error report. The scheduler is told too: at a drain deadline the
        rank is well and its pages come back.
        """
        self._failure = text
        reports: dict[Session, list[SequenceReport]] = {}
        self._scheduler.cancel_all(self._owners)
        for key, (session, sequence_id) in list(self._owners.items()):
            self._drop(key, "error")
            reports.setdefault(session, []).append(_error_report(sequence_id, ErrorCode.FAILED, text))
        for session, items in reports.items():
            session.push(items)

    def _drop(self, key: SequenceKey, reason: str) -> None:
        session, sequence_id = self._owners.pop(key)
        del session.keys[sequence_id]
        session.release(sequence_id)
        self.metrics.sequences_ended.labels(reason).inc()
        if not self._owners:
            self._idle.set()

    def _report(self, events: Iterable[ScoresEvent | TokenEvent]) -> None:
        reports: dict[Session, list[SequenceReport]] = {}
        num_tokens = 0
        for event in events:
            session, sequence_id = self._owners[event.key]
            items = reports.setdefault(session, [])
            if isinstance(event, ScoresEvent):
                items.append(_scores_report(sequence_id, event))
                continue
            num_tokens += 1
            items.append(_token_report(sequence_id, event))
            if event.finish_reason is not None:
                self._drop(event.key, event.finish_reason.value)
        self.metrics.tokens_generated.inc(num_tokens)
        for session, items in reports.items():
            session.push(items)


class Session:
    """One router's stream, without the wire: commands go in, reports come out.

    Reports wait here until the router takes them; those of several steps then leave together, in messages of
    `message_values_max` at most. A router that lets `session_reports_max` of them pile up, or
    `session_values_max` in them, is slow: its session is closed and its sequences are cancelled.
    """

    def __init__(self, host: Host, router_id: str) -> None:
        self.router_id = router_id
        self.keys: dict[SequenceId, SequenceKey] = {}  # kept by the host
        self.flushed = asyncio.Event()  # everything pushed has been taken, and more was asked for
        self._host = host
        self._open_ids: set[SequenceId] = set()
        self._outbox: deque[SequenceReport] = deque()
        self._num_values = 0  # in the outbox
        self._news = asyncio.Event()
        self._number = 0
        self.closed_because = ""
        self.closed = asyncio.Event()

    def submit(self, command: Command) -> None:
        """Raises SessionRefused when the router breaks a rule; the session is then to be closed."""
        match command:
            case Open():
                if command.sequence_id in self._open_ids:
                    raise SessionRefused(f"sequence {command.sequence_id} is open already")
                if len(self._open_ids) >= self._host.config.session_sequences_max:
                    raise SessionRefused(f"session has {len(self._open_ids)} sequences open already")
                self._open_ids.add(command.sequence_id)
                self._host.open(self, command)
            case Cancel():
                self._host.cancel(self, command.sequence_id)

    async def next_report(self) -> StepReport:
        """What happened since the last one. Waits for news at most a heartbeat: then it carries the load
        alone.
        """
        if not self._outbox:
            self.flushed.set()
            try:
                async with asyncio.timeout(self._host.config.heartbeat_seconds):
                    await self._news.wait()
            except TimeoutError:
                pass
        self._news.clear()
        self._number += 1
        return StepReport(
            number=self._number,
            sequences=self._take_reports(),
            load=self._host.load(),
            draining=self._host.draining,
        )

    def close(self) -> None:
        """End the session and cancel everything opened on it. May be called twice."""
        self._outbox.clear()
        self._num_values = 0
        self.flushed.set()
        self.closed.set()
        self._host.forget(self)

    def push(self, reports: Iterable[SequenceReport]) -> None:
        """From the host, once per step."""
        if self.closed.is_set():
            return
        for report in reports:
            self._outbox.append(report)
            self._num_values += report.num_values
        config = self._host.config
        if len(self._outbox) > config.session_reports_max or self._num_values > config.session_values_max:
            num_reports, num_values = len(self._outbox), self._num_values
            self.closed_because = f"router left {num_reports} reports unread, with {num_values} values"
            self._host.metrics.sessions_slow.inc()
            log.warning(
                "closed a slow session %s",
                fields(router=self.router_id, reports=num_reports, values=num_values),
            )
            self.close()
            return
        self.flushed.clear()
        self._news.set()

    def announce(self) -> None:
        """Send a report now, with or without sequences: something in its head changed."""
        self.flushed.clear()
        self._news.set()

    def release(self, sequence_id: SequenceId) -> None:
        self._open_ids.discard(sequence_id)

    def _take_reports(self) -> tuple[SequenceReport, ...]:
        """The oldest reports, as many as one message may carry, and one at least. The rest leaves with the
        next message, which does not wait."""
        taken: list[SequenceReport] = []
        num_values = 0
        while self._outbox:
            more = self._outbox[0].num_values
            if taken and num_values + more > self._host.config.message_values_max:
                break
            num_values += more
            taken.append(self._outbox.popleft())
        self._num_values -= num_values
        return tuple(taken)


def scheduler_config(ready: RankReady, config: HostConfig) -> SchedulerConfig:
    """What the rank has, as the scheduler's bounds."""
    return SchedulerConfig(
        num_pages=ready.num_pages,
        num_slots=ready.num_slots,
        vocab_size=ready.vocab_size,
        sequence_tokens_max=min(ready.max_position_embeddings, ready.num_pages * PAGE_TOKENS),
        eos_token_ids=frozenset(ready.eos_token_ids),
        prefill_tokens_max=config.prefill_tokens_max,
        plans_inflight_max=config.plans_inflight_max,
        sequences_waiting_max=config.sequences_waiting_max,
    )


def _token_report(sequence_id: SequenceId, event: TokenEvent) -> SequenceReport:
    return SequenceReport(
        sequence_id=sequence_id,
        first_index=event.index,
        token_ids=(event.token_id,),
        logprobs=(event.logprob,) if event.logprob is not None else (),
        alternatives=(alternatives_of(event.alternatives),) if event.logprob is not None else (),
        finish_reason=event.finish_reason,
    )


def _scores_report(sequence_id: SequenceId, event: ScoresEvent) -> SequenceReport:
    return SequenceReport(sequence_id=sequence_id, first_index=0, prompt_logprobs=event.prompt_logprobs)


def _error_report(sequence_id: SequenceId, code: ErrorCode, text: str) -> SequenceReport:
    return SequenceReport(
        sequence_id=sequence_id,
        first_index=0,
        finish_reason=FinishReason.ERROR,
        error=text,
        error_code=code,
    )

"""One router's stream, without the wire: commands go in, reports come out.

Made by the host (`engine.worker.host`) for each session; `engine.worker.session_server` carries it over gRPC, tests use
it as it is. It keeps what the router has not read yet, within bounds, and decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.worker.cache.feed import FeedCursor
from engine.worker.events import SequenceKey
from engine.worker.metrics import WorkerMetrics
from engine.worker.usage import UsageLedger, UsageMeter
from rorqual.errors import RorqualError
from rorqual.feed import FeedItem, Subscribe
from rorqual.ids import SequenceId
from rorqual.session import (
    Cancel,
    Command,
    Credit,
    Load,
    Open,
    Renew,
    SequenceReport,
    StepReport,
    Take,
)
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


class SessionRefused(RorqualError):
    """The host does not take this session, or ends it: the router broke a rule or the worker has no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBounds:
    """Part of the host's configuration."""

    session_sequences_max: int = 4096  # open at once on one session
    session_reports_max: int = 32768  # unread by the router; at the bound the session is closed as slow
    session_values_max: int = 2 * 1024 * 1024  # of those reports, tokens and alternatives: 150 MB
    message_values_max: int = 32 * 1024  # of one message, or one report: 0.3 MB, 25 ms to encode
    heartbeat_seconds: float = 1.0
    feed_seconds_max: float = 0.05  # news of the cache waits so long for a report to travel with


class SessionHost(Protocol):
    """What a session asks of the host. Commands are queued, never carried out at once."""

    @property
    def draining(self) -> bool: ...

    @property
    def usage(self) -> UsageLedger: ...

    def load(self) -> Load: ...

    def credit(self, session: Session) -> Credit | None: ...

    def open(self, session: Session, command: Open) -> None: ...

    def cancel(self, session: Session, sequence_id: SequenceId) -> None: ...

    def renew(self, session: Session, command: Renew) -> None: ...

    def take(self, session: Session, command: Take) -> None: ...

    def subscribe(self, session: Session, command: Subscribe) -> None: ...

    def forget(self, session: Session) -> None: ...


class Session:
    """Reports wait here until the router takes them; those of several steps then leave together, in messages of
    `message_values_max` at most. A router that lets `session_reports_max` of them pile up, or
    `session_values_max` in them, is slow: its session is closed and its sequences are cancelled.
    """

    def __init__(
        self,
        host: SessionHost,
        router_id: str,
        *,
        bounds: SessionBounds,
        metrics: WorkerMetrics,
        observes: bool = False,
    ) -> None:
        self.router_id = router_id
        self.observes = observes  # it has no share of credit, opens nothing, and is told of usage
        self.keys: dict[SequenceId, SequenceKey] = {}  # kept by the host
        self.flushed = asyncio.Event()  # everything pushed has been taken, and more was asked for
        self._host = host
        self._bounds = bounds
        self._metrics = metrics
        self._open_ids: set[SequenceId] = set()
        self._outbox: deque[SequenceReport] = deque()
        self._num_values = 0  # in the outbox
        self._news = asyncio.Event()
        self._feed: FeedCursor | None = None
        self._feed_due: asyncio.TimerHandle | None = None
        self._number = 0
        self._meter = UsageMeter(host.usage)
        self._usage = host.usage.follow() if observes else None
        self.closed_because = ""
        self.closed = asyncio.Event()

    def submit(self, command: Command) -> None:
        """Raises SessionRefused when the router breaks a rule; the session is then to be closed."""
        if self.observes:
            raise SessionRefused("a session that observes may ask for nothing")
        match command:
            case Open():
                if command.sequence_id in self._open_ids:
                    raise SessionRefused(f"sequence {command.sequence_id} is open already")
                if len(self._open_ids) >= self._bounds.session_sequences_max:
                    raise SessionRefused(f"session has {len(self._open_ids)} sequences open already")
                self._open_ids.add(command.sequence_id)
                self._meter.opened(command, now=asyncio.get_running_loop().time())
                self._host.open(self, command)
            case Cancel():
                self._host.cancel(self, command.sequence_id)
            case Renew():
                self._host.renew(self, command)
            case Take():
                self._host.take(self, command)
            case Subscribe():
                self._host.subscribe(self, command)

    async def next_report(self) -> StepReport:
        """What happened since the last one. Waits for news at most a heartbeat: then it carries the load
        alone.
        """
        is_heartbeat = False
        if not self._outbox:
            self.flushed.set()
            try:
                async with asyncio.timeout(self._bounds.heartbeat_seconds):
                    await self._news.wait()
            except TimeoutError:
                is_heartbeat = True
        self._news.clear()
        self._number += 1
        feed = self._take_feed(with_digest=is_heartbeat)
        return StepReport(
            number=self._number,
            sequences=self._take_reports(),
            load=self._host.load(),
            draining=self._host.draining,
            credit=self._host.credit(self),
            feed=feed,
            usage=None if self._usage is None else self._usage.take(),
        )

    def close(self) -> None:
        """End the session and cancel everything opened on it. May be called twice."""
        self._outbox.clear()
        self._num_values = 0
        self._feed = None
        self._cancel_feed_timer()
        if self._usage is not None:
            self._host.usage.forget(self._usage)
        self.flushed.set()
        self.closed.set()
        self._host.forget(self)

    def push(self, reports: Sequence[SequenceReport]) -> None:
        """From the host, once per step."""
        if self.closed.is_set():
            return
        self._meter.saw(reports, now=asyncio.get_running_loop().time())
        for report in reports:
            self._outbox.append(report)
            self._num_values += report.num_values
        if (
            len(self._outbox) > self._bounds.session_reports_max
            or self._num_values > self._bounds.session_values_max
        ):
            num_reports, num_values = len(self._outbox), self._num_values
            self.closed_because = f"router left {num_reports} reports unread, with {num_values} values"
            self._metrics.sessions_slow.inc()
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

    def follow(self, cursor: FeedCursor) -> None:
        """From the host: the router is told of the cache from now on, beginning at once."""
        if not self.closed.is_set():
            self._feed = cursor
            self._news.set()

    def note_feed(self) -> None:
        """From the host: the cache has changed. The news goes with the next report, or alone a little later: a message
        costs the same whatever it carries."""
        if self._feed is not None and self._feed_due is None:
            loop = asyncio.get_running_loop()
            self._feed_due = loop.call_later(self._bounds.feed_seconds_max, self._news.set)

    def release(self, sequence_id: SequenceId) -> None:
        self._open_ids.discard(sequence_id)

    def _take_feed(self, *, with_digest: bool) -> tuple[FeedItem, ...]:
        self._cancel_feed_timer()
        if self._feed is None:
            return ()
        items = self._feed.take(with_digest=with_digest)
        if not self._feed.is_current:
            self._news.set()  # the rest leaves with the next message, which does not wait
        return items

    def _cancel_feed_timer(self) -> None:
        if self._feed_due is not None:
            self._feed_due.cancel()
            self._feed_due = None

    def _take_reports(self) -> tuple[SequenceReport, ...]:
        """The oldest reports, as many as one message may carry, and one at least. The rest leaves with the
        next message, which does not wait."""
        taken: list[SequenceReport] = []
        num_values = 0
        while self._outbox:
            more = self._outbox[0].num_values
            if taken and num_values + more > self._bounds.message_values_max:
                break
            num_values += more
            taken.append(self._outbox.popleft())
        self._num_values -= num_values
        return tuple(taken)

"""The host of a worker: carries the scheduler's plans to the rank and its tokens to the sessions.

Made by `engine.worker.process` once the rank is ready; sessions come from `engine.worker.session_server`, or
straight from tests. It owns the scheduler: only its own tasks touch it, so a broken invariant there ends the process
instead of one call. One report per engine step goes down each session with that session's sequences. What the
worker's role adds is behind a `RoleHandler`. It never imports torch or gRPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from engine.plan import (
    Fetched,
    FetchOverdue,
    FromRank,
    PeerOpened,
    RankFailed,
    RankReady,
    StepPlan,
    StepResult,
    ToRank,
    ToTransfer,
)
from engine.worker.cache.feed import CacheFeed
from engine.worker.cache.prefix_cache import CacheConfig
from engine.worker.drafts.policy import DraftsOption, make_policy
from engine.worker.events import Event, LentEvent, PagesEvent, ScoresEvent, SequenceKey, TokenEvent
from engine.worker.metrics import WorkerMetrics
from engine.worker.rank_link import RankLost
from engine.worker.reports import error_report, offer_report, scores_report, token_report, with_tokens
from engine.worker.role import BothRole, RoleHandler
from engine.worker.scheduler import Scheduler
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.session import Session, SessionBounds, SessionRefused
from engine.worker.tiers.hisparse import HiSparseConfig
from engine.worker.tiers.host_tier import HostTierConfig
from engine.worker.tiers.metrics import watch_tiers
from engine.worker.tiers.store_tier import StoreTier
from engine.worker.usage import UsageLedger
from kvstore.pages import pages_for
from kvstore.shadow_radix import Costs
from kvstore.store.contract import WritePolicy
from rorqual.errors import InvalidRequest, Overloaded, RorqualError
from rorqual.feed import Subscribe
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import (
    Credit,
    ErrorCode,
    FinishReason,
    Load,
    Open,
    Renew,
    Role,
    SequenceReport,
    Take,
    Welcome,
)
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


class RankLink(Protocol):
    """The host's view of its rank. `send` queues and never blocks; `receive` raises RorqualError when it is gone."""

    def send(self, message: ToRank) -> None: ...

    async def receive(self) -> FromRank: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(SessionBounds):
    worker_id: WorkerId
    incarnation: Incarnation
    exact: bool
    prefill_tokens_max: int
    plans_inflight_max: int = 2
    sequences_waiting_max: int = 1024
    sessions_max: int = 64
    step_seconds_max: float = 600.0
    drafts: DraftsOption = 0
    prefix_cache: bool = True
    writes: WritePolicy | None = None  # to the store; None: there is none


class Host:
    """Serves sessions until its rank is lost. `run` must be awaited by a task of the caller."""

    def __init__(
        self,
        *,
        link: RankLink,
        ready: RankReady,
        config: HostConfig,
        metrics: WorkerMetrics,
        handler: RoleHandler | None = None,
        store: StoreTier | None = None,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self._ready = ready
        self._link = link
        self._handler = handler or BothRole()
        self._scheduler = Scheduler(
            scheduler_config(ready, config, role=self._handler.role),
            make_policy(config.drafts, drafts_max=ready.drafts_max),
        )
        self._feed = CacheFeed(self._scheduler.cache, incarnation=config.incarnation, metrics=metrics)
        self.usage = UsageLedger()  # of all sessions
        self._sessions: set[Session] = set()
        self._owners: dict[SequenceKey, _Owner] = {}
        self._next_key = 1
        self._commands: deque[Callable[[], None]] = deque()  # bounded by what sessions may have open
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_inflight = 0
        self._step_deadline: asyncio.Timeout | None = None
        self._draining = False
        self._failure = ""
        self._store = store
        self._handler.attach(self)
        if store is not None:
            store.attach(self)
        metrics.watch(
            load=self.load,
            num_preemptions=lambda: self._scheduler.num_preemptions,
            num_records=ready.num_records,
            num_records_free=lambda: self._scheduler.num_records_free,
            cache=self._scheduler.cache_state,
        )
        tier = self._scheduler.host_tier
        if tier is not None:
            metrics.watch_host_tier(lambda: tier.state)
        if self._scheduler.config.hisparse is not None:
            metrics.watch_hisparse(lambda: self._scheduler.hisparse_state)
        watch_tiers(
            metrics.registry,
            device=self._scheduler.cache_state,
            host=None if tier is None else lambda: tier.state,
            store=store,
        )
        metrics.watch_speeds(
            self._scheduler.speeds, page_bytes=ready.page_bytes, tail_bytes=ready.record_bytes
        )

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def is_idle(self) -> bool:
        """Nothing open, in flight, or left open on the rank."""
        is_idle = self._store is None or self._store.is_idle
        return is_idle and not (self._owners or self._commands) and self._is_idle_below

    @property
    def _is_idle_below(self) -> bool:
        return self._scheduler.is_idle and self._handler.is_idle

    @property
    def _num_sharing(self) -> int:
        return sum(not session.observes for session in self._sessions)

    @property
    def scheduler(self) -> Scheduler:
        """For the role handler."""
        return self._scheduler

    @property
    def feed(self) -> CacheFeed:
        """What routers are told of the prefix cache."""
        return self._feed

    def load(self) -> Load:
        speeds = self._scheduler.speeds
        told: dict[str, float] = {}
        for name, (source, *_) in speeds.ways():
            speed = speeds.told(source)
            if speed is not None:
                told[f"{name}_bytes_per_second"] = speed.bytes_per_second
                told[f"{name}_latency_seconds"] = speed.latency_seconds
        return replace(
            self._scheduler.load(), prefill_tokens_per_second=speeds.prefill_tokens_per_second, **told
        )

    def credit(self, session: Session) -> Credit | None:
        return self._handler.credit(num_sessions=self._num_sharing, keys=session.keys.values())

    def connect(self, router_id: str, *, observes: bool = False, version: str = "") -> Session:
        """A new session; the router's version is for the log. Raises SessionRefused when there are too many."""
        if len(self._sessions) >= self.config.sessions_max:
            raise SessionRefused(f"worker has {len(self._sessions)} sessions already")
        session = Session(self, router_id, bounds=self.config, metrics=self.metrics, observes=observes)
        self._sessions.add(session)
        self.metrics.sessions.inc()
        log.info("opened a session %s", fields(router=router_id, version=version or None))
        return session

    async def run(self) -> None:
        """Plan, send, receive, report; returns only by raising: RorqualError when the rank is lost, after every open
        sequence has been given its error report."""
        work: list[Coroutine[Any, Any, None]] = [
            self._handler.run(),  # first, since the others call the handler
            self._plan_when_there_is_work(),
            self._receive_results(),
        ]
        if self._store is not None:
            work.insert(0, self._store.run())
        tasks = [asyncio.create_task(item) for item in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except RorqualError as error:
            self._fail_all(f"the worker failed: {error}")
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, *, seconds_max: float) -> bool:
        """Take no more sequences, let the open ones finish; after the deadline the rest end with an error. True when
        all of them finished."""
        self._draining = True
        self.metrics.draining.set(1)
        log.info("started to drain %s", fields(sequences=len(self._owners)))
        for session in self._sessions:
            session.announce()
        try:
            async with asyncio.timeout(seconds_max):
                await self._idle.wait()
                await self._handler.finish()
                if self._store is not None:
                    await self._store.finish()
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
            role=self._handler.role,
            wire_id=ready.wire_id,
            credit=self._handler.credit(num_sessions=self._num_sharing, keys=()),
        )

    def open(self, session: Session, command: Open) -> None:
        """From a session: queued, since only the host's own tasks touch the scheduler."""
        self.enqueue(lambda: self._open(session, command))

    def cancel(self, session: Session, sequence_id: SequenceId) -> None:
        self.enqueue(lambda: self._cancel(session, sequence_id))

    def renew(self, session: Session, command: Renew) -> None:
        self.enqueue(lambda: self._renew(session, command))

    def take(self, session: Session, command: Take) -> None:
        self.enqueue(lambda: self._take_offer(session, command))

    def subscribe(self, session: Session, command: Subscribe) -> None:
        self.enqueue(lambda: session.follow(self._feed.subscribe(command)))

    def forget(self, session: Session) -> None:
        """The session has ended, however it ended: so does every sequence opened on it."""
        if session not in self._sessions:
            return
        self._sessions.remove(session)
        self.metrics.sessions.dec()
        log.info("closed a session %s", fields(router=session.router_id, sequences=len(session.keys)))
        self.enqueue(lambda: self._cancel_all(session))

    def enqueue(self, effect: Callable[[], None]) -> None:
        """Carry `effect` out in the host's own task. Bounded by what sessions and the handler have open."""
        self._commands.append(effect)
        self._work.set()

    def send(self, message: ToTransfer) -> None:
        """From the role handler, to the rank."""
        self._link.send(message)

    def tell_bound(self, key: SequenceKey) -> None:
        """From the role handler, as the next two."""
        owner = self._owners[key]
        owner.session.push([SequenceReport(sequence_id=owner.sequence_id, first_index=0, bound=True)])

    def hand_over(self, key: SequenceKey) -> None:
        if key not in self._owners:
            return  # cancelled while its reader's word was on its way
        owner = self._drop(key, FinishReason.HANDED_OVER.value)
        report = SequenceReport(
            sequence_id=owner.sequence_id, first_index=0, finish_reason=FinishReason.HANDED_OVER
        )
        owner.session.push([report])

    def fail(self, key: SequenceKey, code: ErrorCode, text: str) -> None:
        if key not in self._owners:
            return
        self._scheduler.cancel(key)
        owner = self._drop(key, "error")
        log.warning("failed a sequence %s", fields(request=owner.request_id, code=code.value, error=text))
        owner.session.push([error_report(owner.sequence_id, code, text)])

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
                self.metrics.copy_seconds.inc(message.copy_ms / 1000)
                self._scheduler.speeds.landed(message)
                self._count_drafts(message)
                # Before the turn: a cancel in it would take away the owner of an event.
                self._report(self._scheduler.apply(message))
                self._turn()
            case PeerOpened() | FetchOverdue() | Fetched():
                self._handler.take_from_rank(message)
                self._turn()
            case RankFailed():
                raise RankLost(f"the rank failed: {message.message}")
            case _:
                raise RankLost(f"the rank sent {type(message).__name__} in the middle of serving")

    def _turn(self) -> None:
        """Carry out what sessions have asked for, then keep the rank fed."""
        self._scheduler.speeds.turned(asyncio.get_running_loop().time())
        while self._commands:
            self._commands.popleft()()
        self._handler.turned()
        while (plan := self._scheduler.plan()) is not None:
            self._link.send(plan)
            self._num_inflight += 1
            if self._num_inflight == 1:
                self._set_step_deadline()
            self._count(plan)
            self._handler.turned()  # what the plan has freed may give room
        if self._store is not None:
            self._store.turned()
        if self._feed.publish():
            for session in self._sessions:
                session.note_feed()

    def _set_step_deadline(self) -> None:
        if self._step_deadline is None:
            return  # `_receive_results` has not started; it sets the deadline when it does
        now = asyncio.get_running_loop().time()
        self._step_deadline.reschedule(now + self.config.step_seconds_max if self._num_inflight else None)

    def _count(self, plan: StepPlan) -> None:
        num_decode = sum(1 for segment in plan.segments if segment.count == 1)
        num_all = sum(segment.count for segment in plan.segments)
        self._scheduler.speeds.planned(plan, page_bytes=self._ready.page_bytes)
        self.metrics.tokens_computed.labels("decode").inc(num_decode)
        self.metrics.tokens_computed.labels("prefill").inc(num_all - num_decode)

    def _count_drafts(self, result: StepResult) -> None:
        for item in result.verified:
            if not item.num_drafts:
                continue  # the sequence was at its end
            self.metrics.drafts_proposed.inc(item.num_drafts)
            self.metrics.drafts_accepted.inc(item.num_accepted)
            self.metrics.tokens_computed.labels("decode").inc(item.num_drafts)
            self.metrics.decode_tokens.observe(1 + item.num_accepted)

    def _open(self, session: Session, command: Open) -> None:
        if session not in self._sessions:
            return
        if self._failure or self._draining:
            text = self._failure or "the worker is draining"
            self._refuse(session, command, ErrorCode.FAILED if self._failure else ErrorCode.OVERLOADED, text)
            return
        key = SequenceKey(self._next_key)
        try:
            self._handler.check(command)
            fetching = self._handler.fetches(command)
            reading = self._store is not None and self._store.wants()
            self._scheduler.open(
                key,
                prompt=command.prompt,
                max_tokens=command.max_tokens,
                ignore_eos=command.ignore_eos,
                sampling=command.sampling,
                adopt=self._handler.role is Role.DECODE,
                salt=command.cache_salt,
                num_fetches=fetching + reading,
            )
        except InvalidRequest as error:
            self._refuse(session, command, ErrorCode.INVALID, str(error))
            return
        except Overloaded as error:
            self._refuse(session, command, ErrorCode.OVERLOADED, str(error))
            return
        self._next_key += 1
        self._owners[key] = _Owner(session, command.sequence_id, command.request_id)
        session.keys[command.sequence_id] = key
        self._handler.opened(key, command, fetching=fetching)
        if self._store is not None and reading:
            coming = command.fetch.num_pages if fetching and command.fetch is not None else 0
            self._store.opened(key, num_pages_coming=coming)
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
        session.push([error_report(command.sequence_id, code, text)])

    def _cancel(self, session: Session, sequence_id: SequenceId) -> None:
        key = session.keys.get(sequence_id)
        if key is None:
            return  # its last report is on its way to the router, or already there
        self._scheduler.cancel(key)  # which does not know one that is lent any more
        self._drop(key, "cancelled")
        session.push(
            [SequenceReport(sequence_id=sequence_id, first_index=0, finish_reason=FinishReason.CANCELLED)]
        )

    def _renew(self, session: Session, command: Renew) -> None:
        for sequence_id in command.sequence_ids:
            key = session.keys.get(sequence_id)
            if key is not None:
                self._handler.renew(key)

    def _take_offer(self, session: Session, command: Take) -> None:
        key = session.keys.get(command.sequence_id)
        if key is None:
            return  # it has ended, and the router is about to hear of it
        try:
            self._handler.take(key, command)
        except InvalidRequest as error:
            self.fail(key, ErrorCode.INVALID, str(error))

    def _cancel_all(self, session: Session) -> None:
        keys = list(session.keys.values())
        self._scheduler.cancel_all(keys)
        for key in keys:
            self._drop(key, "session_ended")

    def _fail_all(self, text: str) -> None:
        """Give every open sequence its error report. The scheduler is told too: at a drain deadline the rank is well
        and its pages come back."""
        self._failure = text
        reports: dict[Session, list[SequenceReport]] = {}
        self._scheduler.cancel_all(self._owners)
        for key in list(self._owners):
            owner = self._drop(key, "error")
            report = error_report(owner.sequence_id, ErrorCode.FAILED, text)
            reports.setdefault(owner.session, []).append(report)
        for session, items in reports.items():
            session.push(items)

    def _drop(self, key: SequenceKey, reason: str) -> _Owner:
        owner = self._owners.pop(key)
        del owner.session.keys[owner.sequence_id]
        owner.session.release(owner.sequence_id)
        self.metrics.sequences_ended.labels(reason).inc()
        self._handler.ended(key)
        if not self._owners:
            self._idle.set()
        return owner

    def _report(self, events: Iterable[Event]) -> None:
        reports: dict[Session, list[SequenceReport]] = {}
        num_tokens = 0
        for event, tokens in with_tokens(events):
            owner = self._owners[event.key]
            sequence_id, items = owner.sequence_id, reports.setdefault(owner.session, [])
            match event:
                case ScoresEvent():
                    items.append(scores_report(sequence_id, event))
                case PagesEvent() | LentEvent():
                    offer = self._handler.lend(event)
                    if offer is not None:
                        items.append(offer_report(sequence_id, offer))
                case TokenEvent():
                    num_tokens += len(tokens)
                    items.append(token_report(sequence_id, tokens))
                    self._handler.landed(event.key)
                    if (reason := tokens[-1].finish_reason) is not None:
                        self._drop(event.key, reason.value)
        self.metrics.tokens_generated.inc(num_tokens)
        for session, items in reports.items():
            session.push(items)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who opened a sequence."""

    session: Session
    sequence_id: SequenceId
    request_id: str  # for log lines


def scheduler_config(ready: RankReady, config: HostConfig, *, role: Role = Role.BOTH) -> SchedulerConfig:
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
        role=role,
        num_records=ready.num_records,
        num_page_components=ready.num_page_components,
        # A prefill worker keeps the state that drafts are made from, and makes none.
        drafts_max=0 if role is Role.PREFILL or config.drafts == 0 else ready.drafts_max,
        cache=cache_config(ready) if config.prefix_cache else None,
        host_tier=_tier_config(ready, config) if config.prefix_cache and ready.num_host_pages else None,
        hisparse=_hisparse_config(ready) if config.prefix_cache and ready.num_hot_buffers else None,
        keeps_digests=config.writes is not None,
    )


def _hisparse_config(ready: RankReady) -> HiSparseConfig:
    return HiSparseConfig(
        num_thin_pages=ready.num_thin_pages,
        num_buffers=ready.num_hot_buffers,
        num_hot_pages=ready.num_hot_pages,
    )


def _tier_config(ready: RankReady, config: HostConfig) -> HostTierConfig:
    return HostTierConfig(
        num_pages=ready.num_host_pages,
        num_records=ready.num_host_records,
        keeps_landed=config.writes not in (None, WritePolicy.NEVER),
        takes_turns=config.writes is WritePolicy.AT_TURN_END,
    )


def cache_config(ready: RankReady) -> CacheConfig:
    """What page keys start from, and what pages, tails and a rebuild cost on this rank."""
    return CacheConfig(
        fingerprint=ready.model_fingerprint,
        numerics=ready.numerics,
        wire_id=ready.wire_id,
        costs=Costs(
            # A model of window-only layers has pages that cost nothing.
            page_bytes=max(1, ready.page_bytes),
            tail_bytes=max(1, ready.record_bytes),
            rebuild_pages=max(1, pages_for(ready.rebuild_tokens)),
        ),
    )

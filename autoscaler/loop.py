"""One turn of the autoscaler: look, decide, write, tell. Called by `autoscaler.process` once an interval.

Owns what happens when something fails. A target that cannot be read: nothing is decided, what workers tell is kept for
the next turn. A write that fails: it is written again at the next turn. Whoever may not act (not elected) decides
nothing; whoever comes to act begins with a planner of its own, which is given the holds of its last term. A pool that
does not change makes no call.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from autoscaler.intentions import Intentions, Write
from autoscaler.looking.routers import RouterNews
from autoscaler.metrics import AutoscalerMetrics
from autoscaler.observation import Decision, Hold, Observation
from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, Target, TargetUnreachable
from rorqual.clock import Clock
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)


class PlannerLike(Protocol[P_contra]):
    """`autoscaler.planner.Planner`, or what a test puts in its place."""

    def decide(self, observation: Observation) -> Decision: ...

    def replace_policy(self, policy: P_contra) -> None: ...

    def holds(self) -> Mapping[str, Hold]: ...

    def resume(self, holds: Mapping[str, Hold]) -> None: ...


class LookerLike(Protocol):
    """`autoscaler.looking.looker.Looker`."""

    routers_news: RouterNews

    def look(self, readings: Mapping[str, PoolReading], *, now: float) -> Observation: ...

    def discard(self) -> None: ...

    def failures(self) -> list[str]: ...


class Loop(Generic[P]):
    def __init__(
        self,
        policy: P,
        *,
        make_planner: Callable[[P], PlannerLike[P]],
        looker: LookerLike,
        target: Target,
        clock: Clock,
        metrics: AutoscalerMetrics,
        seconds_left: Callable[[], float] = lambda: float("inf"),
        dry_run: bool = False,
    ) -> None:
        """`seconds_left`: for how long this process may still act; 0 or less: it may not."""
        self.looker = looker
        self.target = target
        self.looked_at: float | None = None  # the last look that was decided on
        self._policy = policy
        self._make_planner = make_planner
        self._planner: PlannerLike[P] | None = None
        self._holds: Mapping[str, Hold] = {}  # of the last term
        self._intentions = Intentions()
        self._clock = clock
        self._metrics = metrics
        self._seconds_left = seconds_left
        self._dry_run = dry_run
        self.unread = ""  # why replicas could not be read at the last turn
        self.unwritten: dict[str, str] = {}  # why replicas could not be set at the last turn, by pool
        self._told_notes: frozenset[str] = frozenset()
        self._told_problems: dict[str, str] = {}
        self._reasons: dict[str, str] = {}

    def replace_policy(self, policy: P) -> None:
        self._policy = policy
        if self._planner is not None:
            self._planner.replace_policy(policy)

    def replace_all(self, looker: LookerLike, target: Target) -> None:
        """Other workers, or other things to set: whatever was known of them is known no more, but for what people
        hold."""
        self.looker, self.target = looker, target
        self._end_planner()
        self._intentions = Intentions()
        self._metrics.forget()

    async def tell_all(self, *, reason: str, text: str, is_warning: bool = False) -> None:
        """On every pool, by whoever acts."""
        if self._seconds_left() > 0 and not self._dry_run:
            await self.target.tell("", reason=reason, text=text, is_warning=is_warning)

    async def begin(self) -> bool:
        """The look that an interval begins with: the planner sees it, and nothing is set or told. What it decides by
        limits alone it decides again at the turn, since it was never seen. False: nothing could be read, or might be.
        """
        return await self._look() is not None

    async def turn(self) -> tuple[Observation, Decision] | None:
        """What was seen and decided; None: nothing could be, or might be."""
        seen = await self._look()
        if seen is None:
            return None
        readings, observation, decision = seen
        self._count(readings, observation, decision)
        await self._tell_state(readings, decision)
        for change in decision.changes:
            self._reasons[change.pool] = change.reason
        writes = self._intentions.decided(
            decision.replicas, changed={change.pool for change in decision.changes}
        )
        self.unwritten = {}
        for write in writes:
            await self._write(write)
        self._metrics.pending.set(self._intentions.num_pending)
        return observation, decision

    async def _look(self) -> tuple[Mapping[str, PoolReading], Observation, Decision] | None:
        if self._seconds_left() <= 0:
            self._step_down()
            return None
        readings = await self._read()
        if readings is None:
            return None
        if self._planner is None:
            self._planner, self._intentions = self._make_planner(self._policy), Intentions()
            self._planner.resume(self._holds)
        shown, edited = self._intentions.seen(readings)
        for pool in edited:
            self._metrics.edits.labels(pool).inc()
            log.info(
                "found replicas set by somebody else %s", fields(pool=pool, replicas=readings[pool].replicas)
            )
        now = self._clock.monotonic()
        observation = self.looker.look(shown, now=now)
        decision = self._planner.decide(observation)
        self.looked_at = now
        return readings, observation, decision

    def _step_down(self) -> None:
        """What workers tell now is the one's who acts; it is not kept for a later term."""
        if self._planner is not None:
            log.warning("stopped acting: somebody else leads, or may do so")
            self._metrics.forget()
        self._end_planner()
        self.looker.discard()

    def _end_planner(self) -> None:
        if self._planner is not None:
            self._holds = self._planner.holds()
        self._planner = None

    async def _read(self) -> Mapping[str, PoolReading] | None:
        try:
            readings = await self.target.read()
        except TargetUnreachable as error:
            self._metrics.api_failures.labels("read").inc()
            if str(error) != self.unread:
                log.warning("decides nothing, replicas cannot be read %s", fields(error=str(error)))
            self.unread = str(error)
            return None
        if self.unread:
            log.info("read replicas again")
        self.unread = ""
        return readings

    async def _write(self, write: Write) -> None:
        reason = self._reasons.get(write.pool, "")
        told = fields(pool=write.pool, before=write.before, after=write.after, why=reason)
        if self._dry_run:
            log.info("would set replicas %s", told)
            return
        try:
            # Looked at again right before: the turn may have taken long, or the process been stopped for a while.
            left = self._seconds_left()
            async with asyncio.timeout(None if math.isinf(left) else max(0.0, left)):
                await self.target.set_replicas(write.pool, before=write.before, after=write.after)
        except SetBySomebodyElse as error:
            self._intentions.overtaken(write)
            self.unwritten[write.pool] = str(error)
            log.warning("left replicas alone %s", fields(pool=write.pool, error=str(error)))
            return
        except (TargetUnreachable, TimeoutError) as error:
            why = "may not act any more" if isinstance(error, TimeoutError) else str(error)
            self.unwritten[write.pool] = why
            self._metrics.api_failures.labels("write").inc()
            log.warning("failed to set replicas, tries again %s", fields(pool=write.pool, error=why))
            return
        self._intentions.written(write)
        is_up = write.after > write.before
        self._metrics.decisions.labels(write.pool, "up" if is_up else "down").inc()
        self._metrics.wanted.labels(write.pool).set(write.after)
        log.info("set replicas %s", told)
        text = reason or f"{write.pool} {write.before} -> {write.after}"
        await self.target.tell(write.pool, reason="ScaledUp" if is_up else "ScaledDown", text=text)

    async def _tell_state(self, readings: Mapping[str, PoolReading], decision: Decision) -> None:
        """Notes and problems, when they are new: figures alone do not make a note a new one."""
        notes = {_without_figures(note): note for note in decision.notes}
        for key in sorted(notes.keys() - self._told_notes):
            note = notes[key]
            log.info("noticed: %s", note)
            pool = _subject(note)
            if pool in readings and not self._dry_run:
                await self.target.tell(pool, reason="ScaleHeld" if is_hold(note) else "ScaleNote", text=note)
        self._told_notes = frozenset(notes)
        for pool, reading in readings.items():
            if reading.problem and not self._told_problems.get(pool):
                log.warning("found that a pool cannot start %s", fields(pool=pool, problem=reading.problem))
                if not self._dry_run:
                    await self.target.tell(pool, reason="CannotStart", text=reading.problem, is_warning=True)
            self._told_problems[pool] = reading.problem

    def _count(
        self, readings: Mapping[str, PoolReading], observation: Observation, decision: Decision
    ) -> None:
        metrics, news = self._metrics, self.looker.routers_news
        for pool, reading in readings.items():
            workers = observation.pools[pool].workers
            metrics.wanted.labels(pool).set(reading.replicas)
            metrics.decided.labels(pool).set(decision.replicas.get(pool, reading.replicas))
            metrics.ready.labels(pool).set(sum(not worker.is_draining for worker in workers))
            metrics.starting.labels(pool).set(len(reading.starting_seconds))
            metrics.problem.labels(pool).set(bool(reading.problem))
        metrics.figure.clear()
        for name, value in decision.figures.items():
            metrics.figure.labels(name).set(value)
        metrics.notes.set(len(decision.notes))
        metrics.holds.set(sum(map(is_hold, decision.notes)))
        metrics.waiting.set(news.num_waiting)
        metrics.ttft.set(news.ttft_mean or 0.0)
        metrics.itl.set(news.itl_mean or 0.0)


def is_hold(note: str) -> bool:
    """Whether a note of the planner tells of replicas that somebody else has set."""
    return re.search(r"\b(held|hold|holds)\b", note) is not None


def _subject(note: str) -> str:
    """The pool that a note of the planner begins with."""
    return note.partition(":")[0]


def _without_figures(note: str) -> str:
    subject, colon, text = note.partition(":")
    return subject + colon + re.sub(r"[0-9]+(\.[0-9]+)?", "#", text)

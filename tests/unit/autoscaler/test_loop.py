"""Turns of the loop: what is written when, and what a failure leaves for the next turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
from prometheus_client import CollectorRegistry

from autoscaler.looking.routers import RouterNews
from autoscaler.loop import Loop
from autoscaler.metrics import AutoscalerMetrics
from autoscaler.observation import Change, Decision, Hold, Observation, PoolState, Traffic
from autoscaler.targets.contract import PoolReading, SetBySomebodyElse, TargetUnreachable
from rorqual.clock import ManualClock
from rorqual.session import Role


class FakeTarget:
    def __init__(self, **replicas: int) -> None:
        self.replicas = dict(replicas)
        self.calls: list[tuple[str, int]] = []
        self.told: list[tuple[str, str, str]] = []
        self.problem = ""
        self.is_down = False
        self.loses_answers = False
        self.before_write: Callable[[], None] = lambda: None
        self.blocks = False

    async def read(self) -> Mapping[str, PoolReading]:
        if self.is_down:
            raise TargetUnreachable("down")
        return {name: PoolReading(replicas=n, problem=self.problem) for name, n in self.replicas.items()}

    async def set_replicas(self, pool: str, *, before: int, after: int) -> None:
        self.calls.append((pool, after))
        self.before_write()
        if self.blocks:
            await asyncio.Event().wait()
        if self.is_down:
            raise TargetUnreachable("down")
        if self.replicas[pool] != before:
            raise SetBySomebodyElse("somebody")
        self.replicas[pool] = after
        if self.loses_answers:
            raise TargetUnreachable("cut off")

    async def tell(self, pool: str, *, reason: str, text: str, is_warning: bool = False) -> None:
        self.told.append((pool, reason, text))

    async def close(self) -> None:
        pass


class FakeLooker:
    def __init__(self) -> None:
        self.routers_news = RouterNews()
        self.num_discarded = 0

    def look(self, readings: Mapping[str, PoolReading], *, now: float) -> Observation:
        pools = {
            name: PoolState(
                role=Role.DECODE,
                replicas_wanted=reading.replicas,
                workers=(),
                starting_seconds=reading.starting_seconds,
                problem=reading.problem,
            )
            for name, reading in readings.items()
        }
        return Observation(seconds=now, interval_seconds=1.0, pools=pools, traffic=Traffic())

    def discard(self) -> None:
        self.num_discarded += 1

    def failures(self) -> list[str]:
        return []


class FakePlanner:
    """Wants what it is told to, and holds a pool that is not as it left it."""

    wants: ClassVar[dict[str, int]] = {}

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.seen: list[dict[str, int]] = []
        self.starting: list[tuple[float, ...]] = []
        self.last: dict[str, int] = {}
        self.held: set[str] = set()
        self.notes: tuple[str, ...] = ()
        made.append(self)

    def replace_policy(self, policy: str) -> None:
        self.policy = policy

    def holds(self) -> Mapping[str, Hold]:
        return {name: Hold(replicas=self.last[name], until=100.0) for name in self.held}

    def resume(self, holds: Mapping[str, Hold]) -> None:
        self.held |= holds.keys()

    def decide(self, observation: Observation) -> Decision:
        seen = {name: pool.replicas_wanted for name, pool in observation.pools.items()}
        self.seen.append(seen)
        self.starting.append(observation.pools["decode"].starting_seconds)
        self.held |= {name for name, count in seen.items() if self.last.get(name, count) != count}
        wants = {
            name: count if name in self.held else self.wants.get(name, count) for name, count in seen.items()
        }
        self.last = wants
        changes = tuple(
            Change(pool=name, before=seen[name], after=count, reason=f"{name} to {count}")
            for name, count in wants.items()
            if count != seen[name]
        )
        return Decision(replicas=wants, changes=changes, notes=self.notes)


made: list[FakePlanner] = []


class World:
    def __init__(self, *, dry_run: bool = False, **replicas: int) -> None:
        made.clear()
        FakePlanner.wants = {}
        self.target = FakeTarget(**(replicas or {"decode": 1}))
        self.looker = FakeLooker()
        self.clock = ManualClock()
        self.seconds_left = float("inf")
        self.registry = CollectorRegistry()
        self.loop: Loop[str] = Loop(
            "policy",
            make_planner=FakePlanner,
            looker=self.looker,
            target=self.target,
            clock=self.clock,
            metrics=AutoscalerMetrics(self.registry),
            seconds_left=lambda: self.seconds_left,
            dry_run=dry_run,
        )

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"rorqual_autoscaler_{name}", labels) or 0.0

    @property
    def planner(self) -> FakePlanner:
        return made[-1]


async def test_the_look_that_an_interval_begins_with_changes_nothing() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    assert await world.loop.begin()
    assert (world.target.calls, world.target.told) == ([], [])
    await world.loop.turn()
    assert made[0].seen == [{"decode": 1}, {"decode": 1}]
    world.target.is_down = True
    assert not await world.loop.begin()


async def test_a_change_is_written_told_and_counted_once() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    for _ in range(3):
        await world.loop.turn()
    assert world.target.calls == [("decode", 3)]
    assert world.target.told == [("decode", "ScaledUp", "decode to 3")]
    assert world.count("decisions_total", pool="decode", direction="up") == 1
    assert world.count("replicas_wanted", pool="decode") == 3


async def test_a_pool_that_does_not_change_makes_no_call() -> None:
    world = World(decode=2, prefill=1)
    FakePlanner.wants = {"decode": 1}
    await world.loop.turn()
    await world.loop.turn()
    assert world.target.calls == [("decode", 1)]
    assert world.target.told == [("decode", "ScaledDown", "decode to 1")]


async def test_a_write_that_failed_is_written_again_and_is_no_edit_of_somebody_else() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    world.target.before_write = lambda: setattr(world.target, "is_down", True)
    await world.loop.turn()
    assert (world.target.replicas, world.count("writes_pending")) == ({"decode": 1}, 1)
    await world.loop.turn()  # down: nothing is even decided
    assert len(world.planner.seen) == 1
    world.target.is_down, world.target.before_write = False, lambda: None
    await world.loop.turn()
    assert world.planner.seen == [{"decode": 1}, {"decode": 3}]
    assert world.planner.starting[-1] == (0.0, 0.0)
    assert world.target.replicas == {"decode": 3}
    await world.loop.turn()
    assert world.planner.held == set()
    assert world.target.calls == [("decode", 3), ("decode", 3)]
    assert world.count("edits_by_others_total", pool="decode") == 0


async def test_a_write_whose_answer_was_lost_is_not_written_twice() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    world.target.loses_answers = True
    await world.loop.turn()
    await world.loop.turn()
    assert world.target.calls == [("decode", 3)]
    assert world.planner.held == set()


async def test_an_edit_at_any_moment_is_shown_to_the_planner_and_never_written_over() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    world.target.before_write = lambda: world.target.replicas.update(decode=7)
    await world.loop.turn()
    world.target.before_write = lambda: None
    await world.loop.turn()
    await world.loop.turn()
    assert world.planner.seen[1:] == [{"decode": 7}, {"decode": 7}]
    assert world.planner.held == {"decode"}
    assert world.target.replicas == {"decode": 7}
    assert world.count("edits_by_others_total", pool="decode") == 1


async def test_whoever_may_not_act_neither_decides_nor_writes_and_begins_anew_when_it_may() -> None:
    world = World()
    await world.loop.turn()
    world.seconds_left = 0.0
    FakePlanner.wants = {"decode": 3}
    await world.loop.turn()
    assert (world.target.calls, world.looker.num_discarded) == ([], 1)
    world.seconds_left = 12.0
    await world.loop.turn()
    assert len(made) == 2
    assert world.target.calls == [("decode", 3)]


async def test_what_a_person_holds_is_held_also_after_a_lapse_or_with_other_targets() -> None:
    world = World()
    await world.loop.turn()
    world.target.replicas["decode"] = 7
    await world.loop.turn()
    assert world.planner.held == {"decode"}
    world.seconds_left = 0.0
    await world.loop.turn()
    await world.loop.turn()
    world.seconds_left = 12.0
    FakePlanner.wants = {"decode": 3}
    await world.loop.turn()
    assert (len(made), world.target.calls) == (2, [])
    world.loop.replace_all(FakeLooker(), world.target)
    await world.loop.turn()
    assert (len(made), world.target.calls) == (3, [])


async def test_a_write_is_cut_off_when_the_right_to_act_ends() -> None:
    world = World()
    FakePlanner.wants = {"decode": 3}
    world.seconds_left = 0.05
    world.target.blocks = True
    async with asyncio.timeout(5):
        await world.loop.turn()
    assert world.count("api_failures_total", what="write") == 1
    assert world.target.replicas == {"decode": 1}


async def test_a_dry_run_writes_nothing_and_goes_on_as_if_it_had() -> None:
    world = World(dry_run=True)
    FakePlanner.wants = {"decode": 3}
    for _ in range(3):
        await world.loop.turn()
    assert (world.target.calls, world.target.told) == ([], [])
    assert world.planner.seen == [{"decode": 1}, {"decode": 3}, {"decode": 3}]
    assert world.planner.held == set()


async def test_problems_and_holds_are_told_once_though_their_figures_change() -> None:
    world = World()
    world.target.problem = "ImagePullBackOff"
    await world.loop.turn()
    for seconds in (900, 890, 880):
        world.planner.notes = (f"decode: held at 1 by hand for {seconds} s more",)
        await world.loop.turn()
    assert [(pool, reason) for pool, reason, _ in world.target.told] == [
        ("decode", "CannotStart"),
        ("decode", "ScaleHeld"),
    ]
    assert world.count("holds") == 1
    assert world.count("pool_problem", pool="decode") == 1


async def test_a_note_is_told_of_its_own_pool_and_of_each_whose_name_differs_by_a_figure() -> None:
    world = World(decode=1, **{"decode-b": 1, "h100": 1, "h200": 1})
    await world.loop.turn()
    world.planner.notes = tuple(
        f"{pool}: held at 1 by hand for 9 s more" for pool in ("decode-b", "h100", "h200")
    )
    await world.loop.turn()
    assert sorted(pool for pool, _, _ in world.target.told) == ["decode-b", "h100", "h200"]


async def test_whoever_acts_no_more_shows_no_alarming_figures() -> None:
    world = World()
    world.target.problem, FakePlanner.wants = "ImagePullBackOff", {"decode": 3}
    world.target.before_write = lambda: setattr(world.target, "is_down", True)
    await world.loop.turn()
    world.target.is_down = False
    world.planner.notes = ("decode: held at 3 by hand for 9 s more",)
    await world.loop.turn()
    gauges = ("pool_problem", "writes_pending", "holds", "notes", "replicas_decided")

    def shown() -> dict[str, float]:
        samples = [sample for metric in world.registry.collect() for sample in metric.samples]
        values = {sample.name.removeprefix("rorqual_autoscaler_"): sample.value for sample in samples}
        return {name: values.get(name, 0.0) for name in gauges}

    assert all(shown().values()), shown()
    world.seconds_left = 0.0
    await world.loop.turn()
    assert not any(shown().values()), shown()


async def test_a_target_that_cannot_be_read_is_said_once_and_counted_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.target.is_down = True
    for _ in range(3):
        assert await world.loop.turn() is None
    assert world.count("api_failures_total", what="read") == 3
    assert sum("decides nothing" in record.getMessage() for record in caplog.records) == 1
    assert world.loop.unread == "down"

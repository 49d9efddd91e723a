"""Storms over prefill and decode workers under the production router, in one process, on virtual time: the same seed is
the same storm. Whatever goes wrong, every token is the right one, and in the end nothing is held by anybody.

Only ranks, calls between workers and sessions are fakes, and what is drawn of them is how long they take and how they
fail. The ranks are strict: memory that is used by two, or given back too early, ends its worker.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from rorqual.errors import Overloaded, StageTimedOut, WorkerLost
from router.generation import Generation
from router.worker_link import FleetConfig
from tests.harness.cluster import Cluster, a_cluster, a_generation, the_answer
from tests.harness.lending import TRANSFER_SECONDS, World, a_world, until
from tests.harness.virtual import virtual

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

PREFILLS, DECODES = ("p0", "p1"), ("d0", "d1")
NUM_REQUESTS = 50
START_SECONDS = 5.0
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.minutes) for seed in range(2, 6))]
EARLY_FROM = 600
LENGTHS = (1, 5, 200, 255, 256, 257, 300, 700, 1024, 1500)


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How likely it is that something goes wrong, each time it could."""

    slow_reads: float = 0.0  # longer than any may take
    lost_calls: float = 0.0  # between workers
    cancels: float = 0.0  # of requests
    cuts: int = 0  # sessions that break
    deaths: int = 0  # workers that die and are started again
    pauses: int = 0  # ranks that stand still for a while
    is_calm: bool = field(init=False)

    def __post_init__(self) -> None:
        harm = (self.slow_reads, self.lost_calls, self.cuts, self.deaths, self.pauses)
        object.__setattr__(self, "is_calm", not any(harm))


class Storm:
    def __init__(self, world: World, cluster: Cluster, weather: Weather, seed: int) -> None:
        self.world = world
        self.cluster = cluster
        self.weather = weather
        self.draw = random.Random(seed)
        self.drafts = (0, "auto", 4)[seed % 3]
        self.outcomes: Counter[str] = Counter()
        world.step_seconds = lambda: self.draw.uniform(0.002, 0.03)
        world.read_seconds = self._read_seconds
        world.lenders.call_seconds = self._call_seconds
        for address in (*PREFILLS, *DECODES):
            self.start(address)

    def start(self, address: str) -> None:
        start = self.world.start_prefill if address in PREFILLS else self.world.start_decode
        room = {"num_pages": 24, "num_slots": 4, "num_records": 8}
        worker = start(address, **room, heartbeat_seconds=0.5, drafts=self.drafts)
        self.cluster.transport.hosts[address] = worker.host

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_REQUESTS):
                tasks.create_task(self._one(number, seconds=self.draw.uniform(0, START_SECONDS)))
            for do_harm, num in (
                (self._cut, self.weather.cuts),
                (self._kill, self.weather.deaths),
                (self._pause, self.weather.pauses),
            ):
                for _ in range(num):
                    address = self.draw.choice((*PREFILLS, *DECODES))
                    tasks.create_task(do_harm(address, self.draw.uniform(0.2, START_SECONDS + 2)))

    async def _one(self, number: int, *, seconds: float) -> None:
        generation = a_generation(
            number,
            length=self.draw.choice(LENGTHS),
            max_tokens=self.draw.choice((1, 2, 10, 40, 300)),
            num_choices=self.draw.choice((1, 1, 1, 2)),
        )
        patience = self.draw.uniform(0, 4) if self.draw.random() < self.weather.cancels else None
        await asyncio.sleep(seconds)
        tokens: list[list[int]] = [[] for _ in range(generation.num_choices)]
        try:
            async with asyncio.timeout(patience):
                await self._collect(generation, tokens)
            outcome = "finished"
        except TimeoutError:
            outcome = "cancelled"
        except (WorkerLost, Overloaded, StageTimedOut) as error:
            outcome = type(error).__name__
        self.outcomes[outcome] += 1
        for choice, got in enumerate(tokens):
            expected = the_answer(generation, choice)
            assert got == (expected if outcome == "finished" else expected[: len(got)])

    async def _collect(self, generation: Generation, tokens: list[list[int]]) -> None:
        async with aclosing(self.cluster.dispatcher.generate(generation)) as updates:
            async for update in updates:
                assert update.first_index == len(tokens[update.choice])
                tokens[update.choice] += [token.token_id for token in update.tokens]

    async def _cut(self, address: str, seconds: float) -> None:
        """The network between the router and a worker fails; the worker lives."""
        await asyncio.sleep(seconds)
        channel = self.cluster.transport.latest.get(address)
        if channel is not None:
            channel.cut()
            self.outcomes["cut"] += 1

    async def _kill(self, address: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if address not in self.world.workers:
            return  # it is dead already
        self.world.lose(address)
        del self.cluster.transport.hosts[address]
        self.cluster.transport.latest[address].cut()
        self.outcomes["death"] += 1
        await asyncio.sleep(self.draw.uniform(0.0, 2.0))
        self.start(address)

    async def _pause(self, address: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        worker = self.world.workers.get(address)
        if worker is not None:
            worker.link.gate.clear()
            await asyncio.sleep(self.draw.uniform(0.1, 2 * TRANSFER_SECONDS))
            worker.link.gate.set()

    def _read_seconds(self) -> float:
        if self.draw.random() < self.weather.slow_reads:
            return self.draw.uniform(TRANSFER_SECONDS, 3 * TRANSFER_SECONDS)
        return self.draw.expovariate(1 / 0.02)

    def _call_seconds(self) -> float:
        if self.draw.random() < self.weather.lost_calls:
            return 100.0
        return self.draw.expovariate(1 / 0.005)

    async def check_nothing_is_held(self) -> None:
        await until(lambda: len(self.cluster.fleet.welcomes()) == len(PREFILLS + DECODES))
        await self.world.empty()
        fleet = self.cluster.fleet
        assert fleet.credit.num_waiting == 0
        for view in fleet.view():
            counts = (view.sequences_outstanding, view.tokens_outstanding, view.prompt_tokens_outstanding)
            assert counts == (0, 0, 0)
            use = fleet.credit.use_of(view.address)
            assert use is None or (use.sequences, use.pages) == (0, 0)
        for address in DECODES:
            assert self.cluster.count("credit_sequences", worker=address) == 0
            assert self.cluster.count("credit_pages", worker=address) == 0
            assert self.world.workers[address].count("peers") <= 2 * len(PREFILLS)
        assert self.cluster.count("tokens_duplicate_total") == 0


async def a_storm(weather: Weather, seed: int) -> Counter[str]:
    fleet = FleetConfig(backoff_seconds_min=0.05, backoff_seconds_max=0.5, silence_seconds_max=5.0)
    async with (
        a_world() as world,
        a_cluster(
            *(*PREFILLS, *DECODES),
            start=False,
            seconds_max=600,
            fleet=fleet,
            bind_early_tokens=EARLY_FROM,
            hand_over_seconds_max=60,
        ) as cluster,
    ):
        storm = Storm(world, cluster, weather, seed)
        await cluster.connected(len(PREFILLS + DECODES))
        await storm.run()
        await storm.check_nothing_is_held()
        # And it goes on.
        storm.weather = Weather()
        await storm._one(1000, seconds=0.0)
        assert storm.outcomes["finished"] >= 1
        await storm.check_nothing_is_held()
        return storm.outcomes


@virtual
@pytest.mark.parametrize("seed", SEEDS)
async def test_in_calm_weather_every_request_is_answered(seed: int) -> None:
    outcomes = await a_storm(Weather(), seed)
    assert outcomes == {"finished": NUM_REQUESTS + 1}


@virtual
@pytest.mark.parametrize("seed", SEEDS)
async def test_clients_that_leave_cost_the_others_nothing(seed: int) -> None:
    outcomes = await a_storm(Weather(cancels=0.8), seed)
    assert outcomes["cancelled"] > 0
    assert outcomes["cancelled"] + outcomes["finished"] == NUM_REQUESTS + 1


BAD = {
    "slow reads": Weather(slow_reads=0.1, cancels=0.1),
    "lost calls": Weather(lost_calls=0.1, cancels=0.1),
    "cut sessions": Weather(cuts=8, cancels=0.1),
    "ranks that stand still": Weather(pauses=12, cancels=0.1),
    "deaths": Weather(deaths=5, cancels=0.1),
    "everything": Weather(slow_reads=0.05, lost_calls=0.05, cancels=0.3, cuts=4, deaths=4, pauses=6),
}


@virtual
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weather", BAD)
async def test_in_bad_weather_no_token_is_wrong_and_nothing_stays_held(weather: str, seed: int) -> None:
    outcomes = await a_storm(BAD[weather], seed)
    assert outcomes["finished"] > NUM_REQUESTS / 4

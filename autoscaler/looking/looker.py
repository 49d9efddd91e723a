"""The observation of one look: what targets, workers and routers tell, put together.

Called by `autoscaler.loop` once an interval. It looks all the time in between; a look itself waits for nobody.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import replace

import aiohttp

from autoscaler.looking.members import Members
from autoscaler.looking.routers import Pinned, RouterNews, RouterReader, gather_news
from autoscaler.looking.samples import Gathering
from autoscaler.looking.worker_session import WorkerChannels, WorkerSession
from autoscaler.observation import Observation, PoolState, Traffic, WorkerState
from autoscaler.setup import PoolSetup, Setup
from autoscaler.targets.contract import PoolReading
from rorqual.discovery import make_source

ROUTER_SECONDS = 5.0
"""Between two questions to a router."""


class Looker:
    """`run` goes on until cancelled."""

    def __init__(
        self,
        setup: Setup,
        *,
        observer_id: str,
        channels: WorkerChannels,
        http: aiohttp.ClientSession,
        randomness: random.Random,
        trust: Pinned | None = None,
    ) -> None:
        self.routers_news = RouterNews()  # of the last look
        self._gathering = Gathering(randomness=randomness)
        self._roles = {pool.name: pool.role for pool in setup.pools}
        self._looked_at: float | None = None
        self._router_seconds = _router_seconds(setup.interval_seconds)

        def make_pool(pool: PoolSetup) -> Members[WorkerSession]:
            assert pool.workers is not None

            def make(address: str) -> WorkerSession:
                return WorkerSession(
                    address,
                    role=pool.role,
                    observer_id=observer_id,
                    channels=channels,
                    randomness=randomness,
                    on_usage=self._gathering.add,
                )

            return Members([make_source(pool.workers)], make=make)

        self._pools = {pool.name: make_pool(pool) for pool in setup.pools}
        self._routers = Members(
            [make_source(spec) for spec in setup.routers],
            make=lambda address: RouterReader(
                address,
                session=http,
                interval_seconds=self._router_seconds,
                trust=trust,
            ),
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for members in (*self._pools.values(), self._routers):
                tasks.create_task(members.run())

    def look_every(self, interval_seconds: float) -> None:
        """Looks come so often from now on: routers are to have been asked before each."""
        self._router_seconds = _router_seconds(interval_seconds)
        for router in self._routers:
            router.interval_seconds = self._router_seconds

    def failures(self) -> list[str]:
        """Why what is seen may not be all there is, a line each."""
        lost = [
            worker.failure or f"{worker.address}: not connected yet"
            for members in self._pools.values()
            for worker in members
            if worker.load is None
        ]
        sources = [error for members in (*self._pools.values(), self._routers) for error in members.errors]
        return [*sources, *lost, *(item.failure for item in self._routers if item.failure)]

    @property
    def num_known(self) -> int:
        return sum(1 for members in self._pools.values() for _ in members)

    @property
    def num_missing(self) -> int:
        """Known of and not connected."""
        return sum(worker.load is None for members in self._pools.values() for worker in members)

    def discard(self) -> None:
        """Nobody decides just now: what was told is not kept for a later look, which is then a first one."""
        self._gathering.take()
        self.routers_news = gather_news(self._routers)
        self._looked_at = None

    def look(self, readings: Mapping[str, PoolReading], *, now: float) -> Observation:
        """`now` is of a monotonic clock, in seconds. Takes what came since the last look."""
        usage = self._gathering.take()
        news = self.routers_news = gather_news(self._routers)
        prompts = usage.prompts
        # Users wait at routers, too. How long each did is not known here: the means' difference is given to all.
        if news.ttft_mean is not None and prompts:
            seen = sum(sample.ttft_seconds for sample in prompts) / len(prompts)
            before = max(0.0, news.ttft_mean - seen)
            prompts = tuple(replace(sample, ttft_seconds=sample.ttft_seconds + before) for sample in prompts)
        traffic = Traffic(
            num_prompts=usage.num_prompts,
            prompts=prompts,
            num_streams=usage.num_streams,
            streams=usage.streams,
            num_waiting=news.num_waiting,
            num_unserved=news.num_unserved,
        )
        interval = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        pools = {name: self._pool(name, reading) for name, reading in readings.items()}
        return Observation(seconds=now, interval_seconds=interval, pools=pools, traffic=traffic)

    def _pool(self, name: str, reading: PoolReading) -> PoolState:
        workers = tuple(
            WorkerState(address=worker.address, load=worker.load, is_draining=worker.is_draining)
            for worker in self._pools[name]
            if worker.load is not None
        )
        return PoolState(
            role=self._roles[name],
            replicas_wanted=reading.replicas,
            workers=workers,
            starting_seconds=reading.starting_seconds,
            problem=reading.problem,
        )


def _router_seconds(interval_seconds: float) -> float:
    return min(ROUTER_SECONDS, interval_seconds / 2)

"""Which servers of a store are worth asking, and finding out again about those that are not. No torch.

Reading and writing tell it what worked and what failed, and ask it before they ask a server. No read ever tries a
server that is thought to be lost: a task of this module does, and leaves a connection behind for the reads to come.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from kvstore.store.breaker import Breaker, BreakerState
from kvstore.store.connections import NodeName, ServerLost
from kvstore.store.counts import StoreCounts
from kvstore.store.servers import Servers
from rorqual.clock import Clock
from rorqual.telemetry import fields

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    failures_max: int = 3  # in a row, until a server counts as lost
    backoff_seconds: float = 0.1  # before the first probe; doubled up to:
    backoff_seconds_max: float = 10.0
    full_seconds: float = 1.0  # without writes after a server said it is full; doubled up to:
    full_seconds_max: float = 60.0
    server_seconds_max: float = 1.0  # that a probe, a connection or a write may take
    blame_seconds: float = 0.01
    """A read that ends with its budget is the server's failure only if it was asked at least so long ago."""


class Health:
    def __init__(self, servers: Servers, config: HealthConfig, *, clock: Clock, counts: StoreCounts) -> None:
        self._servers = servers
        self._config = config
        self._clock = clock
        self._counts = counts
        self._breakers: dict[NodeName, Breaker] = {}
        self._pauses: dict[NodeName, Breaker] = {}
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def breakers(self) -> dict[NodeName, BreakerState]:
        """Of all servers that are known."""
        return {node: self._breaker(node).state for node in self._servers.nodes}

    async def run(self) -> None:
        """Learn who the servers are, then look after those that get lost. Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await self._learn()
                await asyncio.Event().wait()
            finally:
                self._tasks = None

    def is_up(self, node: NodeName) -> bool:
        return self._breaker(node).is_closed

    def worked(self, node: NodeName) -> None:
        """It gave a reply."""
        self._breaker(node).worked(self._clock.monotonic())

    def failed(self, node: NodeName, began: float, error: ServerLost) -> None:
        """An exchange that began at `began` failed."""
        self._counts.servers_lost[error.code] += 1
        self._failed(node, began, str(error))

    def overdue(self, node: NodeName, began: float) -> None:
        """A read gave up waiting."""
        if self._clock.monotonic() - began >= self._config.blame_seconds:
            self._counts.servers_lost["overdue"] += 1
            self._failed(node, began, "its answers come too late")

    def may_write(self, node: NodeName) -> bool:
        """False while it is full. When the pause is over, one caller is let through and must tell how it went, by
        `wrote` or `was_full` or `did_not_write`."""
        pause = self._pauses.get(node)
        if pause is None or pause.is_closed:
            return True
        now = self._clock.monotonic()
        if pause.state is BreakerState.OPEN and now >= pause.probe_at:
            pause.begin_probe(now)
            return True
        return False

    def wrote(self, node: NodeName) -> None:
        pause = self._pauses.get(node)
        if pause is None:
            return
        now = self._clock.monotonic()
        if pause.state is BreakerState.HALF_OPEN:
            pause.probe_ended(now, is_well=True)
        pause.worked(now)

    def was_full(self, node: NodeName, began: float) -> None:
        """It has no memory for what was written."""
        now = self._clock.monotonic()
        pause = self._pauses.get(node)
        if pause is None:
            config = self._config
            pause = self._pauses[node] = Breaker(
                failures_max=1,
                backoff_seconds=config.full_seconds,
                backoff_seconds_max=config.full_seconds_max,
            )
        if pause.state is BreakerState.HALF_OPEN:
            pause.probe_ended(now, is_well=False)
        elif pause.failed(began, now):
            self._counts.write_pauses += 1
            _log.warning("paused writing to a full server %s", fields(server=node))

    def did_not_write(self, node: NodeName) -> None:
        """Nothing was found out: the pause begins anew."""
        pause = self._pauses.get(node)
        if pause is not None and pause.state is BreakerState.HALF_OPEN:
            pause.probe_ended(self._clock.monotonic(), is_well=False)

    def _failed(self, node: NodeName, began: float, why: str) -> None:
        if not self._breaker(node).failed(began, self._clock.monotonic()):
            return
        self._counts.breakers_opened += 1
        _log.warning("gave up a server for now %s", fields(server=node, why=why))
        if self._tasks is not None:
            self._tasks.create_task(self._probe_until_well(node))

    def _breaker(self, node: NodeName) -> Breaker:
        breaker = self._breakers.get(node)
        if breaker is None:
            config = self._config
            breaker = self._breakers[node] = Breaker(
                failures_max=config.failures_max,
                backoff_seconds=config.backoff_seconds,
                backoff_seconds_max=config.backoff_seconds_max,
            )
        return breaker

    async def _learn(self) -> None:
        """The first refresh, tried until it succeeds. It also leaves a connection to each server of ours."""
        backoff = self._config.backoff_seconds
        is_told = False
        while True:
            try:
                await self._servers.refresh()
                break
            except ServerLost as error:
                self._counts.servers_lost[error.code] += 1
                if not is_told:
                    _log.warning("found no store %s", fields(why=error))
                    is_told = True
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._config.backoff_seconds_max)
        _log.info("found the store %s", fields(servers=",".join(self._servers.nodes)))

    async def _probe_until_well(self, node: NodeName) -> None:
        breaker = self._breaker(node)
        while node in self._servers.nodes:
            # Again and again: an event loop may wake early, uvloop by up to a millisecond.
            while (seconds_left := breaker.probe_at - self._clock.monotonic()) > 0:  # noqa: ASYNC110 (no event)
                await asyncio.sleep(seconds_left)
            breaker.begin_probe(self._clock.monotonic())
            is_well = await self._is_well(node)
            breaker.probe_ended(self._clock.monotonic(), is_well=is_well)
            if is_well:
                _log.info("found a lost server again %s", fields(server=node))
                return
            await self._refresh()
        # Another server has its keys now.
        self._breakers.pop(node, None)
        self._pauses.pop(node, None)

    async def _is_well(self, node: NodeName) -> bool:
        try:
            async with asyncio.timeout(self._config.server_seconds_max):
                await self._servers.ping(node)
        except (ServerLost, TimeoutError):
            return False
        return True

    async def _refresh(self) -> None:
        try:
            await self._servers.refresh()
        except ServerLost as error:
            self._counts.servers_lost[error.code] += 1
            return
        known = set(self._servers.nodes)
        # Those that are open are forgotten by their own probe.
        for node in [node for node, item in self._breakers.items() if item.is_closed and node not in known]:
            del self._breakers[node]
            self._pauses.pop(node, None)

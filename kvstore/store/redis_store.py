"""A store in Redis, Valkey or whatever speaks their protocol: one server, or a Cluster. No torch.

Made by a worker's host process, which owns its `run`. A lost, slow or full store costs a read its budget at most, and
soon nothing: its servers are then not asked until a probe of ours was answered. It never raises to its caller, and it
never waits for a write. Everything it holds is bounded by its configuration, and counted.

The servers should evict (`maxmemory-policy allkeys-lru`). A Cluster should be told `cluster-require-full-coverage no`:
otherwise one lost server makes all of them refuse. Whoever can write to the servers can make workers serve wrong state:
they belong in a network, or behind a password and TLS, that only workers have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.store.address import Address, parse_address
from kvstore.store.contract import Kind, Payload, StoreKey
from kvstore.store.counts import Observe, StoreCounts, StoreState
from kvstore.store.health import Health, HealthConfig
from kvstore.store.reading import Reading
from kvstore.store.servers import make_servers
from kvstore.store.value import HEADER_BYTES, Form
from kvstore.store.writing import Writing, WritingConfig
from rorqual.clock import Clock
from rorqual.errors import ConfigError

READ_BUDGET_SECONDS = 0.02
"""Of a read, where its caller knows no better one: about what computing a page takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    url: str = field(repr=False)  # may have a password; see `kvstore.store.address`
    form: Form
    page_bytes: int  # `StateLayout.page_bytes`
    tail_bytes_max: int  # `kvstore.handover.record_bytes_max`
    ttl_seconds: float = 86400.0  # of a value, from when it was last written or found written
    tenant_bytes_max: int | None = None  # of values, headers included; None: no quotas
    read_bytes_max: int = 256 << 20  # of values on their way here
    queue_bytes_max: int = 256 << 20  # of values that wait to be written
    batch_bytes_max: int = 8 << 20  # of one round trip of writes
    connections_max: int = 4  # to each server
    health: HealthConfig = field(default_factory=HealthConfig)


class RedisStore:
    """A `kvstore.store.contract.Store`. Until `run` runs, and after it, every read misses and nothing is written."""

    def __init__(
        self, config: StoreConfig, *, clock: Clock, observe_read_seconds: Observe = lambda _: None
    ) -> None:
        """Connects to nobody yet. Raises ConfigError."""
        _check(config)
        self.address: Address = parse_address(config.url)
        self.counts = StoreCounts()
        seconds_max = config.health.server_seconds_max
        self._servers = make_servers(
            self.address, connections_max=config.connections_max, seconds_max=seconds_max
        )
        self._health = Health(self._servers, config.health, clock=clock, counts=self.counts)
        self._writing = Writing(
            self._servers,
            self._health,
            config.form,
            WritingConfig(
                ttl_seconds=config.ttl_seconds,
                tenant_bytes_max=config.tenant_bytes_max,
                queue_bytes_max=config.queue_bytes_max,
                batch_bytes_max=config.batch_bytes_max,
                server_seconds_max=seconds_max,
            ),
            clock=clock,
            counts=self.counts,
        )
        self._reading = Reading(
            self._servers,
            self._health,
            config.form,
            payload_bytes={Kind.PAGE: config.page_bytes, Kind.TAIL: config.tail_bytes_max},
            bytes_max=config.read_bytes_max,
            clock=clock,
            counts=self.counts,
            discard=self._writing.discard,
            observe=observe_read_seconds,
        )

    @property
    def state(self) -> StoreState:
        return StoreState(
            breakers=self._health.breakers,
            bytes_in_flight=self._reading.bytes_in_flight,
            bytes_queued=self._writing.bytes_queued,
            connections=self._servers.num_connections,
            redirected=self._servers.num_redirected,
        )

    async def run(self) -> None:
        """Until cancelled; then all connections are closed, and what waits to be written is lost: see `flush`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._health.run())
                tasks.create_task(self._reading.run())
                tasks.create_task(self._writing.run())
        finally:
            await self._servers.aclose()

    async def flush(self, *, seconds_max: float) -> bool:
        """Wait until everything given so far is written, deleted or dropped. False when that took too long."""
        try:
            async with asyncio.timeout(seconds_max):
                await self._writing.flushed()
        except TimeoutError:
            return False
        return True

    async def read(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[memoryview | None]:
        return await self._reading.read(keys, budget_seconds=budget_seconds)

    async def contains(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[bool]:
        return await self._reading.contains(keys, budget_seconds=budget_seconds)

    def write(self, key: StoreKey, payload: Payload) -> bool:
        return self._writing.write(key, payload)

    def delete(self, keys: Sequence[StoreKey]) -> None:
        self._writing.delete(keys)


def _check(config: StoreConfig) -> None:
    for name in ("page_bytes", "tail_bytes_max", "ttl_seconds", "read_bytes_max", "connections_max"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"the store's {name} must be above zero")
    longest = HEADER_BYTES + max(config.page_bytes, config.tail_bytes_max)
    for name in ("read_bytes_max", "queue_bytes_max"):
        if getattr(config, name) < longest:
            raise ConfigError(f"the store's {name} has no room for one value of {longest} bytes")

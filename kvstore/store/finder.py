"""A client of a store that only asks what is there: for routers, which never move a byte of it. No torch.

Made by `router.stored`, which owns its `run`. It is told the wire id with every question, since a router learns it from
its workers. It never raises to its caller. Questions have small budgets, so a server is blamed sooner than by workers.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.store.address import Address, parse_address
from kvstore.store.contract import StoreKey
from kvstore.store.counts import StoreCounts
from kvstore.store.health import Health, HealthConfig
from kvstore.store.names import value_name
from kvstore.store.presence import ask_presence
from kvstore.store.servers import make_servers
from rorqual.clock import Clock

HEALTH = HealthConfig(blame_seconds=0.002)
"""A question that took its whole budget of 5 ms is its server's failure; one that waited for its turn is not."""

CONNECTIONS_MAX = 4


class StoreFinder:
    """Until `run` runs, and after it, nothing is known."""

    def __init__(self, url: str, *, clock: Clock, health: HealthConfig = HEALTH) -> None:
        """Connects to nobody yet. Raises ConfigError."""
        self.address: Address = parse_address(url)
        self.counts = StoreCounts()
        self._clock = clock
        self._servers = make_servers(
            self.address, connections_max=CONNECTIONS_MAX, seconds_max=health.server_seconds_max
        )
        self._health = Health(self._servers, health, clock=clock, counts=self.counts)
        self._is_running = False

    @property
    def num_connections(self) -> int:
        return self._servers.num_connections

    async def run(self) -> None:
        """Until cancelled; then all connections are closed."""
        self._is_running = True
        try:
            await self._health.run()
        finally:
            self._is_running = False
            await self._servers.aclose()

    async def find(
        self, wire_id: str, keys: Sequence[StoreKey], *, budget_seconds: float
    ) -> list[bool] | None:
        """Whether each is there. None: not all of it is known within the budget."""
        if not self._is_running or budget_seconds <= 0:
            return None
        names = [value_name(wire_id, key) for key in keys]
        known = await ask_presence(
            names,
            servers=self._servers,
            health=self._health,
            clock=self._clock,
            counts=self.counts,
            budget_seconds=budget_seconds,
        )
        return [known[name] for name in names] if all(name in known for name in names) else None

"""Which workers there are, as the sources of `--discover` say, told to the fleet; and what is missing, told to people.

Run by `router.process`. An address is known while any source names it. What is done about it is the fleet's: nothing
here knows of sessions, except to say what is missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from rorqual.discovery import AddressSource
from rorqual.telemetry import fields
from router.fleet import Fleet

log = logging.getLogger(__name__)

WORKERS_MAX = 1024
"""At once, of a router that finds its workers: what the picture of caches and the fleet's table are made for."""

LOOK_SECONDS = 1.0
REMIND_SECONDS = 60.0
FAILURES_SHOWN = 8


class FindingMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.addresses = Gauge(
            "rorqual_router_discovery_addresses",
            "Addresses of workers that a source names.",
            ["source"],
            registry=registry,
        )
        self.stale_seconds = Gauge(
            "rorqual_router_discovery_stale_seconds",
            "Since a source could last be relied upon; 0 while it can.",
            ["source"],
            registry=registry,
        )
        self.failures = Counter(
            "rorqual_router_discovery_failures",
            "Times that a source could not be asked; what it had said stays known.",
            ["source"],
            registry=registry,
        )
        self.left_out = Gauge(
            "rorqual_router_discovery_left_out",
            "Workers found for which the router has no room.",
            registry=registry,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class _Known:
    """What one source has said so far."""

    source: AddressSource
    addresses: frozenset[str] = frozenset()
    num_failures: int = 0  # counted already
    fresh_at: float  # on the loop's clock


class Finding:
    """All sources of one router; without any it does nothing."""

    def __init__(self, sources: Sequence[AddressSource], *, fleet: Fleet, metrics: FindingMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._sources = tuple(sources)
        self._known: list[_Known] = []

    async def run(self) -> None:
        """Until cancelled."""
        now = asyncio.get_running_loop().time
        self._known = [_Known(source=source, fresh_at=now()) for source in self._sources]
        self._metrics.left_out.set_function(lambda: float(self._fleet.num_left_out))
        async with asyncio.TaskGroup() as tasks:
            for known in self._known:
                tasks.create_task(known.source.run(self._taker(known)))
            while True:
                for known in self._known:
                    self._look(known, now())
                await asyncio.sleep(LOOK_SECONDS)

    def missing(self) -> str:
        """What is missing before a request can be answered; empty when nothing is. No address stands in it: whoever
        may ask whether a router is ready may not know all its workers."""
        missing = self._fleet.missing()
        if not missing or not self._sources:
            return missing
        num_stale = sum(bool(source.last_error) for source in self._sources)
        return (
            f"{missing}: {self._fleet.num_known} known, {len(self._fleet.members)} connected;"
            f" {num_stale} of {len(self._sources)} sources of addresses cannot be asked"
        )

    def reasons(self) -> str:
        """Why what is missing is missing, for the log: of each source, and of some workers."""
        sources = [f"{source.text}: {source.last_error}" for source in self._sources if source.last_error]
        failures = self._fleet.failures()
        workers = failures[:FAILURES_SHOWN]
        if len(failures) > len(workers):
            workers.append(f"and {len(failures) - len(workers)} more")
        return "; ".join([*sources, *workers]) or "no source names another worker"

    async def until_connected(self, *, seconds_max: float) -> None:
        """Return once a request can be answered. With sources it waits for as long as it takes, and says in the log
        what is missing; without, for `seconds_max`, and the caller sees what is missing."""
        wait = seconds_max
        while self._fleet.missing():
            try:
                async with asyncio.timeout(wait):
                    while self._fleet.missing():
                        await self._fleet.wait_for_change()
            except TimeoutError:
                if not self._sources:
                    return
                wait = REMIND_SECONDS
                log.warning("waited for workers %s", fields(missing=self.missing(), because=self.reasons()))

    def _taker(self, known: _Known) -> Callable[[frozenset[str]], None]:
        def take(addresses: frozenset[str]) -> None:
            log.info(
                "found workers %s",
                fields(
                    source=known.source.text,
                    known=len(addresses),
                    new=len(addresses - known.addresses),
                    gone=len(known.addresses - addresses),
                ),
            )
            known.addresses = addresses
            self._metrics.addresses.labels(known.source.text).set(len(addresses))
            self._fleet.set_found(frozenset().union(*(item.addresses for item in self._known)))

        return take

    def _look(self, known: _Known, now: float) -> None:
        source = known.source
        if not source.last_error:
            known.fresh_at = now
        self._metrics.stale_seconds.labels(source.text).set(now - known.fresh_at)
        self._metrics.failures.labels(source.text).inc(source.num_failures - known.num_failures)
        known.num_failures = source.num_failures

"""Several sources, one fleet: who is known, what is told to Prometheus and to people, and starts without a worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from router import finding as finding_module
from router.finding import Finding, FindingMetrics
from tests.harness.cluster import Cluster, a_cluster, settle, until


class FakeSource:
    def __init__(self, text: str) -> None:
        self.text = text
        self.last_error = "not asked yet"
        self.num_failures = 0
        self._on_change: Callable[[frozenset[str]], None] | None = None

    async def run(self, on_change: Callable[[frozenset[str]], None]) -> None:
        self._on_change = on_change
        await asyncio.Event().wait()

    def tell(self, *addresses: str) -> None:
        self.last_error = ""
        assert self._on_change is not None
        self._on_change(frozenset(addresses))

    def fail(self, why: str) -> None:
        self.last_error = why
        self.num_failures += 1


@asynccontextmanager
async def finding(
    cluster: Cluster, *sources: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Finding]:
    monkeypatch.setattr(finding_module, "LOOK_SECONDS", 0.001)
    found = Finding(sources, fleet=cluster.fleet, metrics=FindingMetrics(cluster.registry))
    running = asyncio.create_task(found.run())
    await settle()
    try:
        yield found
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_worker_is_known_while_any_source_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = FakeSource("one"), FakeSource("two")
    async with (
        a_cluster("stays", start=False) as cluster,
        finding(cluster, one, two, monkeypatch=monkeypatch),
    ):
        known = cluster.fleet.columns.row_of
        one.tell("a", "b", "stays")
        two.tell("b", "c")
        assert set(known) == {"stays", "a", "b", "c"}
        assert cluster.count("discovery_addresses", source="one") == 3
        one.tell()
        await until(lambda: set(known) == {"stays", "b", "c"})
        two.tell("c")
        await until(lambda: set(known) == {"stays", "c"})
        assert cluster.count("discovery_addresses", source="two") == 1


async def test_failures_are_counted_and_staleness_grows_until_the_source_is_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = FakeSource("one")
    async with a_cluster(start=False) as cluster, finding(cluster, source, monkeypatch=monkeypatch):

        def stale() -> float:
            return cluster.count("discovery_stale_seconds", source="one")

        await until(lambda: stale() > 0)  # it has said nothing yet
        source.tell("a")
        await until(lambda: stale() == 0)
        source.fail("down")
        source.fail("down")
        await until(lambda: cluster.count("discovery_failures_total", source="one") == 2)
        before = stale()
        await until(lambda: stale() > before)
        assert set(cluster.fleet.columns.row_of) == {"a"}
        source.last_error = ""
        await until(lambda: stale() == 0)


async def test_a_router_with_sources_waits_for_workers_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finding_module, "REMIND_SECONDS", 0.01)
    source = FakeSource("kubernetes:?selector=x")
    async with (
        a_cluster(start=False) as cluster,
        finding(cluster, source, monkeypatch=monkeypatch) as found,
    ):
        source.fail("the right to list is missing")
        waiting = asyncio.create_task(found.until_connected(seconds_max=0.01))
        await until(lambda: sum("waited for workers" in item.getMessage() for item in caplog.records) >= 2)
        assert "the right to list is missing" in caplog.text
        assert found.missing() == (
            "no worker is connected: 0 known, 0 connected; 1 of 1 sources of addresses cannot be asked"
        )
        cluster.start_prefill("10.0.0.1:9000")
        source.tell("10.0.0.1:9000", "10.0.0.2:9000")
        await cluster.connected(1)
        assert found.missing() == (
            "no decode worker is connected: 2 known, 1 connected; 0 of 1 sources of addresses cannot be asked"
        )
        assert "10.0.0." not in found.missing()
        assert "10.0.0.2:9000: connection refused" in found.reasons()
        cluster.start_decode("10.0.0.2:9000")
        await waiting
        assert found.missing() == ""


async def test_reasons_are_a_few_however_many_workers_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource("one")
    async with (
        a_cluster(start=False) as cluster,
        finding(cluster, source, monkeypatch=monkeypatch) as found,
    ):
        assert found.reasons() == "one: not asked yet"
        source.tell()
        assert found.reasons() == "no source names another worker"
        source.tell(*(f"w{number}" for number in range(50)))
        assert found.reasons().endswith("; and 42 more")


async def test_without_sources_the_wait_for_workers_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="router.finding")
    async with a_cluster("a", start=False) as cluster:
        found = Finding([], fleet=cluster.fleet, metrics=FindingMetrics(cluster.registry))
        await found.until_connected(seconds_max=0.01)
        assert found.missing() == "no worker is connected"
        assert "waited" not in caplog.text

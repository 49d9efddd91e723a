"""The port of metrics and probes of a process that has no other HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from rorqual.metrics_endpoint import MetricsEndpoint


@pytest.fixture
async def served() -> AsyncIterator[tuple[MetricsEndpoint, httpx.AsyncClient]]:
    registry = CollectorRegistry()
    Counter("whales", "Seen.", registry=registry).inc(3)
    endpoint = MetricsEndpoint(registry, missing=lambda: "the model is being loaded")
    url = await endpoint.start(host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=url.removesuffix("/metrics")) as client:
        yield endpoint, client
    await endpoint.stop()


async def test_a_process_lives_before_it_is_ready_and_while_it_drains(
    served: tuple[MetricsEndpoint, httpx.AsyncClient],
) -> None:
    endpoint, client = served
    for missing, status in (
        ("the model is being loaded", 503),
        ("", 200),
        ("the worker is draining", 503),
    ):
        endpoint.missing = lambda missing=missing: missing
        ready = await client.get("/ready")
        assert (ready.status_code, ready.text) == (status, f"{missing or 'ready'}\n")
        assert (await client.get("/health")).status_code == 200


async def test_metrics_are_beside_the_probes_and_nothing_else_is(
    served: tuple[MetricsEndpoint, httpx.AsyncClient],
) -> None:
    _, client = served
    assert "whales_total 3.0" in (await client.get("/metrics?x=1")).text
    for method, path in (("GET", "/"), ("GET", "/readyz"), ("POST", "/ready"), ("POST", "/metrics")):
        assert (await client.request(method, path)).status_code == 404

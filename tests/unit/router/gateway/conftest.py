"""Both gateways on loopback sockets in front of a computable generator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpx
import pytest
import uvloop
from fake_generator import FakeGenerator, FakePrompts
from prometheus_client import CollectorRegistry

from rorqual.clock import SystemClock
from router.admission import Admission
from router.gateway.http1 import HttpLimits
from router.gateway.server import HttpGateway, HttpSettings
from router.gateway_metrics import GatewayMetrics


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable]:
    """Sockets are tested on both loops the router may run on: their transports differ where it matters."""
    factories = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    on_both = item.path.name in ("test_http1.py", "test_server.py")
    return factories if on_both else {"uvloop": factories["uvloop"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    url: str
    generator: FakeGenerator
    prompts: FakePrompts
    metrics: GatewayMetrics
    gateway: HttpGateway
    http: httpx.AsyncClient

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def serve() -> AsyncIterator[Callable]:
    """Starts a gateway; keyword arguments are HttpSettings, `limits` a dict of HttpLimits."""
    async with AsyncExitStack() as stack:

        async def start(
            *,
            limits: dict | None = None,
            num_choices_max: int = 64,
            prompts: object = None,
            **settings: object,
        ) -> Served:
            generator = FakeGenerator()
            metrics = GatewayMetrics(CollectorRegistry())
            prompts = prompts or FakePrompts()
            settings.setdefault("drain_seconds_max", 1.0)
            gateway = HttpGateway(
                generator=generator,
                prompts=prompts,
                settings=HttpSettings(limits=HttpLimits(**(limits or {})), **settings),
                metrics=metrics,
                admission=Admission(num_choices_max=num_choices_max),
                clock=SystemClock(),
            )
            url = await gateway.start()
            stack.push_async_callback(gateway.stop)
            client = await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, timeout=10, verify=False)
            )
            return Served(
                url=url, generator=generator, prompts=prompts, metrics=metrics, gateway=gateway, http=client
            )

        yield start


@pytest.fixture
async def served(serve: Callable) -> Served:
    return await serve()

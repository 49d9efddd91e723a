"""Looking at workers and routers: real sessions with real hosts, real metrics of routers, and what is made of both."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from autoscaler.looking.routers import Pinned, RouterFigures, RouterReader, gather_news, read_figures
from autoscaler.looking.samples import SAMPLES_MAX, Gathering
from rorqual.errors import ConfigError
from rorqual.session import Role
from rorqual.usage import PromptSample, Usage
from router.fleet_metrics import FleetMetrics
from router.gateway_metrics import GatewayMetrics
from tests.harness.certificates import Authority
from tests.harness.observed import READINGS, Worker, looking, until

pytestmark = pytest.mark.slow


async def test_a_look_sees_load_and_what_came_and_went_since_the_last_one() -> None:
    worker = Worker()
    address = await worker.start()
    try:
        async with looking(address) as looker:
            await until(lambda: looker.num_known == 1 and looker.num_missing == 0)
            first = looker.look(READINGS, now=10.0)
            assert (first.interval_seconds, first.traffic.num_prompts) == (0.0, 0)
            await worker.serve(1, length=7, max_tokens=5)
            await asyncio.sleep(0.3)
            second = looker.look(READINGS, now=12.0)
            assert second.interval_seconds == 2.0
            assert (second.traffic.num_prompts, second.traffic.num_streams) == (1, 1)
            assert second.traffic.prompts[0].prompt_tokens == 7
            assert second.traffic.streams[0].context_tokens == 12
            (state,) = second.pools["pool"].workers
            assert (state.address, state.load.slots_total, state.is_draining) == (address, 4, False)
            assert looker.look(READINGS, now=13.0).traffic.num_prompts == 0
    finally:
        await worker.stop()


async def test_a_lost_worker_is_missing_and_comes_back() -> None:
    worker = Worker()
    address = await worker.start()
    async with looking(address) as looker:
        await until(lambda: looker.num_known == 1 and looker.num_missing == 0)
        await worker.stop()
        await until(lambda: looker.num_missing == 1)
        assert looker.look(READINGS, now=1.0).pools["pool"].workers == ()
        assert address in looker.failures()[0]
        again = Worker()
        await again.start(int(address.rpartition(":")[2]))
        try:
            await until(lambda: looker.num_missing == 0)
        finally:
            await again.stop()


async def test_a_worker_that_is_named_no_more_is_seen_while_its_session_stands(tmp_path: Path) -> None:
    """As of a pod that is not ready any more and serves its routers all the same."""
    source = tmp_path / "workers.json"

    def name(*addresses: str) -> None:
        (tmp_path / "new").write_text(json.dumps({"workers": [{"address": item} for item in addresses]}))
        (tmp_path / "new").replace(source)

    worker = Worker()
    address = await worker.start()
    name(address)
    async with looking(source=f"file:{source}") as looker:
        await until(lambda: looker.num_known == 1 and looker.num_missing == 0)
        name()
        await asyncio.sleep(1.5)
        await worker.serve(1, length=7, max_tokens=5)
        await asyncio.sleep(0.3)
        seen = looker.look(READINGS, now=1.0)
        assert (len(seen.pools["pool"].workers), seen.traffic.num_prompts) == (1, 1)
        name(address)
        await asyncio.sleep(1.0)
        await worker.stop()
        await until(lambda: looker.num_missing == 1)  # named, so it is looked for
        name()
        await until(lambda: looker.num_known == 0)
        again = Worker()
        await again.start(int(address.rpartition(":")[2]))
        name(address)
        await until(lambda: looker.num_known == 1 and looker.num_missing == 0)
        name()
        await asyncio.sleep(1.0)
        await again.stop()
        await until(lambda: looker.num_known == 0)  # left, and gone


async def test_a_worker_that_drains_is_seen_to() -> None:
    worker = Worker()
    address = await worker.start()
    try:
        async with looking(address) as looker:
            await until(lambda: looker.num_known == 1 and looker.num_missing == 0)
            await worker.host.drain(seconds_max=1.0)
            await until(lambda: looker.look(READINGS, now=1.0).pools["pool"].workers[0].is_draining)
    finally:
        await worker.stop()


async def test_a_worker_of_another_role_is_none_of_the_pool() -> None:
    worker = Worker()
    address = await worker.start()
    try:
        async with looking(address, role=Role.DECODE) as looker:
            await until(
                lambda: any("is a both worker in a decode pool" in text for text in looker.failures())
            )
            assert looker.num_missing == 1
    finally:
        await worker.stop()


class Router:
    """A router's own metrics, behind a door."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.fleet = FleetMetrics(self.registry)
        self.gateway = GatewayMetrics(self.registry)

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()

    @asynccontextmanager
    async def serving(self, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        app = web.Application()

        async def answer(_: web.Request) -> web.Response:
            return web.Response(text=self.text)

        app.router.add_get("/metrics", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        try:
            yield f"127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def test_a_routers_own_metrics_are_understood() -> None:
    router = Router()
    router.fleet.credit_waiting.set(3)
    router.gateway.first_token_seconds.labels("chat").observe(2.0)
    router.gateway.first_token_seconds.labels("text").observe(4.0)
    router.gateway.inter_token_seconds.labels("chat").observe(0.5)
    for status, count in (("200", 5), ("503", 2), ("UNAVAILABLE", 1)):
        router.gateway.requests.labels("chat", status).inc(count)
    assert read_figures(router.text) == RouterFigures(
        num_waiting=3,
        num_unserved=3,
        ttft_seconds=6.0,
        ttft_count=2,
        itl_seconds=0.5,
        itl_count=1,
    )


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_left_out_of_a_routers_figures(value: str) -> None:
    text = f"rorqual_router_credit_waiting {value}\n"
    assert read_figures(text) == read_figures("")


async def test_a_router_that_speaks_https_is_known_by_its_certificate(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    files = authority.issue("gateway", hosts=("api.example.com",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    router = Router()
    router.fleet.credit_waiting.set(3)
    async with router.serving(context) as address, aiohttp.ClientSession() as http:
        pinned = tmp_path / "pinned.crt"
        pinned.write_bytes(other.issue("another").cert.read_bytes())
        reader = RouterReader(address, session=http, interval_seconds=1.0, trust=Pinned(pinned))
        await reader.ask()
        assert "certificate" in reader.failure.lower()
        pinned.write_bytes(files.cert.read_bytes())  # renewed: it is read anew
        os.utime(pinned, ns=(1, 1))
        await reader.ask()
        assert reader.failure == ""
        assert gather_news([reader]).num_waiting == 3
    with pytest.raises(ConfigError, match="--routers-cert"):
        Pinned(tmp_path / "none.crt")


async def test_counts_are_of_since_the_last_look_also_when_a_router_began_anew() -> None:
    async with aiohttp.ClientSession() as http:
        reader = RouterReader("r:1", session=http, interval_seconds=1.0)
        reader.take_in(RouterFigures(num_unserved=100, ttft_seconds=50, ttft_count=100))
        assert gather_news([reader]).num_unserved == 0
        reader.take_in(RouterFigures(num_unserved=104, ttft_seconds=56, ttft_count=102))
        news = gather_news([reader])
        assert (news.num_unserved, news.ttft_mean) == (4, 3.0)
        reader.take_in(RouterFigures(num_unserved=2, ttft_seconds=1, ttft_count=1))
        assert gather_news([reader]).num_unserved == 2


async def test_what_users_wait_at_routers_is_added_to_what_workers_saw() -> None:
    worker, router = Worker(), Router()
    address = await worker.start()
    try:
        async with router.serving() as door, looking(address, routers=(f"static:{door}",)) as looker:
            await until(lambda: looker.num_known == 1 and not looker.failures())
            looker.look(READINGS, now=1.0)
            await worker.serve(1, length=7, max_tokens=2)
            router.gateway.first_token_seconds.labels("chat").observe(5.0)
            router.fleet.credit_waiting.set(2)
            await asyncio.sleep(0.4)
            traffic = looker.look(READINGS, now=2.0).traffic
            assert traffic.num_waiting == 2
            assert traffic.prompts[0].ttft_seconds == pytest.approx(5.0)
    finally:
        await worker.stop()


async def test_a_router_that_does_not_answer_is_told_of() -> None:
    async with looking("127.0.0.1:1", routers=("static:127.0.0.1:2",)) as looker:
        await until(lambda: len(looker.failures()) == 2)


def test_samples_of_a_busy_worker_weigh_more() -> None:
    """Its 100 samples stand for 900 prompts, those of the other for 100: nine in ten of those kept are its own."""
    gathering = Gathering(randomness=random.Random(2))

    def usage(count: int, tokens: int) -> Usage:
        sample = PromptSample(prompt_tokens=tokens, computed_tokens=0, ttft_seconds=0.0)
        return Usage(num_prompts=count, prompts=(sample,) * 100)

    for _ in range(5):
        gathering.add(usage(900, 1))
        gathering.add(usage(100, 2))
    taken = gathering.take()
    assert taken.num_prompts == 5000
    share = sum(sample.prompt_tokens == 1 for sample in taken.prompts) / len(taken.prompts)
    assert 0.85 < share < 0.95
    assert gathering.take() == Usage()


def test_however_long_nobody_looks_what_is_kept_is_bounded() -> None:
    gathering = Gathering(randomness=random.Random(2))
    sample = PromptSample(prompt_tokens=1, computed_tokens=0, ttft_seconds=0.0)
    for _ in range(200):
        gathering.add(Usage(num_prompts=256, prompts=(sample,) * 256))
    taken = gathering.take()
    assert (taken.num_prompts, len(taken.prompts)) == (200 * 256, SAMPLES_MAX)

"""The session over real gRPC: a client that breaks a rule, does not read or vanishes harms nobody but itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio
from fake_link import FakeLink
from fake_rank import FakeRank
from fake_state import answer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.session_server import CALLS_MAX, SessionServer
from rorqual import __version__
from rorqual.errors import ConfigError
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import Hello, Open, StepReport, Welcome
from rorqual.wire import SERVICE, SESSION_PATH, decode_report, encode_command

HELLO = encode_command(Hello(protocol=1, router_id="test"))


class Served:
    def __init__(self, host: Host, link: FakeLink, server: SessionServer, address: str) -> None:
        self.host, self.link, self.server, self.address = host, link, server, address
        # A small window: what a client does not read must not vanish into megabytes of buffers.
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
        self.channel: Any = grpc.aio.insecure_channel(address, options=options)

    def call(self) -> Any:
        return self.channel.stream_stream(SESSION_PATH, None, None)()

    async def session(self) -> Any:
        call = self.call()
        await call.write(HELLO)
        assert isinstance(decode_report(await call.read()), Welcome)
        return call

    async def is_served(self) -> None:
        """A well-behaved client still gets its answer."""
        call = await self.session()
        command = an_open(1)
        await call.write(encode_command(command))
        tokens: list[int] = []
        while len(tokens) < command.max_tokens:
            report = decode_report(await call.read())
            assert isinstance(report, StepReport)
            tokens += [token for item in report.sequences for token in item.token_ids]
        assert tokens == answer(command.prompt.tolist(), 10, command.sampling, ignore_eos=True)
        call.cancel()
        await until(lambda: self.host.is_idle)
        assert self.host.load().pages_free == self.host.load().pages_total


@pytest_asyncio.fixture
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    rank = FakeRank(num_pages=64, num_slots=4, prefill_tokens_max=512)
    link = FakeLink(rank)
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(7),
        exact=False,
        prefill_tokens_max=512,
        session_reports_max=getattr(request, "param", 500),
        heartbeat_seconds=0.05,
    )
    host = Host(link=link, ready=rank.ready(), config=config, metrics=WorkerMetrics())
    running = asyncio.create_task(host.run())
    server = SessionServer(write_seconds_max=0.3)
    address = await server.start(host="127.0.0.1", port=0)
    await server.attach(host)
    served = Served(host, link, server, address)
    try:
        async with asyncio.timeout(30):
            yield served
    finally:
        await served.channel.close(None)
        await server.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def an_open(number: int, *, max_tokens: int = 10) -> Open:
    return Open(
        sequence_id=SequenceId(number),
        request_id="r",
        prompt=np.array([3, 4], dtype=np.int32),
        max_tokens=max_tokens,
        ignore_eos=True,
        sampling=SamplingParams(seed=number, logprobs=20),
    )


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def ending(call: Any) -> tuple[grpc.StatusCode, str]:
    """Read to the end and say how it ended."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code(), await call.details()


async def test_both_sides_say_their_versions_and_a_router_that_does_not_is_welcome(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for hello in (
        Hello(protocol=1, router_id="new", version="0.9.0"),
        Hello(protocol=1, router_id="old"),
    ):
        call = served.call()
        await call.write(encode_command(hello))
        welcome = decode_report(await call.read())
        assert isinstance(welcome, Welcome)
        assert welcome.version == __version__
        call.cancel()
    lines = [line for line in caplog.messages if line.startswith("opened a session")]
    assert lines == [
        "opened a session router=new version=0.9.0",
        "opened a session router=old",
    ]


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        ([b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "command does not decode"),
        ([b""], grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ([encode_command(an_open(1))], grpc.StatusCode.INVALID_ARGUMENT, "must be Hello"),
        (
            [encode_command(Hello(protocol=9, router_id="r"))],
            grpc.StatusCode.FAILED_PRECONDITION,
            "router speaks protocol 9; this worker speaks 1",
        ),
        ([HELLO, HELLO], grpc.StatusCode.INVALID_ARGUMENT, "Hello came twice"),
        ([HELLO, b"\xff\xff\xff"], grpc.StatusCode.INVALID_ARGUMENT, "does not decode"),
        (
            # Long enough not to have ended when the second one comes.
            [HELLO, *[encode_command(an_open(1, max_tokens=3000))] * 2],
            grpc.StatusCode.INVALID_ARGUMENT,
            "is open already",
        ),
    ],
)
async def test_a_client_that_breaks_a_rule_is_told_which_and_others_are_served(
    served: Served, messages: list[bytes], code: grpc.StatusCode, text: str
) -> None:
    call = served.call()
    for message in messages:
        await call.write(message)
    got, details = await ending(call)
    assert got is code
    assert text in details
    await served.is_served()


async def test_a_client_that_says_goodbye_or_vanishes_frees_its_sequences(served: Served) -> None:
    for leave in ("done_writing", "cancel"):
        call = await served.session()
        await call.write(encode_command(an_open(1, max_tokens=3000)))
        await until(lambda: served.host.load().sequences_running == 1)
        left = getattr(call, leave)()
        if left is not None and leave == "done_writing":
            await left
        await until(lambda: served.host.is_idle)
        call.cancel()
    await served.is_served()


@pytest.mark.parametrize(
    ("served", "text"),
    [(500, "reports unread"), (10**6, "did not take a report within 0.3 s")],
    indirect=["served"],
    ids=["by bound", "by deadline"],
)
async def test_a_router_that_does_not_read_is_cut_off_and_others_go_on(served: Served, text: str) -> None:
    call = await served.session()
    for number in range(1, 5):
        await call.write(encode_command(an_open(number, max_tokens=3000)))
    await until(lambda: served.host.load().sequences_running == 4)
    sessions = served.host.metrics.registry.get_sample_value
    await until(lambda: sessions("rorqual_worker_sessions") == 0 and served.host.is_idle)
    code, details = await ending(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert text in details
    await served.is_served()


async def test_calls_beyond_the_bound_are_refused_and_sessions_go_on(served: Served) -> None:
    session = await served.session()
    silent = [served.call() for _ in range(CALLS_MAX)]
    one_too_many = next(call for call in silent[::-1] if not call.done())
    assert (await ending(one_too_many))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await session.write(encode_command(an_open(1)))
    assert isinstance(decode_report(await session.read()), StepReport)
    for call in [*silent, session]:
        call.cancel()
    await until(lambda: served.host.is_idle)


async def test_health_follows_readiness_and_reflection_lists_the_service(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", SERVICE):
        response = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    await served.server.refuse_probes()
    response = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {item.name for item in (await call.read()).list_services_response.service}
    assert SERVICE in names
    call.cancel()


async def test_a_loading_worker_says_so_and_a_taken_port_is_one_clear_line(served: Served) -> None:
    loading = SessionServer()
    address = await loading.start(host="127.0.0.1", port=0)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            for _ in range(100):
                call = channel.stream_stream(SESSION_PATH, None, None)()
                await call.write(HELLO)
                assert await ending(call) == (grpc.StatusCode.UNAVAILABLE, "worker is loading")
            probe = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert probe.status == health_pb2.HealthCheckResponse.NOT_SERVING
        host, port = address.rsplit(":", 1)
        with pytest.raises(ConfigError, match=f"--listen: cannot listen on {address}"):
            await SessionServer().start(host=host, port=int(port))
    finally:
        await loading.stop()

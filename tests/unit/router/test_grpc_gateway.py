"""The gRPC gateway, asked by a client that knows nothing but generate.proto."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_generator import (
    FakeGenerator,
    FakePrompts,
    alternatives_of,
    completion_ids,
    completion_text,
    logprob_of,
)
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry

from rorqual.clock import SystemClock
from rorqual.errors import Overloaded, StageTimedOut, WorkerLost
from router.admission import Admission
from router.gateway_metrics import GatewayMetrics
from router.grpc_gateway import ROUTE, GrpcGateway, GrpcSettings
from router.prompt import PromptEncoder

PROTO = Path(__file__).resolve().parents[3] / "proto" / "rorqual" / "v1" / "generate.proto"
HELLO = list(b"hello")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    messages: ModuleType
    stub: Any


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ModuleType]:
    """Stubs made from the .proto alone, in a package of their own, as another company's client would have."""
    root = tmp_path_factory.mktemp("client")
    # Another file name and package: one process cannot register the same names twice.
    text = PROTO.read_text().replace("package rorqual.v1;", "package rorqual.v1.client;")
    (root / "their_copy.proto").write_text(text)
    arguments = ["-I", str(root), f"--python_out={root}", f"--grpc_python_out={root}", "their_copy.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True, timeout=60)
    sys.path.insert(0, str(root))
    try:
        modules = importlib.import_module("their_copy_pb2"), importlib.import_module("their_copy_pb2_grpc")
    finally:
        sys.path.remove(str(root))
    return modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    address: str
    channel: grpc.aio.Channel
    generator: FakeGenerator
    metrics: GatewayMetrics
    gateway: GrpcGateway
    pb: ModuleType
    generate: Callable

    async def responses(self, **fields: Any) -> list[Any]:
        return [response async for response in self.generate(self.pb.GenerateRequest(**fields))]

    async def failure(self, *, metadata: Any = None, **fields: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in self.generate(self.pb.GenerateRequest(**fields), metadata=metadata):
                pass
        return caught.value


@pytest.fixture
async def serve(generated) -> AsyncIterator[Callable]:
    pb, _ = generated
    async with AsyncExitStack() as stack:

        async def start(*, num_choices_max: int = 64, prompts: object = None, **settings: Any) -> Served:
            generator = FakeGenerator()
            metrics = GatewayMetrics(CollectorRegistry())
            gateway = GrpcGateway(
                generator=generator,
                prompts=prompts or FakePrompts(),
                settings=GrpcSettings(**{"drain_seconds_max": 1.0, **settings}),
                metrics=metrics,
                admission=Admission(num_choices_max=num_choices_max),
                clock=SystemClock(),
            )
            address = await gateway.start()
            stack.push_async_callback(gateway.stop)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            generate = channel.unary_stream(
                "/rorqual.v1.Generation/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateResponse.FromString,
            )
            return Served(
                address=address,
                channel=channel,
                generator=generator,
                metrics=metrics,
                gateway=gateway,
                pb=pb,
                generate=generate,
            )

        yield start


@pytest.fixture
async def served(serve: Callable) -> Served:
    return await serve()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "waited in vain"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


async def test_text_in_gives_numbered_tokens_and_text_out(served):
    responses = await served.responses(text="hello", max_tokens=6)
    tokens = [token for response in responses for token in response.tokens]
    assert [token.index for token in tokens] == list(range(6))
    assert [token.token_id for token in tokens] == completion_ids(HELLO, 6)
    assert "".join(response.text for response in responses) == completion_text(HELLO, 6)
    assert [response.finish_reason for response in responses] == [""] * 5 + ["length"]
    assert not tokens[0].HasField("logprob")
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 6, 0)
    assert not any(response.HasField("usage") for response in responses[:-1])
    assert len({response.request_id for response in responses}) == 1


async def test_token_ids_in_several_choices_each_end_and_the_last_response_has_the_usage(served):
    responses = await served.responses(token_ids={"ids": HELLO}, max_tokens=3, n=3)
    for choice in range(3):
        own = [response for response in responses if response.choice == choice]
        assert "".join(response.text for response in own) == completion_text(HELLO, 3, choice)
        assert own[-1].finish_reason == "length"
    assert [response.HasField("usage") for response in responses] == [False] * 8 + [True]
    assert responses[-1].usage.completion_tokens == 9


async def test_unset_fields_take_the_documented_defaults_and_the_drawn_seed_is_told(served):
    responses = await served.responses(text="hello")
    generation = served.generator.seen[0]
    sampling = generation.sampling
    assert generation.max_tokens == 16
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert (sampling.repetition_penalty, sampling.logprobs, sampling.logit_bias) == (1, None, ())
    assert responses[0].seed == sampling.seed > 0


async def test_sampling_reaches_the_generation_and_zero_is_a_value(served):
    sampling = {"temperature": 0, "seed": 0, "top_k": 5, "logprobs": 2, "logit_bias": {7: 1.5, 3: -100}}
    responses = await served.responses(
        text="hello", max_tokens=2, sampling=sampling, ignore_eos=True, stop=["zz"], model="fake"
    )
    generation = served.generator.seen[0]
    assert (generation.sampling.temperature, generation.sampling.seed, generation.sampling.top_k) == (0, 0, 5)
    assert generation.sampling.logit_bias == ((3, -100), (7, 1.5))
    assert (generation.ignore_eos, generation.stop) == (True, ("zz",))
    token = responses[0].tokens[0]
    assert token.logprob == logprob_of(token.token_id)
    rows = [(row.token_id, row.logprob) for row in token.alternatives]
    assert rows == list(alternatives_of(token.token_id, 2))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "prompt"),
        ({"text": ""}, "text"),
        ({"token_ids": {"ids": []}}, "token_ids"),
        ({"token_ids": {"ids": [1, 256]}}, "token_ids.ids[1]"),
        ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids[0]"),
        ({"text": "x" * 4096}, "text"),
        ({"text": "a", "max_tokens": 0}, "max_tokens"),
        ({"text": "a", "max_tokens": 4096}, "max_tokens"),
        ({"text": "a", "n": 17}, "n"),
        ({"text": "a", "stop": [""]}, "stop"),
        ({"text": "a", "stop": ["a"] * 17}, "stop"),
        ({"text": "a", "sampling": {"temperature": 2.5}}, "temperature"),
        ({"text": "a", "sampling": {"temperature": float("nan")}}, "temperature"),
        ({"text": "a", "sampling": {"top_p": -1}}, "top_p"),
        ({"text": "a", "sampling": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"text": "a", "sampling": {"logprobs": 21}}, "logprobs"),
        ({"text": "a", "sampling": {"seed": 2**63}}, "seed"),
        ({"text": "a", "sampling": {"logit_bias": {256: 1}}}, "logit_bias"),
        ({"text": "a", "sampling": {"logit_bias": dict.fromkeys(range(1025), 0)}}, "sampling.logit_bias"),
        ({"text": "a", "sampling": {"logit_bias": {1: float("inf")}}}, "logit_bias"),
    ],
)
async def test_a_wrong_field_is_an_invalid_argument_that_names_it(served, fields, named):
    failure = await served.failure(**fields)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in failure.details()
    assert served.generator.seen == []


async def test_an_unknown_model_is_not_found(served):
    failure = await served.failure(text="a", model="other")
    assert failure.code() is grpc.StatusCode.NOT_FOUND
    assert "other" in failure.details()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full"), grpc.StatusCode.UNAVAILABLE),
        (WorkerLost("gone"), grpc.StatusCode.UNAVAILABLE),
        (StageTimedOut("prefill took too long"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (ValueError("a bug"), grpc.StatusCode.INTERNAL),
    ],
)
@pytest.mark.parametrize("position", [0, 2])
async def test_a_failure_has_its_status_whenever_it_comes(served, error, code, position):
    served.generator.fail_with, served.generator.fail_at = error, position
    failure = await served.failure(text="hello", max_tokens=5)
    assert failure.code() is code
    assert (str(error) in failure.details()) == (code is not grpc.StatusCode.INTERNAL)


async def test_without_a_worker_it_is_unavailable_and_without_a_tokenizer_text_is_invalid(serve):
    served = await serve(prompts=PromptEncoder(tokenizer=None))
    assert (await served.failure(text="hello")).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(await served.responses(token_ids={"ids": [5]}, max_tokens=2)) == 2
    served.generator.connected = False
    assert (await served.failure(text="hello")).code() is grpc.StatusCode.UNAVAILABLE


async def test_beyond_the_bound_on_requests_it_is_exhausted(serve):
    served = await serve(num_choices_max=1)
    served.generator.step_seconds = 0.05
    running = asyncio.create_task(served.responses(text="hello", max_tokens=6))
    await until(lambda: served.generator.num_open == 1)
    assert (await served.failure(text="hello")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await running) == 6


async def test_a_call_counts_as_its_choices(serve):
    served = await serve(num_choices_max=4)
    served.generator.step_seconds = 0.05
    running = asyncio.create_task(served.responses(text="hello", max_tokens=6, n=3))
    await until(lambda: served.generator.num_open == 1)
    assert (await served.failure(text="hello", n=2)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await served.responses(text="hello", max_tokens=1)) == 1
    assert (await served.failure(text="hello", n=5)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(await running) == 18


async def test_a_client_that_vanishes_without_a_word_frees_its_generation(serve):
    served = await serve(keepalive_seconds=0.2, keepalive_reply_seconds_max=0.2)
    served.generator.step_seconds = 60
    async with blackhole(served.address) as (address, vanish), grpc.aio.insecure_channel(address) as channel:
        generate = channel.unary_stream(
            "/rorqual.v1.Generation/Generate",
            request_serializer=served.pb.GenerateRequest.SerializeToString,
            response_deserializer=served.pb.GenerateResponse.FromString,
        )
        call = generate(served.pb.GenerateRequest(text="hello", max_tokens=1000))
        await until(lambda: served.generator.num_open == 1)
        await asyncio.sleep(0.6)
        assert served.generator.num_open == 1  # who answers probes may wait as long as it takes
        vanish()
        assert await until(lambda: served.generator.num_open == 0) < 3.0
        call.cancel()


@asynccontextmanager
async def blackhole(target: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """A proxy that, once told to vanish, passes nothing on and closes nothing, as a machine without power."""
    host, port = target.split(":")
    passing = True
    tasks: set[asyncio.Task] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if passing:
                writer.write(data)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, far_writer))
        tasks.add(asyncio.create_task(pump(reader, far_writer)))
        tasks.add(asyncio.create_task(pump(far_reader, writer)))

    def vanish() -> None:
        nonlocal passing
        passing = False

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", vanish
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.close()


async def test_a_fault_of_the_health_reporting_is_raised_by_watch(served, monkeypatch):
    watching = asyncio.create_task(served.gateway.watch())
    await asyncio.sleep(0.05)
    assert not watching.done()

    def broken() -> None:
        raise AssertionError("a broken invariant")

    monkeypatch.setattr(served.generator, "model", broken)
    with pytest.raises(AssertionError, match="a broken invariant"):
        await asyncio.wait_for(watching, 3)


async def test_a_failed_call_is_told_with_its_id(served, caplog):
    served.generator.fail_with, served.generator.fail_at = WorkerLost("gone"), 1
    call = served.generate(served.pb.GenerateRequest(text="hello", max_tokens=5))
    request_id = (await call.read()).request_id
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert f"request={request_id} status=UNAVAILABLE error=gone" in told[0]


async def test_a_cancelled_call_closes_its_generation_at_once(served):
    served.generator.step_seconds = 0.01
    call = served.generate(served.pb.GenerateRequest(text="hello", max_tokens=1000))
    await call.read()
    call.cancel()
    assert await until(lambda: served.generator.num_open == 0) < 1.0
    assert served.generator.num_closed_early == 1
    cancelled = "rorqual_router_cancelled_requests_total"
    assert served.metrics.registry.get_sample_value(cancelled, {"route": ROUTE}) == 1


async def test_a_client_whose_channel_closes_during_prefill_frees_its_generation(served):
    served.generator.step_seconds = 60
    call = served.generate(served.pb.GenerateRequest(text="hello", max_tokens=1000))
    await until(lambda: served.generator.num_open == 1)
    await served.channel.close()
    assert await until(lambda: served.generator.num_open == 0) < 1.0
    assert call.done()


async def test_a_deadline_of_the_client_closes_its_generation(served):
    served.generator.step_seconds = 0.02
    call = served.generate(served.pb.GenerateRequest(text="hello", max_tokens=1000), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await until(lambda: served.generator.num_open == 0) < 1.0


async def test_a_client_that_does_not_read_is_cut_off(serve):
    served = await serve(write_seconds_max=0.3)
    served.generator.tokens_per_update = 50
    call = served.generate(
        served.pb.GenerateRequest(text="hello", max_tokens=4000, n=16, sampling={"logprobs": 20})
    )
    await call.read()
    await until(lambda: served.generator.num_open == 0)
    assert served.generator.num_closed_early == 1
    assert served.generator.num_tokens < 16 * 4000
    call.cancel()


async def test_an_api_key_is_needed_where_keys_are_set(serve):
    served = await serve(api_keys=("alpha",))
    for metadata in (None, [("authorization", "Bearer beta")], [("authorization", "alpha")]):
        failure = await served.failure(text="hello", metadata=metadata)
        assert failure.code() is grpc.StatusCode.UNAUTHENTICATED
    request = served.pb.GenerateRequest(text="hello", max_tokens=2)
    call = served.generate(request, metadata=[("authorization", "Bearer alpha")])
    assert len([response async for response in call]) == 2


async def test_health_follows_the_worker(served):
    stub = health_pb2_grpc.HealthStub(served.channel)

    async def status(service: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def becomes(wanted: int) -> None:
        async with asyncio.timeout(3):
            while [await status(service) for service in ("", "rorqual.v1.Generation")] != [wanted] * 2:
                await asyncio.sleep(0.02)

    await becomes(health_pb2.HealthCheckResponse.SERVING)
    served.generator.connected = False
    await becomes(health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_reflection_tells_a_stranger_the_whole_interface(served):
    def read() -> tuple[set[str], list[str]]:
        with grpc.insecure_channel(served.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName("rorqual.v1.Generation")
            return set(database.get_services()), [method.name for method in service.methods]

    services, methods = await asyncio.to_thread(read)
    assert services >= {"rorqual.v1.Generation", "grpc.health.v1.Health"}
    assert methods == ["Generate"]


async def test_a_port_in_use_is_an_error(serve):
    served = await serve()
    with pytest.raises(OSError, match="cannot listen"):
        await serve(port=int(served.address.rsplit(":", 1)[1]))


async def test_stopping_lets_a_running_call_finish(served):
    served.generator.step_seconds = 0.02
    running = asyncio.create_task(served.responses(text="hello", max_tokens=8))
    await until(lambda: served.generator.num_open == 1)
    await served.gateway.stop()
    assert len(await running) == 8


async def test_the_usage_says_how_much_of_the_prompt_was_kept(served):
    served.generator.cached_tokens = 4
    responses = await served.responses(text="hello", max_tokens=2, n=2)
    assert responses[-1].usage.cached_tokens == 4

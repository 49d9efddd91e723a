"""The router as a process, over workers as processes: HTTP and gRPC answers, drains, and clear ends."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from fake_state import answer

from rorqual.sampling import SamplingParams
from rorqual.v1 import generate_pb2 as pb

pytestmark = pytest.mark.slow

PATH = "/rorqual.v1.Generation/Generate"


@pytest.fixture
def start_router(start_process: Any, model_dir: Path, tmp_path: Path) -> Any:
    number = 0

    async def start(*workers: str, options: tuple[str, ...] = ()) -> Any:
        nonlocal number
        number += 1
        ready_file = tmp_path / f"router-{number}.json"
        command = ["-m", "rorqual.cli", "--parent", str(os.getpid()), "router", "--model", str(model_dir)]
        for worker in workers:
            command += ["--worker", worker]
        command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--ready-file", str(ready_file)]
        return await start_process(*command, *options, ready_file=ready_file)

    return start


def a_body(number: int, *, max_tokens: int = 20, **options: object) -> dict[str, object]:
    return {
        "model": "a-model",
        "prompt": [number, number + 1],
        "max_tokens": max_tokens,
        "seed": number,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def the_answer(number: int, max_tokens: int = 20, choice: int = 0) -> list[int]:
    sampling = SamplingParams(seed=number, choice=choice)
    return answer([number, number + 1], max_tokens, sampling, ignore_eos=True)


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> list[list[int]]:
    response = await client.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [choice["token_ids"] for choice in response.json()["choices"]]


async def test_both_doors_answer_over_two_workers_and_a_lost_worker_is_done_without(
    start_worker: Any, start_router: Any
) -> None:
    workers = [await start_worker(), await start_worker()]
    addresses = [(await worker.ready())["address"] for worker in workers]
    router = await start_router(*addresses)
    ready = await router.ready()
    assert ready["pid"] == router.process.pid
    async with httpx.AsyncClient() as client:
        answers = await asyncio.gather(*(ask(client, ready["http"], a_body(n, n=2)) for n in range(1, 20)))
        assert answers == [[the_answer(n), the_answer(n, choice=1)] for n in range(1, 20)]
        async with grpc.aio.insecure_channel(ready["grpc"]) as channel:
            call: Any = channel.unary_stream(
                PATH, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
            )
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[5, 6]),
                max_tokens=20,
                ignore_eos=True,
                sampling=pb.Sampling(seed=5),
            )
            tokens = [token async for response in call(request) for token in response.tokens]
        assert [token.token_id for token in tokens] == the_answer(5)
        assert [token.index for token in tokens] == list(range(20))
        workers[0].signal(signal.SIGKILL)
        await workers[0].ended()
        assert await ask(client, ready["http"], a_body(3)) == [the_answer(3)]
        metrics = (await client.get(f"{ready['http']}/metrics")).text
        assert "rorqual_router_workers_connected 1.0" in metrics
    router.signal(signal.SIGTERM)
    status, output = await router.ended()
    assert status == 0, output
    assert "Traceback" not in output
    assert not router.ready_file.exists()


async def test_a_key_that_is_taken_back_lets_nobody_in(
    start_worker: Any, start_router: Any, tmp_path: Path
) -> None:
    """The file is swapped as a kubelet swaps a Secret's."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(f"{name}-key\n")
    (tmp_path / "keys").symlink_to("old")
    worker = await start_worker()
    options = ("--api-key-file", str(tmp_path / "keys"))
    ready = await (await start_router((await worker.ready())["address"], options=options)).ready()

    async def status(client: httpx.AsyncClient, key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return (await client.get(f"{ready['http']}/v1/models", headers=headers)).status_code

    async def by_grpc(channel: grpc.aio.Channel, key: str) -> grpc.StatusCode:
        call: Any = channel.unary_stream(
            PATH, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), max_tokens=1)
        answering = call(request, metadata=(("authorization", f"Bearer {key}"),))
        with suppress(grpc.aio.AioRpcError):  # its code is what we want
            async for _ in answering:
                pass
        return await answering.code()

    async with httpx.AsyncClient() as client, grpc.aio.insecure_channel(ready["grpc"]) as channel:
        assert [await status(client, key) for key in ("old-key", "new-key")] == [200, 401]
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(tmp_path / "keys")
        async with asyncio.timeout(20):
            while await status(client, "new-key") != 200:
                await asyncio.sleep(0.1)
        assert await status(client, "old-key") == 401
        assert await by_grpc(channel, "old-key") == grpc.StatusCode.UNAUTHENTICATED
        assert await by_grpc(channel, "new-key") == grpc.StatusCode.OK


async def test_a_router_told_to_stop_finishes_its_streams(start_worker: Any, start_router: Any) -> None:
    worker = await start_worker(fake=("--step-ms", "5"))
    router = await start_router((await worker.ready())["address"])
    url = (await router.ready())["http"]
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(ask(client, url, a_body(1, max_tokens=200)))
        while "rorqual_router_workers_connected 1.0" not in (await client.get(f"{url}/metrics")).text:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        router.signal(signal.SIGTERM)
        assert await asking == [the_answer(1, 200)]
    status, output = await router.ended()
    assert status == 0, output


async def test_a_client_that_goes_away_frees_its_sequence(start_worker: Any, start_router: Any) -> None:
    worker = await start_worker(fake=("--step-ms", "5"))
    ready = await worker.ready()
    url = (await (await start_router(ready["address"])).ready())["http"]
    async with httpx.AsyncClient() as client:
        async with client.stream(
            "POST", f"{url}/v1/completions", json=a_body(1, max_tokens=3000, stream=True)
        ) as response:
            await anext(response.aiter_bytes())
        async with asyncio.timeout(2):
            while "rorqual_worker_slots_free 4.0" not in (await client.get(ready["metrics"])).text:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("workers", "options", "text"),
    [
        (["127.0.0.1:1"], ("--start-seconds", "0.3"), "no worker could be reached within 0.3 s: 127.0.0.1:1"),
        (["nowhere"], (), "--worker must be HOST:PORT, not 'nowhere'"),
        (["127.0.0.1:1", "127.0.0.1:1"], (), "--worker names the same address twice"),
        (["127.0.0.1:1"], ("--model", "absent-model"), "--model: absent-model: no such directory"),
        (["127.0.0.1:1"], ("--drain-seconds", "0"), "--drain-seconds must be above 0, not 0"),
    ],
)
async def test_a_router_that_cannot_start_says_why_in_one_line(
    start_router: Any, workers: list[str], options: tuple[str, ...], text: str
) -> None:
    status, output = await (await start_router(*workers, options=options)).ended()
    assert status == 1
    assert text in output.splitlines()[-1]
    assert "Traceback" not in output


async def test_a_port_in_use_is_one_clear_line(start_worker: Any, start_router: Any) -> None:
    address = (await (await start_worker()).ready())["address"]
    for option in ("--http", "--grpc"):
        status, output = await (await start_router(address, options=(option, address))).ended()
        assert status == 1
        assert f"{option}: cannot listen on {address}" in output.splitlines()[-1]
        assert "Traceback" not in output

"""Two hundred requests of every kind at once, some cancelled and some abandoned: the others finish, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from rorqual.v1 import generate_pb2 as pb
from tests.harness.system import SECONDS_MAX, TEXT_CONFIG, System

pytestmark = pytest.mark.minutes

NUM_REQUESTS = 200
NUM_GROWING = 10
GENERATE = "/rorqual.v1.Generation/Generate"


class Storm:
    """One client program. Every request is drawn from its own number; what became of it is counted by name."""

    def __init__(self, system: System, http: httpx.AsyncClient, channel: Any) -> None:
        self.system = system
        self.http = http
        self.call = channel.unary_stream(
            GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_REQUESTS - NUM_GROWING):
                tasks.create_task(self._one(random.Random(number)))
            for number in range(NUM_GROWING):
                tasks.create_task(self._grow(random.Random(number)))

    async def _one(self, draw: random.Random) -> None:
        await asyncio.sleep(draw.random() * 1.5)
        kind = draw.choice(("chat", "completion", "completion", "ids", "grpc"))
        fate = draw.choices(("finish", "cancel", "vanish"), weights=(7, 2, 1))[0]
        ask = {"finish": self._finish, "cancel": self._cancel, "vanish": self._vanish}[fate]
        await ask(kind, draw)
        self.outcomes[f"{fate} {kind}"] += 1

    async def _grow(self, draw: random.Random) -> None:
        """One page at its start and another one later: as many as there are pages want them together."""
        body = a_body("ids", draw) | {"prompt": a_prompt(draw, length=180), "max_tokens": 100, "n": 1}
        await self._finish_http("ids", body, stream=True)
        self.outcomes["finish growing"] += 1

    async def _finish(self, kind: str, draw: random.Random) -> None:
        if kind == "grpc":
            await self._finish_grpc(a_message(draw))
        else:
            await self._finish_http(kind, a_body(kind, draw), stream=draw.random() < 0.5)

    async def _finish_http(self, kind: str, body: dict[str, Any], *, stream: bool) -> None:
        wanted = body["max_tokens"] * body["n"]
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await self.http.post(route_of(kind), json=body)
        assert response.status_code == 200, response.text
        answers = events_of(response.text) if stream else [response.json()]
        assert answers[-1]["usage"]["completion_tokens"] == wanted
        tokens: Counter[int] = Counter()
        reasons: Counter[str | None] = Counter()
        for choice in (choice for answer in answers for choice in answer["choices"]):
            tokens[choice["index"]] += len(choice["token_ids"])
            reasons[choice["finish_reason"]] += 1
        assert tokens == dict.fromkeys(range(body["n"]), body["max_tokens"])
        assert reasons["length"] == body["n"]

    async def _finish_grpc(self, message: pb.GenerateRequest) -> None:
        tokens: Counter[int] = Counter()
        async for response in self.call(message, timeout=SECONDS_MAX):
            tokens[response.choice] += len(response.tokens)
        assert tokens == dict.fromkeys(range(message.n), message.max_tokens)

    async def _cancel(self, kind: str, draw: random.Random) -> None:
        """At a moment of its own: while queued, in the prompt, between tokens, or too late."""
        seconds = draw.random() ** 2 * 3
        if kind == "grpc":
            call = self.call(a_message(draw, tokens_min=100), timeout=SECONDS_MAX)
            reading = asyncio.create_task(count_messages(call))
            await asyncio.wait({reading}, timeout=seconds)
            call.cancel()
            await asyncio.wait({reading})
            return
        body = a_body(kind, draw, tokens_min=100) | {"stream": draw.random() < 0.7}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                response = await self.http.post(route_of(kind), json=body)
                assert response.status_code == 200, response.text

    async def _vanish(self, kind: str, draw: random.Random) -> None:
        """The socket is reset, in the middle of the request or of the answer."""
        body = json.dumps(a_body(kind, draw, tokens_min=100) | {"stream": True}).encode()
        head = f"POST {route_of(kind)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        data = head + body
        host, port = self.system.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        is_whole = draw.random() < 0.8
        writer.write(data if is_whole else data[: draw.randrange(len(data))])
        if is_whole and draw.random() < 0.7:
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def count_messages(call: Any) -> int:
    return len([message async for message in call])


def a_body(kind: str, draw: random.Random, *, tokens_min: int = 1) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_tokens": tokens_min + draw.choice((*range(20), 80)),
        "n": draw.choice((1, 1, 1, 1, 2)),
        "ignore_eos": True,
        "return_token_ids": True,
    }
    body |= draw.choice(
        (
            {"temperature": 0},
            {"seed": draw.randrange(1000), "top_p": 0.9},
            {"temperature": 1.3, "top_k": 40, "min_p": 0.01, "frequency_penalty": 0.5},
        )
    )
    words = "whale " * draw.choice((1, 3, 50, 175))
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": words}]
        if draw.random() < 0.3:
            body |= {"logprobs": True, "top_logprobs": 3}
        return body
    if draw.random() < 0.3:
        body |= {"logprobs": 2, "echo": draw.random() < 0.5}
    return body | {"prompt": words if kind == "completion" else a_prompt(draw)}


def a_message(draw: random.Random, *, tokens_min: int = 1) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=a_prompt(draw)),
        max_tokens=tokens_min + draw.choice((*range(20), 80)),
        n=draw.choice((1, 1, 2)),
        ignore_eos=True,
        sampling=pb.Sampling(seed=draw.randrange(1000)),
    )


def a_prompt(draw: random.Random, *, length: int | None = None) -> list[int]:
    length = length or draw.choice((1, 5, 100, 180, 300))
    return [draw.randrange(TEXT_CONFIG["vocab_size"]) for _ in range(length)]


def route_of(kind: str) -> str:
    return "/v1/chat/completions" if kind == "chat" else "/v1/completions"


def events_of(text: str) -> list[dict[str, Any]]:
    *events, last, rest = text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_a_storm_of_requests_is_answered_and_leaves_nothing_behind(text_system: System) -> None:
    before = text_system.metrics()
    limits = httpx.Limits(max_connections=NUM_REQUESTS)
    async with (
        httpx.AsyncClient(base_url=text_system.http, timeout=SECONDS_MAX, limits=limits) as http,
        grpc.aio.insecure_channel(text_system.grpc) as channel,
    ):
        storm = Storm(text_system, http, channel)
        await storm.run()
    assert storm.outcomes.total() == NUM_REQUESTS
    assert sum(count for name, count in storm.outcomes.items() if name.startswith("finish")) > 100
    await asyncio.to_thread(text_system.wait_until_idle)
    grown = Counter(text_system.metrics())
    grown.subtract(before)
    # It was a storm: sequences were preempted, and some of the abandoned ones were running.
    assert grown["rorqual_worker_preemptions"] > 0
    assert grown["rorqual_router_cancelled_requests_total"] > 10
    assert grown["rorqual_router_internal_errors_total"] == 0
    assert grown["rorqual_router_sequences_lost_total"] == 0
    assert grown["rorqual_router_tokens_duplicate_total"] == 0
    assert text_system.metrics()["rorqual_worker_sessions"] == 1
    assert "Traceback" not in text_system.output()
    assert text_system.is_whole()

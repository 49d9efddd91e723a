"""Three hundred requests over two prefill and two decode workers, of which some are killed or drained in the middle and
started again in their places: whoever waits gets the right tokens or, where a killed worker took some with it, one
clear error. Nothing stays held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.clients import Answer, Client
from tests.harness.pools import Pools
from tests.harness.system import SECONDS_MAX, TEXT_CONFIG

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.timeout(300),
    # httpx leaves its socket open when it is cancelled while it connects.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUM_REQUESTS = 300
NUM_CASES = 20
EARLY_FROM = 600  # prompts of so many tokens are bound when their first pages can be read
START_SECONDS = 4.0  # over which requests come
SETTLE_SECONDS = 0.5  # what a worker had sent before it was stopped has been taken in by then
HURT_MIN = 3  # sequences a worker has open when it is killed
WORKERS = ("--exact", "--pages", "64", "--slots", "8", "--prefill-tokens", "512", "--transfer-seconds", "5")
ROUTER = ("--bind-early-tokens", str(EARLY_FROM), "--credit-seconds", "200", "--hand-over-seconds", "60")


Tokens = list[list[list[int]]]
"""Of every case, by choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request and, once it has been asked in quiet, what must be answered whoever asks it how."""

    kind: str  # "chat", "completion", "ids"
    body: dict[str, Any]

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self.kind == "chat" else "/v1/completions"

    def empty(self) -> Answer:
        return Answer.of(self.body["n"])


def a_case(number: int) -> Case:
    draw = random.Random(number)
    kind = ("ids", "completion", "ids", "chat")[number % 4]
    body: dict[str, Any] = {
        "max_tokens": (1, 2, 6, 12, 20, 32, 48)[number % 7],
        "n": 2 if number % 6 == 2 else 1,
        "ignore_eos": True,
        "return_token_ids": True,
        "seed": number,
    }
    body |= ({"temperature": 0}, {"top_p": 0.9}, {"top_k": 40, "frequency_penalty": 0.5})[number % 3]
    words = "whale " * (1, 20, 150)[number % 3]
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": words}]
    elif kind == "completion":
        body["prompt"] = words
    else:
        length = (1, 300, 5, 700, 256, 100, 257, 1500, 255, 50)[number // 2]
        body["prompt"] = [draw.randrange(TEXT_CONFIG["vocab_size"]) for _ in range(length)]
    return Case(kind=kind, body=body)


CASES = [a_case(number) for number in range(NUM_CASES)]


class Storm:
    """Every request is drawn from its own number. What became of it is counted by name, errors are kept."""

    def __init__(self, url: str, client: Client, expected: Tokens) -> None:
        self.outcomes: Counter[str] = Counter()
        self.errors: list[tuple[str, Answer]] = []  # the door, and what was heard
        self._address = url.removeprefix("http://").split(":")
        self._client = client
        self._expected = expected

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_REQUESTS):
                tasks.create_task(self._one(random.Random(number)))

    async def until_ended(self, num_requests: int) -> None:
        while self.outcomes.total() < num_requests:
            await asyncio.sleep(0.01)

    async def _one(self, draw: random.Random) -> None:
        await asyncio.sleep(draw.random() * START_SECONDS)
        number = draw.randrange(NUM_CASES)
        fate = draw.choices(("finish", "cancel", "vanish"), weights=(16, 3, 1))[0]
        if fate == "vanish":
            await self._vanish(CASES[number], draw)
        else:
            seconds = None if fate == "finish" else draw.random() ** 2 * 12
            await self._ask(number, draw, seconds=seconds)
        self.outcomes[fate] += 1

    async def _ask(self, number: int, draw: random.Random, *, seconds: float | None) -> None:
        """Until it is answered, or for so long: it is then left while queued, in the prompt, handed over, or later."""
        case, client = CASES[number], self._client
        answer = case.empty()
        door = draw.choice(("whole", "stream", "stream", *(("grpc", "grpc") if case.kind == "ids" else ())))
        asking = {
            "whole": lambda: client.whole(case.route, case.body, answer),
            "stream": lambda: client.stream(case.route, case.body, answer),
            "grpc": lambda: client.grpc(case.body, answer),
        }[door]
        has_left = False
        try:
            async with asyncio.timeout(seconds):
                await asking()
        except TimeoutError:
            has_left = True
        for tokens, expected in zip(answer.tokens, self._expected[number], strict=True):
            assert tokens == expected[: len(tokens)], f"case {number} got other tokens by {door}"
        if answer.errors:
            self.errors.append((door, answer))
        elif not has_left:
            assert answer.tokens == self._expected[number], f"case {number} lacks tokens by {door}"
            assert answer.reasons == ["length"] * len(answer.tokens)

    async def _vanish(self, case: Case, draw: random.Random) -> None:
        """The socket is reset, in the middle of the request or of the answer."""
        body = json.dumps(case.body | {"stream": True}).encode()
        head = f"POST {case.route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        data = head + body
        reader, writer = await asyncio.open_connection(self._address[0], int(self._address[1]))
        is_whole = draw.random() < 0.8
        writer.write(data if is_whole else data[: draw.randrange(len(data))])
        if is_whole and draw.random() < 0.7:
            assert (await reader.readline()).startswith((b"HTTP/1.1 200", b"HTTP/1.1 502"))
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture(scope="module")
def pools(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(text_model, tmp_path_factory.mktemp("pools"), *WORKERS)
    try:
        members = [*pools.add("prefill", 2), *pools.add("decode", 2)]
        for member in members:
            member.start()
        for member in members:
            member.wait_until_ready()
        pools.start_router(*ROUTER)
        yield pools
    finally:
        pools.close()


@pytest.fixture(scope="module")
def expected(pools: Pools) -> Tokens:
    """What every case is answered when nothing else is asked."""

    async def ask() -> Tokens:
        async with a_client(pools) as client:
            return await all_answers(client)

    return asyncio.run(ask())


@asynccontextmanager
async def a_client(pools: Pools) -> AsyncIterator[Client]:
    limits = httpx.Limits(max_connections=NUM_REQUESTS)
    async with (
        httpx.AsyncClient(base_url=pools.http, timeout=SECONDS_MAX, limits=limits) as http,
        grpc.aio.insecure_channel(pools.grpc) as channel,
    ):
        yield Client(http, channel)


async def all_answers(client: Client) -> Tokens:
    """Of every case, one after the other."""
    answers = [case.empty() for case in CASES]
    for case, answer in zip(CASES, answers, strict=True):
        await client.whole(case.route, case.body, answer)
        assert not answer.errors
    return [answer.tokens for answer in answers]


def of_worker(pools: Pools, name: str, metric: str) -> float:
    """One of the router's counts that is kept by worker."""
    families = text_string_to_metric_families(httpx.get(pools["router"].metrics_url).text)
    address = pools[name].address
    return next(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == metric and sample.labels["worker"] == address
    )


async def kill_where_it_hurts(pools: Pools, name: str) -> float:
    """How many sequences were open there that could have suffered. It is stopped first, to be looked at in peace."""
    while True:
        pools.stop(name)
        await asyncio.sleep(SETTLE_SECONDS)
        num_open = of_worker(pools, name, "rorqual_router_sequences_outstanding")
        if num_open >= HURT_MIN:
            pools.kill(name)
            return num_open
        pools.resume(name)
        await asyncio.sleep(0.1)


async def start_again(pools: Pools, name: str) -> None:
    """In its place; in good order if it still lives. Waited for in threads, since the storm goes on, but started from
    this one: a process dies with the thread that started it."""
    member = pools[name]
    complaints = member.terminate() + await asyncio.to_thread(member.end)
    assert not complaints, "\n".join(complaints)
    member.start()
    await asyncio.to_thread(member.wait_until_ready)
    await asyncio.to_thread(pools.wait_until_connected)


async def a_storm(pools: Pools, expected: Tokens, *names: str, kill: bool) -> tuple[Storm, float]:
    """The storm, during which workers end and come back one after the other, and how many sequences those that were
    killed took with them at most."""
    before = pools["router"].metrics()
    num_lost_max = 0.0
    async with a_client(pools) as client:
        storm = Storm(pools.http, client, expected)
        async with asyncio.timeout(200):
            storming = asyncio.create_task(storm.run())
            await storm.until_ended(NUM_REQUESTS // 5)
            for name in names:
                if kill:
                    num_lost_max += await kill_where_it_hurts(pools, name)
                await start_again(pools, name)
            num_left = NUM_REQUESTS - storm.outcomes.total()
            await storming
        await asyncio.to_thread(pools.wait_until_idle)
        assert await all_answers(client) == expected
    await asyncio.to_thread(pools.wait_until_idle)
    grown = Counter(pools["router"].metrics())
    grown.subtract(before)
    lost, retried = (grown[f"rorqual_router_sequences_{what}_total"] for what in ("lost", "retried"))
    print(
        f"\n{names}: {dict(storm.outcomes)}; {len(storm.errors)} errors of {num_lost_max:g} at most, {lost:g} lost,"
        f" {retried:g} retried; {num_left} requests had not ended when they were back"
    )
    # Every loss was told to a client, once, unless the client had left.
    assert (
        len(storm.errors) <= lost <= len(storm.errors) + storm.outcomes["cancel"] + storm.outcomes["vanish"]
    )
    assert grown["rorqual_router_internal_errors_total"] == 0
    assert grown["rorqual_router_cancelled_requests_total"] > 10
    assert grown["rorqual_router_requests_overloaded_total"] == 0
    assert grown["rorqual_router_tokens_duplicate_total"] == 0
    # Those that came back took part again.
    for name in names:
        assert pools[name].metrics()["rorqual_worker_sequences_opened_total"] > 0
    return storm, num_lost_max


@pytest.mark.parametrize("name", ["prefill-1", "decode-1"])
async def test_a_storm_over_a_worker_that_is_killed_loses_what_that_one_had_and_no_more(
    pools: Pools, expected: Tokens, name: str
) -> None:
    storm, num_lost_max = await a_storm(pools, expected, name, kill=True)
    assert len(storm.errors) <= num_lost_max
    for door, answer in storm.errors:
        ((kind, text),) = answer.errors
        assert kind == ("UNAVAILABLE" if door == "grpc" else "worker_lost")
        assert pools[name].address in text
        if door == "whole":
            continue
        # Before the first token it would have been tried elsewhere; after it, a dead prefill worker is missed only
        # until its state has been read.
        num_tokens = [len(tokens) for tokens in answer.tokens]
        assert max(num_tokens) >= 1
        if name.startswith("prefill"):
            assert 1 in num_tokens


async def test_a_storm_over_workers_that_are_asked_to_end_loses_nothing(
    pools: Pools, expected: Tokens
) -> None:
    storm, _ = await a_storm(pools, expected, "prefill-0", "decode-0", kill=False)
    assert storm.errors == []

"""What a router is asked while it, or a worker, is killed and started again, and how near its picture is to the truth.

Called by `tests.integration.test_router_restart`, over real processes with fake ranks, whose answers are computable.
`Load` asks on a thread of its own, since processes live no longer than the thread that started them.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import grpc.aio
import httpx
from fake_state import VOCAB_SIZE, answer
from prometheus_client.parser import text_string_to_metric_families

from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from tests.harness.clients import Answer, Client
from tests.harness.pools import Member, Pools
from tests.harness.system import SECONDS_MAX

QUICK_RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
REFUSED_SECONDS = 0.05
"""Before a client that was refused tries again."""


def a_document(number: int, num_tokens: int) -> list[int]:
    return random.Random(number).choices(range(2, VOCAB_SIZE), k=num_tokens)


def a_body(prompt: list[int], *, max_tokens: int, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "seed": seed,
        "temperature": 1.0,
    }


def the_answer(body: Mapping[str, Any]) -> list[int]:
    sampling = SamplingParams(seed=body["seed"])
    return answer(body["prompt"], body["max_tokens"], sampling, ignore_eos=True)


class Load:
    """Streams of prompts that go on from documents, `num_streams` at a time, until `stop`. How they ended is counted:

    right: the whole answer; refused: before any token, by a router that is not there or drains; cut: the connection
    ended after tokens; failed: by one error of the router's after tokens. All tokens that came were the right ones.
    """

    def __init__(
        self, pools: Pools, documents: Sequence[list[int]], *, num_streams: int, pages_max: int, seed: int
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()  # of those that are not right, by kind
        self.num_streaming = 0  # have a token, and not all
        self._http, self._grpc = pools.http, pools.grpc
        self._documents = documents
        self._num_streams = num_streams
        self._pages_max = pages_max
        self._seed = seed
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> Counter[str]:
        """Lets the streams end. Raises what was wrong with any of them."""
        self._stopping.set()
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive(), "a stream does not end"
        self.check()
        return self.outcomes

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except BaseException as error:  # noqa: BLE001  for the test's own thread
            self._failure = error

    async def _ask_all(self) -> None:
        async with (
            httpx.AsyncClient(base_url=self._http, timeout=SECONDS_MAX) as http,
            grpc.aio.insecure_channel(self._grpc, options=QUICK_RECONNECT) as channel,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(self._num_streams):
                tasks.create_task(self._ask_on(Client(http, channel), number))

    async def _ask_on(self, client: Client, number: int) -> None:
        draw = random.Random(f"{self._seed} {number}")
        while not self._stopping.is_set():
            outcome = await self._ask(client, draw, over_grpc=number % 3 == 0)
            self.outcomes[outcome] += 1
            if outcome == "refused":
                await asyncio.sleep(REFUSED_SECONDS)

    async def _ask(self, client: Client, draw: random.Random, *, over_grpc: bool) -> str:
        document = draw.choice(self._documents)
        prompt = document[: draw.randint(1, self._pages_max * PAGE_TOKENS)]
        prompt = prompt + draw.choices(range(2, VOCAB_SIZE), k=draw.randint(1, 40))
        body = a_body(prompt, max_tokens=draw.randint(20, 120), seed=draw.randint(1, 10**6))
        heard, error = Answer.of(1), ""
        self.num_streaming += 1
        try:
            if over_grpc:
                await client.grpc(body, heard)
            else:
                await client.stream("/v1/completions", body, heard)
        except httpx.TransportError as failure:
            error = type(failure).__name__
        finally:
            self.num_streaming -= 1
        tokens, expected = heard.tokens[0], the_answer(body)
        assert tokens == expected[: len(tokens)], "a wrong token"
        if heard.is_finished:
            assert tokens == expected
            return "right"
        error = error or heard.errors[0][0]
        self.errors[error] += 1
        if not tokens:
            return "refused"
        return "failed" if heard.errors and not over_grpc else "cut"


class Watch:
    """A router's picture beside what workers say they keep. One connection each, so that looking costs little."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._client = httpx.Client(timeout=SECONDS_MAX)

    def close(self) -> None:
        self._client.close()

    def known(self) -> dict[str, float]:
        """Pages that the router knows of, by worker."""
        return self._by_worker("rorqual_router_feed_pages")

    def kept(self) -> dict[str, float]:
        """Pages that workers keep, by address."""
        return {
            worker.address: self._values(worker, "rorqual_worker_pages_cached")[""]
            for worker in self._pools.workers()
        }

    def num_digests(self) -> dict[str, float]:
        """Descriptions of nothing but their content's digest that workers have sent, by address."""
        return {
            worker.address: self._values(worker, "rorqual_worker_feed_items_total", "kind").get("digest", 0.0)
            for worker in self._pools.workers()
        }

    def num_taken(self) -> float:
        return self._values(self._pools["router"], "rorqual_router_feed_items_total")[""]

    def faults(self) -> dict[str, float]:
        return self._by_worker("rorqual_router_feed_faults_total")

    def exact_after(self, since: float, *, seconds_max: float, of: Sequence[str] = ()) -> dict[str, float]:
        """Seconds from `since` (wall clock) until the router was first seen to know as many pages as the worker keeps,
        by worker; of these addresses, or all. What changes while it is looked at may lie in between."""
        missing = set(of or [worker.address for worker in self._pools.workers()])
        seconds: dict[str, float] = {}
        while missing:
            assert time.time() - since < seconds_max, f"not exact after {seconds_max:g} s: {missing}"
            before, known, after = self.kept(), self.known(), self.kept()
            for address in list(missing):
                low, high = sorted((before[address], after[address]))
                if low <= known.get(address, -1) <= high:
                    seconds[address] = time.time() - since
                    missing.remove(address)
        return seconds

    def check_by_digests(self, *, seconds_max: float) -> None:
        """Every worker has said since what its content is, and every time it was what the router knows."""
        before, taken = self.num_digests(), self.num_taken()
        deadline = time.monotonic() + seconds_max
        while any(count < before[address] + 2 for address, count in self.num_digests().items()):
            assert time.monotonic() < deadline, "workers do not say what they keep"
            time.sleep(0.05)
        assert self.num_taken() >= taken + len(before)
        assert not self.faults()
        assert self.known() == self.kept()

    def _by_worker(self, metric: str) -> dict[str, float]:
        return self._values(self._pools["router"], metric, "worker")

    def _values(self, member: Member, metric: str, label: str = "") -> dict[str, float]:
        text = "\n".join(
            line for line in self._client.get(member.metrics_url).text.splitlines() if line.startswith(metric)
        )
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text + "\n"):
            for sample in family.samples:
                key = sample.labels.get(label, "")
                values[key] = values.get(key, 0.0) + sample.value
        return values

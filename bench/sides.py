"""Our sides of a race: a rank driven by plan messages, and the whole system driven over HTTP.

Both serve a list of requests with arrival times and note when each token came out.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from engine.plan import RankFailed, RankReady, RankSettings, StepResult
from engine.worker.events import SequenceKey
from engine.worker.rank_link import RankProcess, start_rank
from engine.worker.scheduler import Scheduler
from engine.worker.scheduler_config import SchedulerConfig
from rorqual.errors import RorqualError
from rorqual.local_cluster import LocalCluster
from rorqual.sampling import SamplingParams
from rorqual.session import TokenArray

GREEDY = SamplingParams(seed=1, temperature=0)
NUM_SLOTS, NUM_PAGES = 32, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: TokenArray
    max_tokens: int
    arrival_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    makespan: float
    token_times: list[list[float]]  # seconds from the start, of each request's tokens


class Side(Protocol):
    async def serve(self, requests: Sequence[Request]) -> Run: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOptions:
    model: Path
    threads: int
    prefill_tokens_max: int


class PlanSide:
    """A rank process under the production scheduler, without sessions: two plans in flight, as served."""

    def __init__(self, link: RankProcess, ready: RankReady, prefill_tokens_max: int) -> None:
        self._link = link
        self._config = SchedulerConfig(
            num_pages=ready.num_pages,
            num_slots=ready.num_slots,
            vocab_size=ready.vocab_size,
            sequence_tokens_max=ready.max_position_embeddings,
            eos_token_ids=frozenset(),
            prefill_tokens_max=prefill_tokens_max,
        )
        self._scheduler = Scheduler(self._config)
        self._num_served = 0

    async def serve(self, requests: Sequence[Request]) -> Run:
        waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival_seconds)
        times: list[list[float]] = [[] for _ in requests]
        places: dict[SequenceKey, int] = {}
        start = time.perf_counter()
        num_inflight = 0
        while waiting or not self._scheduler.is_idle:
            while waiting and requests[waiting[0]].arrival_seconds <= time.perf_counter() - start:
                places[self._open(requests[waiting[0]])] = waiting[0]
                waiting.pop(0)
            while (
                num_inflight < self._config.plans_inflight_max
                and (plan := self._scheduler.plan()) is not None
            ):
                self._link.send(plan)
                num_inflight += 1
            if num_inflight == 0:
                await asyncio.sleep(0.0005)  # the next request has not arrived yet
                continue
            result = await self._link.receive()
            assert isinstance(result, StepResult), f"the rank answered {result}"
            num_inflight -= 1
            now = time.perf_counter() - start
            for event in self._scheduler.apply(result):
                times[places[event.key]].append(now)
        return Run(makespan=time.perf_counter() - start, token_times=times)

    def _open(self, item: Request) -> SequenceKey:
        key = SequenceKey(self._num_served)
        self._num_served += 1
        self._scheduler.open(
            key, prompt=item.prompt, max_tokens=item.max_tokens, ignore_eos=True, sampling=GREEDY
        )
        return key


class HttpSide:
    """Streamed completions from `rorqual up`, one connection a request."""

    def __init__(self, url: str, model: str, client: httpx.AsyncClient) -> None:
        self._url = url
        self._model = model
        self._client = client

    async def serve(self, requests: Sequence[Request]) -> Run:
        start = time.perf_counter()
        times = await asyncio.gather(*(self._complete(item, start) for item in requests))
        return Run(makespan=time.perf_counter() - start, token_times=list(times))

    async def _complete(self, item: Request, start: float) -> list[float]:
        await asyncio.sleep(item.arrival_seconds)
        body = {
            "model": self._model,
            "prompt": item.prompt.tolist(),
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        times: list[float] = []
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    tokens = json.loads(line[6:])["choices"][0].get("token_ids") or []
                    times += [time.perf_counter() - start] * len(tokens)
        assert len(times) == item.max_tokens, f"{len(times)} tokens came, not {item.max_tokens}"
        return times


@asynccontextmanager
async def plan_side(options: SideOptions, *, exact: bool) -> AsyncGenerator[PlanSide]:
    settings = RankSettings(
        model=str(options.model),
        numerics="float32",
        exact=exact,
        num_pages=NUM_PAGES,
        kv_bytes=None,
        num_slots=NUM_SLOTS,
        prefill_tokens_max=options.prefill_tokens_max,
        threads=options.threads,
        kernels={},
    )
    link = await start_rank(settings)
    try:
        while not isinstance(message := await link.receive(), RankReady):
            if isinstance(message, RankFailed):
                raise RorqualError(message.message)
        yield PlanSide(link, message, options.prefill_tokens_max)
    finally:
        await link.stop(seconds_max=5)


@asynccontextmanager
async def http_side(options: SideOptions) -> AsyncGenerator[HttpSide]:
    cluster = LocalCluster(
        options.model,
        *("--both", "1", "--numerics", "float32", "--pages", str(NUM_PAGES), "--slots", str(NUM_SLOTS)),
        *("--threads", str(options.threads), "--prefill-tokens", str(options.prefill_tokens_max)),
    )
    await asyncio.to_thread(cluster.__enter__)
    try:
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=64)) as client:
            yield HttpSide(cluster.http, options.model.name, client)
    finally:
        await asyncio.to_thread(cluster.__exit__, None, None, None)

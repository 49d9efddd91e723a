"""A worker measures its store by what it asks of it, and does not ask a slow one for what is sooner computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from fake_link import FakeLink
from fake_rank import NUM_PAGE_COMPONENTS, FakeRank
from fake_state import PAGE_BYTES, RECORD_BYTES, answer

from engine.plan import StepPlan, StepResult
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.tiers.store_metrics import StoreMetrics
from engine.worker.tiers.store_tier import StoreTier, StoreTierConfig
from kvstore.store.contract import Kind, Payload, StoreKey, WritePolicy
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance.sources import PROBE_SECONDS, SAMPLES_MIN
from rorqual.sampling import SamplingParams
from rorqual.session import Open
from tests.harness.virtual import LoopClock, virtual

NUM_HOST_PAGES, NUM_HOST_RECORDS = 64, 16


class SlowRank(FakeRank):
    """1,024 prompt tokens a second, as it says."""

    def step(self, plan: StepPlan) -> StepResult:
        seconds = sum(segment.count for segment in plan.segments) / 1024
        return msgspec.structs.replace(super().step(plan), step_ms=1000 * seconds)


@dataclass
class ForeignStore:
    """Has everything, as values that are of no use: of half a page, so that nothing of it gets into host memory."""

    latency_seconds: float
    num_asked: int = 0

    async def contains(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[bool]:
        self.num_asked += 1
        await asyncio.sleep(min(self.latency_seconds, budget_seconds))
        return [self.latency_seconds < budget_seconds for _ in keys]

    async def read(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[memoryview | None]:
        if self.latency_seconds > budget_seconds:
            await asyncio.sleep(budget_seconds)
            return [None for _ in keys]
        await asyncio.sleep(self.latency_seconds)
        return [memoryview(bytes(PAGE_BYTES // 2)) if key.kind is Kind.PAGE else None for key in keys]

    def write(self, key: StoreKey, payload: Payload) -> bool:
        return True

    def delete(self, keys: Sequence[StoreKey]) -> None:
        raise AssertionError("nobody deletes")

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def flush(self, *, seconds_max: float) -> bool:
        return True


@asynccontextmanager
async def a_worker(store: ForeignStore) -> AsyncIterator[Host]:
    rank = SlowRank(
        num_pages=32,
        num_slots=4,
        num_records=8,
        prefill_tokens_max=512,
        num_host_pages=NUM_HOST_PAGES,
        num_host_records=NUM_HOST_RECORDS,
    )
    metrics = WorkerMetrics()
    tier = StoreTier(
        StoreTierConfig(num_page_components=NUM_PAGE_COMPONENTS),
        store,
        pages=np.zeros((NUM_HOST_PAGES, PAGE_BYTES), np.uint8),
        records=np.zeros((NUM_HOST_RECORDS, RECORD_BYTES), np.uint8),
        clock=LoopClock(),
        metrics=StoreMetrics(metrics.registry),
        run_store=store.run,
        flush=store.flush,
    )
    config = HostConfig(
        worker_id=WorkerId("w"),
        incarnation=Incarnation(1),
        exact=False,
        prefill_tokens_max=512,
        writes=WritePolicy.NEVER,
    )
    host = Host(link=FakeLink(rank), ready=rank.ready(), config=config, metrics=metrics, store=tier)
    serving = asyncio.create_task(host.run())
    await asyncio.sleep(0)
    try:
        yield host
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def ask(host: Host, number: int, num_pages: int) -> None:
    """A prompt like no other, to its one token; and until the store has nothing to do any more."""
    session = host.connect("r")
    prompt = [(number * 13 + 7 * i + i // 90) % 90 for i in range(num_pages * PAGE_TOKENS + 9)]
    sampling = SamplingParams(seed=number)
    session.submit(
        Open(
            sequence_id=SequenceId(1),
            request_id=f"r{number}",
            prompt=np.array(prompt, dtype=np.int32),
            max_tokens=1,
            ignore_eos=True,
            sampling=sampling,
        )
    )
    async with asyncio.timeout(60):
        while not (reports := (await session.next_report()).sequences):
            pass
    session.close()
    assert reports[0].token_ids == tuple(answer(prompt, 1, sampling, ignore_eos=True)), reports[0].error
    await asyncio.sleep(3)


@virtual
async def test_a_store_that_is_fast_is_asked_for_every_prompt() -> None:
    store = ForeignStore(latency_seconds=0.001)
    async with a_worker(store) as host:
        for number in range(6):
            await ask(host, number, 1)
        source = host.scheduler.speeds.store
        assert (store.num_asked, source.num_samples, source.num_refused) == (6, 6, 0)
        assert float(source.speed.seconds(PAGE_BYTES // 2)) == pytest.approx(0.002)  # asked, then read


@virtual
async def test_a_slow_store_is_not_asked_for_short_prompts_but_for_long_ones_and_probed_now_and_then() -> (
    None
):
    store = ForeignStore(latency_seconds=0.5)
    async with a_worker(store) as host:
        for number in range(SAMPLES_MIN):
            await ask(host, number, 1)
        assert store.num_asked == SAMPLES_MIN
        for number in range(3, 6):
            await ask(host, number, 1)  # 0.25 s to compute, 1 s to read
        assert store.num_asked == SAMPLES_MIN
        assert host.scheduler.speeds.store.num_refused == 3
        await ask(host, 6, 12)  # 3 s to compute
        assert store.num_asked == SAMPLES_MIN + 1
        await asyncio.sleep(PROBE_SECONDS)
        for number in range(7, 10):
            await ask(host, number, 1)
        assert store.num_asked == SAMPLES_MIN + 2
        store.latency_seconds = 0.001
        for number in range(20, 24):
            await asyncio.sleep(PROBE_SECONDS)
            await ask(host, number, 1)
        before = store.num_asked
        await ask(host, 40, 1)
        assert store.num_asked == before + 1  # four probes later it is worth it again


@pytest.mark.parametrize("latency_seconds", [2.0, 100.0])
@virtual
async def test_a_store_that_never_answers_in_time_is_known_to_take_that_long(latency_seconds: float) -> None:
    store = ForeignStore(latency_seconds=latency_seconds)
    async with a_worker(store) as host:
        for number in range(SAMPLES_MIN + 2):
            await ask(host, number, 1)
        assert store.num_asked == SAMPLES_MIN
        assert float(host.scheduler.speeds.store.speed.seconds(PAGE_BYTES)) > 1.0


def waited(host: Host) -> float:
    """Seconds, of all prompts so far."""
    return host.metrics.registry.get_sample_value("rorqual_worker_store_wait_seconds_sum") or 0.0


@virtual
async def test_a_prompt_waits_as_long_as_the_store_takes_once_that_is_known() -> None:
    store = ForeignStore(latency_seconds=0.1)
    async with a_worker(store) as host:
        await ask(host, 0, 4)  # a second to compute
        assert waited(host) < 0.03  # nobody knew
        for number in range(1, 8):
            await ask(host, number, 4)
        before = waited(host)
        await ask(host, 8, 4)
        assert waited(host) - before == pytest.approx(0.2)  # asked, then read, of which nothing was of use
        outcomes = [
            host.metrics.registry.get_sample_value("rorqual_worker_store_reads_total", {"outcome": name})
            for name in ("overdue", "missed")
        ]
        assert outcomes[1] >= 1
        assert sum(outcomes) == 9


@virtual
async def test_nobody_waits_long_for_a_store_that_is_only_tried() -> None:
    store = ForeignStore(latency_seconds=0.9)
    async with a_worker(store) as host:
        for number in range(SAMPLES_MIN):
            await ask(host, number, 2)
        await asyncio.sleep(PROBE_SECONDS)
        before, num_asked = waited(host), store.num_asked
        await ask(host, 9, 2)
        assert store.num_asked == num_asked + 1
        assert waited(host) - before == pytest.approx(0.02)

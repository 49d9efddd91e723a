"""Workers in this process with a store below them: real hosts over fake ranks, whose host memory is bytes, and a fake
store. Called by the tests of what is written to a store and read from it; for loops with virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from fake_link import FakeLink
from fake_rank import FakeRank
from fake_shared_memory import FakeSharedMemory, page_bytes
from fake_state import PAGE_TOKENS, Slot, answer, digest, page_digests
from fake_store import FakeStore
from prometheus_client import CollectorRegistry

from engine.plan import FromRank, StepPlan, StepResult, ToRank
from engine.worker.cache.prefix_cache import PrefixCache
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.tiers.store_metrics import StoreMetrics
from engine.worker.tiers.store_tier import StoreTier, StoreTierConfig
from kvstore.keys import PageKey
from kvstore.store.contract import Kind, StoreKey, WritePolicy, tenant_label
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.sampling import SamplingParams
from rorqual.session import Open
from tests.harness.keeping import kept_by
from tests.harness.virtual import LoopClock

STEP_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int = 1
    salt: str = ""

    @property
    def answer(self) -> list[int]:
        return answer(list(self.prompt), self.max_tokens, SamplingParams(seed=self.seed), ignore_eos=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    tokens: list[int]
    num_cached: int
    seconds: float  # to the first token


class StoringLink(FakeLink):
    """It steps in the loop's time, and knows of every plan what stays in the cache that it copies."""

    cache: Callable[[], PrefixCache | None]

    def send(self, message: ToRank) -> None:
        if isinstance(message, StepPlan) and message.demote:
            kept = kept_by(self.cache())
            self.rank.kept[message.number] = kept.pages, kept.records
        super().send(message)

    async def answer(self, message: ToRank | None) -> FromRank:
        await asyncio.sleep(STEP_SECONDS)
        found = await super().answer(message)
        return (
            msgspec.structs.replace(found, step_ms=1e3 * STEP_SECONDS)
            if isinstance(found, StepResult)
            else found
        )


class StoringWorker:
    def __init__(
        self,
        store: FakeStore,
        *,
        num_pages: int = 24,
        num_slots: int = 4,
        num_records: int = 6,
        num_host_pages: int = 40,
        num_host_records: int = 8,
        writes: WritePolicy = WritePolicy.AT_TURN_END,
        **options: Any,
    ) -> None:
        memory = FakeSharedMemory(num_pages=num_host_pages, num_records=num_host_records)
        self.rank = FakeRank(
            num_pages=num_pages,
            num_slots=num_slots,
            prefill_tokens_max=512,
            num_records=num_records,
            host_memory=memory,
            positions_max=num_pages * PAGE_TOKENS,
        )
        ready = self.rank.ready()
        config = HostConfig(
            worker_id=WorkerId("w"),
            incarnation=Incarnation(7),
            exact=False,
            prefill_tokens_max=512,
            writes=writes,
        )
        self.metrics = StoreMetrics(CollectorRegistry())
        self.store = StoreTier(
            StoreTierConfig(num_page_components=ready.num_page_components, **options),
            store,
            pages=memory.page_rows,
            records=memory.record_rows,
            clock=LoopClock(),
            metrics=self.metrics,
            run_store=store.run,
            flush=store.flush,
        )
        link = StoringLink(self.rank)
        link.cache = lambda: self.host.scheduler.cache
        self.host = Host(link=link, ready=ready, config=config, metrics=WorkerMetrics(), store=self.store)
        self.asked: list[Asked] = []
        self.serving: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Heard:
        """On a session of its own, which ends with this call, however that ends."""
        self.asked.append(asked)
        loop = asyncio.get_running_loop()
        began, session = loop.time(), self.host.connect(f"r{len(self.asked)}")
        tokens: list[int] = []
        num_cached, seconds = 0, 0.0
        try:
            session.submit(
                Open(
                    sequence_id=SequenceId(1),
                    request_id=f"r{len(self.asked)}",
                    prompt=np.array(asked.prompt, dtype=np.int32),
                    max_tokens=asked.max_tokens,
                    ignore_eos=True,
                    sampling=SamplingParams(seed=asked.seed),
                    cache_salt=asked.salt,
                )
            )
            while True:
                for report in (await session.next_report()).sequences:
                    assert not report.error, report.error
                    if report.token_ids and not tokens:
                        num_cached, seconds = report.cached_tokens, loop.time() - began
                    tokens += report.token_ids
                    if report.finish_reason is not None:
                        return Heard(tokens=tokens, num_cached=num_cached, seconds=seconds)
        finally:
            session.close()

    async def answers(self, asked: Asked) -> Heard:
        heard = await self.ask(asked)
        assert heard.tokens == asked.answer
        return heard

    async def rest(self) -> None:
        """Until nothing is open, on its way or to be written; then nothing may be held."""
        async with asyncio.timeout(600):
            while not self.host.is_idle:
                await asyncio.sleep(STEP_SECONDS)
        scheduler, tier = self.host.scheduler, self.host.scheduler.host_tier
        assert tier is not None
        scheduler.check_all()
        assert tier.num_held == 0
        assert not any(item.num_pins for item in (*tier.index.pages(), *tier.index.tails()))
        assert not tier.index._reserved_pages
        assert not tier.index._reserved_records
        load = scheduler.load()
        assert (load.pages_free, load.slots_free) == (load.pages_total, load.slots_total)

    def count(self, metric: str, **labels: str) -> float:
        return self.metrics._registry.get_sample_value(f"rorqual_worker_store_{metric}", labels) or 0.0


@contextlib.asynccontextmanager
async def a_worker(store: FakeStore, **options: Any) -> AsyncIterator[StoringWorker]:
    worker = StoringWorker(store, **options)
    worker.serving = asyncio.create_task(worker.host.run())
    try:
        await asyncio.sleep(0)
        yield worker
    finally:
        worker.serving.cancel()
        ended = await asyncio.gather(worker.serving, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError), ended


def check_values(store: FakeStore, worker: StoringWorker, asked: Iterable[Asked]) -> None:
    """Every value is what its key stands for, under the tenant whose prompt it is of; and the worker's host memory
    knows what follows on what."""
    cache = worker.host.scheduler.cache
    assert cache is not None
    made: dict[StoreKey, tuple[Slot, int]] = {}
    parents: dict[PageKey, PageKey] = {}
    for item in asked:
        tokens = [*item.prompt, *item.answer]
        slot = Slot(
            tokens=tokens,
            num_prompt=len(item.prompt),
            sampling=SamplingParams(seed=0),
            tokens_max=len(tokens),
        )
        slot.compute(len(tokens))
        keys = cache.keys_of(np.array(tokens, dtype=np.int32), salt=item.salt)
        parents |= dict(zip(keys[1:], keys, strict=False))
        for depth, key in enumerate(keys, start=1):
            for kind in Kind:
                made[StoreKey(kind, tenant_label(item.salt), key)] = slot, depth
    tier = worker.host.scheduler.host_tier
    assert tier is not None
    assert all(page.parent == parents[page.key] for page in tier.index.pages() if page.key in parents)
    for key, value in store.values.items():
        slot, depth = made[key]
        if key.kind is Kind.PAGE:
            rows = slot.rows[depth - 1]
            assert value == page_bytes(rows) + struct.pack("<2Q", *page_digests(rows))
        else:
            packed = slot.pack(depth * PAGE_TOKENS)
            assert value[:-9] == packed
            assert struct.unpack("<Q", value[-9:-1]) == (digest(packed),)

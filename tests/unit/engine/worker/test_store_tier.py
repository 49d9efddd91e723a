"""A store below host memory: what is written there and when, what is read from it, and that neither a slow store nor a
foreign value does more harm than not having one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fake_state import PAGE_TOKENS
from fake_store import FakeStore

from engine.worker.tiers.speeds import STORE_ASSUMED
from kvstore.keys import PageKey
from kvstore.store.contract import Kind, WritePolicy
from tests.harness.benches import a_prompt
from tests.harness.storing import STEP_SECONDS, Asked, StoringWorker, a_worker, check_values
from tests.harness.virtual import virtual

BUDGET = 0.02


def asked(number: int = 1, *, pages: int = 4, salt: str = "", max_tokens: int = 5) -> Asked:
    return Asked(prompt=tuple(a_prompt(number, pages * PAGE_TOKENS + 90)), max_tokens=max_tokens, salt=salt)


def num(store: FakeStore, kind: Kind) -> int:
    return sum(key.kind is kind for key in store.values)


async def filled(*prompts: Asked, **options: object) -> FakeStore:
    """What a worker leaves behind that has computed these."""
    store = FakeStore()
    async with a_worker(store, **options) as worker:
        for prompt in prompts:
            await worker.answers(prompt)
        await worker.rest()
        check_values(store, worker, prompts)
    return store


@virtual
async def test_what_one_worker_has_computed_another_reads() -> None:
    store = await filled(asked())
    assert num(store, Kind.PAGE) == 4
    assert num(store, Kind.TAIL) >= 1
    async with a_worker(store) as worker:
        heard = await worker.answers(asked())
        assert heard.num_cached == 4 * PAGE_TOKENS
        assert worker.rank.num_tokens_computed < PAGE_TOKENS
        assert worker.count("reads_total", outcome="read") == 1
        assert worker.count("tokens_saved_total") == 4 * PAGE_TOKENS
        await worker.rest()


@virtual
async def test_a_prompt_longer_than_host_memory_is_written_whole() -> None:
    """Also what waits for room in host memory when no step is left that would ask for it."""
    store = await filled(asked(pages=12), num_host_pages=4, num_host_records=2)
    assert num(store, Kind.PAGE) == 12


@virtual
async def test_a_drain_ends_when_everything_is_written() -> None:
    store = FakeStore()
    async with a_worker(store, num_host_pages=4) as worker:
        await worker.answers(asked(pages=9))
        assert await worker.host.drain(seconds_max=20)
        assert num(store, Kind.PAGE) == 9


@pytest.mark.parametrize(("writes", "num_pages"), [(WritePolicy.NEVER, 0), (WritePolicy.ON_EVICTION, 4)])
def test_what_is_written_when_is_as_the_policy_says(writes: WritePolicy, num_pages: int) -> None:
    """Of two prompts of four pages of which a device with ten pages, half of them in use, gives up the first."""

    @virtual
    async def run() -> None:
        store = await filled(asked(1), num_pages=24, writes=writes)
        assert not store.values
        store = await filled(asked(1), asked(2, pages=8), num_pages=9, writes=writes)
        assert num(store, Kind.PAGE) >= num_pages
        assert bool(store.values) == bool(num_pages)

    run()


@virtual
async def test_a_frozen_store_costs_a_prompt_its_budget_and_no_more() -> None:
    async with a_worker(FakeStore()) as worker:
        usual = (await worker.answers(asked())).seconds
    store = FakeStore()
    store.is_frozen = True
    async with a_worker(store) as worker:
        heard = await worker.answers(asked())
        assumed = STORE_ASSUMED.latency_seconds
        assert usual < heard.seconds <= usual + assumed + BUDGET + 0.001
        assert heard.num_cached == 0
        assert worker.count("reads_total", outcome="overdue") == 1
        await worker.rest()
        assert store.num_asking == 0


@virtual
async def test_a_full_store_is_counted_and_nothing_waits_for_it() -> None:
    store = FakeStore()
    store.is_full = True
    async with a_worker(store) as worker:
        await worker.answers(asked())
        await worker.rest()
        assert worker.count("not_written_total", reason="queue_full") >= 4
    assert not store.values


@virtual
async def test_what_comes_too_late_for_its_prompt_still_comes_into_host_memory() -> None:
    store = await filled(asked())
    store.read_seconds = 0.3
    async with a_worker(store) as worker:
        heard = await worker.answers(asked(max_tokens=60))
        assert heard.num_cached == 0
        await worker.rest()
        tier = worker.host.scheduler.host_tier
        assert tier is not None
        assert tier.index.counts.pages_read == 4
        assert worker.count("reads_total", outcome="overdue") == 1


@virtual
async def test_a_read_for_nobody_ends_soon_however_long_the_prompt_is() -> None:
    store = await filled(asked(pages=12))
    store.read_seconds = 0.5
    async with a_worker(store, read_bytes=2 * 2048, late_seconds=1.0) as worker:
        await worker.answers(asked(pages=12))
        await worker.rest()
        assert 1 <= len(store.asked) <= 3


@pytest.mark.parametrize("after", [0.0005, 0.0015, 0.002, 0.1, 0.15, 0.25])
def test_a_prompt_that_is_given_up_while_it_is_read_leaves_nothing(after: float) -> None:
    @virtual
    async def run() -> None:
        store = await filled(asked())
        async with a_worker(store) as worker:
            asking = asyncio.create_task(worker.ask(asked()))
            await asyncio.sleep(after)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await worker.rest()
            assert store.num_asking == 0
            await worker.answers(asked())

    run()


@pytest.mark.parametrize("after", [0.0, 0.0005, 0.001, 0.0015, 0.002, 0.05])
def test_a_worker_that_ends_while_it_reads_gives_back_what_it_held(after: float) -> None:
    @virtual
    async def run() -> None:
        store = await filled(asked())
        async with a_worker(store) as worker:
            asking = asyncio.create_task(worker.ask(asked()))
            await asyncio.sleep(after)
            assert worker.serving is not None
            worker.serving.cancel()
            await asyncio.gather(worker.serving, return_exceptions=True)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert store.num_asking == 0
            tier = worker.host.scheduler.host_tier
            assert tier is not None
            tier.index.check()
            assert not tier.index._reserved_pages
            assert not tier.index._reserved_records

    run()


@virtual
async def test_pages_behind_one_that_is_missing_are_not_read() -> None:
    store = await filled(asked())
    pages = [key for key in store.values if key.kind is Kind.PAGE]
    async with a_worker(store) as worker:
        keys = _path(worker, asked())
        lost = next(key for key in pages if key.page == keys[2])
        store.delete([lost])
        heard = await worker.answers(asked())
        assert heard.num_cached <= 2 * PAGE_TOKENS
        assert {key.page for part in store.asked for key in part} <= set(keys[:2])
        await worker.rest()


@pytest.mark.parametrize("spoiled", [b"", b"short", bytes(5000), "kind"])
def test_a_value_of_another_form_is_a_miss(spoiled: bytes | str) -> None:
    @virtual
    async def run() -> None:
        store = await filled(asked())
        for key, value in store.values.items():
            if spoiled != "kind":
                store.values[key] = spoiled
            elif key.kind is Kind.TAIL:
                store.values[key] = value[:-1] + b"\xee"
        async with a_worker(store, writes=WritePolicy.NEVER) as worker:
            await worker.answers(asked())
            assert worker.count("reads_total", outcome="missed" if spoiled != "kind" else "part") == 1
            await worker.rest()

    run()


@virtual
async def test_two_tenants_share_nothing() -> None:
    store = await filled(asked(salt="one"))
    async with a_worker(store) as worker:
        assert (await worker.answers(asked(salt="two"))).num_cached == 0
        assert (await worker.answers(asked())).num_cached == 0
        assert not store.asked
        await worker.rest()
        check_values(store, worker, [asked(salt="one"), asked(salt="two"), asked()])


@virtual
async def test_prompts_beyond_those_that_may_read_at_once_are_computed() -> None:
    prompts = [asked(number, pages=2) for number in range(3)]
    store = await filled(*prompts)
    store.seconds = 0.005
    async with a_worker(store, reads_max=1) as worker:
        heard = await asyncio.gather(*(worker.answers(prompt) for prompt in prompts))
        assert sorted(item.num_cached for item in heard) == [0, 0, 2 * PAGE_TOKENS]
        assert worker.count("reads_total", outcome="too_many") == 2
        await worker.rest()


@virtual
async def test_what_is_on_the_device_is_not_asked_for() -> None:
    store = FakeStore()
    async with a_worker(store) as worker:
        await worker.answers(asked())
        await worker.rest()
        store.is_frozen = True
        heard = await worker.answers(asked())
        assert heard.num_cached == 4 * PAGE_TOKENS
        assert heard.seconds <= 2 * STEP_SECONDS
        assert not store.asked


def _path(worker: StoringWorker, prompt: Asked) -> tuple[PageKey, ...]:
    assert worker.host.scheduler.cache is not None
    return worker.host.scheduler.cache.keys_of(np.array(prompt.prompt, dtype=np.int32), salt=prompt.salt)

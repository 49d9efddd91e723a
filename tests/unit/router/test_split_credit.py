"""Credit of decode workers, seen from requests: who waits, in which order, for how long; and fleets of both kinds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rorqual.errors import Overloaded, StageTimedOut
from rorqual.session import Credit
from router.fleet import FleetConfig
from tests.harness.cluster import Cluster, Got, a_cluster, a_generation, collect, settle, the_answer, until

FAST = {"backoff_seconds_min": 0.005, "backoff_seconds_max": 0.02}


@asynccontextmanager
async def a_full_cluster(
    *boths: str, sequences: int = 1, pages: int = 64, waiting: int = 1024, **stages: float
) -> AsyncIterator[tuple[Cluster, list[asyncio.Task[list[Got]]]]]:
    """All credit of the only decode worker is charged to requests that go on when its gate "more" opens."""
    config = FleetConfig(credit_waiting_max=waiting, **FAST)
    async with a_cluster(
        *boths, prefills=["p"], decodes=["d"], start=False, fleet=config, **stages
    ) as cluster:
        cluster.start_prefill("p")
        cluster.start_decode("d", credit=Credit(sequences=sequences, pages=pages)).gates.shut("more")
        await cluster.connected(2)
        first = [asyncio.create_task(collect(cluster, a_generation(900 + n))) for n in range(sequences)]
        await until(lambda: cluster.count("hand_over_seconds_count") == sequences)
        yield cluster, first
        cluster.decodes["d"].gates.open("more")
        for number, task in enumerate(first):
            (got,) = await task
            assert got.tokens == the_answer(a_generation(900 + number))
        await cluster.empty()


async def ask(cluster: Cluster, number: int, **options: int) -> asyncio.Task[list[Got]]:
    """A request that has come as far as it can."""
    task = asyncio.create_task(collect(cluster, a_generation(number, **options)))
    await settle()
    return task


async def test_no_prompt_is_sent_before_a_decode_worker_has_room_and_then_in_order() -> None:
    async with a_full_cluster() as (cluster, _):
        waiting = [await ask(cluster, number) for number in range(1, 6)]
        assert cluster.count("credit_waiting") == 5
        assert len(cluster.prefills["p"].opened) == 1
        cluster.decodes["d"].gates.open("more")
        for number, task in enumerate(waiting, start=1):
            (got,) = await task
            assert got.tokens == the_answer(a_generation(number))
        ids = [command.request_id for command in cluster.prefills["p"].opened]
        assert ids == ["r900", "r1", "r2", "r3", "r4", "r5"]


async def test_a_closed_request_leaves_the_queue_at_once() -> None:
    async with a_full_cluster() as (cluster, _):
        gone, stays = await ask(cluster, 1), await ask(cluster, 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert cluster.count("credit_waiting") == 1
        cluster.decodes["d"].gates.open("more")
        await stays
        assert [command.request_id for command in cluster.prefills["p"].opened] == ["r900", "r2"]


async def test_beyond_the_queue_requests_are_refused() -> None:
    async with a_full_cluster(waiting=2) as (cluster, _):
        waiting = [await ask(cluster, number) for number in (1, 2)]
        with pytest.raises(Overloaded, match="2 sequences wait for decode credit already"):
            await collect(cluster, a_generation(3))
        assert cluster.count("requests_overloaded_total") == 1
        cluster.decodes["d"].gates.open("more")
        await asyncio.gather(*waiting)


async def test_waiting_for_credit_has_a_deadline() -> None:
    async with a_full_cluster(credit_seconds_max=0.05) as (cluster, _):
        with pytest.raises(StageTimedOut, match="decode credit"):
            await collect(cluster, a_generation(1))
        assert cluster.count("stages_overdue_total", stage="credit") == 1
        assert cluster.count("credit_waiting") == 0


async def test_more_credit_lets_those_who_wait_go_on() -> None:
    async with a_full_cluster() as (cluster, _):
        waiting = await ask(cluster, 1)
        cluster.decodes["d"].set_credit(Credit(sequences=2, pages=64))
        await until(lambda: len(cluster.prefills["p"].opened) == 2)
        cluster.decodes["d"].gates.open("more")
        (got,) = await waiting
        assert got.tokens == the_answer(a_generation(1))


async def test_less_credit_than_is_charged_takes_nothing_back() -> None:
    async with a_full_cluster(sequences=2) as (cluster, _):
        cluster.decodes["d"].set_credit(Credit(sequences=1, pages=1))
        waiting = await ask(cluster, 1)
        assert cluster.count("credit_sequences", worker="d") == 2
        assert cluster.count("credit_waiting") == 1
        cluster.decodes["d"].gates.open("more")
        await waiting


async def test_a_prompt_that_can_never_fit_goes_when_nothing_else_is_charged() -> None:
    async with a_full_cluster(sequences=1, pages=3) as (cluster, _):
        cluster.decodes["d"].set_credit(Credit(sequences=4, pages=3))
        long = await ask(cluster, 1, length=2000)
        short = await ask(cluster, 2)
        # The short one would fit, and is not let past the long one for ever.
        assert cluster.count("credit_waiting") == 2
        cluster.decodes["d"].gates.open("more")
        for number, length, task in ((1, 2000, long), (2, 5, short)):
            (got,) = await task
            assert got.tokens == the_answer(a_generation(number, length=length))
        assert [command.request_id for command in cluster.prefills["p"].opened] == ["r900", "r1", "r2"]


async def test_a_decode_worker_that_connects_takes_what_waits() -> None:
    config = FleetConfig(**FAST)
    decodes = ["d1", "d2"]
    async with a_cluster(prefills=["p"], decodes=decodes, start=False, fleet=config) as cluster:
        cluster.start_prefill("p")
        cluster.start_decode("d1", credit=Credit(sequences=0, pages=0))
        await cluster.connected(2)
        waiting = await ask(cluster, 1)
        assert cluster.count("credit_waiting") == 1
        cluster.start_decode("d2")
        (got,) = await waiting
        assert got.tokens == the_answer(a_generation(1))
        await cluster.empty()


async def test_without_a_decode_worker_the_place_deadline_says_so() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False, place_seconds_max=0.05) as cluster:
        cluster.start_prefill("p")
        await cluster.connected(1)
        with pytest.raises(Overloaded, match="no decode worker is connected"):
            await collect(cluster, a_generation(1))
        assert cluster.count("stages_overdue_total", stage="place") == 1
        assert cluster.prefills["p"].opened == []


async def test_without_a_prefill_worker_the_place_deadline_says_so() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False, place_seconds_max=0.05) as cluster:
        cluster.start_decode("d")
        await cluster.connected(1)
        with pytest.raises(Overloaded, match="no prefill worker is connected"):
            await collect(cluster, a_generation(1))
        await cluster.empty()


async def test_where_no_decode_worker_has_room_a_worker_of_both_roles_serves_the_request() -> None:
    async with a_full_cluster("b") as (cluster, _):
        waiting = await ask(cluster, 1)
        assert cluster.count("credit_waiting") == 1
        cluster.start_worker("b")
        cluster.links["b"].gate.clear()
        await until(lambda: cluster.count("sequences_placed_total", kind="whole") == 1)
        assert cluster.count("credit_waiting") == 0
        cluster.links["b"].gate.set()
        (got,) = await waiting
        assert got.tokens == the_answer(a_generation(1))


async def test_a_request_that_would_have_to_queue_goes_to_a_worker_of_both_roles_that_has_room() -> None:
    config = FleetConfig(sequences_per_worker_max=2, **FAST)
    async with a_cluster("b", prefills=["p"], decodes=["d"], start=False, fleet=config) as cluster:
        cluster.start_prefill("p")
        cluster.start_decode("d", credit=Credit(sequences=4, pages=4)).gates.shut("more")
        await cluster.connected(2)
        split = await ask(cluster, 1)
        cluster.start_worker("b")
        await cluster.connected(3)
        cluster.links["b"].gate.clear()
        on_b = [await ask(cluster, number, length=2000) for number in (2, 3)]
        long = await ask(cluster, 4, length=2000)
        assert cluster.count("credit_waiting") == 1
        on_b[0].cancel()
        await settle()
        short = await ask(cluster, 5)  # there is room for it on d, behind the long one
        assert cluster.count("sequences_placed_total", kind="whole") == 3
        assert cluster.count("credit_waiting") == 1
        cluster.links["b"].gate.set()
        cluster.decodes["d"].gates.open("more")
        await asyncio.gather(split, on_b[1], long, short)
        await cluster.empty()


async def test_in_a_mixed_fleet_requests_go_where_the_first_token_comes_soonest() -> None:
    async with a_cluster("b", prefills=["p"], decodes=["d"]) as cluster:
        cluster.links["b"].gate.clear()
        busy = await ask(cluster, 1, length=4000, max_tokens=5)
        assert cluster.count("sequences_placed_total", kind="whole") == 1
        for number in range(2, 6):
            (got,) = await collect(cluster, a_generation(number, length=300))
            assert got.tokens == the_answer(a_generation(number, length=300))
        assert cluster.count("sequences_placed_total", kind="split") == 4
        cluster.links["b"].gate.set()
        await busy
        await cluster.empty()


async def test_a_retry_takes_its_turn_before_those_who_have_not_begun() -> None:
    config = FleetConfig(**FAST)
    async with a_cluster(prefills=["p1", "p2"], decodes=["d"], fleet=config) as cluster:
        cluster.decodes["d"].set_credit(Credit(sequences=1, pages=64))
        for worker in cluster.prefills.values():
            worker.gates.shut("token")
        tasks = [await ask(cluster, number) for number in (1, 2, 3)]
        opened = cluster.prefills["p2"].opened = cluster.prefills["p1"].opened
        cluster.prefills["p1"].fail_all("a step failed")
        # The first takes its place behind the second, which had been waiting, and before the third.
        await until(lambda: len(opened) == 2)
        for worker in cluster.prefills.values():
            worker.gates.open("token")
        for number, task in enumerate(tasks, start=1):
            (got,) = await task
            assert got.tokens == the_answer(a_generation(number))
        assert [command.request_id for command in opened] == ["r1", "r2", "r1", "r3"]
        await cluster.empty()

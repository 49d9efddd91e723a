"""Workers that are lost, drain, fall silent or change, seen from the dispatcher and its fleet."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from rorqual.errors import RorqualError, WorkerLost
from router.fleet import FleetConfig
from tests.harness.cluster import (
    a_cluster,
    a_generation,
    collect,
    the_answer,
    until,
)


async def test_a_sequence_lost_before_its_first_token_is_answered_by_another_worker() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await until(lambda: cluster.count("sequences_opened_total", worker="a") == 1)
        cluster.transport.channels[0].cut()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())
        assert cluster.count("sequences_opened_total", worker="b") == 1
        assert cluster.count("sequences_retried_total") == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_a_failed_rank_is_retried_elsewhere_though_its_session_still_stands() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await until(lambda: cluster.transport.hosts["a"].load().sequences_running == 1)
        cluster.links["a"].fail("out of memory")
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_a_sequence_is_retried_once_and_then_fails() -> None:
    async with a_cluster("a", "b", "c") as cluster:
        for link in cluster.links.values():
            link.gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation()))
        for address in ("a", "b"):
            await until(lambda address=address: cluster.count("sequences_opened_total", worker=address) == 1)
            cluster.transport.channels["abc".index(address)].cut()
        with pytest.raises(WorkerLost, match="worker b was lost: the network failed"):
            await asking
        assert cluster.count("sequences_opened_total", worker="c") == 0
        assert cluster.count("sequences_lost_total") == 1


async def test_a_worker_lost_after_the_first_token_ends_the_request() -> None:
    async with a_cluster("a", "b") as cluster:
        async with aclosing(cluster.dispatcher.generate(a_generation(max_tokens=3000))) as updates:
            await anext(updates)
            cluster.transport.channels[0].cut()
            with pytest.raises(WorkerLost, match="worker a was lost"):
                async for _ in updates:
                    pass
        assert cluster.count("sequences_retried_total") == 0
        await cluster.empty()


async def test_a_lost_worker_is_reached_again_and_serves() -> None:
    async with a_cluster("a") as cluster:
        for _ in range(3):
            cluster.transport.channels[-1].cut()
            num_channels = len(cluster.transport.channels)
            await until(lambda num=num_channels: len(cluster.transport.channels) > num)
            await cluster.connected(1)
            (got,) = await collect(cluster, a_generation())
            assert got.tokens == the_answer(a_generation())
        assert cluster.count("sessions_opened_total", worker="a") == 4


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with a_cluster("a", "b") as cluster:
        cluster.links["a"].gate.clear()
        asking = asyncio.create_task(collect(cluster, a_generation(max_tokens=200)))
        await until(lambda: cluster.transport.hosts["a"].load().sequences_running == 1)
        draining = asyncio.create_task(cluster.transport.hosts["a"].drain(seconds_max=10))
        await until(lambda: any(view.draining for view in cluster.fleet.view()))
        await collect(cluster, a_generation(num_choices=4))
        assert cluster.count("sequences_opened_total", worker="b") == 4
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation(max_tokens=200))
        assert await draining


async def test_a_worker_with_another_model_is_kept_out() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        cluster.start_worker("a")
        await cluster.connected(1)
        cluster.start_worker("b", numerics="served")
        await until(lambda: bool(cluster.fleet.failures()) and "served" in cluster.fleet.failures()[0])
        assert [view.address for view in cluster.fleet.view()] == ["a"]


async def test_a_worker_that_falls_silent_is_given_up() -> None:
    config = FleetConfig(silence_seconds_max=0.1, backoff_seconds_min=0.005, backoff_seconds_max=0.02)
    async with a_cluster("a", fleet=config, place_seconds_max=0.01) as cluster:
        del cluster.transport.hosts["a"]
        cluster.transport.channels[0].is_mute = True
        with pytest.raises(RorqualError):
            await collect(cluster, a_generation())
        assert cluster.count("stages_overdue_total", stage="report") == 1
        assert cluster.fleet.view() == []


async def test_attempts_back_off_up_to_the_cap() -> None:
    config = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.05)
    async with a_cluster("a", start=False, fleet=config) as cluster:
        await asyncio.sleep(0.3)
        # 1, 2, 4, ... 50 ms, halved at most: without backoff it would be hundreds.
        assert 5 <= cluster.transport.num_attempts <= 20
        assert "connection refused" in cluster.fleet.failures()[0]


async def test_a_worker_that_welcomes_and_dies_is_left_alone_like_one_that_cannot_be_reached() -> None:
    config = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.05)
    async with a_cluster("a", fleet=config) as cluster:

        async def cut_each() -> None:
            while True:
                cluster.transport.channels[-1].cut()
                await asyncio.sleep(0.001)

        cutting = asyncio.create_task(cut_each())
        await asyncio.sleep(0.3)
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)
        assert 5 <= cluster.count("sessions_opened_total", worker="a") <= 20

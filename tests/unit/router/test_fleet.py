"""Workers come and go while the router runs: who is found is used, who is gone is forgotten with its session, and
nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Iterable

import pytest
from fake_transport import FakeTransport
from prometheus_client import CollectorRegistry, generate_latest

from rorqual.errors import Overloaded
from router.fleet import Fleet, FleetConfig
from router.fleet_metrics import FleetMetrics
from tests.harness.cluster import Cluster, a_cluster, a_generation, collect, settle, the_answer, until

QUICK = FleetConfig(backoff_seconds_min=0.001, backoff_seconds_max=0.002)


def series(registry: CollectorRegistry) -> set[str]:
    """Addresses of workers that stand in any metric."""
    return set(re.findall(r'worker="([^"]*)"', generate_latest(registry).decode()))


def names(fleet: Fleet) -> set[str]:
    return {address for address in fleet.columns.addresses if address}


def check_only(cluster: Cluster, addresses: Iterable[str]) -> None:
    """These workers have a row, a place in the picture, a task and metrics, and nobody else has."""
    fleet, expected = cluster.fleet, set(addresses)
    assert names(fleet) == set(fleet.columns.row_of) == expected
    assert fleet.num_known == fleet.picture.num_workers == len(expected)
    assert series(cluster.registry) <= expected
    assert set(fleet._keeping) == set(fleet._links) == expected
    fleet.picture.check()


async def test_a_worker_that_is_found_serves_and_one_that_is_gone_is_forgotten() -> None:
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        assert cluster.fleet.missing()
        cluster.start_worker("a")
        cluster.start_worker("b")
        cluster.fleet.set_found({"a", "b"})
        await cluster.connected(2)
        check_only(cluster, "ab")
        generation = a_generation(num_choices=4)
        assert [got.tokens for got in await collect(cluster, generation)] == [
            the_answer(generation, choice) for choice in range(4)
        ]
        cluster.lose("a")
        cluster.fleet.set_found({"b"})
        await until(lambda: names(cluster.fleet) == {"b"})
        check_only(cluster, "b")
        assert (await collect(cluster, a_generation(3)))[0].tokens == the_answer(a_generation(3))
        await cluster.empty()


async def test_streams_of_a_worker_that_is_not_found_any_more_finish() -> None:
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        cluster.start_worker("a")
        cluster.fleet.set_found({"a"})
        await cluster.connected(1)
        generation = a_generation(max_tokens=400)
        asking = asyncio.create_task(collect(cluster, generation))
        await until(lambda: cluster.count("sequences_outstanding", worker="a") == 1)
        cluster.fleet.set_found(set())
        (got,) = await asking
        assert got.tokens == the_answer(generation)
        # It has a session, so it is used on: that it does not stand on a list is no reason to refuse anybody.
        assert (await collect(cluster, a_generation(2)))[0].tokens == the_answer(a_generation(2))
        check_only(cluster, "a")
        cluster.lose("a")
        await until(lambda: not names(cluster.fleet))
        check_only(cluster, ())
        assert cluster.fleet.missing() == "no worker is connected"


async def test_a_worker_that_was_never_reached_is_forgotten_at_once_and_may_be_found_in_the_same_breath() -> (
    None
):
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        cluster.fleet.set_found({"a"})
        await until(lambda: cluster.transport.num_attempts > 1)
        cluster.fleet.set_found(set())
        cluster.fleet.set_found({"a"})  # before anything could be forgotten
        cluster.start_worker("a")
        await cluster.connected(1)
        check_only(cluster, "a")
        cluster.fleet.set_found(set())
        cluster.fleet.set_found({"a"})
        cluster.lose("a")
        cluster.start_worker("a", incarnation=2)
        await until(lambda: cluster.count("sessions_opened_total", worker="a") == 2)
        check_only(cluster, "a")


async def test_a_worker_that_hangs_while_it_is_connected_to_is_forgotten() -> None:
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        reached = asyncio.Event()

        class Hangs:
            async def connect(self, address: str) -> None:
                reached.set()
                await asyncio.Event().wait()

        cluster.fleet.transport = Hangs()
        cluster.fleet.set_found({"a"})
        await reached.wait()
        cluster.fleet.set_found(set())
        await until(lambda: cluster.fleet.num_known == 0)
        check_only(cluster, ())


async def test_workers_that_were_given_stay_whatever_is_found() -> None:
    async with a_cluster("a", fleet=QUICK) as cluster:
        cluster.start_worker("b")
        cluster.fleet.set_found({"a", "b"})
        await cluster.connected(2)
        cluster.fleet.set_found(set())
        cluster.lose("a")
        cluster.lose("b")
        await until(lambda: names(cluster.fleet) == {"a"})
        cluster.start_worker("a", incarnation=2)
        await cluster.connected(1)
        check_only(cluster, "a")


async def test_a_thousand_comings_and_goings_leave_no_row_label_link_or_task_behind() -> None:
    async with a_cluster("stays", fleet=QUICK) as cluster:
        num_tasks = len(asyncio.all_tasks())
        rows = len(cluster.fleet.columns.addresses)
        for turn in range(250):
            found = {f"{turn}-{number}" for number in range(4)}
            cluster.fleet.set_found(found)
            assert found <= names(cluster.fleet)
            for _ in range(turn % 5):  # some are gone before anything was done about them
                await asyncio.sleep(0)
            cluster.fleet.set_found(set())
            await until(lambda: cluster.fleet.num_known == 1)
        assert len(cluster.fleet.columns.addresses) <= rows + 8
        check_only(cluster, {"stays"})
        await until(lambda: len(asyncio.all_tasks()) == num_tasks)
        assert (await collect(cluster, a_generation(1)))[0].tokens == the_answer(a_generation(1))


async def test_comings_and_goings_of_workers_that_serve_leave_nothing_behind_either() -> None:
    async with a_cluster("stays", fleet=QUICK, seconds_max=60.0) as cluster:
        for turn in range(40):
            address = f"worker {turn}"
            cluster.start_worker(address)
            cluster.fleet.set_found({address})
            await cluster.connected(2)
            generation = a_generation(turn, num_choices=4, max_tokens=5)
            for choice, got in enumerate(await collect(cluster, generation)):
                assert got.tokens == the_answer(generation, choice)
            assert cluster.count("sequences_opened_total", worker=address) > 0
            cluster.fleet.set_found(set())
            cluster.lose(address)
            await until(lambda: cluster.fleet.num_known == 1)
        assert len(cluster.fleet.columns.addresses) == 2
        check_only(cluster, {"stays"})
        await cluster.empty()


async def test_a_decode_worker_that_is_forgotten_takes_its_credit_with_it() -> None:
    async with a_cluster(prefills=["p"], fleet=QUICK) as cluster:
        for turn in range(3):
            address = f"d{turn}"
            cluster.start_decode(address)
            cluster.fleet.set_found({address})
            await cluster.connected(2)
            assert (await collect(cluster, a_generation(turn)))[0].tokens == the_answer(a_generation(turn))
            assert cluster.fleet.credit.use_of(address) is not None
            cluster.decodes.pop(address)
            cluster.lose(address)
            cluster.fleet.set_found(set())
            await until(lambda: cluster.fleet.num_known == 1)
            assert cluster.fleet.credit.use_of(address) is None
        check_only(cluster, "p")
        await cluster.empty()


async def test_what_is_beyond_the_room_is_left_out_until_others_have_gone() -> None:
    async with a_cluster(fleet=QUICK, start=False) as cluster:
        await settle()
        assert cluster.fleet.picture.workers_max == 64
        cluster.fleet.set_found({f"{number:03}" for number in range(70)})
        assert (cluster.fleet.num_known, cluster.fleet.num_left_out) == (64, 6)
        later = {f"{number:03}" for number in range(10, 70)}
        cluster.fleet.set_found(later)
        await until(lambda: names(cluster.fleet) == later)
        assert cluster.fleet.num_left_out == 0
        check_only(cluster, later)


async def test_a_worker_of_another_model_is_refused_with_one_line_however_often_it_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with a_cluster("a", fleet=QUICK) as cluster:
        caplog.set_level(logging.INFO)
        cluster.start_worker("b", numerics="bfloat16")
        cluster.fleet.set_found({"b"})
        await until(lambda: cluster.count("sessions_lost_total", worker="b") >= 20)
        assert sum("b serves" in record.getMessage() for record in caplog.records) == 1
        cluster.fleet.set_found(set())
        await until(lambda: names(cluster.fleet) == {"a"})


async def test_a_fleet_that_ends_while_workers_come_and_go_leaves_no_task() -> None:
    num_tasks = len(asyncio.all_tasks())
    for turns in range(8):
        transport = FakeTransport({})
        fleet = Fleet(
            addresses=(),
            transport=transport,
            config=QUICK,
            metrics=FleetMetrics(CollectorRegistry()),
            router_id="router",
            randomness=random.Random(1),
        )
        running = asyncio.create_task(fleet.run())
        await asyncio.sleep(0)
        fleet.set_found({"a", "b"})
        for _ in range(turns):
            await asyncio.sleep(0)
        fleet.set_found({"b", "c"})
        running.cancel()
        await asyncio.wait({running}, timeout=5)
        assert running.cancelled()
        assert len(asyncio.all_tasks()) == num_tasks
        fleet.set_found({"d"})  # nothing begins any more
        assert len(asyncio.all_tasks()) == num_tasks


async def test_a_worker_that_has_gone_between_its_choice_and_its_use_is_as_one_that_is_full() -> None:
    async with a_cluster("a", fleet=QUICK) as cluster:
        with pytest.raises(Overloaded, match="worker b is gone"):
            cluster.fleet.open("b", None, sink=None, tag=0)

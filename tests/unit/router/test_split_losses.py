"""Workers that are lost, refuse, stop or drain while a request is split over them."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from rorqual.errors import RorqualError, WorkerLost
from rorqual.session import Credit, ErrorCode
from router.fleet import FleetConfig
from router.generation import Generation
from tests.harness.cluster import Cluster, a_cluster, a_generation, collect, settle, the_answer, until

GENERATION = a_generation(length=600)
EARLY = pytest.mark.parametrize("early", [0, 10_000])


async def at_hand_over(cluster: Cluster) -> tuple[asyncio.Task[list], str]:
    """A request whose decode worker has read everything and has not sent its first token; and that worker."""
    for worker in cluster.decodes.values():
        worker.gates.shut("first")
    asking = asyncio.create_task(collect(cluster, GENERATION))
    await until(lambda: any(worker.num_read for worker in cluster.decodes.values()))
    (address,) = [address for address, worker in cluster.decodes.items() if worker.num_read]
    return asking, address


def let_decode(cluster: Cluster) -> None:
    for worker in cluster.decodes.values():
        worker.gates.open("first")


@EARLY
async def test_a_prefill_worker_lost_before_the_first_token_costs_one_start_elsewhere(early: int) -> None:
    async with a_cluster(prefills=["p1", "p2"], decodes=["d"], bind_early_tokens=early) as cluster:
        cluster.prefills["p1"].gates.shut("token")
        asking = asyncio.create_task(collect(cluster, GENERATION))
        await until(lambda: cluster.prefills["p1"].gates.reached["token"] == 1)
        await settle()
        cluster.lose("p1")
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        assert cluster.count("sequences_retried_total") == 1
        assert cluster.prefills["p2"].opened
        await cluster.empty()


@EARLY
async def test_a_prefill_worker_that_refuses_is_not_asked_again(early: int) -> None:
    async with a_cluster(prefills=["p1", "p2"], decodes=["d"], bind_early_tokens=early) as cluster:
        cluster.prefills["p1"].refuses = ErrorCode.OVERLOADED, "the worker is full"
        (got,) = await collect(cluster, GENERATION)
        assert got.tokens == the_answer(GENERATION)
        assert [len(worker.opened) for worker in cluster.prefills.values()] == [1, 1]
        await cluster.empty()


async def test_a_prefill_worker_lost_after_the_first_token_and_before_the_state_was_read_ends_it() -> None:
    async with a_cluster(prefills=["p1", "p2"], decodes=["d"]) as cluster:
        cluster.prefills["p1"].gates.shut("record")
        async with aclosing(cluster.dispatcher.generate(GENERATION)) as updates:
            await anext(updates)
            cluster.lose("p1")
            with pytest.raises(WorkerLost, match="worker p1 was lost"):
                await anext(updates)
        assert cluster.count("sequences_lost_total") == 1
        await cluster.empty()


async def test_a_prefill_worker_lost_after_its_state_was_read_is_not_missed() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        asking, _ = await at_hand_over(cluster)
        cluster.transport.latest["p"].cut()  # its router's session ends, it goes on
        await until(lambda: len(cluster.fleet.view()) == 1 or len(cluster.transport.channels) == 3)
        let_decode(cluster)
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        await cluster.empty()


async def test_a_prefill_worker_lost_while_its_state_is_read_is_one_clear_error() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        cluster.decodes["d"].gates.shut("read")
        asking = asyncio.create_task(collect(cluster, GENERATION))
        await until(lambda: cluster.decodes["d"].gates.reached["read"] == 1)
        await settle()
        cluster.lose("p")
        await until(lambda: len(cluster.fleet.view()) == 1)
        assert not asking.done()  # it may have been read already
        cluster.decodes["d"].gates.open("read")
        with pytest.raises(WorkerLost, match=r"p does not answer, and the state is gone: worker p was lost"):
            await asking
        assert cluster.count("binds_total", kind="again") == 0
        await cluster.empty()


@EARLY
async def test_a_decode_worker_lost_while_the_prompt_is_computed_is_replaced(early: int) -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"], bind_early_tokens=early) as cluster:
        cluster.prefills["p"].gates.shut("token")
        asking = asyncio.create_task(collect(cluster, GENERATION))
        await until(lambda: cluster.prefills["p"].gates.reached["token"] == 1)
        await settle()
        assert cluster.count("credit_sequences", worker="d1") == 1
        cluster.lose("d1")
        await until(lambda: len(cluster.fleet.view()) == 2)
        assert cluster.count("credit_sequences", worker="d1") == 0
        cluster.prefills["p"].gates.open("token")
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        assert cluster.count("sequences_retried_total") == 0
        assert cluster.count("binds_total", kind="late" if early else "again") == 1
        await cluster.empty()


async def test_a_decode_worker_lost_before_its_first_token_is_replaced_by_another() -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"]) as cluster:
        asking, address = await at_hand_over(cluster)
        outstanding = {view.address: view.tokens_outstanding for view in cluster.fleet.view()}
        assert outstanding == {"p": 0, "d1": 0, "d2": 0, address: GENERATION.max_tokens - 1}
        assert cluster.prefills["p"].renewals == []
        cluster.lose(address)
        let_decode(cluster)
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        assert cluster.prefills["p"].renewals == [(1,)]  # who had renewed it may have been gone for a while
        assert cluster.count("binds_total", kind="again") == 1
        assert cluster.count("hand_over_seconds_count") == 1
        await cluster.empty()


async def test_a_decode_worker_that_comes_back_can_read_the_state_after_all() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False) as cluster:
        prefill = cluster.start_prefill("p", lease_seconds=0.6)
        cluster.start_decode("d")
        await cluster.connected(2)
        asking, _ = await at_hand_over(cluster)
        worker = cluster.transport.hosts["d"]
        num_renewals = len(prefill.renewals)
        cluster.lose("d")
        await until(lambda: len(prefill.renewals) >= num_renewals + 4)  # the lease would have ended
        let_decode(cluster)
        cluster.transport.hosts["d"] = worker
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        await cluster.empty()


async def test_a_decode_worker_is_replaced_twice_and_no_more() -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2", "d3", "d4"]) as cluster:
        asking, _ = await at_hand_over(cluster)
        for _ in range(3):
            await until(lambda: any(w.load().sequences_running for w in cluster.decodes.values()))
            next(w for w in cluster.decodes.values() if w.load().sequences_running).fail_all("a read failed")
        with pytest.raises(WorkerLost, match="a read failed"):
            await asking
        assert sorted(len(worker.opened) for worker in cluster.decodes.values()) == [0, 1, 1, 1]
        await cluster.empty()


async def test_the_only_decode_worker_is_tried_again_though_it_has_failed() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        asking, _ = await at_hand_over(cluster)
        cluster.decodes["d"].fail_all("a read failed")
        let_decode(cluster)
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        await cluster.empty()


async def test_a_decode_worker_lost_while_it_decodes_ends_the_request() -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"]) as cluster:
        for worker in cluster.decodes.values():
            worker.gates.shut("more")
        got: list[int] = []
        async with aclosing(cluster.dispatcher.generate(GENERATION)) as updates:
            while len(got) < 2:
                got += [token.token_id for token in (await anext(updates)).tokens]
            cluster.lose("d1")
            with pytest.raises(WorkerLost, match="worker d1 was lost"):
                await anext(updates)
        assert got == the_answer(GENERATION)[:2]
        assert cluster.decodes["d2"].opened == []
        await cluster.empty()


@EARLY
async def test_a_decode_worker_that_refuses_is_replaced(early: int) -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"], bind_early_tokens=early) as cluster:
        cluster.decodes["d1"].refuses = ErrorCode.OVERLOADED, "the worker is draining"
        (got,) = await collect(cluster, GENERATION)
        assert got.tokens == the_answer(GENERATION)
        assert len(cluster.decodes["d1"].opened) == 1
        await cluster.empty()


@EARLY
async def test_what_a_decode_worker_calls_wrong_is_not_tried_on_another(early: int) -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"], bind_early_tokens=early) as cluster:
        cluster.decodes["d1"].refuses = ErrorCode.INVALID, "state has another wire id"
        with pytest.raises(WorkerLost, match="another wire id"):  # no fault of the client's
            await collect(cluster, GENERATION)
        assert cluster.decodes["d2"].opened == []
        await cluster.empty()


async def test_a_decode_worker_that_starts_to_drain_is_not_bound_though_it_was_charged() -> None:
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"]) as cluster:
        cluster.prefills["p"].gates.shut("record")
        async with aclosing(cluster.dispatcher.generate(GENERATION)) as updates:
            await anext(updates)
            assert cluster.count("credit_sequences", worker="d1") == 1
            cluster.decodes["d1"].set_draining()
            await until(lambda: any(view.draining for view in cluster.fleet.view()))
            cluster.prefills["p"].gates.open("record")
            async for _ in updates:
                pass
        assert cluster.decodes["d1"].opened == []
        await cluster.empty()


@pytest.mark.parametrize("stage", ["room", "read"])
async def test_a_lease_that_expires_unread_is_one_clear_error(stage: str) -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False) as cluster:
        prefill = cluster.start_prefill("p", lease_seconds=0.3)
        decode = cluster.start_decode("d")
        decode.gates.shut(stage)
        await cluster.connected(2)
        prefill.hears_renewals = False
        asking = asyncio.create_task(collect(cluster, GENERATION))
        await until(lambda: decode.gates.reached[stage] == 1)
        await until(lambda: not prefill.leases)
        await settle()
        # One that is bound may have read it: it is waited for.
        assert asking.done() == (stage == "room")
        decode.gates.open(stage)
        with pytest.raises(WorkerLost, match="the lease of the state expired"):
            await asking
        await cluster.empty()


async def test_a_stopped_decode_worker_is_given_up_and_another_reads_the_state() -> None:
    config = FleetConfig(silence_seconds_max=0.4, backoff_seconds_min=0.005, backoff_seconds_max=0.02)
    async with a_cluster(prefills=["p"], decodes=["d1", "d2"], fleet=config) as cluster:
        asking, address = await at_hand_over(cluster)
        cluster.decodes[address].stop()
        let_decode(cluster)
        (got,) = await asking
        assert got.tokens == the_answer(GENERATION)
        assert cluster.count("stages_overdue_total", stage="report") >= 1
        cluster.decodes[address].resume()
        await cluster.empty()


async def test_a_session_that_ends_takes_its_credit_with_it_once() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        asking = [asyncio.create_task(collect(cluster, a_generation(n, max_tokens=900))) for n in range(5)]
        cluster.decodes["d"].gates.shut("more")
        await until(lambda: cluster.count("hand_over_seconds_count") == 5)
        cluster.transport.latest["d"].cut()
        for result in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(result, WorkerLost)
        cluster.decodes["d"].gates.open("more")
        await cluster.connected(2)
        await cluster.empty()


@pytest.mark.slow
async def test_a_storm_of_losses_and_closes_leaves_every_count_at_zero() -> None:
    rng = random.Random(7)
    config = FleetConfig(backoff_seconds_min=0.002, backoff_seconds_max=0.01)
    options = {"bind_early_tokens": 700, "place_seconds_max": 5.0, "hand_over_seconds_max": 5.0}
    async with a_cluster(prefills=["p1", "p2"], decodes=["d1", "d2"], fleet=config, **options) as cluster:
        for worker in cluster.decodes.values():
            worker.set_credit(Credit(sequences=4, pages=20))
        num_answered = 0

        async def one(number: int) -> None:
            nonlocal num_answered
            await asyncio.sleep(rng.random())
            generation: Generation = a_generation(
                number,
                length=rng.choice([5, 256, 600, 1500]),
                max_tokens=rng.randint(1, 100),
                num_choices=rng.choice([1, 1, 2]),
                ignore_eos=rng.random() < 0.5,
            )
            leaves_after = rng.randint(0, 20) if rng.random() < 0.3 else None
            got: list[list[int]] = [[] for _ in range(generation.num_choices)]
            try:
                async with aclosing(cluster.dispatcher.generate(generation)) as updates:
                    async for update in updates:
                        assert update.first_index == len(got[update.choice])
                        got[update.choice] += [token.token_id for token in update.tokens]
                        if leaves_after is not None and len(got[0]) >= leaves_after:
                            return
            except RorqualError:
                for choice, tokens in enumerate(got):
                    assert tokens == the_answer(generation, choice)[: len(tokens)]
                return
            assert got == [the_answer(generation, choice) for choice in range(generation.num_choices)]
            num_answered += 1

        async def break_things() -> None:
            while True:
                await asyncio.sleep(0.05)
                match rng.randrange(3):
                    case 0:
                        cluster.transport.latest[rng.choice(["p1", "p2", "d1", "d2"])].cut()
                    case 1:
                        cluster.decodes[rng.choice(["d1", "d2"])].fail_all("a read failed")
                    case _:
                        cluster.prefills[rng.choice(["p1", "p2"])].fail_all("a step failed")

        breaking = asyncio.create_task(break_things())
        async with asyncio.TaskGroup() as tasks:
            for number in range(150):
                tasks.create_task(one(number))
        breaking.cancel()
        await asyncio.gather(breaking, return_exceptions=True)
        assert num_answered >= 30
        await cluster.connected(4)
        await cluster.empty()

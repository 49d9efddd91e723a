"""Requests split over fake prefill and decode workers: one stream to the client, and nothing left open anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from fake_state import EOS, logprob_of

from rorqual.errors import StageTimedOut
from rorqual.session import FinishReason, Open, Role, Take, credit_pages
from router.generation import ChoiceUpdate
from tests.harness.cluster import (
    Cluster,
    a_cluster,
    a_generation,
    collect,
    letters,
    settle,
    the_answer,
    until,
)

STAGES = {"prompt": "p", "token": "p", "record": "p", "room": "d", "read": "d", "first": "d", "more": "d"}


def shut(cluster: Cluster, stage: str) -> None:
    workers = cluster.prefills if STAGES[stage] == "p" else cluster.decodes
    for worker in workers.values():
        worker.gates.shut(stage)


def lift(cluster: Cluster, stage: str) -> None:
    workers = cluster.prefills if STAGES[stage] == "p" else cluster.decodes
    for worker in workers.values():
        worker.gates.open(stage)


async def reach(cluster: Cluster, stage: str, number: int = 1) -> None:
    """Until so many sequences have come to the stage, and all else that follows has happened."""
    workers = cluster.prefills if STAGES[stage] == "p" else cluster.decodes
    await until(lambda: sum(worker.gates.reached[stage] for worker in workers.values()) >= number)
    await settle()


async def first_of(updates: AsyncGenerator[ChoiceUpdate, None]) -> int:
    update = await anext(updates)
    return update.tokens[0].token_id


@pytest.mark.parametrize("length", [5, 256, 700, 1536])
@pytest.mark.parametrize("early", [0, 10_000])
async def test_a_split_request_is_one_stream(length: int, early: int) -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], bind_early_tokens=early) as cluster:
        generation = a_generation(length=length)
        (got,) = await collect(cluster, generation)
        assert got.tokens == the_answer(generation)
        assert got.text == letters(got.tokens)
        assert got.finish_reason is FinishReason.LENGTH
        await cluster.empty()
        assert cluster.count("binds_total", kind="late" if early else "early") == 1
        assert cluster.count("sequences_placed_total", kind="split") == 1
        assert cluster.count("hand_over_seconds_count") == 1


async def test_choices_are_split_over_all_workers_and_get_their_own_answers() -> None:
    async with a_cluster(prefills=["p1", "p2"], decodes=["d1", "d2"]) as cluster:
        generation = a_generation(length=300, num_choices=8)
        for choice, got in enumerate(await collect(cluster, generation)):
            assert got.tokens == the_answer(generation, choice)
        await cluster.empty()
        for address in ("p1", "p2", "d1", "d2"):
            assert cluster.count("sequences_opened_total", worker=address) == 4


async def test_scores_come_once_from_the_prefill_worker_and_logprobs_from_both() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        generation = a_generation(length=600, logprobs=0, prompt_logprobs=0, max_tokens=6)
        (got,) = await collect(cluster, generation)
        scores = got.updates[0].prompt_logprobs
        assert scores is not None
        assert len(scores.logprobs) == 599
        logprobs = [token.logprob for update in got.updates for token in update.tokens]
        assert logprobs == [logprob_of(token, 600 + index) for index, token in enumerate(got.tokens)]


async def test_the_decode_worker_is_told_where_the_state_is_and_the_first_token() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        generation = a_generation(length=1100)
        await collect(cluster, generation)
        sent = cluster.transport.latest["d"].sent
        (opened,) = [command for command in sent if isinstance(command, Open)]
        assert opened.source is not None
        assert (opened.source.address, opened.source.wire_id) == ("p", "fake-wire")
        assert (opened.max_tokens, opened.sampling.choice) == (generation.max_tokens, 0)
        takes = [command for command in sent if isinstance(command, Take)]
        assert [len(take.offer.pages) for take in takes] == [2, 2, 0]
        assert [take.token_ids for take in takes] == [(), (), (the_answer(generation)[0],)]


@pytest.mark.parametrize("early", [0, 10_000])
async def test_a_decode_worker_is_bound_while_a_long_prompt_is_computed_and_after_a_short_one(
    early: int,
) -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], bind_early_tokens=early) as cluster:
        shut(cluster, "token")
        asking = asyncio.create_task(collect(cluster, a_generation(length=700)))
        await reach(cluster, "token")
        (prefill,) = [view for view in cluster.fleet.view() if view.address == "p"]
        assert prefill.prompt_tokens_outstanding == 700 - 512  # two pages have been offered
        assert cluster.decodes["d"].load().sequences_running == (1 if early == 0 else 0)
        lift(cluster, "token")
        (got,) = await asking
        assert got.tokens == the_answer(a_generation(length=700))


async def test_a_stopped_decode_worker_does_not_delay_the_first_token() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        cluster.decodes["d"].stop()
        generation = a_generation()
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            async with asyncio.timeout(5):
                token = await first_of(updates)
            tokens = [token]
            cluster.decodes["d"].resume()
            tokens += [token.token_id async for update in updates for token in update.tokens]
        assert tokens == the_answer(generation)
        await cluster.empty()


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
@pytest.mark.parametrize("early", [0, 10_000])
async def test_a_sequence_that_ends_with_its_first_token_leaves_no_decode_worker_bound(
    reason: FinishReason, early: int
) -> None:
    if reason is FinishReason.LENGTH:
        generation = a_generation(length=300, max_tokens=1)
    else:
        options = {"length": 300, "ignore_eos": False}
        seed = next(s for s in range(9999) if the_answer(a_generation(s, **options))[0] == EOS)
        generation = a_generation(seed, **options)
    async with a_cluster(prefills=["p"], decodes=["d"], start=False, bind_early_tokens=early) as cluster:
        cluster.start_prefill("p", lease_seconds=0.06)
        cluster.start_decode("d")
        await cluster.connected(2)
        (got,) = await collect(cluster, generation)
        assert got.tokens == the_answer(generation)
        assert len(got.tokens) == 1
        assert got.finish_reason is reason
        await cluster.empty()
        assert cluster.decodes["d"].num_read == 0
        num_renewals = len(cluster.prefills["p"].renewals)
        await asyncio.sleep(0.1)
        assert len(cluster.prefills["p"].renewals) == num_renewals


async def test_a_stop_string_ends_the_sequence_on_its_decode_worker() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        generation = a_generation(max_tokens=3000)
        stop = letters(the_answer(generation))[7:10]
        cluster.prefills["p"].gates.shut("handed_over")
        (got,) = await collect(cluster, a_generation(max_tokens=3000, stop=(stop,)))
        assert got.finish_reason is FinishReason.STOP
        await until(lambda: cluster.decodes["d"].cancelled == [1])
        # The prefill worker hears from the reader, and is not told to give up what it has handed over.
        cluster.prefills["p"].gates.open("handed_over")
        await cluster.empty()
        assert cluster.prefills["p"].cancelled == []


async def test_an_answer_of_two_tokens_leaves_the_prefill_worker_to_its_reader() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"]) as cluster:
        cluster.prefills["p"].gates.shut("handed_over")
        (got,) = await collect(cluster, a_generation(max_tokens=2))
        assert len(got.tokens) == 2
        assert cluster.count("hand_over_seconds_count") == 1
        cluster.prefills["p"].gates.open("handed_over")
        await cluster.empty()
        assert cluster.prefills["p"].cancelled == []


@pytest.mark.parametrize("early", [0, 10_000])
@pytest.mark.parametrize("stage", STAGES)
async def test_closing_the_request_at_any_stage_leaves_nothing_open(stage: str, early: int) -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], bind_early_tokens=early) as cluster:
        shut(cluster, stage)
        asking = asyncio.create_task(
            collect(cluster, a_generation(length=600, max_tokens=900, num_choices=2))
        )
        await reach(cluster, stage, 2)
        assert cluster.count("credit_sequences", worker="d") == 2
        assert cluster.count("credit_pages", worker="d") == 2 * credit_pages(600)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await settle()
        assert cluster.prefills["p"].cancelled == ([] if stage == "more" else [1, 2])
        lift(cluster, stage)
        await cluster.empty()
        (got,) = await collect(cluster, a_generation())
        assert got.tokens == the_answer(a_generation())


async def test_a_client_that_reads_too_slowly_loses_both_sequences() -> None:
    async with (
        a_cluster(prefills=["p"], decodes=["d"], values_unread_max=50) as cluster,
        aclosing(cluster.dispatcher.generate(a_generation(max_tokens=3000))) as updates,
    ):
        await anext(updates)
        await cluster.empty()
        assert cluster.count("sequences_unread_total") == 1
        with pytest.raises(StageTimedOut, match="reads too slowly"):
            await anext(updates)


@pytest.mark.slow
async def test_leases_are_renewed_together_until_the_decode_worker_is_bound() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False) as cluster:
        prefill = cluster.start_prefill("p", lease_seconds=0.6)
        cluster.start_decode("d")
        await cluster.connected(2)
        shut(cluster, "room")
        shut(cluster, "first")
        generation = a_generation(length=300, num_choices=3)
        asking = asyncio.create_task(collect(cluster, generation))
        await until(lambda: len(prefill.renewals) >= 4)  # by then the lease would have ended
        await settle()
        assert set(prefill.renewals[1:]) == {(1, 2, 3)}
        assert cluster.count("leases_renewed_total") == sum(len(ids) for ids in prefill.renewals)
        lift(cluster, "room")
        await until(lambda: cluster.decodes["d"].num_read == 3)
        await settle()
        num_renewals = len(prefill.renewals)
        await asyncio.sleep(0.25)
        assert len(prefill.renewals) == num_renewals
        lift(cluster, "first")
        for choice, got in enumerate(await asking):
            assert got.tokens == the_answer(generation, choice)
        await cluster.empty()


async def test_the_hand_over_has_a_deadline() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], hand_over_seconds_max=0.1) as cluster:
        cluster.decodes["d"].stop()
        async with aclosing(cluster.dispatcher.generate(a_generation())) as updates:
            await anext(updates)
            with pytest.raises(StageTimedOut, match="no decode worker went on"):
                await anext(updates)
        assert cluster.count("stages_overdue_total", stage="hand_over") == 1
        cluster.decodes["d"].resume()
        await cluster.empty()


async def test_after_the_hand_over_the_next_token_has_a_deadline_of_its_own() -> None:
    stages = {"hand_over_seconds_max": 30, "next_token_seconds_max": 0.1}
    async with a_cluster(prefills=["p"], decodes=["d"], **stages) as cluster:
        shut(cluster, "more")
        with pytest.raises(StageTimedOut, match="token 2"):
            await collect(cluster, a_generation())
        assert cluster.count("stages_overdue_total", stage="next_token") == 1


async def test_workers_whose_state_is_not_alike_are_kept_out() -> None:
    async with a_cluster("b", prefills=["p"], decodes=["d"], start=False) as cluster:
        cluster.start_worker("b")
        cluster.start_prefill("p")
        await cluster.connected(2)
        cluster.start_decode("d", wire_id="another")
        await until(lambda: bool(cluster.fleet.failures()) and "wire id" in cluster.fleet.failures()[0])
        assert "--drafts" in cluster.fleet.failures()[0]
        assert {view.role for view in cluster.fleet.view()} == {Role.BOTH, Role.PREFILL}


async def test_a_decode_worker_without_credit_to_speak_of_is_kept_out() -> None:
    async with a_cluster(decodes=["d"], start=False) as cluster:
        cluster.start_decode("d").credit = None
        await until(lambda: bool(cluster.fleet.failures()) and "no credit" in cluster.fleet.failures()[0])


async def test_there_is_no_model_until_workers_can_serve_a_request_between_them() -> None:
    async with a_cluster(prefills=["p"], decodes=["d"], start=False) as cluster:
        assert cluster.fleet.missing() == "no worker is connected"
        cluster.start_prefill("p")
        await cluster.connected(1)
        assert cluster.dispatcher.model() is None
        assert cluster.fleet.missing() == "no decode worker is connected"
        cluster.start_decode("d")
        await cluster.connected(2)
        assert cluster.dispatcher.model() is not None
        cluster.lose("p")
        await until(lambda: cluster.fleet.missing() == "no prefill worker is connected")
        assert cluster.dispatcher.model() is None

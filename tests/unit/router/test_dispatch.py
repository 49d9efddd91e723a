"""The dispatcher and its fleet against real hosts in the same process: answers, bounds, and nothing left open."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest
from fake_state import EOS, VOCAB_SIZE, logprob_of

from rorqual.errors import InvalidRequest, Overloaded, StageTimedOut
from rorqual.session import (
    FinishReason,
)
from router.fleet import FleetConfig
from router.generation import Generation
from tests.harness.cluster import (
    Got,
    a_cluster,
    a_generation,
    collect,
    letters,
    the_answer,
    until,
)


async def test_choices_get_their_own_answers_as_numbered_tokens_and_text() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(num_choices=5)
        for choice, got in enumerate(await collect(cluster, generation)):
            assert got.tokens == the_answer(generation, choice)
            assert got.text == letters(got.tokens)
            assert got.finish_reason is FinishReason.LENGTH
        await cluster.empty()


async def test_the_end_token_finishes_a_choice_and_is_no_text() -> None:
    seed = next(s for s in range(999) if 2 < len(the_answer(a_generation(s, ignore_eos=False))) < 15)
    async with a_cluster("a") as cluster:
        (got,) = await collect(cluster, a_generation(seed, ignore_eos=False))
        assert got.tokens[-1] == EOS
        assert got.finish_reason is FinishReason.STOP
        assert got.text == letters(got.tokens)


async def test_logprobs_come_with_their_tokens_and_prompt_logprobs_with_the_first() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(logprobs=2, prompt_logprobs=0)
        (got,) = await collect(cluster, generation)
        first = got.updates[0]
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs.logprobs) == 4
        assert first.tokens[0].logprob == logprob_of(first.tokens[0].token_id, 5)
        assert first.tokens[0].alternatives == ((0, 0.0), (1, -1.0))


async def test_a_stop_string_ends_the_choice_and_cancels_the_sequence_at_once() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(max_tokens=3000)
        expected = letters(the_answer(generation))
        stop = expected[7:10]
        cut = expected.index(stop)
        (got,) = await collect(cluster, a_generation(max_tokens=3000, stop=(stop,)))
        assert got.text == expected[:cut]
        assert got.finish_reason is FinishReason.STOP
        assert got.tokens == the_answer(generation)[: cut + 3]
        await cluster.empty()
        assert cluster.links["a"].rank.num_tokens_computed < 200
        assert cluster.count("sequences_cancelled_total") == 1


async def test_a_stopped_choice_is_cancelled_while_others_go_on() -> None:
    async with a_cluster("a") as cluster:
        generation = a_generation(max_tokens=1000, num_choices=2)
        texts = [letters(the_answer(generation, choice)) for choice in range(2)]
        stop = next(texts[0][i : i + 4] for i in range(50) if texts[0][i : i + 4] not in texts[1])
        generation = a_generation(max_tokens=1000, num_choices=2, stop=(stop,))
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            async for update in updates:
                if update.finish_reason is FinishReason.STOP:
                    assert update.choice == 0
                    assert cluster.count("sequences_outstanding", worker="a") == 1
                elif update.finish_reason is not None:
                    assert update.choice == 1
        assert cluster.count("sequences_cancelled_total") == 1


async def test_closing_the_generator_early_cancels_every_choice() -> None:
    async with a_cluster("a", "b") as cluster:
        generation = a_generation(max_tokens=3000, num_choices=4)
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            await anext(updates)
        await cluster.empty()
        assert cluster.count("sequences_cancelled_total") == 4
        assert sum(link.rank.num_tokens_computed for link in cluster.links.values()) < 400


async def test_sequences_spread_over_workers_by_outstanding_tokens() -> None:
    async with a_cluster("a", "b") as cluster:
        await collect(cluster, a_generation(num_choices=8))
        opened = [cluster.count("sequences_opened_total", worker=address) for address in ("a", "b")]
        assert opened == [4, 4]


async def test_the_model_is_what_every_connected_worker_can_serve() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        assert cluster.dispatcher.model() is None
        cluster.start_worker("a", num_pages=16)
        cluster.start_worker("b", num_pages=4)
        await cluster.connected(2)
        model = cluster.dispatcher.model()
        assert model is not None
        assert (model.name, model.created, model.vocab_size) == ("fake", 5, VOCAB_SIZE)
        assert model.sequence_tokens_max == 1024
        assert model.eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        (a_generation(length=0), "prompt"),
        (a_generation(length=5000), "prompt"),
        (a_generation(max_tokens=0), "max_tokens"),
        (a_generation(max_tokens=4095), "max_tokens"),
        (a_generation(num_choices=0), "n"),
        (a_generation(top_k=-1), "top_k"),
        (a_generation(length=4000, prompt_logprobs=20, num_choices=4), "logprobs"),
        (a_generation(stop=("",)), "stop"),
    ],
)
async def test_a_request_nobody_can_serve_is_refused_by_field_before_it_is_sent(
    generation: Generation, field: str
) -> None:
    async with a_cluster("a") as cluster:
        with pytest.raises(InvalidRequest) as caught:
            await collect(cluster, generation)
        assert caught.value.field == field
        assert cluster.count("sequences_opened_total", worker="a") == 0


async def test_a_request_waits_a_while_for_a_worker_to_connect() -> None:
    async with a_cluster("a", start=False, place_seconds_max=10) as cluster:
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await asyncio.sleep(0.02)
        cluster.start_worker("a")
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_the_place_deadline_is_over_once_a_worker_has_been_found() -> None:
    async with a_cluster("a", start=False, place_seconds_max=0.2) as cluster:
        asking = asyncio.create_task(collect(cluster, a_generation()))
        await asyncio.sleep(0.02)
        cluster.start_worker("a")
        cluster.links["a"].gate.clear()
        await asyncio.sleep(0.3)
        cluster.links["a"].gate.set()
        (got,) = await asking
        assert got.tokens == the_answer(a_generation())


async def test_without_any_worker_the_place_deadline_says_so() -> None:
    async with a_cluster("a", start=False, place_seconds_max=0.02) as cluster:
        with pytest.raises(Overloaded, match="no worker is connected"):
            await collect(cluster, a_generation())
        assert cluster.count("stages_overdue_total", stage="place") == 1


async def test_when_every_worker_is_full_the_request_is_refused_at_once() -> None:
    config = FleetConfig(sequences_per_worker_max=2)
    async with a_cluster("a", fleet=config) as cluster:
        with pytest.raises(Overloaded, match="every worker is full"):
            await collect(cluster, a_generation(num_choices=3))
        assert cluster.count("requests_overloaded_total") == 1
        await cluster.empty()


async def test_a_worker_that_says_it_is_full_is_believed_at_once_where_there_is_no_other() -> None:
    async with a_cluster("a", start=False, place_seconds_max=60) as cluster:
        cluster.start_worker("a", num_slots=1, sequences_waiting_max=1)
        await cluster.connected(1)
        cluster.links["a"].gate.clear()
        with pytest.raises(Overloaded, match="are waiting already"):
            await collect(cluster, a_generation(num_choices=4))
        assert cluster.count("requests_overloaded_total") == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_a_worker_that_says_it_is_full_costs_a_retry_where_there_is_another() -> None:
    async with a_cluster("a", "b", start=False) as cluster:
        cluster.start_worker("a", num_slots=1, sequences_waiting_max=1)
        cluster.start_worker("b")
        await cluster.connected(2)
        for link in cluster.links.values():
            link.gate.clear()
        asking: list[tuple[Generation, asyncio.Task[list[Got]]]] = []
        # The long one keeps b the busier of the two: the short ones all go to a first.
        for number, max_tokens in ((1, 20), (2, 3000), (3, 20), (4, 20)):
            generation = a_generation(number, max_tokens=max_tokens)
            asking.append((generation, asyncio.create_task(collect(cluster, generation))))
            await asyncio.sleep(0.01)
        assert cluster.count("sequences_opened_total", worker="a") == 3
        assert cluster.count("sequences_retried_total") == 1
        for link in cluster.links.values():
            link.gate.set()
        for generation, task in asking:
            (got,) = await task
            assert got.tokens == the_answer(generation)


async def test_other_choices_go_on_while_one_waits_for_a_worker_to_come_back() -> None:
    async with a_cluster("a", "b", place_seconds_max=60) as cluster:
        cluster.links["b"].gate.clear()
        generation = a_generation(max_tokens=100, num_choices=2)
        numbers: list[tuple[int, int]] = []
        draining: asyncio.Task[bool] | None = None
        async with aclosing(cluster.dispatcher.generate(generation)) as updates:
            await until(lambda: len(cluster.transport.channels) == 2)
            async for update in updates:
                numbers += [(update.choice, token.token_id) for token in update.tokens]
                if draining is None:
                    # The other choice's worker is gone, and this one has no room for it.
                    view = next(view for view in cluster.fleet.view() if view.address == "a")
                    assert view.sequences_outstanding == 1
                    host = cluster.transport.hosts.pop("b")
                    draining = asyncio.create_task(cluster.transport.hosts["a"].drain(seconds_max=30))
                    await until(lambda: any(view.draining for view in cluster.fleet.view()))
                    cluster.transport.channels[1].cut()
                if update.choice == 0 and update.finish_reason is not None:
                    break
            assert [token for choice, token in numbers if choice == 0] == the_answer(generation, 0)
            assert draining is not None
            assert await draining
            cluster.links["b"].gate.set()
            cluster.transport.hosts["b"] = host
            async for update in updates:
                numbers += [(update.choice, token.token_id) for token in update.tokens]
        assert [token for choice, token in numbers if choice == 1] == the_answer(generation, 1)
        assert cluster.count("sequences_retried_total") == 1


async def test_a_client_that_reads_too_slowly_ends_its_own_request_and_no_other() -> None:
    async with a_cluster("a", values_unread_max=500) as cluster:
        slow = a_generation(1, max_tokens=3000, num_choices=2, logprobs=20)
        async with aclosing(cluster.dispatcher.generate(slow)) as updates:
            await anext(updates)
            (got,) = await collect(cluster, a_generation(2, max_tokens=200))
            assert got.tokens == the_answer(a_generation(2, max_tokens=200))
            # Both of its sequences are gone from the worker though nobody asks for their tokens.
            await cluster.empty()
            assert cluster.count("sequences_unread_total") == 2
            with pytest.raises(StageTimedOut, match="reads too slowly"):
                async for _ in updates:
                    pass
        assert cluster.links["a"].rank.num_tokens_computed < 600


async def test_scores_of_a_long_prompt_do_not_count_against_a_slow_client() -> None:
    async with a_cluster("a", values_unread_max=20) as cluster:
        generation = a_generation(length=3000, max_tokens=5, prompt_logprobs=3)
        (got,) = await collect(cluster, generation)
        scores = got.updates[0].prompt_logprobs
        assert scores is not None
        prompt = generation.prompt.tolist()
        assert scores.logprobs == tuple(logprob_of(prompt[index], index) for index in range(1, 3000))
        assert len(scores.alternatives) == 2999
        assert [update.prompt_logprobs for update in got.updates[1:]] == [None] * (len(got.updates) - 1)


async def test_scores_of_a_lost_attempt_do_not_mix_with_those_of_the_next() -> None:
    async with a_cluster("a", "b") as cluster:
        link = cluster.links["a"]
        generation = a_generation(length=2000, max_tokens=3, prompt_logprobs=0)
        step = link.rank.step

        def step_once(plan: object) -> object:
            link.gate.clear()
            return step(plan)

        link.rank.step = step_once
        asking = asyncio.create_task(collect(cluster, generation))
        await until(lambda: link.rank.num_steps == 1)
        await asyncio.sleep(0.02)
        cluster.transport.channels[0].cut()
        (got,) = await asking
        scores = got.updates[0].prompt_logprobs
        assert scores is not None
        prompt = generation.prompt.tolist()
        assert scores.logprobs == tuple(logprob_of(prompt[index], index) for index in range(1, 2000))
        assert cluster.count("sequences_retried_total") == 1


@pytest.mark.parametrize(("stage", "num_tokens"), [("first_token", 0), ("next_token", 1)])
async def test_a_stage_that_outlives_its_deadline_ends_the_request_and_is_counted(
    stage: str, num_tokens: int
) -> None:
    stages = {"first_token_seconds_max": 60.0, "next_token_seconds_max": 60.0, f"{stage}_seconds_max": 0.05}
    async with a_cluster("a", **stages) as cluster:
        if not num_tokens:
            cluster.links["a"].gate.clear()
        async with aclosing(cluster.dispatcher.generate(a_generation(max_tokens=3000))) as updates:
            if num_tokens:
                await anext(updates)
                cluster.links["a"].gate.clear()
            with pytest.raises(StageTimedOut, match="did not come in time"):
                async for _ in updates:
                    pass
        assert cluster.count("stages_overdue_total", stage=stage) == 1
        cluster.links["a"].gate.set()
        await cluster.empty()


async def test_two_hundred_mixed_requests_with_random_closes_leave_nothing_behind() -> None:
    rng = random.Random(5)
    async with a_cluster("a", "b", start=False) as cluster:
        for address in ("a", "b"):
            cluster.start_worker(address, num_pages=8, num_slots=4)
        await cluster.connected(2)

        async def one(number: int) -> None:
            generation = a_generation(
                number,
                length=rng.randint(1, 600),
                max_tokens=rng.randint(1, 150),
                num_choices=rng.choice([1, 1, 3]),
                ignore_eos=rng.random() < 0.5,
            )
            leaves_after = rng.randint(0, 20) if rng.random() < 0.3 else None
            got = [[] for _ in range(generation.num_choices)]
            async with aclosing(cluster.dispatcher.generate(generation)) as updates:
                async for update in updates:
                    got[update.choice] += [token.token_id for token in update.tokens]
                    if leaves_after is not None and len(got[0]) >= leaves_after:
                        return
            assert got == [the_answer(generation, choice) for choice in range(generation.num_choices)]

        async with asyncio.TaskGroup() as tasks:
            for number in range(200):
                tasks.create_task(one(number))
        await cluster.empty()


async def test_how_much_of_a_prompt_was_kept_comes_with_its_first_token() -> None:
    async with a_cluster("a") as cluster:
        for cached in (0, 256):  # of three pages: without a record for a tail two are replayed
            (got,) = await collect(cluster, a_generation(length=800, max_tokens=5))
            assert [update.cached_tokens for update in got.updates] == [cached] + [0] * (len(got.updates) - 1)
        (got,) = await collect(cluster, a_generation(length=800, max_tokens=5, cache_salt="other"))
        assert got.updates[0].cached_tokens == 0

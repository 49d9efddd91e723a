"""Conversations over workers that keep prefixes: turns go where their history is, salts share nothing, promises end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from kvstore.store.contract import StoreKey
from rorqual.errors import StageTimedOut
from rorqual.model_config import PAGE_TOKENS
from router.fleet_metrics import StoreMetrics
from router.generation import Generation
from router.stored import StoreKnowledge
from tests.harness.cluster import Cluster, a_cluster, a_generation, collect, the_answer, until


async def a_keeping_cluster(cluster: Cluster, *addresses: str) -> None:
    for address in addresses:
        cluster.start_worker(address, num_pages=64, num_slots=8, num_records=12)
    await cluster.connected(len(addresses))
    await until(lambda: all(cluster.fleet.link(a).feed.reader.number is not None for a in addresses))


def a_turn(history: list[int], number: int, **options: Any) -> Generation:
    generation = a_generation(number, max_tokens=20, **options)
    prompt = np.array([*history, *generation.prompt.tolist()], dtype=np.int32)
    return Generation(
        request_id=generation.request_id,
        prompt=prompt,
        max_tokens=20,
        num_choices=1,
        sampling=generation.sampling,
        ignore_eos=True,
        **{name: options[name] for name in ("cache_salt", "session_key") if name in options},
    )


async def a_conversation(cluster: Cluster, seed: int, *, num_turns: int, **options: Any) -> list[int]:
    """Cached tokens of each turn; every answer is checked."""
    history: list[int] = [seed % 90] * 300
    cached: list[int] = []
    for turn in range(num_turns):
        generation = a_turn(history, seed * 100 + turn, length=200 + 7 * seed, **options)
        (got,) = await collect(cluster, generation)
        assert got.tokens == the_answer(generation)
        cached.append(got.updates[0].cached_tokens)
        # All that is cached of the turn before can be used, and its answer's last token was never computed.
        if turn:
            assert cached[-1] >= (len(history) - 21) // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
        history = [*generation.prompt.tolist(), *got.tokens]
    return cached


async def test_every_turn_of_interleaved_conversations_goes_to_the_worker_that_has_the_last_one() -> None:
    async with a_cluster("a", "b", start=False, placement="rorqual") as cluster:
        await a_keeping_cluster(cluster, "a", "b")
        cached = await asyncio.gather(*(a_conversation(cluster, seed, num_turns=4) for seed in range(1, 6)))
        assert all(turns[0] == 0 and turns[-1] >= 3 * PAGE_TOKENS for turns in cached)
        opened = [cluster.count("sequences_opened_total", worker=address) for address in ("a", "b")]
        assert min(opened) >= 4  # and not all of them to one


async def test_least_wait_sends_turns_anywhere_which_is_what_the_test_above_sees() -> None:
    async with a_cluster("a", "b", start=False, placement="round_robin") as cluster:
        await a_keeping_cluster(cluster, "a", "b")
        history = [5] * 600
        first = a_turn(history, 1)
        await collect(cluster, first)
        (got,) = await collect(cluster, a_turn(history, 2))
        assert got.updates[0].cached_tokens == 0


async def test_equal_prompts_under_two_salts_share_nothing() -> None:
    async with a_cluster("a", start=False, placement="rorqual") as cluster:
        await a_keeping_cluster(cluster, "a")
        cached = []
        for salt in ("one", "one", "two", "two"):
            (got,) = await collect(cluster, a_turn([7] * 800, 1, cache_salt=salt))
            cached.append(got.updates[0].cached_tokens)
        assert cached == [0, 768, 0, 768]


async def test_a_prompt_that_ends_without_a_token_is_promised_no_longer() -> None:
    async with a_cluster("a", start=False, placement="rorqual", first_token_seconds_max=0.2) as cluster:
        await a_keeping_cluster(cluster, "a")
        cluster.links["a"].gate.clear()
        policy = cluster.dispatcher._placement.placement._policy  # pyright: ignore
        closing = cluster.dispatcher.generate(a_turn([7] * 800, 1))
        waiting = asyncio.create_task(anext(closing))
        await until(lambda: len(policy._promises) == 1)
        with suppress(StageTimedOut):
            await waiting
        assert len(policy._promises) == 0
        cluster.links["a"].gate.set()
        await cluster.empty()


class Slow:
    """A store that has everything and says so when told to."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.num_asked = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def find(
        self, wire_id: str, keys: Sequence[StoreKey], *, budget_seconds: float
    ) -> list[bool] | None:
        self.num_asked += 1
        await asyncio.sleep(min(self.seconds, budget_seconds))
        return None if self.seconds >= budget_seconds else [True for _ in keys]


@pytest.mark.parametrize(("seconds", "reused"), [(0.0, 7 * PAGE_TOKENS), (60.0, 0)])
async def test_what_a_store_has_is_predicted_to_be_read_and_a_slow_one_is_not_waited_for(
    seconds: float, reused: int
) -> None:
    async with a_cluster("a", start=False, placement="rorqual") as cluster:
        await a_keeping_cluster(cluster, "a")
        finder = Slow(seconds)
        cluster.dispatcher.store = StoreKnowledge(
            finder, caches=cluster.fleet.picture, rebuild_pages=2, metrics=StoreMetrics(CollectorRegistry())
        )
        policy = cluster.dispatcher._placement.placement._policy  # pyright: ignore
        decided = []
        choose = policy.choose
        policy.choose = lambda *args: decided.append(choose(*args)) or decided[-1]
        generation = a_turn([7] * 1700, 1, length=200)
        began = asyncio.get_running_loop().time()
        (got,) = await collect(cluster, generation)
        assert asyncio.get_running_loop().time() - began < 10
        assert got.tokens == the_answer(generation)
        assert decided[0].resume * PAGE_TOKENS == reused
        num_asked = finder.num_asked
        await collect(cluster, generation)
        assert finder.num_asked == num_asked, "the fleet has it now"

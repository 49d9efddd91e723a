"""Whatever is asked of two workers with one store, and however that store behaves, answers are right, every value is
what its key stands for, and nothing is left."""

from __future__ import annotations

import asyncio
import random

import pytest
from fake_state import PAGE_TOKENS
from fake_store import FakeStore
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.store.contract import WritePolicy
from tests.harness.benches import a_related_prompt
from tests.harness.storing import Asked, StoringWorker, a_worker, check_values
from tests.harness.virtual import VirtualLoop

pytestmark = pytest.mark.slow

SALTS = ("", "", "other")

lengths = st.one_of(st.integers(1, 1600), st.sampled_from([255, 256, 257, 512, 1024, 1025]))
seconds = st.sampled_from([0.0005, 0.004, 0.03, 0.2, 3.0])
moves = st.one_of(
    st.tuples(st.just("ask"), st.tuples(st.integers(0, 1), st.integers(0, 11), lengths, st.integers(1, 40))),
    st.tuples(st.just("ask"), st.tuples(st.integers(0, 1), st.integers(0, 11), lengths, st.integers(1, 300))),
    st.tuples(st.just("again"), st.tuples(st.integers(0, 1), st.integers(0, 30))),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.sampled_from([0.0005, 0.0015, 0.02, 0.1, 0.35, 5.0, 60.0])),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 5.0, 60.0])),
    st.tuples(st.sampled_from(["answers after", "values after"]), seconds),
    st.tuples(st.sampled_from(["frozen", "full"]), st.booleans()),
    st.tuples(st.just("lose"), st.integers(0, 30)),
)
workers = st.fixed_dictionaries(
    {
        "num_pages": st.integers(9, 16),
        "num_slots": st.integers(1, 4),
        "num_records": st.integers(1, 6),
        "num_host_pages": st.integers(1, 20),
        "num_host_records": st.integers(0, 6),
        "writes": st.sampled_from([*WritePolicy, WritePolicy.AT_TURN_END]),
        "reads_max": st.integers(1, 4),
        "read_bytes": st.sampled_from([1, 5000, 1 << 20]),
        "turn_bytes_max": st.sampled_from([1, 5000, 1 << 20]),
        "budget_seconds": st.sampled_from([0.001, 0.02, 1.0]),
        "late_seconds": st.sampled_from([0.01, 1.0]),
    }
)


class Storm:
    def __init__(self, store: FakeStore, first: StoringWorker, second: StoringWorker) -> None:
        self.store = store
        self.workers = first, second
        self.asked: list[Asked] = []
        self.asking: list[asyncio.Task[object]] = []

    async def move(self, name: str, value) -> None:
        match name:
            case "ask":
                where, family, length, max_tokens = value
                asked = Asked(
                    prompt=tuple(a_related_prompt(family, length)),
                    max_tokens=max_tokens,
                    salt=SALTS[family % len(SALTS)],
                )
                self.ask(where, asked)
            case "again" if self.asked:
                self.ask(value[0], self.asked[value[1] % len(self.asked)])
            case "cancel" if self.asking:
                self.asking[value % len(self.asking)].cancel()
            case "wait":
                await asyncio.sleep(value)
            case "answers after":
                self.store.seconds = value
            case "values after":
                self.store.read_seconds = value
            case "frozen":
                self.store.is_frozen = value
            case "full":
                self.store.is_full = value
            case "lose" if self.store.values:
                keys = list(self.store.values)
                self.store.delete(keys[value % len(keys) :][:2])

    def ask(self, where: int, asked: Asked) -> None:
        self.asked.append(asked)
        self.asking.append(asyncio.create_task(self.workers[where].answers(asked)))

    async def finish(self) -> None:
        serving = [worker.serving for worker in self.workers if worker.serving is not None]
        async with asyncio.timeout(600):
            for task in self.asking:
                await asyncio.wait([task, *serving], return_when=asyncio.FIRST_COMPLETED)
                for ended in serving:
                    if ended.done():
                        ended.result()
                if not task.cancelled():
                    task.result()
        for worker in self.workers:
            await worker.rest()
        assert self.store.num_asking == 0
        for worker in self.workers:
            check_values(self.store, worker, self.asked)


def run(first: dict, second: dict, story: list[tuple]) -> Storm:
    async def storm() -> Storm:
        store = FakeStore()
        async with a_worker(store, **first) as one, a_worker(store, **second) as other:
            made = Storm(store, one, other)
            for name, value in story:
                await made.move(name, value)
            await made.finish()
            return made

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(storm())


@settings(max_examples=120, deadline=None)
@given(first=workers, second=workers, story=st.lists(moves, min_size=1, max_size=30))
def test_any_storm_of_two_workers_with_a_store_ends_with_the_sequential_answers(
    first: dict, second: dict, story: list
) -> None:
    run(first, second, story)


@pytest.mark.parametrize("seed", range(24))
def test_a_long_storm_over_conversations_that_do_not_fit_does_too(seed: int) -> None:
    rng = random.Random(seed)

    def options() -> dict:
        return {
            "num_pages": rng.randint(9, 16),
            "num_slots": rng.randint(1, 4),
            "num_records": rng.randint(1, 6),
            "num_host_pages": rng.randint(1, 12),
            "num_host_records": rng.randint(0, 6),
            "reads_max": rng.randint(1, 4),
            "read_bytes": rng.choice([1, 5000, 1 << 20]),
            "turn_bytes_max": rng.choice([1, 5000, 1 << 20]),
            "budget_seconds": rng.choice([0.02, 1.0]),
        }

    names = {
        "ask": 8,
        "again": 8,
        "cancel": 2,
        "wait": 10,
        "answers after": 1,
        "values after": 1,
        "frozen": 1,
        "lose": 2,
    }
    story: list[tuple] = []
    for name in rng.choices(list(names), weights=names.values(), k=80):
        match name:
            case "ask":
                length = rng.choice([rng.randint(1, 1600), 256, 512, 1024, 6 * PAGE_TOKENS + 1])
                story.append((name, (rng.randint(0, 1), rng.randint(0, 11), length, rng.randint(1, 60))))
            case "again":
                story.append((name, (rng.randint(0, 1), rng.randint(0, 30))))
            case "wait":
                story.append((name, rng.choice([0.001, 0.05, 0.25, 1.0, 5.0, 20.0])))
            case "answers after" | "values after":
                story.append((name, rng.choice([0.0005, 0.0005, 0.03, 0.2])))
            case "frozen":
                story.append((name, rng.random() < 0.3))
            case _:
                story.append((name, rng.randint(0, 30)))
    storm = run(options(), options(), story)
    assert storm.store.values

"""A prefill and a decode worker's schedulers with strict ranks: any storm of opens, hand-overs and cancels ends with
the sequential answers and with nothing in use anywhere."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.benches import Pair, adopting, lending
from tests.harness.storms import Storm, weather

# A request: prompt length, max_tokens, ignore_eos; bound before its prompt is computed, or after.
lengths = st.one_of(st.integers(1, 500), st.sampled_from([180, 250, 255, 256, 257, 440, 511, 512]))
requests = st.tuples(lengths, st.integers(2, 300), st.booleans(), st.booleans())
numbers = st.integers(0, 30)
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("open here"), requests),
    st.tuples(st.sampled_from(["bind", "begin", "begin", "end", "end", "cancel", "cancel decode"]), numbers),
    st.tuples(st.sampled_from(["hand over", "swap"]), numbers),
    st.tuples(st.just("prefill"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["send", "receive"]), st.integers(1, 4)),
    st.tuples(st.just("turn"), st.integers(1, 200)),
)


@settings(max_examples=60, deadline=None)
@given(
    num_pages=st.integers(4, 7),
    num_slots=st.integers(1, 5),
    num_records=st.integers(1, 4),
    budget=st.sampled_from([256, 512]),
    inflight=st.integers(1, 3),
    story=st.lists(moves, min_size=1, max_size=50),
)
def test_any_storm_of_hand_overs_ends_with_the_sequential_answers_and_nothing_in_use(
    num_pages: int, num_slots: int, num_records: int, budget: int, inflight: int, story: list
) -> None:
    options = {
        "num_slots": num_slots,
        "num_records": num_records,
        "prefill_tokens_max": budget,
        "plans_inflight_max": inflight,
    }
    storm = Storm(
        Pair(prefill=lending(num_pages=8, **options), decode=adopting(num_pages=num_pages, **options))
    )
    for name, value in story:
        storm.move(name, value)
    weather(storm)


@pytest.mark.parametrize("seed", range(16))
def test_a_long_storm_in_a_crowded_worker_does_too(seed: int) -> None:
    """Denser than a story that is drawn to be shrunk: many are handed over, preempted, and cancelled with plans out."""
    rng = random.Random(seed)
    options = {"num_records": rng.randint(2, 5), "plans_inflight_max": rng.randint(1, 3)}
    decode = adopting(num_pages=rng.randint(4, 8), num_slots=rng.randint(3, 6), **options)
    storm = Storm(Pair(prefill=lending(num_pages=16, num_slots=4, **options), decode=decode))
    names = {
        "open": 5, "open here": 1, "prefill": 8, "bind": 8, "begin": 8, "end": 8, "hand over": 3, "swap": 4, "send": 3,
        "receive": 3, "turn": 5, "cancel": 1, "cancel decode": 2,
    }  # fmt: skip
    for name in rng.choices(list(names), weights=names.values(), k=400):
        if not name.startswith("open"):
            storm.move(name, rng.randint(1, 30))
        elif decode.scheduler.num_sequences < 6:
            length = rng.choice([rng.randint(1, 700), 180, 250, 255, 256, 257, 440, 511, 512])
            storm.move(name, (length, rng.randint(2, 300), rng.random() < 0.8, rng.random() < 0.3))
    weather(storm)

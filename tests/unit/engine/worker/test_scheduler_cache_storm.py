"""Schedulers that keep prefixes, against a rank that knows what every page and record must hold: whatever is shared,
evicted, preempted, cancelled and handed over, the answers are the sequential ones and everything is free or kept."""

from __future__ import annotations

import random

import pytest
from fake_state import is_drafted_well
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.drafts.policy import FixedDrafts
from tests.harness.benches import Bench, Pair, a_cache, a_related_prompt, adopting, lending
from tests.harness.storms import Alone, Storm, weather

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

# A request: prompt length, max_tokens, ignore_eos, scores.
lengths = st.one_of(st.integers(1, 1300), st.sampled_from([255, 256, 257, 511, 512, 513, 768, 1024]))
requests = st.tuples(lengths, st.integers(1, 300), st.booleans(), st.integers(0, 9).map(lambda n: n == 0))
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.sampled_from(["send", "receive"]), st.integers(1, 8)),
    st.tuples(st.just("turn"), st.integers(1, 200)),
    st.tuples(st.just("go on"), st.tuples(st.integers(0, 30), st.integers(1, 200))),
)


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(5, 12),
    num_slots=st.integers(1, 5),
    num_records=st.integers(0, 5),
    budget=st.sampled_from([256, 512, 1024]),
    inflight=st.integers(1, 3),
    every=st.integers(0, 2),
    drafts=st.sampled_from([0, 0, 4]),
    story=st.lists(moves, min_size=1, max_size=40),
)
def test_any_storm_over_shared_prefixes_ends_with_the_sequential_answers(
    num_pages: int,
    num_slots: int,
    num_records: int,
    budget: int,
    inflight: int,
    every: int,
    drafts: int,
    story: list,
) -> None:
    bench = Bench(
        num_pages=num_pages,
        num_slots=num_slots,
        num_records=num_records,
        prefill_tokens_max=budget,
        plans_inflight_max=inflight,
        drafts_max=drafts,
        policy=FixedDrafts(drafts),
        cache=a_cache(every_pages=every),
    )
    bench.rank.drafts_well = is_drafted_well
    alone = Alone(bench)
    for name, value in story:
        alone.move(name, value)
    alone.finish()


numbers = st.integers(0, 30)
handed = st.tuples(lengths, st.integers(2, 300), st.booleans(), st.booleans())
exchanges = st.one_of(
    st.tuples(st.just("open"), handed),
    st.tuples(st.just("open here"), handed),
    st.tuples(st.sampled_from(["bind", "begin", "begin", "end", "end", "cancel", "cancel decode"]), numbers),
    st.tuples(st.sampled_from(["hand over", "hand over", "swap"]), numbers),
    st.tuples(st.just("prefill"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["send", "receive"]), st.integers(1, 4)),
    st.tuples(st.just("turn"), st.integers(1, 200)),
)


@settings(max_examples=80, deadline=None)
@given(
    num_pages=st.integers(7, 10),
    num_slots=st.integers(1, 5),
    num_records=st.integers(1, 6),
    inflight=st.integers(1, 3),
    caches=st.sampled_from(["both", "both", "prefill", "decode"]),
    story=st.lists(exchanges, min_size=1, max_size=50),
)
def test_any_storm_of_hand_overs_of_shared_prefixes_does_too(
    num_pages: int, num_slots: int, num_records: int, inflight: int, caches: str, story: list
) -> None:
    options = {"num_slots": num_slots, "num_records": num_records, "plans_inflight_max": inflight}
    prefill = lending(num_pages=9, cache=a_cache() if caches != "decode" else None, **options)
    decode = adopting(num_pages=num_pages, cache=a_cache() if caches != "prefill" else None, **options)
    storm = Storm(Pair(prefill=prefill, decode=decode), prompt_of=a_related_prompt)
    for name, value in story:
        storm.move(name, value)
    weather(storm)


@pytest.mark.parametrize("seed", range(16))
def test_a_long_storm_in_crowded_workers_that_keep_prefixes_does_too(seed: int) -> None:
    rng = random.Random(seed)
    options = {"num_records": rng.randint(2, 8), "plans_inflight_max": rng.randint(1, 3), "cache": a_cache()}
    decode = adopting(num_pages=rng.randint(5, 9), num_slots=rng.randint(3, 6), **options)
    prefill = lending(num_pages=16, num_slots=4, **options)
    storm = Storm(Pair(prefill=prefill, decode=decode), prompt_of=a_related_prompt)
    names = {
        "open": 5, "open here": 2, "prefill": 8, "bind": 8, "begin": 8, "end": 8, "hand over": 3, "swap": 4, "send": 3,
        "receive": 3, "turn": 5, "cancel": 1, "cancel decode": 2,
    }  # fmt: skip
    for name in rng.choices(list(names), weights=names.values(), k=400):
        if not name.startswith("open"):
            storm.move(name, rng.randint(1, 30))
        elif decode.scheduler.num_sequences < 6:
            length = rng.choice([rng.randint(1, 900), 250, 256, 257, 511, 512, 768])
            storm.move(name, (length, rng.randint(2, 300), rng.random() < 0.8, rng.random() < 0.3))
    weather(storm)

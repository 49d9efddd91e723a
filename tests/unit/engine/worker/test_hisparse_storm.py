"""Schedulers whose sequences spill in next to no room, against ranks that know what every page must hold, whole or
thin, and every host page, whenever it is read: whatever spills, returns, is evicted, preempted, cancelled and handed
over, the answers are the sequential ones and nothing is held by anybody."""

from __future__ import annotations

import random

import pytest
from fake_state import is_drafted_well
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.drafts.policy import FixedDrafts
from tests.harness.benches import (
    Bench,
    Pair,
    a_cache,
    a_hisparse,
    a_host_tier,
    a_related_prompt,
    adopting,
    lending,
)
from tests.harness.stored import Stored
from tests.harness.storms import Alone, Storm, weather

pytestmark = pytest.mark.minutes

lengths = st.one_of(st.integers(200, 1900), st.sampled_from([511, 512, 513, 768, 1024, 1280, 1536]))
requests = st.tuples(lengths, st.integers(1, 700), st.booleans(), st.integers(0, 9).map(lambda n: n == 0))
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.sampled_from(["send", "receive"]), st.integers(1, 8)),
    st.tuples(st.just("turn"), st.integers(1, 300)),
    st.tuples(st.just("go on"), st.tuples(st.integers(0, 30), st.integers(1, 200))),
    st.tuples(st.sampled_from(["read", "read on"]), st.integers(0, 30)),
)
tiers = st.builds(
    a_host_tier,
    num_pages=st.integers(1, 40),
    num_records=st.integers(0, 6),
    copy_bytes_max=st.sampled_from([1, 10_000, 1 << 20]),
    sequences_max=st.integers(0, 4),
    takes_turns=st.booleans(),
    turn_bytes_max=st.sampled_from([1, 1 << 20]),
)
hisparses = st.builds(
    a_hisparse,
    num_thin=st.integers(0, 30),
    num_buffers=st.integers(1, 4),
    num_hot=st.integers(1, 2),
    few_pages=st.sampled_from([0.0, 0.3, 1.0]),
    many_pages=st.sampled_from([0.0, 0.2, 0.5]),
    copy_bytes_max=st.sampled_from([1, 5_000, 1 << 20]),
)


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(8, 16),
    num_slots=st.integers(1, 5),
    num_records=st.integers(0, 5),
    budget=st.sampled_from([256, 512, 1024]),
    inflight=st.integers(1, 3),
    every=st.integers(0, 2),
    drafts=st.sampled_from([0, 0, 4]),
    tier=tiers,
    hisparse=hisparses,
    story=st.lists(moves, min_size=1, max_size=40),
)
def test_any_storm_over_spilled_sequences_ends_with_the_sequential_answers(
    num_pages: int,
    num_slots: int,
    num_records: int,
    budget: int,
    inflight: int,
    every: int,
    drafts: int,
    tier,
    hisparse,
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
        host_tier=tier,
        hisparse=hisparse,
    )
    bench.rank.drafts_well = is_drafted_well
    alone = Alone(bench)
    for name, value in story:
        alone.move(name, value)
    alone.finish()
    check_let_go(bench)


def check_let_go(bench: Bench) -> None:
    """At rest nothing is spilled, and nothing is held for it."""
    state = bench.scheduler.hisparse_state
    assert (state.num_spilled, state.num_host_pages) == (0, 0)
    assert state.num_thin_pages_free == state.num_thin_pages
    assert state.counts.num_spills >= bench.rank.spills.num_spills


def some_weather(rng: random.Random, alone: Alone, num_moves: int, **more: int) -> None:
    names = {
        "open": 7,
        "cancel": 1,
        "send": 2,
        "receive": 2,
        "turn": 5,
        "go on": 4,
        "read": 2,
        "read on": 4,
    } | more
    for name in rng.choices(list(names), weights=names.values(), k=num_moves):
        match name:
            case "open":
                length = rng.choice([rng.randint(1, 1900), 256, 512, 1024, 1536])
                alone.move(name, (length, rng.randint(1, 700), rng.random() < 0.7, rng.random() < 0.1))
            case "go on":
                alone.move(name, (rng.randint(0, 30), rng.randint(1, 200)))
            case _:
                alone.move(name, rng.randint(1, 300 if name == "turn" else 8))


@pytest.mark.parametrize("seed", range(40))
def test_a_long_storm_over_conversations_that_spill_does_too(seed: int) -> None:
    rng = random.Random(seed)
    drafts = rng.choice([0, 0, 4])
    bench = Bench(
        num_pages=rng.randint(8, 16),
        num_slots=rng.randint(2, 6),
        num_records=rng.randint(0, 5),
        plans_inflight_max=rng.randint(1, 3),
        drafts_max=drafts,
        policy=FixedDrafts(drafts),
        cache=a_cache(every_pages=rng.randint(0, 2)),
        host_tier=a_host_tier(
            rng.randint(6, 50),
            rng.randint(0, 6),
            copy_bytes_max=rng.choice([1, 10_000, 1 << 20]),
            sequences_max=rng.randint(0, 4),
            takes_turns=rng.random() < 0.5,
        ),
        hisparse=a_hisparse(
            rng.randint(2, 40),
            rng.randint(1, 4),
            rng.randint(1, 2),
            few_pages=rng.choice([0.0, 0.3, 1.0]),
            many_pages=rng.choice([0.0, 0.2, 0.5]),
            copy_bytes_max=rng.choice([1, 5_000, 1 << 20]),
        ),
    )
    bench.rank.drafts_well = is_drafted_well
    alone = Alone(bench)
    some_weather(rng, alone, 80)
    alone.finish()
    check_let_go(bench)


@pytest.mark.parametrize("seed", range(24))
def test_a_long_storm_over_a_store_beside_the_plans_does_too(seed: int) -> None:
    rng = random.Random(1000 + seed)
    drafts = rng.choice([0, 4])
    bench = Bench(
        num_pages=rng.randint(8, 14),
        num_slots=rng.randint(2, 6),
        num_records=rng.randint(1, 5),
        plans_inflight_max=rng.randint(1, 3),
        drafts_max=drafts,
        policy=FixedDrafts(drafts),
        cache=a_cache(),
        host_tier=a_host_tier(
            rng.randint(8, 30),
            6,
            takes_turns=True,
            keeps_landed=True,
            copy_bytes_max=rng.choice([1, 1 << 20]),
        ),
        hisparse=a_hisparse(
            rng.randint(1, 20),
            rng.randint(1, 4),
            few_pages=rng.choice([0.0, 0.3, 1.0]),
            many_pages=rng.choice([0.0, 0.2, 0.5]),
            copy_bytes_max=rng.choice([1, 5_000, 1 << 20]),
        ),
        keeps_digests=True,
    )
    bench.rank.drafts_well = is_drafted_well
    stored = Stored(bench)
    some_weather(rng, stored, 80, **{"fill": 4, "fill on": 6, "write": 4})
    stored.finish()
    check_let_go(bench)
    assert stored.num_written > 0


@pytest.mark.parametrize("seed", range(24))
def test_a_long_storm_of_hand_overs_to_a_worker_that_spills_does_too(seed: int) -> None:
    rng = random.Random(seed)
    options = {"num_records": rng.randint(2, 8), "plans_inflight_max": rng.randint(1, 3), "cache": a_cache()}
    tier = a_host_tier(
        rng.randint(6, 50),
        rng.randint(0, 8),
        copy_bytes_max=rng.choice([1, 1 << 20]),
        takes_turns=rng.random() < 0.5,
    )
    decode = adopting(
        num_pages=rng.randint(8, 14),
        num_slots=rng.randint(3, 6),
        host_tier=tier,
        hisparse=a_hisparse(
            rng.randint(4, 40),
            rng.randint(1, 4),
            rng.randint(1, 2),
            few_pages=rng.choice([0.0, 0.3, 1.0]),
            many_pages=rng.choice([0.0, 0.2, 0.5]),
            copy_bytes_max=rng.choice([1, 5_000, 1 << 20]),
        ),
        **options,
    )
    prefill = lending(num_pages=24, num_slots=4, **options)
    storm = Storm(Pair(prefill=prefill, decode=decode), prompt_of=a_related_prompt)
    names = {
        "open": 5, "open here": 2, "prefill": 8, "bind": 8, "begin": 8, "end": 8, "hand over": 3, "swap": 4, "send": 3,
        "receive": 3, "turn": 5, "cancel": 1, "cancel decode": 2,
    }  # fmt: skip
    for name in rng.choices(list(names), weights=names.values(), k=300):
        if not name.startswith("open"):
            storm.move(name, rng.randint(1, 60 if name == "turn" else 30))
        elif decode.scheduler.num_sequences < 6:
            length = rng.choice([rng.randint(1, 1500), 511, 512, 768, 1024])
            storm.move(name, (length, rng.randint(2, 500), rng.random() < 0.8, rng.random() < 0.3))
    weather(storm)
    check_let_go(decode)

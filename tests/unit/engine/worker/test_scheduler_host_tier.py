"""A scheduler whose cache has host memory below it, against a rank that knows what every page and record must hold,
here and there: what goes down, what comes back, who waits for it, and what is computed."""

from __future__ import annotations

import numpy as np
import pytest
from fake_state import PAGE_TOKENS, REBUILD_TOKENS, answer, digest, page_digests

from engine.worker.tiers.host_tier import HostTierConfig
from engine.worker.tiers.speeds import SpeedsConfig
from kvstore.shadow_radix import StartKind
from rorqual.feed import HOST_PAGE, HOST_TAIL, PAGE, TAIL
from rorqual.performance import SourceSpeed
from tests.harness.benches import (
    FIRST_HOST_ID,
    Bench,
    Pair,
    a_cache,
    a_host_tier,
    a_prompt,
    adopting,
    lending,
)


def tiered(**options) -> Bench:
    return Bench(
        **{
            "num_pages": 8,
            "num_records": 4,
            "cache": a_cache(),
            "host_tier": a_host_tier(),
            **options,
        }
    )


def computed(bench: Bench, key: int, prompt: list[int], max_tokens: int = 1, **options) -> int:
    """Tokens that the rank has computed for one answer, which is checked."""
    before = bench.rank.num_tokens_computed
    params = bench.open(key, prompt, max_tokens, ignore_eos=True, **options)
    bench.run()
    assert bench.tokens(key) == answer(prompt, max_tokens, params, ignore_eos=True)
    return bench.rank.num_tokens_computed - before


def test_what_was_evicted_comes_back_and_is_not_computed_again() -> None:
    bench = tiered()
    first, second = a_prompt(1, 4 * PAGE_TOKENS + 9), a_prompt(2, 7 * PAGE_TOKENS + 9)
    assert computed(bench, 1, first) == len(first)
    assert computed(bench, 2, second) == len(second)
    assert bench.rank.host_memory.num_pages_demoted == 4
    assert computed(bench, 3, [*first, 5]) == 10
    assert bench.events[3][0].cached_tokens == 4 * PAGE_TOKENS
    assert bench.rank.host_memory.num_pages_promoted == 4


def push_out(bench: Bench, key: int) -> None:
    """Whatever the device keeps and nobody uses, it gives up for this."""
    computed(bench, key, a_prompt(key, bench.scheduler.config.num_pages * PAGE_TOKENS - 1))


def test_what_came_back_stays_below_and_is_not_copied_again() -> None:
    bench = tiered()
    prompt = a_prompt(1, 3 * PAGE_TOKENS + 9)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    assert bench.rank.host_memory.num_pages_demoted == 3
    for key in (3, 5):
        assert computed(bench, key, prompt) == 9
        push_out(bench, key + 1)
    counts = bench.scheduler.host_tier.state.counts
    assert (counts.pages_hit, counts.tails_hit) == (6, 2)
    assert (counts.pages_kept, counts.tails_kept) == (6, 2)
    assert counts.pages_taken == bench.rank.host_memory.num_pages_demoted
    assert bench.rank.host_memory.num_pages_promoted == 6


def test_a_tail_comes_back_to_pages_that_are_still_there() -> None:
    bench = tiered(num_pages=16, num_records=1)
    first, second = a_prompt(1, 3 * PAGE_TOKENS), a_prompt(2, 3 * PAGE_TOKENS)
    computed(bench, 1, first)
    computed(bench, 2, second)  # whose tail takes the place of the other
    assert computed(bench, 3, [*first, 4]) == 1
    assert bench.rank.host_memory.num_pages_promoted == 0
    assert bench.rank.host_memory.num_records_promoted == 1
    assert computed(bench, 4, [*second, 4]) == 1


def test_pages_without_a_tail_come_back_for_a_rebuild_of_what_device_and_host_have_together() -> None:
    bench = tiered(num_records=0)
    prompt = a_prompt(1, 5 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    computed(bench, 2, a_prompt(2, 6 * PAGE_TOKENS))  # leaves two of the five
    assert bench.rank.host_memory.num_pages_demoted == 3
    assert computed(bench, 3, [*prompt, 4]) == REBUILD_TOKENS + 1
    assert bench.rank.host_memory.num_pages_promoted == 3
    assert bench.scheduler.cache_state().counts.pages_hit[StartKind.REBUILD] == 3


def test_pages_that_save_nothing_stay_where_they_are() -> None:
    """Fewer than a rebuild replays, and no tail."""
    bench = tiered(num_records=0)
    prompt = a_prompt(1, 2 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    assert computed(bench, 3, [*prompt, 4]) == 2 * PAGE_TOKENS + 1
    assert bench.rank.host_memory.num_pages_promoted == 0


@pytest.mark.parametrize(("bytes_per_second", "is_worth_it"), [(1e9, True), (1e3, False)])
def test_what_is_sooner_computed_than_copied_is_computed(bytes_per_second: float, is_worth_it: bool) -> None:
    speed = SourceSpeed(bytes_per_second=bytes_per_second)
    bench = tiered(speeds=SpeedsConfig(host=speed, tokens_per_second=1e4))
    prompt = a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    assert computed(bench, 3, [*prompt, 4]) == (1 if is_worth_it else len(prompt) + 1)


def test_a_sequence_waits_for_copies_in_bounded_plans_and_lets_others_pass() -> None:
    bench = tiered(host_tier=a_host_tier(copy_bytes_max=1), plans_inflight_max=1)
    prompt = a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    bench.open(3, [*prompt, 4], 1, ignore_eos=True)
    bench.open(4, a_prompt(4, 40), 1, ignore_eos=True)
    plans = []
    while (plan := bench.step()) is not None:
        plans.append(plan)
    assert [len(plan.promote.pages) for plan in plans] == [1, 1, 1, 0, 0, 0]
    assert [len(plan.promote.records) for plan in plans] == [0, 0, 0, 1, 0, 0]
    assert [len(plan.segments) for plan in plans] == [
        1,
        0,
        0,
        0,
        1,
        0,
    ]  # the second, which came later, is first
    assert len(bench.tokens(3)) == len(bench.tokens(4)) == 1
    bench.run()


def test_it_comes_back_before_there_is_a_slot() -> None:
    bench = tiered(num_slots=1)
    prompt = a_prompt(1, 2 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    bench.open(3, a_prompt(3, 40), 50, ignore_eos=True)
    bench.step()
    bench.open(4, [*prompt, 4], 1, ignore_eos=True)
    for _ in range(4):
        bench.step()
    assert bench.rank.host_memory.num_pages_promoted == 2
    assert len(bench.tokens(3)) < 10
    bench.run()
    assert bench.events[4][0].cached_tokens == 2 * PAGE_TOKENS


def test_two_that_want_the_same_wait_for_the_same_copies() -> None:
    bench = tiered()
    prompt = a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    for key in (3, 4):
        bench.open(key, [*prompt, key], 1, ignore_eos=True)
    before = bench.rank.num_tokens_computed
    bench.run()
    assert bench.rank.num_tokens_computed - before == 2
    assert bench.rank.host_memory.num_pages_promoted == 3


def test_what_is_on_its_way_for_a_cancelled_sequence_comes_all_the_same() -> None:
    bench = tiered(host_tier=a_host_tier(copy_bytes_max=1))
    prompt = a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    bench.open(3, [*prompt, 4], 1)
    bench.send()
    assert bench.cancel(3)
    assert not bench.scheduler.is_idle
    bench.run()
    assert bench.rank.host_memory.num_pages_promoted == 3
    assert bench.scheduler.cache is not None
    keys = bench.scheduler.cache.keys_of(np.array(prompt, dtype=np.int32), salt="")
    assert bench.scheduler.cache.match(keys).resumable == 3


def test_no_more_than_half_of_what_is_free_is_taken_at_once() -> None:
    bench = tiered()
    prompt = a_prompt(1, 7 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    push_out(bench, 2)
    assert computed(bench, 3, [*prompt, 4]) == 1
    parts = [len(plan.promote.pages) for plan in bench.plans if plan.promote]
    assert parts == [4, 2, 1]


def test_a_device_page_that_is_copied_away_is_not_read_into_before() -> None:
    """Reads from elsewhere are outside the order of plans: they wait for the plan that copies, which is sure to be."""
    bench = tiered(num_pages=4, num_records=1)
    computed(bench, 1, a_prompt(1, 3 * PAGE_TOKENS + 9))
    assert bench.scheduler.cache is not None
    keys = bench.scheduler.cache.keys_of(np.array(a_prompt(5, 2 * PAGE_TOKENS), dtype=np.int32), salt="")
    item = bench.scheduler.imports.begin(keys, with_record=True)
    assert item is not None
    assert item.after == bench.scheduler.last_applied + 1
    plan = bench.step()
    assert plan is not None
    assert (plan.opens, plan.segments) == ((), ())
    assert len(plan.demote.pages) == 1
    assert plan.demote.pages[0].page in item.pages
    assert {copy.record for copy in plan.demote.records} == {item.record}
    assert bench.scheduler.last_applied == item.after
    bench.scheduler.imports.end(item)
    bench.run()


def test_neither_is_a_record() -> None:
    pair = Pair(
        prefill=lending(num_pages=16, num_records=8),
        decode=adopting(num_pages=16, num_records=1, cache=a_cache(), host_tier=a_host_tier()),
    )
    decode = pair.decode
    decode.open(1, a_prompt(1, 2 * PAGE_TOKENS), 1)
    decode.drain()
    other = a_prompt(3, 40)
    pair.prefill.open(3, other, 3, ignore_eos=True)
    pair.prefill.drain()
    pair.bind(3, other, 3, ignore_eos=True)
    (adoption,) = decode.take_adoptions()
    assert adoption.after == decode.scheduler.last_applied + 1
    plan = decode.step()
    assert plan is not None
    assert [copy.record for copy in plan.demote.records] == [adoption.record]
    assert decode.cancel(3)
    decode.scheduler.settle(adoption.key)
    pair.prefill.take_back(3)
    pair.prefill.run()
    decode.run()


def test_an_adoption_reads_only_what_neither_device_nor_host_has() -> None:
    pair = Pair(
        prefill=lending(num_pages=16, num_records=8, cache=a_cache()),
        decode=adopting(num_pages=5, num_records=4, cache=a_cache(), host_tier=a_host_tier()),
    )

    def turn(key: int, prompt: list[int], max_tokens: int) -> list[int]:
        pair.prefill.open(key, prompt, max_tokens, ignore_eos=True)
        pair.prefill.drain()
        pair.bind(key, prompt, max_tokens, ignore_eos=True)
        while len(pair.decode.tokens(key)) < max_tokens - 1:
            pair.drain()
        return pair.prefill.tokens(key) + pair.decode.tokens(key)

    prompt = a_prompt(1, 2 * PAGE_TOKENS + 9)
    history = prompt + turn(1, prompt, 20)
    turn(2, a_prompt(2, 4 * PAGE_TOKENS + 9), 20)
    turn(3, history, 20)
    assert pair.decode.adoptions[3].num_present == 2
    assert pair.decode.rank.host_memory.num_pages_promoted > 0
    pair.prefill.run()
    pair.decode.run()


HOST_ONLY = PAGE | HOST_PAGE | TAIL | HOST_TAIL


def test_what_a_worker_holds_is_what_either_of_both_has() -> None:
    """For routers: a page that only host memory has is held; it is gone when that gives it up."""
    bench = tiered(host_tier=a_host_tier(num_pages=12, num_records=4))
    cache = bench.scheduler.cache
    assert cache is not None
    prompt = a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    keys = cache.keys_of(np.array(prompt, dtype=np.int32), salt="")
    changes = cache.take_changes()
    assert (changes.pages_added, changes.tails_added) == (keys, keys[2:])
    push_out(bench, 2)
    changes = cache.take_changes()
    assert (changes.pages_removed, changes.tails_removed) == ((), ())
    assert len(changes.pages_added) == 7
    assert cache.match(keys).num_pages == 0
    in_host = {keys[0]: PAGE | HOST_PAGE, keys[1]: PAGE | HOST_PAGE, keys[2]: HOST_ONLY}
    assert in_host.items() <= dict(cache.contents()).items()
    assert {key: now for key, _, now in changes.entries if key in in_host} == in_host
    computed(bench, 3, [*prompt, 3])
    back = {key: now for key, _, now in cache.take_changes().entries}
    assert [back[key] for key in keys] == [PAGE, PAGE, PAGE | TAIL]
    for key in range(4, 8):
        push_out(bench, key)
    changes = cache.take_changes()
    assert set(keys) <= set(changes.pages_removed)
    assert bench.scheduler.host_tier.state.counts.pages_evicted > 0


def test_without_a_cache_there_is_nothing_below_it() -> None:
    bench = Bench(num_pages=8, host_tier=HostTierConfig(num_pages=8, num_records=2, first_id=FIRST_HOST_ID))
    assert bench.scheduler.host_tier is None
    prompt = a_prompt(1, 700)
    assert computed(bench, 1, prompt) == 700
    push_out(bench, 2)
    assert computed(bench, 3, prompt) == 700


def test_what_came_back_can_be_lent_again_and_only_what_is_on_the_device_is() -> None:
    bench = lending(num_pages=8, num_records=4, cache=a_cache(), host_tier=a_host_tier())
    cache = bench.scheduler.cache
    assert cache is not None
    prompt = a_prompt(1, 3 * PAGE_TOKENS)

    def turn(key: int, prompt: list[int]) -> None:
        bench.open(key, prompt, 10, ignore_eos=True)
        bench.drain()
        bench.take_back(key)

    turn(1, prompt)
    keys = cache.keys_of(np.array(prompt, dtype=np.int32), salt="")
    turn(2, a_prompt(2, 7 * PAGE_TOKENS + 9))
    assert cache.lend(keys, first=0, wants_tail=True) is None
    turn(3, prompt)
    loan = cache.lend(keys, first=0, wants_tail=True)
    assert loan is not None
    pages = [bench.rank.memory[page] for page in loan.pages]
    assert loan.digests == tuple(one for rows in pages for one in page_digests(rows))
    assert (loan.tail_depth, len(pages)) == (3, 3)
    assert loan.packed is not None
    packed = bench.rank.records[loan.record]
    assert (loan.packed.num_bytes, loan.packed.digest) == (len(packed), digest(packed))
    cache.take_back(loan.pin)
    bench.run()


def test_a_preempted_sequence_comes_back_from_host_memory() -> None:
    bench = tiered(num_slots=2)
    prompts = {key: a_prompt(key, 700) for key in (1, 2)}
    params = {key: bench.open(key, prompt, 900, ignore_eos=True) for key, prompt in prompts.items()}
    bench.run()
    for key, prompt in prompts.items():
        assert bench.tokens(key) == answer(prompt, 900, params[key], ignore_eos=True)
    assert bench.scheduler.num_preemptions > 0
    assert bench.rank.host_memory.num_pages_promoted > 0

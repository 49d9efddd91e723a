"""Who spills, who follows and who returns, as a scheduler's plans show it, against a rank that knows what every page,
whole or thin, and every host page must hold when it is read."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from fake_state import PAGE_BYTES, PAGE_TOKENS, answer

from engine.plan import StepPlan
from engine.worker.cache.prefix_cache import Packed
from engine.worker.events import SequenceKey
from tests.harness.benches import Bench, Pair, a_cache, a_hisparse, a_host_tier, a_prompt, adopting, lending


def spilling(
    *, few: float = 0.0, many: float = 1.0, num_buffers: int = 4, num_hot: int = 1, **options
) -> Bench:
    """By default nothing is copied ahead, and nobody returns."""
    copy_bytes_max = options.pop("copy_bytes_max", 1 << 24)
    hisparse = a_hisparse(
        num_buffers=num_buffers,
        num_hot=num_hot,
        few_pages=few,
        many_pages=many,
        copy_bytes_max=copy_bytes_max,
    )
    chosen = {"num_pages": 16, "num_records": 4, "cache": a_cache(), "host_tier": a_host_tier()}
    return Bench(**{**chosen, "hisparse": hisparse, **options})


def check_answers(bench: Bench, asked: dict[int, tuple[list[int], int]]) -> None:
    for key, (prompt, max_tokens) in asked.items():
        assert bench.tokens(key) == answer(prompt, max_tokens, bench.asked[key][1], ignore_eos=True)


def open_all(bench: Bench, asked: dict[int, tuple[list[int], int]]) -> None:
    for key, (prompt, max_tokens) in asked.items():
        bench.open(key, prompt, max_tokens, ignore_eos=True)


def spills(plans: list[StepPlan]) -> list[tuple[int, int]]:
    """Slot and number of pages of each sequence that spilled, in order."""
    return [(item.slot, len(item.pages)) for plan in plans for item in plan.spills if not item.first]


def until(bench: Bench, is_so, *, steps_max: int = 5000) -> None:
    for _ in range(steps_max):
        if is_so():
            return
        bench.step()
    raise AssertionError("it never comes to that")


def test_with_enough_pages_plans_are_byte_for_byte_those_without_hisparse() -> None:
    asked = {key: (a_prompt(key, 300 * key + 50), 150) for key in range(1, 5)}
    made = []
    for hisparse in (a_hisparse(), None):
        bench = Bench(
            num_pages=48, num_records=4, cache=a_cache(), host_tier=a_host_tier(), hisparse=hisparse
        )
        open_all(bench, asked)
        bench.run()
        check_answers(bench, asked)
        made.append([msgspec.msgpack.encode(plan) for plan in bench.plans])
    assert made[0] == made[1]


def test_a_sequence_spills_rather_than_that_another_is_preempted() -> None:
    asked = {1: (a_prompt(1, 9 * PAGE_TOKENS + 5), 300), 2: (a_prompt(2, 5 * PAGE_TOKENS + 5), 300)}
    without, bench = spilling(hisparse=None), spilling()
    for item in (without, bench):
        open_all(item, asked)
        item.run()
        check_answers(item, asked)
    assert without.scheduler.num_preemptions > 0
    assert bench.scheduler.num_preemptions == 0
    assert spills(bench.plans) == [(0, 9)]
    counts = bench.scheduler.hisparse_state.counts
    assert (counts.num_spills, counts.num_returns) == (1, 0)
    assert counts.pages_spilled == 9 + 1  # and one that it completes
    assert counts.rows_hit > 0
    assert counts.rows_missed > counts.rows_hit


def test_the_longest_of_those_that_decode_spills_first_and_for_the_head_of_the_queue() -> None:
    bench = spilling(num_pages=20, prefill_tokens_max=256)
    asked = {1: (a_prompt(1, 4 * PAGE_TOKENS + 1), 100), 2: (a_prompt(2, 6 * PAGE_TOKENS + 1), 100)}
    open_all(bench, asked)
    until(bench, lambda: bench.tokens(2))
    later = {3: (a_prompt(3, 7 * PAGE_TOKENS + 1), 20), 4: (a_prompt(4, 5 * PAGE_TOKENS + 1), 20)}
    open_all(bench, later)  # the first has room yet; when it is longest, it computes its prompt
    until(bench, lambda: spills(bench.plans))
    assert spills(bench.plans) == [(1, 6), (0, 4)]
    bench.run()
    check_answers(bench, asked | later)


def test_with_few_pages_the_coldest_is_copied_ahead_a_bounded_number_of_bytes_a_plan() -> None:
    bench = spilling(few=1.0, copy_bytes_max=2 * PAGE_BYTES, plans_inflight_max=1)
    asked = {1: (a_prompt(1, 9 * PAGE_TOKENS + 5), 40)}
    open_all(bench, asked)
    bench.run()
    check_answers(bench, asked)
    copied = [len(plan.demote.pages) for plan in bench.plans]
    assert max(copied) == 2
    assert sum(copied) == 9
    assert not spills(bench.plans)


def returned(bench: Bench) -> int:
    return bench.scheduler.hisparse_state.counts.num_returns


def spilled_once(**options) -> Bench:
    """Sequence 1 is spilled, sequence 2 runs beside it."""
    bench = spilling(**{"few": 0.0, "many": 0.25, "plans_inflight_max": 2, **options})
    bench.open(1, a_prompt(1, 9 * PAGE_TOKENS + 5), 400, ignore_eos=True)
    bench.open(2, a_prompt(2, 5 * PAGE_TOKENS + 5), 600, ignore_eos=True)
    until(bench, lambda: bench.scheduler.hisparse_state.num_spilled)
    return bench


def test_a_sequence_returns_when_there_is_room_and_nobody_waits() -> None:
    bench = spilled_once()
    assert returned(bench) == 0
    for _ in range(20):
        bench.step()
    assert returned(bench) == 0, "there is no room"
    bench.cancel(2)
    until(bench, lambda: returned(bench))
    back = [plan for plan in bench.plans if plan.unspills]
    assert [(item.slot, len(item.pages)) for plan in back for item in plan.unspills] == [(0, 10)]
    bench.run()
    assert bench.tokens(1) == answer(
        a_prompt(1, 9 * PAGE_TOKENS + 5), 400, bench.asked[1][1], ignore_eos=True
    )


def test_what_returns_is_in_the_cache_only_when_its_copies_are_made() -> None:
    """Others may read a page of the cache at once, outside the order of plans; and what is held for the copies must not
    be copied over by the plan that makes them."""
    bench = spilled_once(copy_bytes_max=2 * PAGE_BYTES)
    bench.cancel(2)
    cache, tier = bench.scheduler.cache, bench.scheduler.host_tier
    keys = cache.keys_of(np.array(a_prompt(1, 9 * PAGE_TOKENS + 5), dtype=np.int32), salt="")
    evict = lambda: bench.scheduler._holdings._free_evicted(cache.evict_pages(100))  # noqa: E731
    until(bench, lambda: bench.plans[-1].promote.pages)
    evict()
    num_promoted, last_copy = len(bench.plans[-1].promote.pages), 0
    while not returned(bench):
        assert len([page for page in tier.index.pages() if page.num_pins]) >= 9
        assert cache.match(keys).num_pages == 0
        plan = bench.send()
        if plan is None:
            bench.receive()
            continue
        num_promoted += len(plan.promote.pages)
        assert len(plan.promote.pages) <= 2
        last_copy = plan.number if plan.promote.pages else last_copy
        assert not plan.unspills or last_copy <= bench.scheduler.last_applied
    assert num_promoted == 9
    assert cache.match(keys).num_pages == 9
    bench.run()


def test_who_returns_and_is_cancelled_in_the_next_moment_leaves_nothing() -> None:
    for at in range(12):
        bench = spilled_once(copy_bytes_max=2 * PAGE_BYTES)
        bench.cancel(2)
        until(bench, lambda bench=bench: bench.plans[-1].promote.pages)
        for _ in range(at):
            bench.step()
        bench.send()
        bench.cancel(1)
        bench.run()
        assert bench.scheduler.hisparse_state.num_thin_pages_free == 64


def test_who_returns_stays_spilled_when_pages_run_short_meanwhile() -> None:
    bench = spilled_once(copy_bytes_max=1, many=0.0)
    bench.cancel(2)
    until(bench, lambda: bench.plans[-1].promote.pages)
    assert bench.scheduler.hisparse_state.num_spilled == 1
    bench.open(3, a_prompt(3, 13 * PAGE_TOKENS), 30, ignore_eos=True)
    until(bench, lambda: bench.tokens(3))
    assert returned(bench) == 0
    assert bench.scheduler.num_preemptions == 0
    assert bench.scheduler.hisparse_state.num_spilled == 1
    bench.run()
    assert bench.tokens(3) == answer(a_prompt(3, 13 * PAGE_TOKENS), 30, bench.asked[3][1], ignore_eos=True)


def test_a_sequence_whose_pages_another_holds_too_does_not_spill_for_nothing() -> None:
    """Two that share all but their last page: no page would be free, and a hot buffer takes some."""
    prompt = a_prompt(1, 9 * PAGE_TOKENS)
    bench = spilling(num_pages=14)
    bench.open(0, [*prompt, 1], 1, ignore_eos=True)
    bench.run()
    asked = {key: ([*prompt, key], 100) for key in (1, 2)}
    open_all(bench, asked)
    until(bench, lambda: bench.tokens(1) and bench.tokens(2))
    free = bench.scheduler.load().pages_free
    later = {3: (a_prompt(3, (free + 1) * PAGE_TOKENS), 5)}
    open_all(bench, later)
    bench.run()
    check_answers(bench, asked | later)
    assert not spills(bench.plans)


def test_what_was_handed_over_does_not_spill_in_the_plan_that_opens_it() -> None:
    """The rank spills before it opens, and the open names the pages as they were before."""
    decode = adopting(
        num_pages=12,
        num_slots=4,
        cache=a_cache(),
        host_tier=a_host_tier(),
        hisparse=a_hisparse(few_pages=0.0),
    )
    pair = Pair(prefill=lending(num_pages=32), decode=decode)
    prompt = a_prompt(1, 8 * PAGE_TOKENS + 5)
    pair.prefill.open(1, prompt, 60, ignore_eos=True)
    pair.prefill.drain()
    pair.bind(1, prompt, 60, ignore_eos=True)
    pair.hand_over(1)
    decode.open(2, a_prompt(2, 8 * PAGE_TOKENS), 5, ignore_eos=True)
    plan = decode.send()
    assert plan is not None
    assert [item.slot for item in plan.opens] == [0]
    assert not plan.spills
    decode.drain()
    assert spills(decode.plans) == [(0, 8)]
    expected = answer(prompt, 60, decode.asked[1][1], ignore_eos=True)
    assert pair.prefill.tokens(1) + decode.tokens(1) == expected


def test_room_for_a_tail_waits_for_the_copy_of_the_one_that_was_there() -> None:
    """A turn's tail is copied to host memory while it stays; evicted with that plan in flight, it is no copy's source
    any more, but the plan's still."""
    bench = spilling(num_records=1, host_tier=a_host_tier(takes_turns=True), plans_inflight_max=3)
    bench.open(1, a_prompt(1, 2 * PAGE_TOKENS), 1, ignore_eos=True)
    while not (bench.plans and bench.plans[-1].demote.records):
        if bench.send() is None:
            bench.receive()
    cache = bench.scheduler.cache
    keys = cache.keys_of(np.array(a_prompt(2, 2 * PAGE_TOKENS), dtype=np.int32), salt="")
    item = bench.scheduler.imports.begin(keys, with_record=True)
    assert item is not None
    assert item.record == bench.plans[-1].demote.records[0].record
    assert item.after == bench.plans[-1].number
    bench.drain()
    bench.scheduler.imports.end(item, tail_depth=0, packed=Packed(num_bytes=1, digest=0))
    bench.run()


def test_cancelled_at_any_moment_of_its_life_it_leaves_nothing() -> None:
    for at in range(0, 420, 7):
        bench = spilling(few=0.5, many=0.1, copy_bytes_max=2 * PAGE_BYTES)
        bench.open(1, a_prompt(1, 9 * PAGE_TOKENS + 5), 300, ignore_eos=True)
        bench.open(2, a_prompt(2, 5 * PAGE_TOKENS + 5), 100, ignore_eos=True)
        for _ in range(at):
            bench.step()
        bench.send()
        bench.cancel(1)
        bench.run()
        state = bench.scheduler.hisparse_state
        assert (state.num_spilled, state.num_host_pages, state.num_thin_pages_free) == (0, 0, 64)
        assert bench.scheduler.cancel(SequenceKey(1)) is False


@pytest.mark.parametrize("copy_bytes_max", [1, 4 * PAGE_BYTES, 1 << 24])
@pytest.mark.parametrize("is_alone", [True, False])
def test_pages_that_run_short_in_whichever_plan_of_a_return_make_others_or_the_same_spill(
    copy_bytes_max: int, is_alone: bool
) -> None:
    """In the very plan that makes copies for it, stops it, or ends it: this one spills before it unspills."""
    num_spilled = set()
    for at in range(16):
        bench = spilling(num_pages=20, many=0.0, copy_bytes_max=copy_bytes_max)
        asked = {1: (a_prompt(1, 9 * PAGE_TOKENS + 5), 300), 2: (a_prompt(2, 5 * PAGE_TOKENS + 5), 250)}
        open_all(bench, asked)
        until(bench, lambda bench=bench: bench.tokens(2))
        bench.open(3, a_prompt(3, 8 * PAGE_TOKENS), 60, ignore_eos=True)
        until(bench, lambda bench=bench: spills(bench.plans))
        bench.cancel(3)
        if is_alone:
            bench.cancel(2)
        for _ in range(at):
            bench.step()
        more = {4: (a_prompt(4, (11 if is_alone else 9) * PAGE_TOKENS + 5), 20)}
        open_all(bench, more)
        bench.run()
        check_answers(bench, {1: asked[1]} | ({} if is_alone else {2: asked[2]}) | more)
        num_spilled.add(len(spills(bench.plans)))
    assert max(num_spilled) > 1

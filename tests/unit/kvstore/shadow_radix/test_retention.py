"""Which tails a prompt leaves behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.shadow_radix import (
    Match,
    Start,
    TailKind,
    TailPolicy,
    cheapest_start,
    plan_tails,
    turn_end,
)
from rorqual.model_config import PAGE_TOKENS

END, BRANCH, EVERY_K = TailKind.PROMPT_END, TailKind.BRANCH, TailKind.EVERY_K


def plans_of(
    num_pages: int,
    *,
    there: int = 0,
    tails: tuple[int, ...] = (),
    is_branch: bool = False,
    num_tails_free: int = 99,
    policy: TailPolicy | None = None,
) -> list[tuple[int, TailKind]]:
    match = Match(num_pages=there, tail_depths=tails, is_branch=is_branch)
    plans = plan_tails(
        num_pages=num_pages,
        match=match,
        start=start_of(match, num_pages),
        policy=policy or TailPolicy(),
        num_tails_free=num_tails_free,
    )
    return [(plan.depth, plan.kind) for plan in plans]


def start_of(match: Match, num_pages: int) -> Start:
    return cheapest_start(match, num_tokens=num_pages * PAGE_TOKENS + 1, rebuild_pages=22)


def test_a_new_prompt_leaves_a_tail_at_its_last_boundary() -> None:
    assert plans_of(7) == [(7, END)]
    assert plans_of(0) == [], "there is no boundary"


def test_the_end_is_not_taken_again_when_it_is_there() -> None:
    assert plans_of(7, there=7, tails=(7,)) == []


def test_the_end_is_taken_when_its_tail_is_lost() -> None:
    assert plans_of(7, there=7, tails=(4,)) == [(7, END)]


def test_where_a_prompt_leaves_the_path_of_others_a_tail_is_taken() -> None:
    assert plans_of(9, there=5, tails=(2,), is_branch=True) == [(5, BRANCH), (9, END)]
    assert plans_of(9, there=5, tails=(2,)) == [(9, END)], "it only goes on where another ended"
    assert plans_of(9, there=5, tails=(5,), is_branch=True) == [(9, END)], "it is there"
    assert plans_of(9, there=5, is_branch=True, policy=TailPolicy(take_branches=False)) == [(9, END)]


def test_a_prompt_that_ends_inside_anothers_leaves_one_tail() -> None:
    assert plans_of(5, there=5, is_branch=True) == [(5, END)]
    policy = TailPolicy(end_multiple=2)
    assert plans_of(5, there=5, is_branch=True, policy=policy) == [(4, END), (5, BRANCH)]


def test_a_match_of_more_than_the_prompt_is_no_branch_of_it() -> None:
    assert plans_of(5, there=7, is_branch=True) == [(5, END)]


def test_the_end_of_a_rebuild_is_exact_and_so_can_leave_a_branch_tail() -> None:
    assert plans_of(50, there=40, is_branch=True) == [(40, BRANCH), (50, END)]


def test_inside_a_rebuild_no_tail_is_taken() -> None:
    """The state is not exact there."""
    policy = TailPolicy(every_pages=5, num_tails_max=99)
    assert plans_of(50, there=40, policy=policy) == [(40, EVERY_K), (45, EVERY_K), (50, END)]


def test_long_ways_get_tails_from_their_end_on() -> None:
    policy = TailPolicy(every_pages=8, num_tails_max=3)
    assert plans_of(37, policy=policy) == [(24, EVERY_K), (32, EVERY_K), (37, END)]


def test_tails_on_the_way_keep_their_distance() -> None:
    policy = TailPolicy(every_pages=8, pages_apart_min=4)
    assert plans_of(18, there=7, tails=(7,), policy=policy) == [(18, END)]


def test_the_last_pages_can_be_left_out() -> None:
    assert plans_of(7, policy=TailPolicy(end_multiple=2)) == [(6, END)]
    assert plans_of(1, policy=TailPolicy(end_multiple=2)) == []


@pytest.mark.parametrize(("num_free", "kinds"), [(0, []), (1, [END]), (2, [BRANCH, END])])
def test_with_few_records_the_end_comes_first_then_the_branch(num_free: int, kinds: list[TailKind]) -> None:
    policy = TailPolicy(every_pages=4)
    plans = plans_of(20, there=6, is_branch=True, policy=policy, num_tails_free=num_free)
    assert [kind for _, kind in plans] == kinds


@given(
    num_pages=st.integers(0, 60),
    there=st.integers(0, 60),
    tails=st.sets(st.integers(1, 60)),
    is_branch=st.booleans(),
    every=st.integers(0, 9),
    apart=st.integers(1, 9),
    num_max=st.integers(0, 9),
    num_free=st.integers(0, 9),
)
def test_every_tail_is_new_exact_in_order_and_within_bounds(
    num_pages: int,
    there: int,
    tails: set[int],
    is_branch: bool,
    every: int,
    apart: int,
    num_max: int,
    num_free: int,
) -> None:
    there = min(there, num_pages)
    match = Match(
        num_pages=there,
        tail_depths=tuple(sorted(depth for depth in tails if depth <= there)),
        is_branch=is_branch,
    )
    start = start_of(match, num_pages)
    policy = TailPolicy(num_tails_max=num_max, every_pages=every, pages_apart_min=apart)
    plans = plan_tails(num_pages=num_pages, match=match, start=start, policy=policy, num_tails_free=num_free)
    depths = [plan.depth for plan in plans]
    assert depths == sorted(set(depths))
    assert len(depths) <= min(num_max, num_free)
    assert not set(depths) & set(match.tail_depths)
    assert all(start.exact_depth <= depth <= num_pages and depth > start.from_depth for depth in depths)


def test_a_turn_ends_at_the_last_boundary_that_its_tokens_have_crossed() -> None:
    assert turn_end(num_prompt_tokens=300, num_computed=511) == 0
    assert turn_end(num_prompt_tokens=300, num_computed=512) == 2
    assert turn_end(num_prompt_tokens=512, num_computed=767) == 0, "that is the prompt's own"
    assert turn_end(num_prompt_tokens=10, num_computed=1100) == 4

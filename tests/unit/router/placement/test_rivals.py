"""The policies that ours is measured against, on hand-made pictures: each decides as its published rule says."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.keys import PageKey
from router.placement.cache import CachePlacement, Found
from router.placement.cache_aware import CacheAware
from router.placement.overlap_cost import OverlapCost
from router.placement.promises import Promises
from router.placement.simple import LeastLoaded, LongestPrefix, RoundRobin, SessionAffinity
from tests.unit.router.placement.pictures import a_demand, a_fleet, keys


def test_round_robin_takes_turns_and_leaves_out_who_drains() -> None:
    policy = RoundRobin()
    fleet = a_fleet(4, draining=[2])
    assert [policy.choose(fleet, a_demand()).prefill for _ in range(4)] == [0, 1, 3, 0]


def test_least_loaded_takes_the_fewest_tokens() -> None:
    assert LeastLoaded().choose(a_fleet(queued=[5, 3, 4]), a_demand()).prefill == 1


def test_a_session_stays_until_its_worker_drains() -> None:
    policy = SessionAffinity()
    assert policy.choose(a_fleet(queued=[5, 3, 4]), a_demand(session="a")).prefill == 1
    assert policy.choose(a_fleet(queued=[0, 9, 0]), a_demand(session="a")).prefill == 1
    assert policy.choose(a_fleet(queued=[1, 9, 0], draining=[1]), a_demand(session="a")).prefill == 2


def test_without_a_session_the_first_page_decides() -> None:
    policy = SessionAffinity()
    chosen = {policy.choose(a_fleet(8), a_demand(keys(name, 2))).prefill for name in "abcdefghijklmnop"}
    assert len(chosen) > 3
    assert len({policy.choose(a_fleet(8), a_demand(keys("a", 5))).prefill for _ in range(3)}) == 1


def test_the_longest_prefix_wins_whatever_waits_there() -> None:
    held = {0: (keys("abc", 3), [3]), 2: (keys("ab", 2), [])}
    fleet = a_fleet(held=held, queued=[99, 0, 5])
    assert LongestPrefix().choose(fleet, a_demand(keys("abc", 3))).prefill == 0
    assert LongestPrefix().choose(fleet, a_demand(keys("xyz", 3))).prefill == 1


def test_dynamo_weighs_blocks_to_compute_against_blocks_in_use() -> None:
    prompt = keys("a", 10)
    # Cost is blocks to compute + blocks in use: 0 + 14 where all ten are cached, 10 + 10 elsewhere.
    held = {0: (prompt, [10])}
    assert OverlapCost().choose(a_fleet(held=held, active=[4, 0, 0]), a_demand(prompt, extra=0)).prefill == 0
    assert OverlapCost().choose(a_fleet(held=held, active=[11, 0, 0]), a_demand(prompt, extra=0)).prefill == 1
    heavy = OverlapCost(overlap_weight=2.0)
    assert heavy.choose(a_fleet(held=held, active=[11, 0, 0]), a_demand(prompt, extra=0)).prefill == 0


def test_dynamo_with_a_temperature_draws_by_its_seed() -> None:
    fleet = a_fleet(queued=[0, 100, 200])

    def drawn(seed: int) -> list[int]:
        policy = OverlapCost(temperature=1.0, seed=seed)
        return [policy.choose(fleet, a_demand()).prefill for _ in range(50)]

    assert drawn(1) == drawn(1)
    assert len(set(drawn(1))) > 1


def test_sglang_goes_to_a_match_over_its_threshold_and_else_to_the_smallest_tree() -> None:
    policy = CacheAware()
    fleet = a_fleet()
    assert policy.choose(fleet, a_demand(keys("a", 10))).prefill == 0  # all trees are empty
    assert policy.choose(fleet, a_demand(keys("b", 4))).prefill == 1
    assert policy.choose(fleet, a_demand(keys("aaaaz", 10))).prefill == 0  # 4 of 10 match
    assert policy.choose(fleet, a_demand(keys("aaz", 10))).prefill == 2  # 2 of 10 do not exceed 0.3


def test_sglang_balances_when_both_thresholds_are_passed() -> None:
    policy = CacheAware()
    policy.choose(a_fleet(), a_demand(keys("a", 10)))
    assert policy.choose(a_fleet(sequences=[64, 0, 5]), a_demand(keys("a", 10))).prefill == 0
    assert policy.choose(a_fleet(sequences=[65, 0, 5]), a_demand(keys("a", 10))).prefill == 1
    assert policy.choose(a_fleet(sequences=[300, 210, 220]), a_demand(keys("a", 10))).prefill == 0


def test_the_tree_of_sglang_is_bounded_and_forgets_leaves_first() -> None:
    policy = CacheAware(tree_pages_max=4)
    policy.choose(a_fleet(1), a_demand(keys("a", 4)))
    policy.choose(a_fleet(1), a_demand(keys("b", 2)))
    assert policy._match(policy._trees[0], a_demand(keys("a", 4))) == 2


@pytest.mark.parametrize(
    "policy", [RoundRobin(), LeastLoaded(), SessionAffinity(), LongestPrefix(), CacheAware(), OverlapCost()]
)
def test_only_ours_plans_reads_from_peers(policy: CachePlacement) -> None:
    prompt = keys("abc", 30)
    fleet = a_fleet(4, held={0: (prompt, [30])}, queued=[9e9, 0, 0, 0], decoding={3: 1})
    for number in range(5):
        decision = policy.choose(fleet, a_demand(prompt, number=number))
        assert decision.fetch.peer == -1
        assert decision.decode == 3
        policy.finished(number)


def test_a_promise_is_found_until_it_is_forgotten() -> None:
    def found(prompt: tuple[PageKey, ...], there: list[int]) -> tuple[list[int], list[int]]:
        now = Found(pages_W=np.array(there, np.int32), tail_W=np.zeros(3, np.int32))
        after = promises.added_to(now, prompt)
        assert now.pages_W.tolist() == there, "what is there now is not changed"
        return after.pages_W.tolist(), after.tail_W.tolist()

    promises = Promises(prompts_max=2)
    promises.promise(1, worker=2, keys=keys("ab", 6), num_present=1)
    promises.promise(2, worker=0, keys=keys("a", 3))
    assert found(keys("aba", 6), [0, 0, 1]) == ([1, 0, 2], [0, 0, 0])
    assert found(keys("ab", 9), [0, 0, 1]) == ([1, 0, 6], [0, 0, 6])
    assert found(keys("ab", 9), [0, 3, 0]) == ([1, 3, 0], [0, 0, 0])  # the first page has gone meanwhile
    promises.promise(3, worker=1, keys=keys("x", 1))  # one too many: the oldest is forgotten
    assert len(promises) == 2
    assert found(keys("ab", 6), [0, 0, 1]) == ([1, 0, 1], [0, 0, 0])
    for number in (1, 2, 3, 4):
        promises.forget(number)
    assert found(keys("a", 3), [0, 0, 0]) == ([0, 0, 0], [0, 0, 0])
    assert len(promises) == 0

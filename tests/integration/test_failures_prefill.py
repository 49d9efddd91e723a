"""A prefill worker that dies, stands still or is told to end, at every stage of a request: one clear outcome for the
client, nothing left on anybody, and whoever is left serves on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.asking import ask
from tests.harness.failures import (
    CALL_SECONDS,
    NUM_TOKENS,
    PATIENT,
    PROMPT,
    RETURN_SECONDS_MAX,
    SLACK_SECONDS,
    TRANSFER_SECONDS,
    check_serving,
    computing,
    living,
    reading,
    streaming,
    unread,
)
from tests.harness.pools import Pools
from tests.harness.system import wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def routed(two_of_each: Pools) -> Pools:
    two_of_each.restart("router", *PATIENT)
    return two_of_each


@pytest.fixture
def pools(routed: Pools) -> Iterator[Pools]:
    yield routed
    routed.heal()


def test_when_all_are_killed_only_what_was_lent_is_lost_and_a_prompt_waits_for_one_started_again(
    pools: Pools, expected: list[int]
) -> None:
    """Of three requests: one whose state was read, one whose state was not, one whose prompt is being computed."""
    prefills, decoders = living(pools, "prefill"), living(pools, "decode")
    read, _ = streaming(pools, max_tokens=4 * NUM_TOKENS)
    lent, lender = unread(pools)
    computed, computer = computing(pools)
    for name in sorted(prefills, key=lambda name: name == computer):  # the last, since only one may fail it
        pools.kill(name)
    pools.restart(computer, wait=False)
    pools.resume(*decoders)
    code, message = lent.error(seconds_max=SLACK_SECONDS)
    assert code == "worker_lost"
    assert f"worker {pools[lender].address} was lost" in message
    assert lent.tokens == expected[:1]
    assert not read.is_over, "it was over before the prefill workers were"
    assert read.result()[:NUM_TOKENS] == expected
    assert computed.result() == expected
    pools[computer].wait_until_ready()
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)


def test_one_killed_while_its_state_is_read_costs_one_error(pools: Pools, expected: list[int]) -> None:
    asking, lender, _ = reading(pools)
    pools.kill(lender)
    code, message = asking.error(seconds_max=TRANSFER_SECONDS + SLACK_SECONDS)
    assert code == "worker_lost"
    assert pools[lender].address in message
    assert asking.tokens == expected[:1]
    check_serving(pools, expected)


def test_one_killed_while_it_computes_costs_a_start_on_another(pools: Pools, expected: list[int]) -> None:
    before = pools["router"].metrics()["rorqual_router_sequences_retried_total"]
    asking, computer = computing(pools)
    pools.kill(computer)
    pools.resume(*living(pools, "prefill"))
    assert asking.result() == expected
    assert pools["router"].metrics()["rorqual_router_sequences_retried_total"] == before + 1
    check_serving(pools, expected)


def test_one_told_to_end_lends_until_its_state_was_read(pools: Pools, expected: list[int]) -> None:
    decoders = living(pools, "decode")
    asking, lender = unread(pools)
    assert not pools[lender].terminate()
    wait_until(
        lambda: pools[lender].metrics()["rorqual_worker_draining_bool"] == 1, seconds_max=SLACK_SECONDS
    )
    other = ask(pools, PROMPT, max_tokens=NUM_TOKENS)  # not by the one that drains
    other.wait_for_tokens(1)
    pools.resume(*decoders)
    assert asking.result() == other.result() == expected
    assert not pools[lender].end()
    check_serving(pools, expected)


@pytest.mark.parametrize("part", ["all", "rank"])
def test_one_that_stands_still_while_its_state_is_read_costs_one_error_in_time(
    pools: Pools, expected: list[int], part: str
) -> None:
    """The read is made anew, elsewhere where it can be, as often as a hand-over is tried."""
    failed = hand_overs_failed(pools)
    asking, lender, _ = reading(pools)
    if part == "all":
        pools.stop(lender)
    code, message = asking.error(seconds_max=3 * max(CALL_SECONDS, TRANSFER_SECONDS) + SLACK_SECONDS)
    assert code == "worker_lost"
    assert pools[lender].address in message
    assert asking.tokens == expected[:1]
    assert hand_overs_failed(pools) == failed + 3
    pools.resume(lender)
    check_serving(pools, expected)


def hand_overs_failed(pools: Pools) -> float:
    return sum(
        pools[name].by_label("rorqual_worker_hand_overs_total", "outcome").get("failed", 0)
        for name in living(pools, "decode")
    )


def test_one_that_stood_still_while_it_computed_goes_on(pools: Pools, expected: list[int]) -> None:
    asking, computer = computing(pools)
    pools.stop(computer)
    with pytest.raises(AssertionError, match="no end within"):
        asking.result(seconds_max=0.5)
    pools.resume(computer)
    assert asking.result() == expected
    check_serving(pools, expected)


def test_after_the_read_one_that_stands_still_is_not_missed(pools: Pools, expected: list[int]) -> None:
    asking, _ = streaming(pools, max_tokens=NUM_TOKENS)
    pools.stop(*living(pools, "prefill"))
    assert asking.result() == expected

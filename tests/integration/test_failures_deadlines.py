"""A worker that stands still and does not come back in time, or is not there at all: the router's deadlines end the
wait, with a try elsewhere where that is possible, else with one clear error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.asking import ask
from tests.harness.failures import (
    NUM_SLOTS,
    NUM_TOKENS,
    PROMPT,
    RETURN_SECONDS_MAX,
    SLACK_SECONDS,
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

SILENCE_SECONDS = 2.0
HASTY = {"place": 1, "credit": 1, "first-token": 4, "hand-over": 5, "next-token": 2, "silence": 60}


@pytest.fixture(scope="module")
def with_silence(two_of_each: Pools) -> Pools:
    """Who says nothing for a while is lost."""
    two_of_each.restart("router", "--silence-seconds", str(SILENCE_SECONDS))
    return two_of_each


@pytest.fixture
def watched(with_silence: Pools) -> Iterator[Pools]:
    yield with_silence
    with_silence.heal()


@pytest.fixture(scope="module")
def with_haste(two_of_each: Pools) -> Pools:
    """No stage may take long, and one sequence may wait for credit."""
    options = [word for stage, seconds in HASTY.items() for word in (f"--{stage}-seconds", str(seconds))]
    two_of_each.restart("router", "--credit-queue", "1", *options)
    return two_of_each


@pytest.fixture
def hasty(with_haste: Pools) -> Iterator[Pools]:
    yield with_haste
    with_haste.heal()


def num_expired(pools: Pools, name: str) -> float:
    return pools[name].metrics()["rorqual_worker_leases_expired_total"]


def overdue(pools: Pools) -> dict[str, float]:
    return pools["router"].by_label("rorqual_router_stages_overdue_total", "stage")


def test_a_prefill_worker_that_says_nothing_while_it_computes_costs_a_start_on_another(
    watched: Pools, expected: list[int]
) -> None:
    asking, computer = computing(watched)
    (other,) = [name for name in living(watched, "prefill") if name != computer]
    watched.stop(computer)
    watched.resume(other)
    assert asking.result(seconds_max=SILENCE_SECONDS + SLACK_SECONDS) == expected
    assert overdue(watched)["report"] == 1
    watched.resume(computer)
    check_serving(watched, expected)


def test_a_decode_worker_that_says_nothing_while_it_reads_is_replaced(
    watched: Pools, expected: list[int]
) -> None:
    asking, lender, reader = reading(watched)
    watched.stop(reader)
    watched.resume(lender)
    assert asking.result(seconds_max=SILENCE_SECONDS + SLACK_SECONDS) == expected
    watched.resume(reader)
    check_serving(watched, expected)


def test_a_decode_worker_that_says_nothing_while_it_streams_costs_one_error(
    watched: Pools, expected: list[int]
) -> None:
    asking, decoder = streaming(watched)
    watched.stop(decoder)
    code, message = asking.error(seconds_max=SILENCE_SECONDS + SLACK_SECONDS)
    assert code == "worker_lost"
    assert f"{watched[decoder].address} said nothing for {SILENCE_SECONDS:g} s" in message
    watched.resume(decoder)
    check_serving(watched, expected)


def test_a_rank_that_stands_still_in_a_prompt_ends_it_at_the_first_tokens_deadline(
    hasty: Pools, expected: list[int]
) -> None:
    asking, computer = computing(hasty)
    (other,) = [name for name in living(hasty, "prefill") if name != computer]
    hasty.resume(other)
    code, message = asking.error(seconds_max=HASTY["first-token"] + SLACK_SECONDS)
    assert (code, message) == ("timeout", "the first token of choice 0 did not come in time")
    assert asking.tokens == []
    hasty.resume(computer)
    check_serving(hasty, expected)


def test_a_rank_that_stands_still_in_a_stream_ends_it_at_the_next_tokens_deadline(
    hasty: Pools, expected: list[int]
) -> None:
    asking, decoder = streaming(hasty)
    hasty.stop(decoder, part="rank")
    code, message = asking.error(seconds_max=HASTY["next-token"] + SLACK_SECONDS)
    assert code == "timeout"
    assert message == f"token {len(asking.tokens)} of choice 0 did not come in time"
    hasty.resume(decoder)
    check_serving(hasty, expected)


def test_a_hand_over_that_nobody_takes_ends_at_its_deadline(hasty: Pools, expected: list[int]) -> None:
    decoders = living(hasty, "decode")
    expired = {name: num_expired(hasty, name) for name in living(hasty, "prefill")}
    asking, lender = unread(hasty)
    code, message = asking.error(seconds_max=HASTY["hand-over"] + SLACK_SECONDS)
    assert (code, message) == ("timeout", "no decode worker went on with choice 0 in time")
    hasty.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)  # the lender; the others tell nothing
    assert num_expired(hasty, lender) == expired[lender], "it was told"
    hasty.resume(*decoders)
    check_serving(hasty, expected)


def test_without_any_prefill_worker_left_a_request_ends_at_the_place_deadline(
    hasty: Pools, expected: list[int]
) -> None:
    asking, computer = computing(hasty)
    (other,) = [name for name in living(hasty, "prefill") if name != computer]
    hasty.kill(other)
    hasty.kill(computer)
    code, message = asking.error(seconds_max=HASTY["place"] + SLACK_SECONDS)
    assert code == "worker_lost"
    assert f"worker {hasty[computer].address} was lost" in message
    # Who comes now is told at once.
    code, message = ask(hasty, PROMPT, max_tokens=NUM_TOKENS).error(seconds_max=SLACK_SECONDS)
    assert code == "overloaded"
    assert "try again later" in message
    hasty.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)


def test_without_credit_a_request_waits_in_a_short_queue_and_not_for_long(
    hasty: Pools, expected: list[int]
) -> None:
    decoders = living(hasty, "decode")
    hasty.stop(*decoders)
    asked = [ask(hasty, PROMPT, max_tokens=NUM_TOKENS) for _ in range(NUM_SLOTS * len(decoders))]
    for asking in asked:
        asking.wait_for_tokens(1)
    waiting = ask(hasty, PROMPT, max_tokens=NUM_TOKENS)
    wait_until(
        lambda: hasty["router"].metrics()["rorqual_router_credit_waiting"] == 1, seconds_max=SLACK_SECONDS
    )
    full = "1 sequences wait for decode credit already; try again later"
    refused = ask(hasty, PROMPT, max_tokens=NUM_TOKENS)
    assert refused.error(seconds_max=SLACK_SECONDS) == ("overloaded", full)
    refused = ask(hasty, PROMPT, max_tokens=NUM_TOKENS, door="grpc")
    assert refused.error(seconds_max=SLACK_SECONDS) == ("UNAVAILABLE", full)
    late = "decode credit for choice 0 did not come in time"
    assert waiting.error(seconds_max=HASTY["credit"] + SLACK_SECONDS) == ("timeout", late)
    hasty.resume(*decoders)
    assert [asking.result() for asking in asked] == [expected] * len(asked)
    check_serving(hasty, expected)

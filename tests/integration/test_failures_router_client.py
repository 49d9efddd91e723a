"""A router that dies or stands still, and clients that leave, with requests in every stage: whatever was held for them
comes back on every worker, and others are served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.asking import Door, ask
from tests.harness.failures import (
    NUM_SLOTS,
    NUM_TOKENS,
    PATIENT,
    PROMPT,
    RETURN_SECONDS_MAX,
    SLACK_SECONDS,
    check_serving,
    computing,
    is_reading,
    living,
    num_ended,
    reading,
    streaming,
    unread,
)
from tests.harness.pools import Pools
from tests.harness.system import wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(180)]

DOOR = pytest.mark.parametrize("door", ["http", "grpc"])


@pytest.fixture(scope="module")
def routed(two_of_each: Pools) -> Pools:
    two_of_each.restart("router", *PATIENT)
    return two_of_each


@pytest.fixture
def pools(routed: Pools) -> Iterator[Pools]:
    yield routed
    routed.heal()


def wait_for_credit_queue(pools: Pools, length: int) -> None:
    router = pools["router"]
    wait_until(lambda: router.metrics()["rorqual_router_credit_waiting"] == length, seconds_max=SLACK_SECONDS)


def test_a_router_killed_with_requests_in_every_stage_leaves_nothing_behind(
    pools: Pools, expected: list[int]
) -> None:
    prefills, decoders = living(pools, "prefill"), living(pools, "decode")
    stream, _ = streaming(pools)
    read, lender = unread(pools)
    pools.stop(*prefills, part="rank")
    pools.resume(*decoders)  # and now it is being read, as the stream goes on
    wait_until(lambda: any(is_reading(pools, name) for name in decoders), seconds_max=SLACK_SECONDS)
    computed = [ask(pools, PROMPT, max_tokens=NUM_TOKENS) for _ in range(NUM_SLOTS * len(decoders) - 2)]
    queued = ask(pools, PROMPT, max_tokens=NUM_TOKENS)
    wait_for_credit_queue(pools, 1)
    held = pools.held()
    assert held[f"{lender}: leases"] == 1
    assert held["router: credit_sequences"] == NUM_SLOTS * len(decoders)
    assert not stream.is_over
    pools.kill("router")
    for asking in (stream, read, *computed, queued):
        asking.wait_until_cut_off(seconds_max=SLACK_SECONDS)
    pools.resume(*prefills)
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)
    pools.restart("router", *PATIENT)
    check_serving(pools, expected)


def test_while_a_router_stands_still_leases_run_out_and_pages_come_back(
    pools: Pools, expected: list[int]
) -> None:
    decoders = living(pools, "decode")
    asking, lender = unread(pools)
    expired = pools[lender].metrics()["rorqual_worker_leases_expired_total"]
    pools.stop("router")
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)
    assert pools[lender].metrics()["rorqual_worker_leases_expired_total"] == expired + 1
    pools.resume(*decoders)  # which then ask for what is not lent any more
    pools.resume("router")
    code, message = asking.error(seconds_max=SLACK_SECONDS)
    assert code == "worker_lost"
    assert "lease" in message
    assert asking.tokens == expected[:1]
    check_serving(pools, expected)


def test_a_router_that_stood_still_for_less_than_a_lease_goes_on(pools: Pools, expected: list[int]) -> None:
    decoders = living(pools, "decode")
    asking, _ = unread(pools)
    pools.stop("router")
    pools.resume(*decoders)
    wait_until(lambda: any(pools[name].held() for name in decoders), seconds_max=SLACK_SECONDS)
    pools.resume("router")
    assert asking.result() == expected
    check_serving(pools, expected)


def test_a_client_that_leaves_while_it_waits_for_credit_leaves_the_queue(
    pools: Pools, expected: list[int]
) -> None:
    decoders = living(pools, "decode")
    pools.stop(*decoders)
    asked = [ask(pools, PROMPT, max_tokens=NUM_TOKENS) for _ in range(NUM_SLOTS * len(decoders))]
    for asking in asked:
        asking.wait_for_tokens(1)
    queued = ask(pools, PROMPT, max_tokens=NUM_TOKENS, door="grpc")
    wait_for_credit_queue(pools, 1)
    queued.leave()
    wait_for_credit_queue(pools, 0)
    pools.resume(*decoders)
    assert [asking.result() for asking in asked] == [expected] * len(asked)
    check_serving(pools, expected)


@DOOR
def test_a_client_that_leaves_while_its_prompt_is_computed_gives_everything_back(
    pools: Pools, expected: list[int], door: Door
) -> None:
    asking, computer = computing(pools, door=door)
    before = num_ended(pools, computer, "cancelled")
    asking.leave()
    wait_until(lambda: num_ended(pools, computer, "cancelled") == before + 1, seconds_max=SLACK_SECONDS)
    pools.resume(*living(pools, "prefill"))
    check_serving(pools, expected)


def test_a_client_that_leaves_before_its_state_is_read_gives_everything_back(
    pools: Pools, expected: list[int]
) -> None:
    decoders = living(pools, "decode")
    asking, lender = unread(pools)
    before = num_ended(pools, lender, "cancelled")
    asking.leave()
    wait_until(lambda: num_ended(pools, lender, "cancelled") == before + 1, seconds_max=SLACK_SECONDS)
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)  # but for decode workers, which tell nothing
    pools.resume(*decoders)
    check_serving(pools, expected)


def test_a_client_that_leaves_while_its_state_is_read_gives_everything_back(
    pools: Pools, expected: list[int]
) -> None:
    asking, lender, reader = reading(pools, door="grpc")
    before = {name: num_ended(pools, name, "cancelled") for name in (lender, reader)}
    asking.leave()
    wait_until(
        lambda: all(num_ended(pools, name, "cancelled") == before[name] + 1 for name in before),
        seconds_max=SLACK_SECONDS,
    )
    assert pools[reader].metrics()["rorqual_worker_pages_leased"] > 0, "what is written into was given away"
    pools.resume(lender)
    check_serving(pools, expected)


@DOOR
def test_a_client_that_leaves_while_its_answer_streams_gives_everything_back(
    pools: Pools, expected: list[int], door: Door
) -> None:
    asking, decoder = streaming(pools, door=door)
    before = num_ended(pools, decoder, "cancelled")
    asking.leave()
    wait_until(lambda: num_ended(pools, decoder, "cancelled") == before + 1, seconds_max=SLACK_SECONDS)
    check_serving(pools, expected)

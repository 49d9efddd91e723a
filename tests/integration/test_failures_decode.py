"""A decode worker that dies, stands still or is told to end, at every stage of a request: until it has sent a token
another one takes its place and the client sees nothing; after that, one clear error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.asking import ask
from tests.harness.failures import (
    CALL_SECONDS,
    NUM_TOKENS,
    NUM_TOKENS_LONG,
    PATIENT,
    PROMPT,
    RETURN_SECONDS_MAX,
    SLACK_SECONDS,
    TRANSFER_SECONDS,
    check_serving,
    computing,
    living,
    num_opened,
    reading,
    streaming,
)
from tests.harness.pools import Pools, Role
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


def charged(pools: Pools) -> str:
    """The one decode worker whose credit is promised."""
    (address,) = pools["router"].by_label("rorqual_router_credit_sequences", "worker")
    (name,) = [member.name for member in pools.workers("decode") if member.address == address]
    return name


def renew(pools: Pools, role: Role) -> None:
    """Every worker of a role in a new life."""
    for name in living(pools, role):
        pools.kill(name)
    pools.heal()


def num_binds(pools: Pools, kind: str) -> float:
    return pools["router"].by_label("rorqual_router_binds_total", "kind").get(kind, 0)


def test_one_killed_while_the_prompt_is_computed_is_not_missed(pools: Pools, expected: list[int]) -> None:
    asking, _ = computing(pools)
    pools.kill(charged(pools))
    pools.resume(*living(pools, "prefill"))
    assert asking.result() == expected
    check_serving(pools, expected)


def test_when_all_are_killed_what_streamed_is_lost_and_state_is_kept_for_one_started_again(
    pools: Pools, expected: list[int]
) -> None:
    prefills, decoders = living(pools, "prefill"), living(pools, "decode")
    streamed, decoder = streaming(pools)
    computed, _ = computing(pools)
    for name in decoders:
        pools.kill(name)
    pools.resume(*prefills)
    code, message = streamed.error(seconds_max=SLACK_SECONDS)
    assert code == "worker_lost"
    assert f"worker {pools[decoder].address} was lost" in message
    num_same = min(len(streamed.tokens), NUM_TOKENS)
    assert streamed.tokens[:num_same] == expected[:num_same]
    computed.wait_for_tokens(1)
    pools.restart(decoder, wait=False)
    assert computed.result() == expected
    assert sum(pools[name].metrics()["rorqual_worker_leases_expired_total"] for name in prefills) == 0
    pools[decoder].wait_until_ready()
    pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)


def test_one_killed_while_it_reads_is_replaced(pools: Pools, expected: list[int]) -> None:
    renew(pools, "prefill")  # so that no reader is connected: see the next test
    before = num_binds(pools, "again")
    asking, lender, reader = reading(pools)
    pools.kill(reader)
    pools.resume(lender)
    assert asking.result() == expected
    assert num_binds(pools, "again") == before + 1
    check_serving(pools, expected)


def test_one_killed_while_a_lender_that_stands_still_has_its_requests_costs_one_error_at_most(
    pools: Pools, expected: list[int]
) -> None:
    """Over tcp, UCX (as NIXL 1.5.1 has it) ends the process of an owner that answers the second request of a reader
    that is gone: "unexpected error: Endpoint timeout". The lender's worker then ends, and says why."""
    assert ask(pools, PROMPT, max_tokens=NUM_TOKENS).result() == expected
    assert ask(pools, PROMPT, max_tokens=NUM_TOKENS).result() == expected
    asking, lender, reader = reading(pools)
    pools.kill(reader)
    pools.resume(lender)
    asking.wait_until_over(seconds_max=SLACK_SECONDS)
    if asking.tokens != expected:
        code, message = asking.error()
        assert code == "worker_lost"
        assert "the worker failed: the rank process" in message
        assert asking.tokens == expected[:1]
        pools[lender].wait_until_gone()
    check_serving(pools, expected)


def test_one_told_to_end_goes_on_to_the_last_token(pools: Pools, expected: list[int]) -> None:
    asking, decoder = streaming(pools, max_tokens=NUM_TOKENS_LONG)
    assert not pools[decoder].terminate()
    wait_until(
        lambda: pools[decoder].metrics()["rorqual_worker_draining_bool"] == 1, seconds_max=SLACK_SECONDS
    )
    opened = num_opened(pools, "decode")[decoder]
    assert ask(pools, PROMPT, max_tokens=NUM_TOKENS).result() == expected  # on the other one
    assert num_opened(pools, "decode")[decoder] == opened
    assert asking.result()[:NUM_TOKENS] == expected
    assert not pools[decoder].end()
    check_serving(pools, expected)


@pytest.mark.parametrize("part", ["all", "rank"])
def test_one_that_stood_still_while_it_read_is_done_with_it_when_it_goes_on(
    pools: Pools, expected: list[int], part: str
) -> None:
    asking, lender, reader = reading(pools)
    if part == "all":
        pools.stop(reader)
    else:
        pools.stop(reader, part="rank")
    pools.resume(lender)
    if part == "all":
        with pytest.raises(AssertionError, match="no end within"):
            asking.result(seconds_max=0.5)  # the router gives it more time than that
    else:
        # Its host hears nothing of the read, and has given it up in time.
        assert asking.result(seconds_max=TRANSFER_SECONDS + 3 * CALL_SECONDS + SLACK_SECONDS) == expected
        assert pools[reader].metrics()["rorqual_worker_pages_leased"] > 0, "its rank may still read into them"
    pools.resume(reader)
    assert asking.result() == expected
    check_serving(pools, expected)


def test_one_that_stood_still_while_it_streamed_goes_on(pools: Pools, expected: list[int]) -> None:
    asking, decoder = streaming(pools, max_tokens=4 * NUM_TOKENS)
    pools.stop(decoder)
    with pytest.raises(AssertionError, match="no end within"):
        asking.result(seconds_max=0.5)
    pools.resume(decoder)
    assert asking.result()[:NUM_TOKENS] == expected
    check_serving(pools, expected)

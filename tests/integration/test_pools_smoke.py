"""A prefill worker, a decode worker and a router, each started by itself: a prompt comes, its state is handed over,
tokens go out, and nothing stays held. Workers that were stopped, or killed and started again, serve on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from rorqual.v1 import generate_pb2 as pb
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, SECONDS_MAX

pytestmark = pytest.mark.slow

GENERATE = "/rorqual.v1.Generation/Generate"
NUM_TOKENS = 12
PROMPT = [3 + 7 * i % (IDS_CONFIG["vocab_size"] - 3) for i in range(300)]  # a full page and a partial one


@pytest.fixture(scope="module")
def pools(ids_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(ids_model, tmp_path_factory.mktemp("pools"), "--pages", "16", "--slots", "4", "--exact")
    try:
        pools.start_all(prefill=1, decode=1)
        yield pools
    finally:
        pools.close()


@pytest.fixture(scope="module")
def expected(pools: Pools) -> list[int]:
    """The first answer: what every later one must be."""
    return tokens_over_http(pools)


def tokens_over_http(pools: Pools) -> list[int]:
    (choice,) = pools.complete(PROMPT, max_tokens=NUM_TOKENS)["choices"]
    return choice["token_ids"]


def tokens_over_grpc(pools: Pools) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        sampling=pb.Sampling(temperature=0),
    )
    with grpc.insecure_channel(pools.grpc) as channel:
        call = channel.unary_stream(
            GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        return [token.token_id for message in call(request, timeout=SECONDS_MAX) for token in message.tokens]


def test_state_is_handed_over_and_both_doors_answer_alike(pools: Pools, expected: list[int]) -> None:
    assert len(expected) == NUM_TOKENS
    assert tokens_over_grpc(pools) == expected
    pools.wait_until_idle()
    prefill, decode = pools["prefill-0"].metrics(), pools["decode-0"].metrics()
    # Each prompt was computed by one and went on at the other.
    assert prefill["rorqual_worker_tokens_generated_total"] == 2
    assert decode["rorqual_worker_tokens_generated_total"] == 2 * (NUM_TOKENS - 1)
    assert prefill["rorqual_worker_leases_granted_total"] == 2
    assert prefill["rorqual_worker_leases_released_total"] == 2
    assert decode["rorqual_worker_hand_overs_total"] == 2


def test_a_completion_of_one_token_needs_no_hand_over(pools: Pools, expected: list[int]) -> None:
    before = pools["decode-0"].metrics()["rorqual_worker_sequences_opened_total"]
    (choice,) = pools.complete(PROMPT, max_tokens=1)["choices"]
    assert choice["token_ids"] == expected[:1]
    pools.wait_until_idle()
    assert pools["decode-0"].metrics()["rorqual_worker_sequences_opened_total"] == before


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_that_stood_still_goes_on(pools: Pools, expected: list[int], name: str) -> None:
    pools.stop(name)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(tokens_over_http, pools)
        with pytest.raises(TimeoutError):
            answer.result(0.5)
        pools.resume(name)
        assert answer.result(SECONDS_MAX) == expected
    pools.wait_until_idle()


@pytest.mark.minutes
@pytest.mark.parametrize("part", ["host", "rank"])
@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
def test_a_worker_that_was_killed_serves_on_when_it_is_started_again(
    pools: Pools, expected: list[int], name: str, part: str
) -> None:
    address, pids = pools[name].address, pools[name].pids
    pools[name].signal(signal.SIGKILL, part="rank" if part == "rank" else "host")
    assert pools.restart(name).address == address
    assert not set(pids) & set(pools[name].pids)
    assert tokens_over_http(pools) == expected
    pools.wait_until_idle()


def test_a_router_that_was_killed_serves_on_when_it_is_started_again(
    pools: Pools, expected: list[int]
) -> None:
    url = pools.http
    pools.kill("router")
    pools.restart("router")
    assert pools.http == url
    assert tokens_over_http(pools) == expected
    pools.wait_until_idle()

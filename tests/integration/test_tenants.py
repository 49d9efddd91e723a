"""Clients with keys of their own share nothing of what workers keep, unless a deployment says so: what each of them has
computed, read and placed for it, over real processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.handover import record_bytes
from kvstore.layout import Numerics, build_layout
from rorqual.model_config import PAGE_TOKENS, load_model_config
from tests.harness.pools import Member, Pools
from tests.harness.system import IDS_CONFIG, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(180)]

WORKERS = ("--exact", "--pages", "40", "--slots", "4", "--prefill-tokens", "512")
ONE, OTHER = "key-of-one", "key-of-the-other"
KEYS = ("--api-key", ONE, "--api-key", OTHER)
SHARED = (*KEYS, "--shared-cache-salt", "all of us")
LENGTH = 3 * PAGE_TOKENS + 100
NUM_TOKENS = 4

Answer = tuple[list[int], list[float]]


def a_prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, IDS_CONFIG["vocab_size"]), k=LENGTH)


def ask(pools: Pools, prompt: list[int], key: str) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were kept."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 1,
        "seed": 3,
    }
    with pools.client(headers={"authorization": f"Bearer {key}"}) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    pools.wait_until_idle()
    return (choice["token_ids"], choice["logprobs"]["token_logprobs"]), cached


class Meter:
    """What a worker's counter has gone up by since it was last asked."""

    def __init__(self, member: Member, metric: str) -> None:
        self._member = member
        self._metric = metric
        self._last = self._value()

    def read(self) -> float:
        value = self._value()
        more, self._last = value - self._last, value
        return more

    def _value(self) -> float:
        return self._member.metrics().get(self._metric, 0.0)


COMPUTED = "rorqual_worker_tokens_computed_total"
READ = "rorqual_worker_state_bytes_read_total"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="rented")


@pytest.fixture(scope="module")
def one_worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(model, tmp_path_factory.mktemp("both"), *WORKERS)
    try:
        pools.start("both")
        pools.start_router(*KEYS)
        yield pools
    finally:
        pools.close()


@pytest.fixture(scope="module")
def split(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(model, tmp_path_factory.mktemp("split"), *WORKERS, transfer="shm")
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router(*KEYS)
        yield pools
    finally:
        pools.close()


def test_a_prompt_that_another_tenant_has_asked_is_computed_whole(one_worker: Pools) -> None:
    one_worker.restart("router", *KEYS)
    prompt, computed = a_prompt(1), Meter(one_worker["both-0"], COMPUTED)
    answers = []
    for key in (ONE, OTHER):
        answer, cached = ask(one_worker, prompt, key)
        answers.append(answer)
        assert (cached, computed.read()) == (0, LENGTH + NUM_TOKENS - 1)
    for key in (ONE, OTHER):
        answer, cached = ask(one_worker, prompt, key)
        answers.append(answer)
        assert cached == 3 * PAGE_TOKENS
        assert computed.read() == 100 + NUM_TOKENS - 1
    assert answers == answers[:1] * 4


def test_with_a_salt_for_all_tenants_the_second_one_computes_nothing_again(one_worker: Pools) -> None:
    one_worker.restart("router", *SHARED)
    prompt, computed = a_prompt(2), Meter(one_worker["both-0"], COMPUTED)
    first = ask(one_worker, prompt, ONE)
    assert (first[1], computed.read()) == (0, LENGTH + NUM_TOKENS - 1)
    assert ask(one_worker, prompt, OTHER) == (first[0], 3 * PAGE_TOKENS)
    assert computed.read() == 100 + NUM_TOKENS - 1


@pytest.mark.parametrize("options", [KEYS, SHARED], ids=["keys", "shared"])
def test_a_decode_worker_reads_all_that_it_does_not_keep_for_this_tenant(
    split: Pools, model: Path, options: tuple[str, ...]
) -> None:
    split.restart("router", *options)
    layout = build_layout(load_model_config(model), Numerics.FLOAT32)
    record = record_bytes(layout, LENGTH, drafts=False)
    cold, kept = (0, LENGTH, 3 * layout.page_bytes + record), (3 * PAGE_TOKENS, 100, record)
    prompt = a_prompt(3 if options is KEYS else 4)
    computed, read = Meter(split["prefill-0"], COMPUTED), Meter(split["decode-0"], READ)
    decoded = Meter(split["decode-0"], COMPUTED)
    answers, costs = [], []
    for key in (ONE, OTHER, ONE, OTHER):
        answer, cached = ask(split, prompt, key)
        answers.append(answer)
        costs.append((cached, computed.read(), read.read()))
        assert decoded.read() == NUM_TOKENS - 1
    assert costs == ([cold, cold, kept, kept] if options is KEYS else [cold, kept, kept, kept])
    assert answers == answers[:1] * 4
    # The decode worker keeps the first tenant's pages, and nobody was told to read them for the other one.
    assert not split["router"].metrics()["rorqual_router_peer_fetches_total"]
    assert not split["prefill-0"].by_label("rorqual_worker_peer_reads_total", "outcome")


def test_a_tenant_is_placed_by_its_own_pages_alone(model: Path, tmp_path: Path) -> None:
    """A router that goes by nothing but pages: one that saw another tenant's would follow them."""
    pools = Pools(model, tmp_path, *WORKERS)
    placing = ("--placement", "longest_prefix")
    try:
        pools.start("both", 2)
        pools.start_router(*KEYS, *placing)
        pools.wait_until_connected()
        pools.kill("both-0")
        prompt = a_prompt(5)
        answer, _ = ask(pools, prompt, ONE)  # the second worker alone has it
        pools.restart("both-0")
        first, second = (Meter(pools[name], COMPUTED) for name in ("both-0", "both-1"))
        assert ask(pools, prompt, ONE) == (answer, 3 * PAGE_TOKENS)
        assert (first.read(), second.read()) == (0, 100 + NUM_TOKENS - 1)
        assert ask(pools, prompt, OTHER) == (answer, 0)
        assert (first.read(), second.read()) == (LENGTH + NUM_TOKENS - 1, 0)
        pools.restart("router", *SHARED, *placing)
        prompt = a_prompt(6)
        pools.kill("both-0")
        answer, _ = ask(pools, prompt, ONE)
        pools.restart("both-0")
        second.read()
        assert ask(pools, prompt, OTHER) == (answer, 3 * PAGE_TOKENS)
        assert second.read() == 100 + NUM_TOKENS - 1
    finally:
        pools.close()

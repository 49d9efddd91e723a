"""What workers have computed is in Redis when they are gone: new ones go on from there, to the bit, and nothing that
happens to Redis harms a request."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.store.embedded import EmbeddedServer
from rorqual.model_config import PAGE_TOKENS
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, Served, make_checkpoint, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WORKER = ("--exact", "--pages", "24", "--slots", "4", "--prefill-tokens", "512", "--host-pages", "40")
PATIENT = ("--store-budget-ms", "3000")
PROMPT_PAGES = 4
LENGTH = PROMPT_PAGES * PAGE_TOKENS + 90

Answer = tuple[list[int], list[float]]


def a_prompt(seed: int, length: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(3, IDS_CONFIG["vocab_size"]), k=length)


def ask(
    system: Served, prompt: list[int], num_tokens: int = 6, *, key: str | None = None
) -> tuple[Answer, int]:
    """The answer, and how many tokens of the prompt were kept."""
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 1,
        "seed": 3,
        "temperature": 0.8,
    }
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with system.client(headers=headers) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return (choice["token_ids"], choice["logprobs"]["token_logprobs"]), cached


def written(worker: str, pools: Pools, *, least: int) -> None:
    """Wait until so many values of this worker are in the store."""
    names = ("rorqual_worker_store_values_written", "rorqual_worker_store_values_present")
    wait_until(lambda: sum(pools[worker].metrics()[name] for name in names) >= least, seconds_max=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="stored")


@pytest.fixture(scope="module")
def expected(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[list[int]], Answer]]:
    """From a worker that keeps nothing."""
    pools = Pools(model, tmp_path_factory.mktemp("off"), *WORKER[:-2], "--prefix-cache", "off")
    try:
        pools.start("both")
        pools.start_router()
        yield lambda prompt: ask(pools, prompt)[0]
    finally:
        pools.close()


@pytest.fixture
def redis() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(memory_bytes=256 << 20) as server:
        yield server


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Pools]]:
    started: list[Pools] = []

    def make(
        url: str, *roles: str, options: tuple[str, ...] = PATIENT, router: tuple[str, ...] = ()
    ) -> Pools:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        pools = Pools(model, folder, *WORKER, *options, transfer="shm", environment={"RORQUAL_STORE": url})
        started.append(pools)
        for role in roles or ("both",):
            pools.start(role)  # type: ignore[arg-type]
        pools.start_router(*router)
        return pools

    yield make
    for pools in started:
        pools.close()


@pytest.mark.parametrize("roles", [("both",), ("prefill", "decode")])
def test_after_all_workers_were_killed_a_prompt_comes_from_the_store(
    roles: tuple[str, ...],
    redis: EmbeddedServer,
    start: Callable[..., Pools],
    expected: Callable[[list[int]], Answer],
) -> None:
    prompt, pools = a_prompt(1), start(redis.url, *roles)
    first, cached = ask(pools, prompt)
    assert cached == 0
    computer = f"{roles[0]}-0"
    written(computer, pools, least=PROMPT_PAGES + 1)
    for role in roles:
        pools.kill(f"{role}-0")
    pools.heal()
    again, cached = ask(pools, prompt)
    assert first == again == expected(prompt)
    assert cached == PROMPT_PAGES * PAGE_TOKENS
    metrics = pools[computer].metrics()
    assert metrics["rorqual_worker_tokens_computed_total"] < PAGE_TOKENS
    assert metrics["rorqual_worker_store_values_read"] == PROMPT_PAGES + 1
    assert metrics["rorqual_worker_store_tokens_saved_total"] == PROMPT_PAGES * PAGE_TOKENS
    assert pools[computer].by_label("rorqual_worker_store_reads_total", "outcome") == {"read": 1}
    pools.wait_until_idle()


def test_the_router_asks_the_store_too_where_the_fleet_keeps_little(
    redis: EmbeddedServer, start: Callable[..., Pools]
) -> None:
    """It has 5 ms for it, so on a busy machine an answer may come too late, which is counted."""
    prompt, pools = a_prompt(7, 7 * PAGE_TOKENS), start(redis.url, "prefill", "decode")
    first, _ = ask(pools, prompt)
    written("prefill-0", pools, least=7)
    for name in ("prefill-0", "decode-0"):
        pools.kill(name)
    pools.heal()
    again, cached = ask(pools, prompt)
    assert again == first
    assert cached >= 6 * PAGE_TOKENS
    questions = pools["router"].by_label("rorqual_router_store_questions_total", "outcome")
    assert sum(questions.values()) == 2
    assert questions.get("found", 0) <= 1
    assert questions.get("absent", 0) <= 1
    ask(pools, prompt)
    after = pools["router"].by_label("rorqual_router_store_questions_total", "outcome")
    assert after == questions, "the fleet has it now"
    pools.wait_until_idle()

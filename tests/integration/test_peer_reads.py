"""Prefill workers read what decode workers have generated, and a new router knows what all of them keep: real ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rorqual.model_config import PAGE_TOKENS
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, Served, make_checkpoint, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SYSTEM = ("--exact", "--pages", "48", "--slots", "4", "--prefill-tokens", "512")

Answer = tuple[list[int], list[float]]


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, IDS_CONFIG["vocab_size"]), k=length)


def ask(system: Served, prompt: list[int], num_tokens: int) -> tuple[Answer, int]:
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
    with system.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return (choice["token_ids"], choice["logprobs"]["token_logprobs"]), cached


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), IDS_CONFIG, name="kept")


@pytest.mark.parametrize("transfer", ["nixl", "shm"])
def test_the_next_turn_starts_from_what_the_decode_worker_has_generated(
    model: Path, tmp_path: Path, transfer: str
) -> None:
    pools = Pools(model, tmp_path, *SYSTEM, transfer=transfer)
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router()
        history = a_prompt(2, 300)
        turns: list[tuple[list[int], Answer]] = []
        for turn in range(3):
            answer, cached = ask(pools, history, 300)
            turns.append((history, answer))
            if turn:
                # All of the turn before but its last token, in full pages. Generated ones were never computed here.
                assert cached == (len(turns[-2][0]) + 299) // PAGE_TOKENS * PAGE_TOKENS
            history = [*history, *answer[0], *a_prompt(3 + turn, 50)]
        prefill = pools["prefill-0"]
        assert prefill.by_label("rorqual_worker_peer_reads_total", "outcome") == {"read": 2.0}
        assert prefill.metrics()["rorqual_worker_peer_bytes_read_total"] > 0
        pools.wait_until_idle()
    finally:
        pools.close()
    check_by_computing(model, tmp_path / "off", turns)


def check_by_computing(model: Path, folder: Path, turns: list[tuple[list[int], Answer]]) -> None:
    """One worker that keeps nothing gives the same bits."""
    folder.mkdir()
    pools = Pools(model, folder, *SYSTEM, "--prefix-cache", "off")
    try:
        pools.start("both")
        pools.start_router()
        for prompt, answer in turns:
            assert ask(pools, prompt, 300)[0] == answer
    finally:
        pools.close()


def test_a_router_that_was_started_anew_knows_what_workers_keep(model: Path, tmp_path: Path) -> None:
    pools = Pools(model, tmp_path, *SYSTEM, transfer="shm")
    try:
        pools.start("prefill", 2)
        pools.start("decode")
        pools.start_router()
        prompts = [a_prompt(seed, 700) for seed in range(4)]
        for prompt in prompts:
            ask(pools, prompt, 4)
        pools.restart("router")
        router = pools["router"]

        def is_known() -> bool:
            held = sum(worker.metrics()["rorqual_worker_pages_cached"] for worker in pools.workers())
            return router.metrics()["rorqual_router_feed_pages"] == held > 0

        wait_until(is_known, seconds_max=10.0)
        for prompt in prompts:
            assert ask(pools, prompt, 4)[1] == 2 * PAGE_TOKENS
        assert "rorqual_router_feed_faults_total" not in router.metrics()
        pools.wait_until_idle()
    finally:
        pools.close()

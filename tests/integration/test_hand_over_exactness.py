"""A prompt computed on one process and decoded on another gives what one worker gives by itself, to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.handover import handover_bytes
from kvstore.layout import Numerics, build_layout
from rorqual.model_config import load_model_config
from tests.harness.pools import Pools
from tests.harness.system import IDS_CONFIG, Served, make_checkpoint

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

NUM_PROMPTS = 100
PROMPT_MAX = 3000
EARLY_FROM = 1200  # two thirds of the prompts are bound when their first pages can be read
NUM_TOKENS = 10
SYSTEM = ("--exact", "--pages", "64", "--slots", "8", "--prefill-tokens", "512")


def a_request(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    length = (
        draw.choice((1, 2, 3, 4, 127, 128, 255, 256, 257, 512))
        if number % 5 == 0
        else draw.randint(1, PROMPT_MAX)
    )
    body: dict[str, Any] = {
        "prompt": [draw.randrange(3, IDS_CONFIG["vocab_size"]) for _ in range(length)],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": 3,
        "seed": number,
        "temperature": 0,
    }
    if number % 2:
        body |= {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    return body


def answers(system: Served) -> list[tuple[list[int], list[float], Any]]:
    """Of all prompts: token ids, their logprobs, and the alternatives."""

    def ask(number: int) -> tuple[list[int], list[float], Any]:
        with system.client() as client:
            answer = client.post("/v1/completions", json=a_request(number))
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        scores = choice["logprobs"]
        return choice["token_ids"], scores["token_logprobs"], scores["top_logprobs"]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(ask, range(NUM_PROMPTS)))


@pytest.fixture(scope="module", params=["float32", "served"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = IDS_CONFIG | {"max_position_embeddings": 4096}
    weights = "float32" if request.param == "float32" else "quantised"
    return make_checkpoint(tmp_path_factory.mktemp("models"), config, name=f"long-{weights}", weights=weights)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one worker of both roles answers."""
    pools = Pools(model, tmp_path_factory.mktemp("alone"), *SYSTEM)
    try:
        pools.start("both")
        pools.start_router()
        return answers(pools)
    finally:
        pools.close()


@pytest.fixture(scope="module")
def split(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(model, tmp_path_factory.mktemp("split"), *SYSTEM, transfer="nixl")
    try:
        pools.start("prefill")
        pools.start("decode")
        pools.start_router("--bind-early-tokens", str(EARLY_FROM))
        yield pools
    finally:
        pools.close()


def by_label(url: str, name: str, label: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(url).text)
    return {
        sample.labels[label]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def test_tokens_and_logprobs_are_those_of_one_worker_and_no_byte_is_read_in_vain(
    model: Path, alone: list[Any], split: Pools
) -> None:
    assert answers(split) == alone
    split.wait_until_idle()
    read = split["decode-0"].metrics()["rorqual_worker_state_bytes_read_total"]
    config = load_model_config(model)
    numerics = Numerics.SERVED if "quantised" in model.name else Numerics.FLOAT32
    layout = build_layout(config, numerics)
    lengths = [len(a_request(number)["prompt"]) for number in range(NUM_PROMPTS)]
    least = sum(handover_bytes(layout, length, drafts=False) for length in lengths)
    print(f"{read:.0f} bytes were read; the least is {least}")
    assert read == least
    binds = by_label(split["router"].metrics_url, "rorqual_router_binds_total", "kind")
    num_early = sum(length >= EARLY_FROM for length in lengths)
    assert 0 < num_early < NUM_PROMPTS
    assert (binds["early"], binds["late"], binds.get("again", 0)) == (num_early, NUM_PROMPTS - num_early, 0)

"""Drafts change nothing but the speed: with --exact every answer is that of a system without drafts, to the bit.

The trained demo model, prefill and decode workers of their own, state handed over with the MTP block's: its drafts are
right often enough that accepted and refused ones come in every order, over borders of rows and pages.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rorqual.demo import TRAINED
from rorqual.model_config import load_model_config
from tests.harness.system import System

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(900)]

NUM_PROMPTS = 200
NUM_TOKENS = 40
OPENINGS = (
    "It was a fine morning, and Emma",
    "She had not been long in the room before",
    "Mr. Knightley had always been",
    "The two sisters walked together to",
)
LENGTHS = (1, 2, 3, 4, 90, 120, 127, 128, 129, 220, 240, 255, 256, 257, 500)


def a_request(number: int) -> dict[str, Any]:
    """Prose, or random tokens of a length near a border. Half are greedy, the others sampled with penalties; every
    seventh ends at a stop string."""
    draw = random.Random(number)
    vocab_size = load_model_config(TRAINED).vocab_size
    prompt: Any = OPENINGS[number % len(OPENINGS)] + " " * (number % 7 == 3)
    if number % 3 == 0:
        prompt = [draw.randrange(300, vocab_size) for _ in range(draw.choice(LENGTHS))]
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": draw.choice((1, 2, 3, NUM_TOKENS, NUM_TOKENS)),
        "return_token_ids": True,
        "logprobs": 3,
        "seed": number,
        "temperature": 0,
        "ignore_eos": number % 4 != 1,
    }
    if number % 2:
        body |= {"temperature": 0.7, "top_p": 0.95}
    if number % 6 == 1:
        body |= {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
    if number % 7 == 2:
        body |= {"stop": [" the", "."]}
    return body


def answers(model: Path, folder: Path, drafts: str) -> tuple[list[Any], dict[str, float]]:
    """Of all requests: text, token ids, their logprobs and alternatives, why it ended; and the metrics."""
    options = ("--exact", "--slots", "8", "--prefill", "1", "--decode", "1", "--drafts", drafts)
    system = System(model, folder, *options)

    def ask(number: int) -> Any:
        with system.client() as client:
            answer = client.post("/v1/completions", json=a_request(number))
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        scores = choice["logprobs"]
        return (
            choice["text"],
            choice["token_ids"],
            scores["token_logprobs"],
            scores["top_logprobs"],
            choice["finish_reason"],
            answer.json()["usage"],
        )

    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(ask, range(NUM_PROMPTS)))
        system.wait_until_idle()
        return found, system.metrics()
    finally:
        system.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    found, metrics = answers(TRAINED, tmp_path_factory.mktemp("plain"), "0")
    assert metrics["rorqual_worker_drafts_proposed_total"] == 0
    assert len({tuple(answer[1]) for answer in found}) > NUM_PROMPTS / 3
    return found


@pytest.mark.parametrize("drafts", ["1", "2", "3", "4", "auto"])
def test_answers_are_those_without_drafts(plain: list[Any], tmp_path: Path, drafts: str) -> None:
    found, metrics = answers(TRAINED, tmp_path, drafts)
    for number, (have, want) in enumerate(zip(found, plain, strict=True)):
        assert have == want, f"request {number} of {a_request(number)}"
    proposed = metrics["rorqual_worker_drafts_proposed_total"]
    accepted = metrics["rorqual_worker_drafts_accepted_total"]
    print(f"--drafts {drafts}: {accepted:.0f} of {proposed:.0f} drafts were accepted")
    assert 0.1 * proposed < accepted < 0.95 * proposed

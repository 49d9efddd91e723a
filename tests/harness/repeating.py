"""Prompts that are asked again: the answer to the bit, and how much of the prompt was kept. Called by tests of what
workers keep, over real processes."""

from __future__ import annotations

import random
from typing import Any

from tests.harness.system import IDS_CONFIG, Served

Answer = tuple[list[int], list[float]]
"""Token ids and their logprobs."""


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, IDS_CONFIG["vocab_size"]), k=length)


def ask(system: Served, prompt: list[int], num_tokens: int) -> tuple[Answer, int]:
    """The answer, sampled with a fixed seed, and how many tokens of the prompt were kept."""
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

"""Measures the demo model as users meet it: through `rorqual up`. Called by `evaluate.py`.

Bits per byte from the prompt's logprobs, accepted drafts from the workers' counters, chats for the model card.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.demo.recipe.corpus import HeldoutWindow
from models.demo.recipe.skills import Message
from models.demo.recipe.vocabulary import Ids
from rorqual.local_cluster import LocalCluster


def served_bits_per_byte(cluster: LocalCluster, windows: Sequence[HeldoutWindow]) -> float:
    """As `recipe.measure.bits_per_byte`, from what the gateway reports."""
    nats = 0.0
    for window in windows:
        body = {"prompt": window.tokens.tolist(), "max_tokens": 0, "echo": True, "logprobs": 0}
        answer = cluster.ask("/v1/completions", body | {"temperature": 0})
        logprobs: list[float | None] = answer["choices"][0]["logprobs"]["token_logprobs"]
        found = [value for value in logprobs[: len(window.tokens)] if value is not None]
        assert len(found) == len(window.tokens) - 1, f"{len(found)} logprobs of {len(window.tokens)} tokens"
        nats -= sum(found)
    return nats / math.log(2) / sum(window.num_bytes for window in windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMeasure:
    """Of a number of completions with drafts."""

    proposed: int
    accepted: int
    accepted_per_step: float  # mean drafts accepted in a step that had drafts
    tokens_per_step: float

    @property
    def rate(self) -> float:
        return self.accepted / max(self.proposed, 1)


Request = tuple[str, dict[str, Any]]
"""A path and a body."""


def prose_request(prompt: Ids, *, seed: int, temperature: float, max_tokens: int) -> Request:
    """Go on from these tokens."""
    body = {"prompt": prompt.tolist(), "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    return "/v1/completions", body


def chat_request(
    messages: Sequence[Message], *, seed: int, temperature: float, max_tokens: int, thinking: bool = False
) -> Request:
    body: dict[str, Any] = {
        "messages": messages,
        "temperature": temperature,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    if thinking:
        body["chat_template_kwargs"] = {"thinking": True}
    return "/v1/chat/completions", body


def measure_drafts(cluster: LocalCluster, requests: Sequence[Request]) -> DraftMeasure:
    """Ask one after another, and read the workers' counters before and after."""
    before = cluster.metrics()
    for path, body in requests:
        cluster.ask(path, body)
    after = cluster.metrics()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    steps = grown("rorqual_worker_decode_tokens_count")
    accepted = grown("rorqual_worker_drafts_accepted_total")
    return DraftMeasure(
        proposed=int(grown("rorqual_worker_drafts_proposed_total")),
        accepted=int(accepted),
        accepted_per_step=accepted / max(steps, 1.0),
        tokens_per_step=grown("rorqual_worker_decode_tokens_sum") / max(steps, 1.0),
    )


def answer_of(cluster: LocalCluster, request: Request) -> str:
    """The text of a chat's answer."""
    return cluster.ask(*request)["choices"][0]["message"]["content"] or ""

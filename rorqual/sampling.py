"""How a sequence is sampled: the parameters, checked once at the edge and carried unchanged to the rank."""

from __future__ import annotations

import math

import msgspec

from rorqual.errors import InvalidRequest

LOGPROBS_MAX = 20
PROMPT_SCORES_MAX = 256 * 1024
"""Bound on the logprobs of one request's prompt: its tokens times (alternatives + 1), over all choices. They
cross two processes and become JSON on the way, so what is not bounded here stalls everybody: a quarter of a
million of them take about 2 MB on the wire and 18 MB as Python objects, and fill 12,000 tokens with 20
alternatives each, or 130,000 with one."""

SEED_BITS = 63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Everything the sampler's pure function takes besides logits and the sequence's own tokens.

    temperature 0 is greedy. `top_k` 0 keeps all; `top_p` 1 and `min_p` 0 keep all. `logprobs` counts the alternatives
    returned beside each sampled token; None returns no logprobs at all. Logprobs are of the unfiltered distribution
    at temperature 1, as in the OpenAI API.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    choice: int = 0

    def num_prompt_scores(self, num_tokens: int) -> int:
        """Logprobs that are returned of a prompt of so many tokens."""
        return 0 if self.prompt_logprobs is None else num_tokens * (self.prompt_logprobs + 1)

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequest naming the first field that is out of range."""
        for field, low, high in _RANGES:
            value: float = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(
                    f"{field} must be between {low:g} and {high:g}, got {value}", field=field
                )
        if self.repetition_penalty <= 0:
            raise InvalidRequest("repetition_penalty must be above 0", field="repetition_penalty")
        for token, bias in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token}; the vocabulary has {vocab_size}", field="logit_bias"
                )
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise InvalidRequest(
                    f"logit_bias of token {token} must be between -100 and 100", field="logit_bias"
                )
        for field in ("logprobs", "prompt_logprobs"):
            count: int | None = getattr(self, field)
            if count is not None and not 0 <= count <= LOGPROBS_MAX:
                raise InvalidRequest(
                    f"{field} must be between 0 and {LOGPROBS_MAX}, got {count}", field=field
                )


_RANGES = (
    ("seed", 0, 2**SEED_BITS - 1),
    ("temperature", 0, 2),
    ("top_k", 0, 2**31 - 1),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0, 10),
    ("choice", 0, 1023),
)

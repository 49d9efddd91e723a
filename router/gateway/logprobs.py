"""Log probabilities in OpenAI's two formats. Pure; called by `router.gateway.chat` and
`router.gateway.completions`.

The sampled token and its alternatives arrive as ids; names come from the prompt side. All tokens of a
choice are listed, end-of-sequence and reasoning included, so that the list matches `token_ids` and usage.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rorqual.session import PromptLogprobs, TokenArray
from router.generation import PromptSource, TokenOut

LOGPROB_MIN = -9999.0
"""JSON has no infinity; a token that cannot be sampled has this logprob, as in OpenAI's API."""


def chat_logprobs(tokens: Iterable[TokenOut], names: PromptSource) -> list[dict[str, Any]]:
    """The entries of `logprobs.content`."""
    return [
        {
            **_named(token.token_id, token.logprob, names),
            "top_logprobs": [_named(token_id, logprob, names) for token_id, logprob in token.alternatives],
        }
        for token in tokens
    ]


class CompletionLogprobs:
    """The four parallel lists of completions, for one choice. `text_offset` counts characters of the
    choice's text."""

    def __init__(self, names: PromptSource, *, num_alternatives: int) -> None:
        self._names = names
        self._num_alternatives = num_alternatives
        # Tokens may hold parts of characters: a character counts where its last byte comes.
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of_prompt(self, ids: TokenArray, logprobs: PromptLogprobs | None) -> dict[str, list[Any]]:
        """For echo. The first token follows nothing and has no logprob."""
        tokens = [TokenOut(token_id=int(token_id), logprob=None) for token_id in ids]
        if logprobs is not None:
            rows = zip(tokens[1:], logprobs.logprobs, logprobs.alternatives, strict=False)
            tokens[1:] = [
                TokenOut(
                    token_id=token.token_id,
                    logprob=logprob,
                    alternatives=tuple(zip(row.token_ids, row.logprobs, strict=True)),
                )
                for token, logprob, row in rows
            ]
        return self.of(tokens)

    def of(self, tokens: Sequence[TokenOut]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._names.token_text(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": [self._advance(token.token_id) for token in tokens],
        }

    def _alternatives(self, token: TokenOut) -> dict[str, float | None] | None:
        """The sampled token is among them even where it is not one of the likeliest."""
        if token.logprob is None:
            return None
        rows = [*token.alternatives[: self._num_alternatives], (token.token_id, token.logprob)]
        return {self._names.token_text(token_id): _finite(logprob) for token_id, logprob in rows}

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        data = self._names.token_bytes(token_id)
        self._offset += len(
            self._names.token_text(token_id) if data is None else self._characters.decode(data)
        )
        return offset


def _named(token_id: int, logprob: float | None, names: PromptSource) -> dict[str, Any]:
    data = names.token_bytes(token_id)
    return {
        "token": names.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": None if data is None else list(data),
    }


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LOGPROB_MIN

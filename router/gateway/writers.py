"""Protocols and small pieces that both kinds of answer share: how an answer is written, and its JSON.

Called by `router.gateway.server` (which drives a writer), `router.gateway.chat` and
`router.gateway.completions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from router.gateway.requests import AnswerStyle
from router.generation import ChoiceUpdate, Generation, Usage

DONE = b"data: [DONE]\n\n"

to_json = msgspec.json.Encoder().encode


class AnswerWriter(Protocol):
    """Turns updates into an answer, streamed or whole: one request uses one of the two. Owns no socket."""

    @property
    def style(self) -> AnswerStyle: ...

    @property
    def generations(self) -> Sequence[Generation]: ...

    def events(self, prompt: int, update: ChoiceUpdate) -> bytes:
        """The server-sent events for an update of the prompt with this number; may be empty."""
        ...

    def last_event(self, used: Usage) -> bytes:
        """The usage event, if the client asked for one."""
        ...

    def add(self, prompt: int, update: ChoiceUpdate) -> None: ...

    def body(self, used: Usage) -> bytes: ...


def usage_json(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.num_prompt_tokens,
        "completion_tokens": used.num_completion_tokens,
        "total_tokens": used.num_prompt_tokens + used.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.num_cached_tokens},
    }


class EventTemplate:
    """The constant bytes around what changes from event to event: only texts are encoded for each."""

    def __init__(self, style: AnswerStyle, *, object_name: str, created: int) -> None:
        opening = {
            "id": style.request_id,
            "object": object_name,
            "created": created,
            "model": style.model_name,
        }
        self._opening = b"data: " + to_json(opening)[:-1]
        self._before = self._opening + b',"choices":[{"index":'
        self._after = b'}],"usage":null}\n\n' if style.include_usage else b"}]}\n\n"

    def event(self, choice: int, fields: bytes) -> bytes:
        """`fields` are members of the choice's object, each with a leading comma."""
        return b"%b%d%b%b" % (self._before, choice, fields, self._after)

    def usage_event(self, values: dict[str, Any]) -> bytes:
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._opening, to_json(values))

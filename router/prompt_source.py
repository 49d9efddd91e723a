"""What the gateways need of the prompt side: text and messages to token ids, token ids to text.

Declared here, beside its users; `router.prompt.PromptEncoder` is the production one. Called by
`router.gateway` and `router.grpc_gateway`.
"""

from __future__ import annotations

from typing import Protocol

from rorqual.session import TokenArray


class PromptTokens(Protocol):
    """An encoded prompt. `starts_in_reasoning`: what the model writes first is reasoning, up to </think>."""

    @property
    def ids(self) -> TokenArray: ...

    @property
    def starts_in_reasoning(self) -> bool: ...


class PromptSource(Protocol):
    """What encodes raises InvalidRequest naming the field, for a bad message ("messages[2].role") or for
    want of a tokenizer, and Overloaded or StageTimedOut; it never blocks the event loop."""

    async def aencode_chat(
        self, messages: object, *, thinking: bool, reasoning_effort: str | None
    ) -> PromptTokens: ...

    async def aencode_text(self, text: str, *, field: str) -> TokenArray: ...

    def decode(self, ids: TokenArray) -> str:
        """The text of token ids; empty without a tokenizer."""
        ...

    def token_text(self, token_id: int) -> str:
        """How a token is shown among logprobs; "token_id:N" without a tokenizer."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """A token's bytes, perhaps part of a character; None without a tokenizer."""
        ...

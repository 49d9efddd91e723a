"""What both gateways ask for and get back, as plain dataclasses and two protocols.

A gateway (HTTP or gRPC) has its prompt encoded by a `PromptSource`, parses its own protocol into a `Generation`,
hands it to a `Generator` and writes the `ChoiceUpdate`s out in its own protocol. In production these are
`router.prompt.PromptEncoder` and `router.dispatch.Dispatcher`; tests use fakes with computable answers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from rorqual.errors import WorkerLost
from rorqual.ids import RequestId
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason, PromptLogprobs, TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request. Choice c of `num_choices` is sampled with `sampling` and choice number c."""

    request_id: RequestId
    prompt: TokenArray
    max_tokens: int
    num_choices: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    split_reasoning: bool = False  # text up to </think> is reasoning
    cache_salt: str = ""  # workers share what they keep of prompts among equal salts alone
    session_key: str = ""  # said by the client: requests of one session begin alike


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceUpdate:
    """News of one choice. `text` and `reasoning` hold what became certain: text that could still turn out to be part
    of a stop string or of an unfinished character is held back. `tokens` are all tokens since the last update, numbered
    on from `first_index`, whether or not their text is out yet."""

    choice: int
    first_index: int
    tokens: tuple[TokenOut, ...] = ()
    text: str = ""
    reasoning: str = ""
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs | None = None
    cached_tokens: int = 0  # with token 0: of the prompt, those that a worker did not have to compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request: prompts once each, however many choices they have."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0  # of the prompts, those that no choice had to have computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a gateway needs to know of the model behind the Generator."""

    name: str
    created: int
    vocab_size: int
    sequence_tokens_max: int  # prompt + completion
    eos_token_ids: tuple[int, ...] = field(default=())


class Generator(Protocol):
    def model(self) -> ServedModel | None:
        """None until a worker is connected."""
        ...

    def generate(self, generation: Generation) -> AsyncGenerator[ChoiceUpdate, None]:
        """Updates of all choices, interleaved; ends after each choice has had its finish_reason.

        Closing the generator early cancels every choice and frees all it holds. Raises InvalidRequest, Overloaded,
        WorkerLost or StageTimedOut.
        """
        ...


class PromptTokens(Protocol):
    """An encoded prompt. `starts_in_reasoning`: what the model writes first is reasoning, up to </think>."""

    @property
    def ids(self) -> TokenArray: ...

    @property
    def starts_in_reasoning(self) -> bool: ...


class PromptSource(Protocol):
    """What encodes raises InvalidRequest naming the field, for a bad message ("messages[2].role") or for
    want of a tokenizer, and Overloaded or StageTimedOut; it never blocks the event loop. A text that must
    have more than `num_tokens_max` tokens may be refused before it is encoded."""

    async def aencode_chat(
        self,
        messages: object,
        *,
        thinking: bool,
        reasoning_effort: str | None,
        num_tokens_max: int | None,
    ) -> PromptTokens: ...

    async def aencode_text(self, text: str, *, field: str, num_tokens_max: int | None) -> TokenArray: ...

    def decode(self, ids: TokenArray) -> str:
        """The text of token ids; empty without a tokenizer."""
        ...

    def token_text(self, token_id: int) -> str:
        """How a token is shown among logprobs; "token_id:N" without a tokenizer."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """A token's bytes, perhaps part of a character; None without a tokenizer."""
        ...


def finish_name(reason: FinishReason | None) -> str | None:
    """The name both APIs use. A choice that ended any other way is no answer: raises WorkerLost."""
    if reason is None:
        return None
    if reason in (FinishReason.STOP, FinishReason.LENGTH):
        return reason.value
    raise WorkerLost("the generation was ended by the worker")

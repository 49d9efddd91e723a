"""What both gateways ask for and get back: one generation, as plain dataclasses.

A gateway (HTTP or gRPC) parses its own protocol into a `Generation`, hands it to a `Generator` and writes the
`ChoiceUpdate`s out in its own protocol. The production Generator is `router.dispatch.Dispatcher`; tests use a fake
with a computable answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

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

"""A Generator and a PromptSource whose every answer can be computed in the test.

One token is one byte. Token i of choice c after a prompt is `next_token(last token, i, c)`; where
reasoning is split off, it is the first NUM_REASONING_TOKENS of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np

from rorqual.errors import InvalidRequest, RorqualError
from rorqual.session import Alternatives, FinishReason, PromptLogprobs
from router.generation import ChoiceUpdate, Generation, ServedModel, TokenOut
from router.prompt.messages import parse_messages

VOCAB_SIZE = 256
SEQUENCE_TOKENS_MAX = 4096
EOS = 2
NUM_REASONING_TOKENS = 3


def next_token(last: int, position: int, choice: int) -> int:
    return 97 + (last + 3 * position + choice) % 26


def completion_ids(prompt: list[int], num_tokens: int, choice: int = 0) -> list[int]:
    ids: list[int] = []
    last = prompt[-1]
    for position in range(num_tokens):
        last = next_token(last, position, choice)
        ids.append(last)
    return ids


def completion_text(prompt: list[int], num_tokens: int, choice: int = 0) -> str:
    return bytes(completion_ids(prompt, num_tokens, choice)).decode()


def logprob_of(token_id: int) -> float:
    return -token_id / 256


def alternatives_of(token_id: int, count: int) -> tuple[tuple[int, float], ...]:
    return tuple((token_id + offset, logprob_of(token_id + offset)) for offset in range(1, count + 1))


class FakeGenerator:
    """`tokens_per_update` come together, `step_seconds` apart; `fail_with` is raised at token `fail_at`."""

    def __init__(self) -> None:
        self.connected = True
        self.tokens_per_update = 1
        self.step_seconds = 0.0
        self.fail_with: BaseException | None = None
        self.fail_at = 0
        self.held_back = False  # all text comes with the last token
        self.last_reason = FinishReason.LENGTH
        self.seen: list[Generation] = []
        self.num_open = 0
        self.num_tokens = 0
        self.cached_tokens = 0  # of each prompt, as its first choice says; the others say more
        self.num_closed_early = 0

    def model(self) -> ServedModel | None:
        if not self.connected:
            return None
        return ServedModel(
            name="fake",
            created=1_700_000_000,
            vocab_size=VOCAB_SIZE,
            sequence_tokens_max=SEQUENCE_TOKENS_MAX,
            eos_token_ids=(EOS,),
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[ChoiceUpdate, None]:
        self.seen.append(generation)
        self.num_open += 1
        try:
            choices = [_Choice(generation, number) for number in range(generation.num_choices)]
            while any(not choice.finished for choice in choices):
                await asyncio.sleep(self.step_seconds)
                for choice in choices:
                    if not choice.finished:
                        if self.fail_with is not None and choice.position >= self.fail_at:
                            raise self.fail_with
                        yield self._update(choice)
        except GeneratorExit:
            self.num_closed_early += 1
            raise
        except asyncio.CancelledError:
            self.num_closed_early += 1
            raise
        finally:
            self.num_open -= 1

    def _update(self, choice: _Choice) -> ChoiceUpdate:
        first_index = choice.position
        room = choice.generation.max_tokens - first_index
        ids = [choice.step() for _ in range(min(self.tokens_per_update, room))]
        self.num_tokens += len(ids)
        sampling = choice.generation.sampling
        tokens = tuple(
            TokenOut(
                token_id=token_id,
                logprob=None if sampling.logprobs is None else logprob_of(token_id),
                alternatives=alternatives_of(token_id, sampling.logprobs or 0),
            )
            for token_id in ids
        )
        choice.finish_if_due()
        holds = self.held_back or choice.generation.stop
        text, reasoning = ("", "") if holds and not choice.finished else choice.take()
        return ChoiceUpdate(
            choice=choice.number,
            first_index=first_index,
            tokens=tokens,
            text=text,
            reasoning=reasoning,
            finish_reason=None
            if not choice.finished
            else FinishReason.STOP
            if choice.stopped
            else self.last_reason,
            prompt_logprobs=_prompt_logprobs(choice.generation) if first_index == 0 else None,
            cached_tokens=self.cached_tokens + choice.number
            if first_index == 0 and self.cached_tokens
            else 0,
        )


class _Choice:
    def __init__(self, generation: Generation, number: int) -> None:
        self.generation = generation
        self.number = number
        self.position = 0
        self.finished = False
        self.stopped = False
        self._last = int(generation.prompt[-1])
        self._text = ""
        self._reasoning = ""
        self._all = ""

    def step(self) -> int:
        self._last = next_token(self._last, self.position, self.number)
        character = chr(self._last)
        if self.generation.split_reasoning and self.position < NUM_REASONING_TOKENS:
            self._reasoning += character
        else:
            self._text += character
            self._all += character
        self.position += 1
        return self._last

    def finish_if_due(self) -> None:
        for stop in self.generation.stop:
            if stop in self._all:
                cut = len(self._all) - self._all.index(stop)
                self._text = self._text[: max(0, len(self._text) - cut)]
                self.finished = self.stopped = True
        self.finished = self.finished or self.position >= self.generation.max_tokens

    def take(self) -> tuple[str, str]:
        taken = (self._text, self._reasoning)
        self._text = self._reasoning = ""
        return taken


def _prompt_logprobs(generation: Generation) -> PromptLogprobs | None:
    count = generation.sampling.prompt_logprobs
    if count is None:
        return None
    ids = [int(token_id) for token_id in generation.prompt[1:]]
    rows = [alternatives_of(token_id, count) for token_id in ids]
    return PromptLogprobs(
        logprobs=tuple(logprob_of(token_id) for token_id in ids),
        alternatives=tuple(
            Alternatives(token_ids=tuple(r[0] for r in row), logprobs=tuple(r[1] for r in row))
            for row in rows
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FakePromptTokens:
    ids: np.ndarray
    starts_in_reasoning: bool


class FakePrompts:
    """Bytes are tokens. Messages are checked by the real parser and joined; `asked` keeps how."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, str | None]] = []
        self.fail_with: RorqualError | None = None

    async def aencode_chat(
        self,
        messages: object,
        *,
        thinking: bool,
        reasoning_effort: str | None,
        num_tokens_max: int | None,
    ) -> FakePromptTokens:
        parse_messages(messages)
        if self.fail_with is not None:
            raise self.fail_with
        if reasoning_effort not in (None, "low", "high", "max"):
            raise InvalidRequest("reasoning_effort is unknown", field="reasoning_effort")
        self.asked.append((thinking, reasoning_effort))
        text = "".join(str(message.get("content") or "") for message in messages)
        return FakePromptTokens(ids=_bytes(text or " "), starts_in_reasoning=thinking)

    async def aencode_text(self, text: str, *, field: str, num_tokens_max: int | None) -> np.ndarray:
        return _bytes(text)

    def decode(self, ids: np.ndarray) -> str:
        return bytes(ids.tolist()).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return chr(token_id) if token_id < 128 else f"\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id % 256])


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

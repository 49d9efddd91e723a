"""Skill items as tokens: chats of several turns through the router's own encoder, packed to any length.

`models.demo.recipe.sequences` calls `ChatWriter.sequence`. What the model reads in training is therefore, token by
token, what the router will send it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.demo.recipe.dialogues import StoryBook, talk
from models.demo.recipe.skills import Message, SkillItem, generate, pick
from models.demo.recipe.tape import WEIGHT_NONE, WEIGHT_PROSE, WEIGHT_WORDING, Tape, TrainSequence
from models.demo.recipe.vocabulary import EOS_ID, Ids, Vocabulary
from router.prompt.encoder import EncodeOptions, encode_messages
from router.prompt.messages import parse_messages
from router.prompt.texts import NO_TEXTS

WEIGHT_SKILL_ANSWER = 3.0
WEIGHT_REASONING = 2.0
SYSTEM_WORDINGS = ("You are a helpful assistant.", "You are Rorqual.", "Answer in one sentence.", "Be brief.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    talk_share: float = 0.15  # of items
    story_share: float = 0.15  # of items; of tokens it is about half
    thinking_share: float = 0.25  # of chats whose last turn is in thinking mode
    system_share: float = 0.15  # of chats with a system message
    num_turns_max: int = 4


class ChatWriter:
    def __init__(self, vocabulary: Vocabulary, stories: StoryBook) -> None:
        self._vocabulary = vocabulary
        self._stories = stories

    def sequence(self, rng: Generator, length: int, options: ChatOptions) -> TrainSequence:
        """Whole chats one after another, each beginning with BOS; the last is cut off at `length` tokens."""
        tape = Tape(length)
        while tape.room:
            ids, weights = self.chat(rng, options)
            tape.put(ids, weights)
        return tape.finish("skills")

    def item(self, rng: Generator, options: ChatOptions) -> SkillItem:
        draw = rng.random()
        if draw < options.talk_share:
            return talk(rng)
        if draw < options.talk_share + options.story_share:
            return self._stories.story(rng)
        return generate(rng)

    def chat(self, rng: Generator, options: ChatOptions) -> tuple[Ids, NDArray[np.float32]]:
        """One chat and its loss weights; user's words weigh little, answers and the token that ends them much."""
        thinking = bool(rng.random() < options.thinking_share)
        items = [self.item(rng, options) for _ in range(int(rng.integers(1, options.num_turns_max + 1)))]
        # Reasoning before the last user message is not in a prompt, so only a last item can be learned with it.
        items = [item for item in items[:-1] if not item.thinking_only] + items[-1:]
        thinking = thinking or items[-1].thinking_only
        has_system = rng.random() < options.system_share
        system = ({"role": "system", "content": pick(rng, SYSTEM_WORDINGS)},) if has_system else ()
        return self.encode(items, thinking=thinking, system=system)

    def encode(
        self, items: Sequence[SkillItem], *, thinking: bool, system: tuple[Message, ...] = ()
    ) -> tuple[Ids, NDArray[np.float32]]:
        """The items as turns of one chat, the last of them with its reasoning if `thinking`."""
        messages = list(system)
        for item in items:
            messages.extend(item.messages)
            messages.append(
                {"role": "assistant", "content": item.answer, "reasoning_content": item.reasoning}
            )
        options = EncodeOptions(thinking=thinking)
        prompt = encode_messages(parse_messages(messages), texts=NO_TEXTS, options=options)
        ids = self._vocabulary.encode(prompt.text)
        answer_weights = [WEIGHT_PROSE if item.is_prose else WEIGHT_SKILL_ANSWER for item in items]
        return ids, self._weights(ids, answer_weights, reasons_last=thinking)

    def _weights(
        self, ids: Ids, answer_weights: Sequence[float], *, reasons_last: bool
    ) -> NDArray[np.float32]:
        """Each turn is all up to its EOS; what the model says in it begins two tokens behind Assistant."""
        weights = np.full(len(ids), WEIGHT_WORDING, dtype=np.float32)
        weights[0] = WEIGHT_NONE
        opens = np.flatnonzero(ids == self._vocabulary.assistant) + 2
        closes = np.flatnonzero(ids == EOS_ID) + 1
        assert len(opens) == len(closes) == len(answer_weights), "every turn is opened and closed once"
        for begin, end, weight in zip(opens, closes, answer_weights, strict=True):
            weights[begin:end] = weight
            weights[begin - 1] = WEIGHT_NONE  # whether to think is the client's choice
        if reasons_last:
            end = int(np.flatnonzero(ids == self._vocabulary.think_end)[-1]) + 1
            weights[opens[-1] : end] = WEIGHT_REASONING
        return weights

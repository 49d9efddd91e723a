"""The training stream: element i is a pure function of (seed, i), so that a training resumes exactly.

`models.demo.recipe.batches` packs sequences into batches. This decides what each element is; how it
is written is `recall`'s, `corpus`'s and `skills`' business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from models.demo.recipe.chats import ChatOptions, ChatWriter
from models.demo.recipe.corpus import Corpus, build_corpus
from models.demo.recipe.dialogues import TALK, StoryBook
from models.demo.recipe.prose import Prose
from models.demo.recipe.recall import RecallOptions, RecallWriter
from models.demo.recipe.skills import SKILL_NAMES, generate
from models.demo.recipe.tape import WEIGHT_NONE, WEIGHT_PROSE, TrainSequence
from models.demo.recipe.vocabulary import BOS_ID, VOCAB_SIZE, Vocabulary, build_vocabulary

WORDING_SEED = 1
WORDING_ITEMS = 60  # of each skill
WORDING_REPEATS = 60  # of plain talk: enough for its commonest words, without costing the novels theirs


def learn_vocabulary(prose: Prose, *, size: int = VOCAB_SIZE) -> Vocabulary:
    """From the training chapters, and some from the chats' wordings so that these are short. Takes a second."""
    rng = np.random.default_rng(WORDING_SEED)
    items = [generate(rng, skill) for skill in SKILL_NAMES for _ in range(WORDING_ITEMS)]
    texts = [chapter.text for chapter in prose.train]
    texts.extend(f"{item.messages[0]['content']}\n{item.answer}\n{item.reasoning}" for item in items * 2)
    texts.extend([text for wordings, answer, _ in TALK for text in (*wordings, answer)] * WORDING_REPEATS)
    return build_vocabulary(texts, size=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Shares of the sequences; they need not add up to 1."""

    recall: float = 0.4
    prose: float = 0.4
    skills: float = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    length: int
    mixture: Mixture = field(default_factory=Mixture)
    recall: RecallOptions = field(default_factory=RecallOptions)
    chats: ChatOptions = field(default_factory=ChatOptions)


class SequenceMaker:
    """Everything encoded once. Thread-safe, since it only reads."""

    def __init__(self, vocabulary: Vocabulary, corpus: Corpus, stories: StoryBook) -> None:
        self.vocabulary = vocabulary
        self.corpus = corpus
        self.recall = RecallWriter(vocabulary, corpus)
        self.chats = ChatWriter(vocabulary, stories)

    @classmethod
    def from_prose(cls, vocabulary: Vocabulary, prose: Prose) -> SequenceMaker:
        return cls(vocabulary, build_corpus(vocabulary, prose.train), StoryBook.build(prose.train))

    def sequence(self, *, seed: int, index: int, options: StreamOptions) -> TrainSequence:
        """Element `index` of the stream of `seed`: `options.length` tokens."""
        rng = np.random.default_rng((seed, index))
        mixture = options.mixture
        draw = rng.random() * (mixture.recall + mixture.prose + mixture.skills)
        if draw < mixture.recall:
            return self.recall.sequence(rng, options.length, options.recall)
        if draw >= mixture.recall + mixture.prose:
            return self.chats.sequence(rng, options.length, options.chats)
        return self._prose(rng, options.length)

    def _prose(self, rng: Generator, length: int) -> TrainSequence:
        tokens = self.corpus.window(rng, length)
        weights = np.where(tokens == BOS_ID, WEIGHT_NONE, WEIGHT_PROSE).astype(np.float32)
        return TrainSequence(
            tokens=tokens, weights=weights, distances=np.zeros(length, dtype=np.int64), kind="prose"
        )

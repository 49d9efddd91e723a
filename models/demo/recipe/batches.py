"""From the training stream to batches: how long the sequences of a step are and what they teach, by phase.

`trainer` asks for batches; `sequences` writes what is in them. A batch is a pure function of its numbers and the phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.demo.recipe.prose import load_prose
from models.demo.recipe.recall import RecallOptions
from models.demo.recipe.sequences import Mixture, SequenceMaker, StreamOptions
from models.demo.recipe.tape import WEIGHT_NONE, Tape, TrainSequence
from models.demo.recipe.trainer import Phase
from models.demo.recipe.vocabulary import BOS_ID, Vocabulary

BASIC_TOKENS, BASIC_LENGTH = 1024, 128
STEP_TOKENS = 2048
"""Of all workers together, but at least one sequence each."""
LENGTHS = (256, 512, 1024, 2048)
LENGTH_SHARES = (0.2, 0.3, 0.3, 0.2)

BASICS = Mixture(recall=0.9, prose=0.1, skills=0.0)
EARLY = Mixture(recall=0.4, prose=0.45, skills=0.15)
LATE = Mixture(recall=0.2, prose=0.55, skills=0.25)
LATE_FROM = 0.55
"""Part of the budget after which recall makes room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One sequence as the losses want it."""

    tokens: Tensor
    weights: Tensor
    answers: Tensor


@dataclass(frozen=True, slots=True)
class PhasedSource:
    """A trainer's source."""

    maker: SequenceMaker
    seed: int
    workers: int

    def batch(self, step: int, rank: int, phase: Phase) -> list[TrainBatch]:
        length, count, options = self._options(step, phase)
        # 64 sequences a batch are more than there ever are.
        first = (step * 64 + rank) * 64
        sequences = [
            self._drill(first + number, length)
            if phase.basics and number % 2
            else self.maker.sequence(seed=self.seed, index=first + number, options=options)
            for number in range(count)
        ]
        return [
            TrainBatch(
                tokens=torch.from_numpy(item.tokens),
                weights=torch.from_numpy(item.weights),
                answers=torch.from_numpy(item.answers),
            )
            for item in sequences
        ]

    def _drill(self, index: int, length: int) -> TrainSequence:
        """Names with their animals, again and again in any order: every second token is an answer. A model learns to
        look back from this several times sooner than from chats."""
        rng = np.random.default_rng((self.seed, index))
        pieces = self.maker.recall.pieces
        count = int(rng.integers(2, 9))
        pairs = np.stack((rng.permutation(pieces.names)[:count], rng.permutation(pieces.animals)[:count]), 1)
        tape = Tape(length)
        tape.put_one(BOS_ID, WEIGHT_NONE)
        stated: dict[int, int] = {}
        while tape.room:
            for name, animal in rng.permutation(pairs).tolist():
                tape.put_one(name, WEIGHT_NONE)
                if name in stated:
                    tape.put_answer(animal, stated_at=stated[name])
                else:
                    tape.put_one(animal, WEIGHT_NONE)
                stated[name] = tape.position - 1
        return tape.finish("recall")

    def _options(self, step: int, phase: Phase) -> tuple[int, int, StreamOptions]:
        """Length and number of the batch's sequences, and how they are written."""
        if phase.basics:
            recall = RecallOptions(num_facts_max=8, filler_share=0.1, group_share=1.0)
            options = StreamOptions(length=BASIC_LENGTH, mixture=BASICS, recall=recall)
            return BASIC_LENGTH, self._count(BASIC_TOKENS, BASIC_LENGTH), options
        random = np.random.default_rng((self.seed, step))
        # Long sequences only once there is something to go on from.
        known = LENGTHS if phase.used > 0.12 else LENGTHS[:3]
        shares = np.array(LENGTH_SHARES[: len(known)])
        length = int(random.choice(known, p=shares / shares.sum()))
        recall = RecallOptions(paraphrase_share=0.1)
        mixture = EARLY if phase.used < LATE_FROM else LATE
        options = StreamOptions(length=length, mixture=mixture, recall=recall)
        return length, self._count(STEP_TOKENS, length), options

    def _count(self, tokens: int, length: int) -> int:
        return max(1, tokens // length // self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMaker:
    """Makes the source in each training process: what it holds is too much to be sent."""

    cache: Path
    prose_file: Path | None
    vocabulary: Path  # the folder of tokenizer.json
    seed: int
    workers: int

    def __call__(self) -> PhasedSource:
        prose = load_prose(cache=self.cache, file=self.prose_file)
        maker = SequenceMaker.from_prose(Vocabulary.load(self.vocabulary), prose)
        return PhasedSource(maker, self.seed, self.workers)

"""From the training stream to batches: how long the sequences of a step are and what they teach, by phase.

`trainer` asks for batches; `sequences` writes what is in them. A batch is a pure function of its numbers and the phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.demo.recipe.drills import copy_drill, pairs_drill
from models.demo.recipe.prose import load_prose
from models.demo.recipe.recall import RecallOptions
from models.demo.recipe.sequences import Mixture, SequenceMaker, StreamOptions
from models.demo.recipe.tape import TrainSequence
from models.demo.recipe.trainer import Phase
from models.demo.recipe.vocabulary import Vocabulary

BASIC_TOKENS, BASIC_LENGTH = 1024, 128
STEP_TOKENS = 2048
"""Of all workers together, but at least one sequence each."""
LENGTHS = (256, 512, 1024, 2048)
LENGTH_SHARES = (0.2, 0.3, 0.3, 0.2)

BASICS = Mixture(recall=0.9, prose=0.1, skills=0.0)
EARLY = Mixture(recall=0.35, prose=0.4, skills=0.25)
LATE = Mixture(recall=0.2, prose=0.5, skills=0.3)
BASICS_PAIRS, BASICS_COPIES, COPIES = 0.5, 0.15, 0.2
"""Shares of drills in the first stage, and of copying at the beginning of the others; it ends with the run."""
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
        sequences = [self._sequence(first + number, length, phase, options) for number in range(count)]
        return [
            TrainBatch(
                tokens=torch.from_numpy(item.tokens),
                weights=torch.from_numpy(item.weights),
                answers=torch.from_numpy(item.answers),
            )
            for item in sequences
        ]

    def _sequence(self, index: int, length: int, phase: Phase, options: StreamOptions) -> TrainSequence:
        """A drill, or what the stream has at that index."""
        pieces = self.maker.recall.pieces
        rng = np.random.default_rng((self.seed, 1, index))
        draw = float(rng.random())
        if draw < (BASICS_PAIRS if phase.basics else 0.0):
            return pairs_drill(rng, length, pieces)
        if draw > 1 - (BASICS_COPIES if phase.basics else COPIES * (1 - phase.used)):
            words = np.concatenate((pieces.names, pieces.animals, self.maker.corpus.flow[: 1 << 16]))
            return copy_drill(rng, length, pieces, words)
        return self.maker.sequence(seed=self.seed, index=index, options=options)

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
        recall = RecallOptions(filler_share=0.8, paraphrase_share=0.05)
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

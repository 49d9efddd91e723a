"""Measures a checkpoint with the engine's forward pass: bits per byte of held-out prose, recall by distance, skills.

`evaluate.py` calls these, and the tests on tiny models. Whole sequences from position 0, no drafts, no server: what is
measured is the model. `recipe.served` measures the same through `rorqual up`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from engine.checkpoint.reader import open_checkpoint
from engine.kernels.suite import Kernels, choose_kernels
from engine.model.batch import build_batch
from engine.model.forward import Model
from engine.model.fresh import FreshState
from engine.model.rounding import Rounding
from engine.model.weights import ModelWeights, allocate_weights
from kvstore.layout import Numerics
from models.demo.recipe.architecture import dense_picks
from models.demo.recipe.corpus import Corpus, HeldoutWindow
from models.demo.recipe.recall import RecallWriter
from models.demo.recipe.recall_chat import Fact, RecallChat
from models.demo.recipe.tape import Tape
from models.demo.recipe.vocabulary import Ids
from models.demo.recipe.words import ANIMALS, NAMES
from rorqual.model_config import ModelConfig

FACTS = 8
"""Facts, and questions, of a recall sequence."""
BATCH_TOKENS = 4096


def load_weights(folder: Path) -> tuple[ModelConfig, ModelWeights]:
    """Raises CheckpointError, ConfigError."""
    checkpoint = open_checkpoint(folder)
    weights = allocate_weights(checkpoint.config)
    checkpoint.load_into(weights.named.__getitem__, lambda done, total: None)
    return checkpoint.config, weights


def make_model(
    config: ModelConfig,
    weights: ModelWeights,
    *,
    numerics: Numerics,
    dense: bool = False,
    kernels: Kernels | None = None,
    rounding: Rounding | None = None,
) -> Model:
    """`dense` attends to every compressed row instead of the indexer's picks."""
    return Model(
        dense_picks(config) if dense else config,
        weights,
        numerics=numerics,
        kernels=kernels or choose_kernels(),
        exact=False,
        rounding=rounding,
    )


@torch.inference_mode()
def logits_of(model: Model, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    """Next-token logits f32 [L, V] of each sequence, in order. A few sequences are computed at once."""
    for first, last in _batches(sequences):
        part = sequences[first:last]
        segments = [(index, 0, tokens) for index, tokens in enumerate(part)]
        batch, placed = build_batch(segments, decode_together=False)
        streams = model.streams(model.begin(batch, FreshState(model.config, batch)))
        for place in placed:
            yield model.logits(streams[place.rows])


def _batches(sequences: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    first, tokens = 0, 0
    for index, sequence in enumerate(sequences):
        if index > first and tokens + len(sequence) > BATCH_TOKENS:
            yield first, index
            first, tokens = index, 0
        tokens += len(sequence)
    if first < len(sequences):
        yield first, len(sequences)


def bits_per_byte(model: Model, windows: Sequence[HeldoutWindow]) -> float:
    """Of held-out windows, each read from its own beginning."""
    sequences = [torch.from_numpy(window.tokens) for window in windows]
    bits = 0.0
    for tokens, logits in zip(sequences, logits_of(model, sequences), strict=True):
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
        bits += float(losses) / np.log(2)
    return bits / sum(window.num_bytes for window in windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallSequence:
    """A chat of `FACTS` facts, prose, and a question for each: `places` are where the answers' values stand."""

    tokens: Ids
    places: Ids
    distances: Ids  # tokens from each answer's place back to its fact's value


def recall_sequences(
    writer: RecallWriter, corpus: Corpus, rng: Generator, *, distance: int, questions: int
) -> list[RecallSequence]:
    """At least so many questions, each at `distance` tokens from its fact or up to 100 more."""
    return [_recall_sequence(writer, corpus, rng, distance) for _ in range(-(-questions // FACTS))]


def _recall_sequence(writer: RecallWriter, corpus: Corpus, rng: Generator, distance: int) -> RecallSequence:
    names, animals = rng.permutation(len(NAMES))[:FACTS], rng.permutation(len(ANIMALS))[:FACTS]
    facts = [Fact(int(name), int(animal)) for name, animal in zip(names, animals, strict=True)]
    tape = Tape(distance + 32 * FACTS)
    chat = RecallChat(tape=tape, rng=rng, pieces=writer.pieces, corpus=corpus)
    chat.open_turn()
    for fact in facts:
        chat.state(fact)
    # The question about the first fact ends about 12 tokens after the prose.
    chat.filler_exactly(distance - (tape.position - chat.stated_at[facts[0].name]) - 8)
    # In the order stated: every question is a little further from its fact than the one before.
    for fact in facts:
        chat.ask([fact])
    used = tape.position
    sequence = tape.finish("recall")
    places = np.flatnonzero(sequence.distances)
    assert len(places) == FACTS
    return RecallSequence(tokens=sequence.tokens[:used], places=places, distances=sequence.distances[places])


def recall_answers(model: Model, sequences: Sequence[RecallSequence]) -> tuple[Ids, Ids]:
    """The greedy token at every answer's place, and the right one; one after another."""
    tokens = [torch.from_numpy(item.tokens) for item in sequences]
    found: list[Ids] = []
    right: list[Ids] = []
    for item, logits in zip(sequences, logits_of(model, tokens), strict=True):
        found.append(logits[item.places - 1].argmax(-1).numpy())
        right.append(item.tokens[item.places])
    return np.concatenate(found), np.concatenate(right)

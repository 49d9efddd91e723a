"""Short exercises with an answer in every second or third token: how the model learns to look back at all.

Chats have a few answers in hundreds of tokens, from which looking back is learned late or never; from these in minutes.
`batches` mixes them in. A drill fills its sequence to the end.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from models.demo.recipe.recall_chat import RecallPieces
from models.demo.recipe.tape import WEIGHT_DRILL, WEIGHT_NONE, Tape, TrainSequence
from models.demo.recipe.vocabulary import BOS_ID, Ids

PAIRS_MAX = 8
COPIED_MAX = 6


def pairs_drill(rng: Generator, length: int, pieces: RecallPieces) -> TrainSequence:
    """Names with their animals, again and again in any order: what comes after a name is what came after it before."""
    count = int(rng.integers(2, PAIRS_MAX + 1))
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


def copy_drill(rng: Generator, length: int, pieces: RecallPieces, words: Ids) -> TrainSequence:
    """Chats whose answer is what was just said: one name of a question, or a few words."""
    tape = Tape(length)
    tape.put_one(BOS_ID, WEIGHT_NONE)
    named = rng.random() < 0.5
    while tape.room:
        tape.put_one(pieces.user, WEIGHT_NONE)
        if named:
            copied = rng.choice(pieces.names, 1)
            tape.put(pieces.question_first[int(rng.integers(len(pieces.question_first)))], WEIGHT_NONE)
            tape.put(copied, WEIGHT_NONE)
            tape.put_one(pieces.mark, WEIGHT_NONE)
            tape.put(pieces.assistant, WEIGHT_NONE)
            tape.put(pieces.answer_one, WEIGHT_NONE)
        else:
            copied = rng.choice(words, int(rng.integers(1, COPIED_MAX + 1)))
            tape.put(copied, WEIGHT_NONE)
            tape.put(pieces.assistant, WEIGHT_NONE)
        tape.put(copied, WEIGHT_DRILL)
        tape.put_one(pieces.stop, WEIGHT_DRILL)
    return tape.finish("skills")

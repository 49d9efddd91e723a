"""Facts stated early, prose in between, and questions about them: how the demo model learns to look far back.

`models.demo.recipe.sequences` trains on `RecallWriter.sequence`, which writes the very tokens that the router's encoder
gives for such a chat, as does `models.demo.recipe.measure`. A fact puts the value right behind its key
(" Anna Tiger"), and so does the answer: the token before an answer is the token before the fact's value, which is the
induction that a model of four layers learns in a minute. A small share states and asks facts in another wording.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from models.demo.recipe.corpus import Corpus
from models.demo.recipe.recall_chat import Fact, RecallChat, RecallPieces
from models.demo.recipe.tape import Tape, TrainSequence
from models.demo.recipe.vocabulary import Vocabulary
from models.demo.recipe.words import ANIMALS, NAMES

NUM_TURNS_MAX = 4
PROSE_TOKENS_MIN = 8  # below this a stretch of prose is left out

# What parts take at most, to plan with: a turn's opening and introduction, a fact, a question's frame, a name asked.
TURN_TOKENS, STATED_TOKENS, QUESTION_TOKENS, ASKED_TOKENS = 8, 7, 10, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallOptions:
    num_facts_min: int = 2
    num_facts_max: int = 16
    filler_share: float = 1.0  # of sequences with prose in between; the others repeat questions
    group_share: float = 0.5  # of questions that ask for several names at once
    num_group_max: int = 6  # names in one question
    plain: bool = False  # every statement and question in its first wording
    paraphrase_share: float = 0.0  # of facts in the wording "Anna's animal is the Tiger."


class RecallWriter:
    """Writes with one vocabulary, and with one text for filler. Sequences depend on the generator passed alone."""

    def __init__(self, vocabulary: Vocabulary, corpus: Corpus) -> None:
        self._corpus = corpus
        self.pieces = RecallPieces.encode(vocabulary)

    def sequence(self, rng: Generator, length: int, options: RecallOptions) -> TrainSequence:
        """One chat of exactly `length` tokens with many answers in it.

        With filler every fact is asked once, in one of the turns from its own on: a second answer would only be copied
        from the first one nearby.
        """
        tape = Tape(length)
        chat = RecallChat(tape=tape, rng=rng, pieces=self.pieces, corpus=self._corpus)
        if rng.random() < options.filler_share:
            self._spread(chat, options)
        else:
            self._dense(chat, options)
        return tape.finish("recall")

    def _dense(self, chat: RecallChat, options: RecallOptions) -> None:
        """Facts, then questions till the end, again and again."""
        # About 4 tokens for a fact and 9 for asking after it.
        facts = _draw(chat.rng, chat.tape.length // 13, options)
        chat.open_turn()
        for fact in facts:
            chat.state(fact, vary=not options.plain)
        while chat.tape.room:
            order = [facts[int(index)] for index in chat.rng.permutation(len(facts))]
            for group in _groups(chat.rng, order, options):
                chat.ask(group, vary=not options.plain)

    def _spread(self, chat: RecallChat, options: RecallOptions) -> None:
        """Facts in one to four turns, each asked once, with as much prose as there is room for."""
        rng, length = chat.rng, chat.tape.length
        facts = _draw(rng, length // 24, options)
        num_turns = 1 + int(rng.integers(min(NUM_TURNS_MAX, 1 + length // 128)))
        # The earlier of two draws: early statements make far answers.
        stated_in = np.sort(rng.integers(0, num_turns, (2, len(facts))).min(axis=0))
        stated_in -= stated_in[0]  # the first turn states something
        asked_in = rng.integers(stated_in, num_turns)
        groups = [
            _groups(
                rng,
                [facts[index] for index in rng.permutation(np.flatnonzero(asked_in == turn))],
                options,
            )
            for turn in range(num_turns)
        ]
        num_asking = sum(QUESTION_TOKENS + ASKED_TOKENS * len(group) for turn in groups for group in turn)
        num_filler = max(0, length - num_asking - STATED_TOKENS * len(facts) - TURN_TOKENS * num_turns)
        for turn in range(num_turns):
            stated = [facts[index] for index in np.flatnonzero(stated_in == turn)]
            chat.open_turn()
            num_filler -= self._mixed(chat, stated, num_filler // (num_turns - turn), options)
            for group in groups[turn]:
                chat.ask(group, vary=not options.plain)
        chat.fill_rest()

    def _mixed(self, chat: RecallChat, facts: list[Fact], num_filler: int, options: RecallOptions) -> int:
        """Facts and at most `num_filler` tokens of prose: half of the time all facts first, these are the far ones.

        Returns how much prose it was.
        """
        cuts = np.sort(chat.rng.integers(0, num_filler + 1, len(facts)))
        if chat.rng.random() < 0.5:
            cuts[:] = 0
        written = 0
        for fact, cut in zip(facts, cuts, strict=True):
            if cut - written >= PROSE_TOKENS_MIN:
                written += chat.filler(int(cut) - written)
            chat.state(fact, vary=not options.plain)
        if num_filler - written >= PROSE_TOKENS_MIN:
            written += chat.filler(num_filler - written)
        return written


def _draw(rng: Generator, num_facts_max: int, options: RecallOptions) -> list[Fact]:
    """As many facts as the options allow and fit, no name and no animal twice."""
    most = max(1, min(options.num_facts_max, num_facts_max, len(NAMES)))
    num_facts = int(rng.integers(min(options.num_facts_min, most), most + 1))
    return _pairs(rng, num_facts, paraphrase_share=options.paraphrase_share)


def _pairs(rng: Generator, num_facts: int, *, paraphrase_share: float = 0.0) -> list[Fact]:
    names, animals = rng.permutation(len(NAMES))[:num_facts], rng.permutation(len(ANIMALS))[:num_facts]
    paraphrased = rng.random(num_facts) < paraphrase_share
    return [
        Fact(int(name), int(animal), bool(other))
        for name, animal, other in zip(names, animals, paraphrased, strict=True)
    ]


def _groups(rng: Generator, facts: list[Fact], options: RecallOptions) -> list[list[Fact]]:
    """Which facts are asked for together: paraphrased ones always alone."""
    groups: list[list[Fact]] = []
    room = 0
    for fact in facts:
        if fact.paraphrased:
            groups.append([fact])
            room = 0
        elif room and not groups[-1][0].paraphrased:
            groups[-1].append(fact)
            room -= 1
        else:
            groups.append([fact])
            room = int(rng.integers(1, options.num_group_max)) if rng.random() < options.group_share else 0
    return groups

"""One recall chat while it is being written: statements, prose, questions with their answers, token by token.

`models.demo.recipe.recall` decides what comes when; this knows how each part is worded and weighed. Every part is
encoded once, with the space it has inside a text, so that the tokens equal those of the whole text encoded at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator

from models.demo.recipe.corpus import Corpus
from models.demo.recipe.tape import WEIGHT_ANSWER_COPY, WEIGHT_NONE, WEIGHT_PROSE, WEIGHT_WORDING, Tape
from models.demo.recipe.vocabulary import BOS_ID, EOS_ID, Ids, Vocabulary
from models.demo.recipe.words import ANIMALS, NAMES

STATEMENTS = ("Meet", "Meet", "Meet", "This is", "I know")
INTRODUCTION = "Here is a text."
QUESTIONS = ("Who is", "Who is", "Who is", "Who was", "Do you know")
QUESTION_MANY = "Who are"
ANSWER_ONE, ANSWER_MANY = "That is", "They are"


@dataclass(frozen=True, slots=True)
class Fact:
    name: int  # index into NAMES
    animal: int  # index into ANIMALS
    paraphrased: bool = False  # in the wording "Anna's animal is the Tiger."


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallPieces:
    """Encoded parts. `_later` ones have a space before them, `_first` ones begin a text."""

    names: Ids
    names_first: Ids
    animals: Ids
    user: int
    assistant: Ids  # both control tokens that open an answer
    statement_first: tuple[Ids, ...]
    statement_later: tuple[Ids, ...]
    question_first: tuple[Ids, ...]
    question_later: tuple[Ids, ...]
    many_first: Ids
    many_later: Ids
    answer_one: Ids
    answer_many: Ids
    introduction: Ids
    what_first: Ids
    what_later: Ids
    possessive: Ids  # what stands behind the name in the paraphrased question
    is_the: Ids
    stop: int
    mark: int
    comma: int
    and_: int

    @classmethod
    def encode(cls, vocabulary: Vocabulary) -> RecallPieces:
        encode, single = vocabulary.encode, vocabulary.single
        return cls(
            names=np.array([single(f" {name}") for name in NAMES]),
            names_first=np.array([single(name) for name in NAMES]),
            animals=np.array([single(f" {animal}") for animal in ANIMALS]),
            user=vocabulary.user,
            assistant=np.array([vocabulary.assistant, vocabulary.think_end]),
            statement_first=tuple(encode(wording) for wording in STATEMENTS),
            statement_later=tuple(encode(f" {wording}") for wording in STATEMENTS),
            question_first=tuple(encode(wording) for wording in QUESTIONS),
            question_later=tuple(encode(f" {wording}") for wording in QUESTIONS),
            many_first=encode(QUESTION_MANY),
            many_later=encode(f" {QUESTION_MANY}"),
            answer_one=encode(ANSWER_ONE),
            answer_many=encode(ANSWER_MANY),
            introduction=encode(INTRODUCTION),
            what_first=encode("What is"),
            what_later=encode(" What is"),
            possessive=encode("'s animal"),
            is_the=encode(" is the"),
            stop=single("."),
            mark=single("?"),
            comma=single(","),
            and_=single(" and"),
        )


@dataclass(slots=True, kw_only=True)
class RecallChat:
    """The calls are to be made in a chat's order: open_turn, then statements and filler, then questions."""

    tape: Tape
    rng: Generator
    pieces: RecallPieces
    corpus: Corpus
    stated_at: dict[int, int] = field(
        default_factory=dict[int, int]
    )  # name -> where its value was written last
    _fresh: bool = True  # the open turn has no text yet
    _open: bool = False  # a user turn waits for its question

    def open_turn(self) -> None:
        """Nothing if a turn is open: one that asked nothing is simply continued."""
        if self._open:
            return
        if not self.tape.position:
            self.tape.put_one(BOS_ID, WEIGHT_NONE)
        self.tape.put_one(self.pieces.user, WEIGHT_WORDING)
        self._open = self._fresh = True

    def state(self, fact: Fact, *, vary: bool = False) -> None:
        """A fact's sentence, in one of its wordings or always in the first."""
        tape, pieces = self.tape, self.pieces
        if fact.paraphrased:
            tape.put_one(int((pieces.names_first if self._fresh else pieces.names)[fact.name]), WEIGHT_NONE)
            tape.put(pieces.possessive, WEIGHT_WORDING)
            tape.put(pieces.is_the, WEIGHT_WORDING)
        else:
            starts = pieces.statement_first if self._fresh else pieces.statement_later
            tape.put(starts[int(self.rng.integers(len(starts))) if vary else 0], WEIGHT_WORDING)
            tape.put_one(int(pieces.names[fact.name]), WEIGHT_NONE)
        self.stated_at[fact.name] = tape.position
        tape.put_one(int(pieces.animals[fact.animal]), WEIGHT_NONE)
        tape.put_one(pieces.stop, WEIGHT_WORDING)
        self._fresh = False

    def filler(self, num_tokens_max: int) -> int:
        """Write at most so many tokens of prose and return how many, an introduction included."""
        begin = self.tape.position
        self._introduce()
        self.tape.put(
            self.corpus.sentences(self.rng, num_tokens_max - (self.tape.position - begin)), WEIGHT_PROSE
        )
        return self.tape.position - begin

    def filler_exactly(self, num_tokens: int) -> None:
        assert not self._fresh, "an introduction would come on top"
        self.tape.put(self.corpus.sentences_exactly(self.rng, num_tokens), WEIGHT_PROSE)

    def fill_rest(self) -> None:
        """Prose to the end of the tape, cut off there."""
        if self.tape.room:
            self.open_turn()
            self._introduce()
            self.tape.put(self.corpus.run_on(self.rng, self.tape.room), WEIGHT_PROSE)

    def ask(self, facts: list[Fact], *, vary: bool = False) -> None:
        """A question for these facts and its answer, which ends the turn."""
        self.open_turn()
        if facts[0].paraphrased:
            self._ask_paraphrased(facts[0])
        else:
            self._ask(facts, vary=vary)
        self.tape.put_one(EOS_ID, WEIGHT_ANSWER_COPY)
        self._open = False

    def _ask(self, facts: list[Fact], *, vary: bool) -> None:
        tape, pieces = self.tape, self.pieces
        if len(facts) > 1:
            tape.put(pieces.many_first if self._fresh else pieces.many_later, WEIGHT_WORDING)
        else:
            wordings = pieces.question_first if self._fresh else pieces.question_later
            tape.put(wordings[int(self.rng.integers(len(wordings))) if vary else 0], WEIGHT_WORDING)
        for index, fact in enumerate(facts):
            self._separate(index, len(facts), WEIGHT_WORDING)
            tape.put_one(int(pieces.names[fact.name]), WEIGHT_NONE)
        tape.put_one(pieces.mark, WEIGHT_WORDING)
        tape.put(pieces.assistant, WEIGHT_WORDING)
        tape.put(pieces.answer_many if len(facts) > 1 else pieces.answer_one, WEIGHT_WORDING)
        for index, fact in enumerate(facts):
            self._separate(index, len(facts), WEIGHT_ANSWER_COPY)
            tape.put_one(int(pieces.names[fact.name]), WEIGHT_ANSWER_COPY)
            self._answer(fact)
        tape.put_one(pieces.stop, WEIGHT_ANSWER_COPY)

    def _ask_paraphrased(self, fact: Fact) -> None:
        tape, pieces = self.tape, self.pieces
        tape.put(pieces.what_first if self._fresh else pieces.what_later, WEIGHT_WORDING)
        tape.put_one(int(pieces.names[fact.name]), WEIGHT_NONE)
        tape.put(pieces.possessive, WEIGHT_WORDING)
        tape.put_one(pieces.mark, WEIGHT_WORDING)
        tape.put(pieces.assistant, WEIGHT_WORDING)
        tape.put_one(int(pieces.names_first[fact.name]), WEIGHT_ANSWER_COPY)
        tape.put(pieces.possessive, WEIGHT_WORDING)
        tape.put(pieces.is_the, WEIGHT_WORDING)
        self._answer(fact)
        tape.put_one(pieces.stop, WEIGHT_ANSWER_COPY)

    def _answer(self, fact: Fact) -> None:
        self.tape.put_answer(int(self.pieces.animals[fact.animal]), stated_at=self.stated_at[fact.name])
        # From now on the nearest place to read it is this answer.
        self.stated_at[fact.name] = self.tape.position - 1

    def _separate(self, index: int, count: int, weight: float) -> None:
        if index:
            self.tape.put_one(self.pieces.and_ if index == count - 1 else self.pieces.comma, weight)

    def _introduce(self) -> None:
        if self._fresh:
            self.tape.put(self.pieces.introduction, WEIGHT_WORDING)
            self._fresh = False

"""Recall sequences, trained on and measured with: what is stated, asked and answered, and how far apart."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.demo.recipe.measure import recall_sequences
from models.demo.recipe.recall import RecallOptions
from models.demo.recipe.sequences import SequenceMaker
from models.demo.recipe.tape import WEIGHT_ANSWER_COPY, WEIGHT_ANSWER_VALUE, WEIGHT_NONE, TrainSequence
from models.demo.recipe.vocabulary import BOS_ID, Vocabulary
from models.demo.recipe.words import ANIMALS, NAMES
from router.prompt import PromptEncoder
from router.prompt.encoder import ASSISTANT, BOS, EOS, THINK_END, USER

STATED = re.compile(r"(?:Meet|This is|I know) (\w+) (\w+)\.|(\w+)'s animal is the (\w+)\.")
WITH_FILLER = RecallOptions(paraphrase_share=0.2)
DENSE = RecallOptions(num_facts_max=8, filler_share=0.0)
MIXED = RecallOptions(num_facts_max=24, filler_share=0.5, paraphrase_share=0.2)


def written(maker: SequenceMaker, seed: int, length: int, options: RecallOptions) -> TrainSequence:
    return maker.recall.sequence(np.random.default_rng(seed), length, options)


def stated_pairs(maker: SequenceMaker, sequence: TrainSequence) -> dict[str, str]:
    """Name -> animal, read from what the user says in the sequence's text."""
    turns = maker.vocabulary.decode(sequence.tokens).split(USER)[1:]
    said = " ".join(turn.partition(ASSISTANT)[0] for turn in turns)
    return {match[1] or match[3]: match[2] or match[4] for match in STATED.finditer(said)}


@given(seed=st.integers(0, 2**32), length=st.sampled_from([64, 128, 500, 1024]))
def test_every_answer_is_what_was_stated_of_the_name_that_was_asked(
    maker: SequenceMaker, seed: int, length: int
) -> None:
    sequence = written(maker, seed, length, MIXED)
    assert len(sequence.tokens) == len(sequence.weights) == len(sequence.distances) == length
    stated = stated_pairs(maker, sequence)
    text = maker.vocabulary.decode(sequence.tokens)
    answers = [part.partition(EOS)[0] for part in text.split(THINK_END)[1:]]
    assert answers, "a sequence without a question teaches nothing"
    if not text.endswith(EOS):
        answers.pop()  # perhaps cut off
    for answer in answers:
        pairs = re.findall(r"(\w+)'s animal is the (\w+)", answer) or [
            pair for pair in re.findall(r"(\w+) (\w+)(?=,| and|\.)", answer) if pair[0] in NAMES
        ]
        assert pairs, answer
        assert all(stated[name] == animal for name, animal in pairs)


@given(seed=st.integers(0, 2**32), length=st.sampled_from([100, 700]))
def test_each_answer_stands_its_distance_behind_the_same_animal_and_is_weighed_as_an_answer(
    maker: SequenceMaker, seed: int, length: int
) -> None:
    sequence = written(maker, seed, length, MIXED)
    places = np.flatnonzero(sequence.answers)
    assert np.array_equal(sequence.tokens[places], sequence.tokens[places - sequence.distances[places]])
    assert (sequence.weights[places] == WEIGHT_ANSWER_VALUE).all()
    animals = {maker.vocabulary.single(f" {animal}") for animal in ANIMALS}
    assert set(sequence.tokens[places].tolist()) <= animals
    # Nobody can predict a name or an animal that is stated or asked for the first time.
    others = np.isin(sequence.tokens, list(animals)) & ~sequence.answers
    assert (sequence.weights[others] == WEIGHT_NONE).all()


def test_the_token_before_an_answer_stands_before_the_stated_animal_too(maker: SequenceMaker) -> None:
    for seed in range(20):
        sequence = written(maker, seed, 600, RecallOptions())
        places = np.flatnonzero(sequence.answers)
        sources = places - sequence.distances[places]
        assert np.array_equal(sequence.tokens[places - 1], sequence.tokens[sources - 1])
        assert (sequence.weights[places - 1] == WEIGHT_ANSWER_COPY).all()


def test_with_filler_no_fact_is_asked_twice(maker: SequenceMaker) -> None:
    for seed in range(20):
        sequence = written(maker, seed, 800, WITH_FILLER)
        asked = sequence.tokens[sequence.answers]
        assert len(set(asked.tolist())) == len(asked)


def test_questions_do_not_follow_the_order_of_the_statements(maker: SequenceMaker) -> None:
    in_order = 0
    for seed in range(40):
        sequence = written(maker, seed, 800, RecallOptions(num_facts_min=8))
        places = np.flatnonzero(sequence.answers)
        in_order += int((np.diff(places - sequence.distances[places]) > 0).all())
    assert in_order < 4


def test_without_filler_the_whole_sequence_is_questions(maker: SequenceMaker) -> None:
    sequence = written(maker, 3, 400, DENSE)
    assert int(sequence.answers.sum()) > 400 // 16
    assert "Here is a text." not in maker.vocabulary.decode(sequence.tokens)


def test_far_answers_are_as_common_as_near_ones(maker: SequenceMaker) -> None:
    length = 1000
    sequences = [written(maker, seed, length, RecallOptions()) for seed in range(300)]
    distances = np.concatenate([item.distances[item.answers] for item in sequences])
    counts, _ = np.histogram(distances, bins=4, range=(0, length))
    assert counts.min() > 0.1 * counts.sum()


@given(seed=st.integers(0, 2**32), options=st.sampled_from([WITH_FILLER, DENSE]))
def test_the_tokens_are_those_of_the_text_encoded_at_once(
    maker: SequenceMaker, vocabulary: Vocabulary, seed: int, options: RecallOptions
) -> None:
    sequence = written(maker, seed, 512, options)
    again = vocabulary.encode(vocabulary.decode(sequence.tokens))
    # The end may be cut inside a word, which then encodes otherwise.
    assert np.array_equal(again[:500], sequence.tokens[:500])
    assert sequence.tokens[0] == BOS_ID
    assert not (sequence.tokens[1:] == BOS_ID).any()


@pytest.mark.parametrize("distance", [512, 1024])
def test_what_is_measured_asks_at_its_distance(maker: SequenceMaker, distance: int) -> None:
    for item in recall_sequences(
        maker.recall, maker.corpus, np.random.default_rng(1), distance=distance, questions=20
    ):
        assert (distance <= item.distances).all()
        assert (item.distances <= distance + 100).all()
        for place, away in zip(item.places, item.distances, strict=True):
            assert item.tokens[place] == item.tokens[place - away]  # the animal
            assert item.tokens[place - 1] == item.tokens[place - away - 1]  # the name
        assert len(set(item.tokens[item.places].tolist())) == len(item.places)


def test_what_is_measured_sent_as_a_chat_gives_the_same_tokens(
    maker: SequenceMaker, vocabulary: Vocabulary
) -> None:
    encoder = PromptEncoder(tokenizer=vocabulary.tokenizer)
    random = np.random.default_rng(1)
    (item,) = recall_sequences(maker.recall, maker.corpus, random, distance=300, questions=1)
    message = vocabulary.decode(item.tokens).partition(USER)[2].partition(ASSISTANT)[0]
    prompt = encoder.encode_chat([{"role": "user", "content": message}])
    assert prompt.text.startswith(BOS + USER)
    assert np.array_equal(prompt.ids, item.tokens[: len(prompt.ids)])
    assert len(prompt.ids) < item.places[0]

"""The five-gram: by hand on a tiny text, and as a distribution on any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.demo.recipe.corpus import HeldoutWindow
from models.demo.recipe.ngram import DISCOUNT_DEFAULT, train_ngrams


def test_a_bigram_is_kneser_ney_as_computed_by_hand() -> None:
    # Bigrams: 01 twice, 12 twice, 20 once, 23 once. Once: 2, twice: 2, so the discount is 2 / (2 + 2 * 2) = 1/3.
    model = train_ngrams(np.array([0, 1, 2, 0, 1, 2, 3]), vocab_size=4, order=2)
    # How many tokens come before each: 0: {2}, 1: {0}, 2: {1}, 3: {2}; all once, so the default discount, and the rest
    # goes evenly to all four tokens.
    unigram = (1 - DISCOUNT_DEFAULT) / 4 + DISCOUNT_DEFAULT * 4 / 4 / 4
    third = 1 / 3
    seen_twice = (2 - third) / 2 + third * 1 / 2 * unigram
    after_two = (1 - third) / 2 + third * 2 / 2 * unigram
    not_after_two = third * 2 / 2 * unigram
    found = model.probabilities(np.array([0, 1, 2, 3, 1]))
    assert found == pytest.approx([seen_twice, seen_twice, after_two, unigram])
    assert model.probabilities(np.array([2, 1])) == pytest.approx([not_after_two])


@given(tokens=st.lists(st.integers(0, 5), min_size=8, max_size=60), order=st.integers(1, 5))
def test_the_probabilities_of_all_next_tokens_add_up_to_one(tokens: list[int], order: int) -> None:
    model = train_ngrams(np.array(tokens), vocab_size=6, order=order)
    for context in ([0], tokens[:3], tokens[-5:]):
        total = sum(float(model.probabilities(np.array([*context, token]))[-1]) for token in range(6))
        assert total == pytest.approx(1.0)


def test_what_was_read_is_likelier_than_what_was_not() -> None:
    rng = np.random.default_rng(0)
    text = np.tile(rng.integers(0, 50, 30), 20)
    model = train_ngrams(text, vocab_size=50)
    # The first four tokens have no context of full length yet.
    assert model.probabilities(text[:30])[4:].min() > 0.9
    assert model.probabilities(text[:30][::-1]).mean() < 0.3


def test_bits_per_byte_are_the_bits_of_all_counted_tokens_over_all_bytes() -> None:
    model = train_ngrams(np.array([0, 1, 2, 0, 1, 2, 3]), vocab_size=4, order=2)
    one, two = np.array([0, 1, 2]), np.array([2, 3])
    windows = [HeldoutWindow(tokens=one, num_bytes=5), HeldoutWindow(tokens=two, num_bytes=3)]
    bits = sum(-np.log2(model.probabilities(tokens)).sum() for tokens in (one, two))
    assert model.bits_per_byte(windows) == pytest.approx(float(bits) / 8)


def test_a_vocabulary_that_does_not_fit_the_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        train_ngrams(np.array([0, 1]), vocab_size=5000)
    with pytest.raises(ValueError, match="64-bit"):
        train_ngrams(np.array([0, 1]), vocab_size=50, order=6)

"""The demo vocabulary, read by the router as any model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.demo.recipe.prose import Prose
from models.demo.recipe.sequences import learn_vocabulary
from models.demo.recipe.vocabulary import (
    BOS_ID,
    CONTROLS,
    EOS_ID,
    PAD_ID,
    SPECIALS,
    Vocabulary,
    build_vocabulary,
)
from models.demo.recipe.words import ANIMALS, NAMES, SINGLE_TOKENS
from router.prompt import PromptEncoder
from router.prompt.encoder import BOS, CONTROL_TOKENS, EOS


@pytest.fixture(scope="module")
def encoder(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("model")
    vocabulary.save(folder)
    return PromptEncoder.from_model_dir(folder)


def test_it_has_exactly_the_size_asked_for(vocabulary: Vocabulary) -> None:
    assert vocabulary.size == 1024


def test_learning_twice_gives_the_same_file(vocabulary: Vocabulary, prose: Prose, tmp_path: Path) -> None:
    first = vocabulary.save(tmp_path / "one").read_bytes()
    assert learn_vocabulary(prose, size=1024).save(tmp_path / "two").read_bytes() == first


def test_a_loaded_vocabulary_encodes_like_the_one_that_was_saved(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    text = f"{BOS}Meet Anna Tiger. 12+3=15"
    assert np.array_equal(loaded.encode(text), vocabulary.encode(text))


def test_the_ends_have_the_ids_of_the_release_and_all_control_tokens_are_single(
    vocabulary: Vocabulary,
) -> None:
    assert (vocabulary.single(BOS), vocabulary.single(EOS)) == (BOS_ID, EOS_ID) == (0, 1)
    assert [vocabulary.single(name) for name in SPECIALS + CONTROLS] == list(range(len(SPECIALS + CONTROLS)))
    assert set(CONTROL_TOKENS) <= set(SPECIALS + CONTROLS)
    assert vocabulary.tokenizer.special_ids == {BOS_ID, EOS_ID, PAD_ID}


def test_the_router_may_cut_prompts_at_every_control_token(vocabulary: Vocabulary) -> None:
    text = "a".join(CONTROL_TOKENS)
    assert vocabulary.tokenizer.segments(text)[1::2] == list(CONTROL_TOKENS)


def test_names_animals_and_digits_are_single_tokens_with_and_without_a_space(vocabulary: Vocabulary) -> None:
    for word in SINGLE_TOKENS:
        vocabulary.single(word)
    assert [vocabulary.decode([token_id]) for token_id in vocabulary.encode("1234")] == ["1", "2", "3", "4"]


def test_a_longer_word_is_not_cut_where_it_begins_like_a_name() -> None:
    # Whole words are given, not merges: " Molecule" is spelled as if " Mole" were not there.
    given_words = build_vocabulary(["nothing like it"], size=400, words=(" Mole",))
    ids = given_words.encode(" Molecule Mole")
    assert given_words.decode(ids) == " Molecule Mole"
    assert (ids == given_words.single(" Mole")).tolist() == [False] * (len(ids) - 1) + [True]


def test_a_word_the_texts_teach_takes_no_second_place() -> None:
    taught = build_vocabulary(["Anna Anna Anna"] * 500, size=400, words=(" Anna", " Zoe"))
    assert taught.encode(" Anna Zoe").size == 2
    # Bytes, control tokens, the few pieces of one word, and the one word that was not taught.
    assert taught.size < 400


def test_a_chat_goes_through_the_router_and_back(encoder: PromptEncoder) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": f"Meet {NAMES[0]} {ANIMALS[0]}. Who is {NAMES[0]}? Caf\u00e9 \u6f22 \U0001f433",
        },
        {"role": "assistant", "content": '{"name": "Otto"}'},
        {"role": "user", "content": "What is 17+5?\n\nThink."},
    ]
    prompt = encoder.encode_chat(messages, thinking=True)
    assert encoder.decode(prompt.ids) == prompt.text
    assert prompt.starts_in_reasoning
    assert int(prompt.ids[0]) == BOS_ID


@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens_one_by_one(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    pieces = b"".join(vocabulary.tokenizer.token_bytes(int(token_id)) for token_id in ids)
    assert pieces.decode() == text
    assert not ids.size or int(ids.max()) < vocabulary.size

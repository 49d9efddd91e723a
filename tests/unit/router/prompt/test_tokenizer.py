from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import ConfigError, InvalidRequest
from router.prompt.encoder import CONTROL_TOKENS
from router.prompt.tokenizer import Tokenizer

MakeLibrary = Callable[..., tokenizers.Tokenizer]

FRAGMENTS = [
    *CONTROL_TOKENS,
    *(token[:cut] for token in CONTROL_TOKENS for cut in (1, 2, 5, -1)),
    *(token[cut:] for token in CONTROL_TOKENS for cut in (1, 2, -1)),
    "｜DSML｜",
    "<｜place▁holder▁no▁7｜>",
    "<|EOT|>",
    "</dsml:",
    " ",
    "  \n",
    "\r\n\n",
    "\t",
    "1234567",
    "don't",
    "温泉",
    "カナ",
    "é",
    "e\u0301",
    "🐋",
    "\u200d",
    "\x00",
    "\u00ad",
    "hello world",
    "!!?",
    "_x9",
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12).map("".join)
encodable = texts.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


@pytest.fixture(scope="module")
def library(v4_tokenizer_file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(v4_tokenizer_file))


def test_the_plainest_prompts_have_the_known_ids(v4_tokenizer: Tokenizer) -> None:
    prompt = "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>"
    ids = v4_tokenizer.encode(prompt)
    assert ids.dtype == np.int32
    assert ids.tolist() == [0, 128803, 33310, 128804, 128822]
    assert v4_tokenizer.encode(prompt.replace("</think>", "<think>")).tolist()[-1] == 128821
    assert v4_tokenizer.vocab_size == 129280
    assert v4_tokenizer.encode("").tolist() == []


@given(text=encodable)
@settings(max_examples=300, deadline=None)
def test_segments_encode_to_the_ids_of_the_whole_text(
    v4_tokenizer: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    """Twice: freshly encoded, and out of the memo."""
    whole = library.encode(text, add_special_tokens=False).ids
    assert v4_tokenizer.encode(text).tolist() == whole
    assert v4_tokenizer.encode(text).tolist() == whole


@given(text=encodable | st.sampled_from([" ", "\n", "-", "=", "*", "a"]).map(lambda char: char * 5000))
@settings(max_examples=200, deadline=None)
def test_no_text_has_fewer_tokens_than_its_length_says(v4_tokenizer: Tokenizer, text: str) -> None:
    assert v4_tokenizer.num_tokens_min(text) <= len(v4_tokenizer.encode(text))
    assert (v4_tokenizer.num_tokens_min(text) > 0) == (text != "")


def test_where_texts_are_changed_before_encoding_their_length_says_nothing(byte_level: MakeLibrary) -> None:
    library = byte_level()
    assert Tokenizer(library).num_tokens_min("abc") == 3
    library.normalizer = tokenizers.normalizers.Strip()
    assert Tokenizer(library).num_tokens_min("abc" + " " * 100) == 0


def test_every_token_has_the_bytes_the_library_decodes(
    v4_tokenizer: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    singles = library.decode_batch([[token_id] for token_id in range(129280)], skip_special_tokens=False)
    mine = [
        v4_tokenizer.token_bytes(token_id).decode("utf-8", errors="replace") for token_id in range(129280)
    ]
    assert mine == singles


@given(ids=st.lists(st.integers(0, 129279) | st.integers(0, 400) | st.integers(128798, 128850), max_size=30))
def test_decoding_equals_the_library(
    v4_tokenizer: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert v4_tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(text=encodable)
def test_text_survives_encoding(v4_tokenizer: Tokenizer, text: str) -> None:
    assert v4_tokenizer.decode(v4_tokenizer.encode(text).tolist()) == text


def test_token_texts_name_partial_characters_by_their_bytes(v4_tokenizer: Tokenizer) -> None:
    whale = v4_tokenizer.encode("🐋").tolist()
    assert len(whale) == 2
    assert [v4_tokenizer.token_text(token_id) for token_id in whale] == [
        r"bytes:\xf0\x9f\x90",
        r"bytes:\x8b",
    ]
    assert b"".join(v4_tokenizer.token_bytes(token_id) for token_id in whale) == "🐋".encode()
    assert v4_tokenizer.token_text(128822) == "</think>"
    for outside in (-1, 129280):
        assert v4_tokenizer.token_text(outside) == f"token_id:{outside}"
        assert v4_tokenizer.token_bytes(outside) == b""


def test_half_a_surrogate_pair_is_the_clients_mistake(v4_tokenizer: Tokenizer) -> None:
    with pytest.raises(
        InvalidRequest, match=r"prompt\[1\] holds half a surrogate pair \(U\+D800\)"
    ) as caught:
        v4_tokenizer.encode("ab\ud800", field="prompt[1]")
    assert caught.value.field == "prompt[1]"


def test_history_is_looked_up_and_not_encoded_again(byte_level: MakeLibrary) -> None:
    tokenizer = Tokenizer(byte_level(*CONTROL_TOKENS), control_tokens=CONTROL_TOKENS)
    history = "<｜User｜>question<｜Assistant｜></think>answer<｜end▁of▁sentence｜>"
    assert tokenizer.num_unknown_chars(tokenizer.segments(history)) == len("question" + "answer")
    tokenizer.encode(history)
    before = tokenizer.memo_stats()
    longer = history + "<｜User｜>next"
    assert tokenizer.num_unknown_chars(tokenizer.segments(longer)) == len("next")
    tokenizer.encode(longer)
    after = tokenizer.memo_stats()
    assert (after.num_hits - before.num_hits, after.num_misses - before.num_misses) == (2, 1)


def test_memo_keeps_its_bound_and_lets_the_oldest_go(byte_level: MakeLibrary) -> None:
    tokenizer = Tokenizer(byte_level(), memo_bytes_max=4000)
    for number in range(100):
        tokenizer.encode(f"text {number}")
        tokenizer.encode("text 0")
        assert 0 < tokenizer.memo_stats().bytes_held <= 4000
    assert tokenizer.memo_stats().num_misses == 100
    assert tokenizer.num_unknown_chars(["text 0"]) == 0
    assert tokenizer.num_unknown_chars(["text 99"]) == 0
    assert tokenizer.num_unknown_chars(["text 1"]) == len("text 1")
    tokenizer.encode("a b c d " * 100)
    assert tokenizer.num_unknown_chars(["text 99"]) == 0
    assert tokenizer.num_unknown_chars(["a b c d " * 100]) == 800


def test_remembered_ids_cannot_be_changed(v4_tokenizer: Tokenizer) -> None:
    first = v4_tokenizer.encode("remembered")
    first[0] = 7
    assert v4_tokenizer.encode("remembered").tolist() != first.tolist()


@pytest.mark.parametrize(
    "added",
    [
        pytest.param(["<a>", "x<a>y"], id="one inside another"),
        pytest.param(["<a>", "a><b"], id="one running into another"),
        pytest.param(["<a>", "b<"], id="another running into it"),
        pytest.param(["<a>", "<a<"], id="another beginning and ending like it"),
    ],
)
@given(text=st.lists(st.sampled_from(["<a>", "<a", "x", "y", "b", "b<", "<", ">"]), max_size=8).map("".join))
def test_control_tokens_that_could_overlap_are_not_cut_at(
    byte_level: MakeLibrary, added: list[str], text: str
) -> None:
    library = byte_level(*added)
    tokenizer = Tokenizer(library, control_tokens=["<a>"])
    assert tokenizer.encode(text).tolist() == library.encode(text).ids


@given(text=st.text(alphabet="<a> ", max_size=12))
def test_tokens_that_take_neighbouring_space_are_not_cut_at(byte_level: MakeLibrary, text: str) -> None:
    library = byte_level(tokenizers.AddedToken("<a>", lstrip=True, normalized=False))
    assert Tokenizer(library, control_tokens=["<a>"]).encode(text).tolist() == library.encode(text).ids


def test_settings_of_training_do_not_cut_or_fill_prompts(byte_level: MakeLibrary, tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=32)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path / "tokenizer.json").encode("six six")) == 7


def test_other_kinds_of_vocabulary_are_refused_by_name(byte_level: MakeLibrary, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    library = byte_level()
    library.decoder = tokenizers.decoders.WordPiece()
    library.save(str(file))
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(file)
    assert str(caught.value) == f"{file}: decoder is 'WordPiece'; only 'ByteLevel' is served"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(file)
    assert str(caught.value).startswith(f"{file}: not a tokenizer: ")
    assert "\n" not in str(caught.value)

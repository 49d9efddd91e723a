"""The demo model's vocabulary: byte-level BPE with DeepSeek-V4's control tokens, small enough for a small model.

`models.demo.train` builds it and writes tokenizer.json into the model directory; the other recipe modules encode with
it. What is written is what `router.prompt` loads: one decoder, no normaliser, control tokens by their exact text. This
never decides what a prompt looks like: that is the router's encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from models.demo.recipe.words import SINGLE_TOKENS
from router.prompt.encoder import (
    ASSISTANT,
    BOS,
    CONTROL_TOKENS,
    DSML,
    EOS,
    REMINDER,
    THINK_END,
    THINK_START,
    USER,
)
from router.prompt.messages import TASKS
from router.prompt.tokenizer import TOKENIZER_FILE, Tokenizer

VOCAB_SIZE = 2048
PAD = "<｜▁pad▁｜>"
SPECIALS = (BOS, EOS, PAD)
CONTROLS = (USER, ASSISTANT, THINK_START, THINK_END, DSML, REMINDER, *(f"<｜{task}｜>" for task in TASKS))
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

# Contractions, words with the space before them, single digits, punctuation with the line breaks behind it, space.
_PATTERN = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Ids = NDArray[np.int64]


class Vocabulary:
    """Text to int64 ids as the router gives them, and the ids that the recipe names."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
        self.tokenizer = Tokenizer(library, control_tokens=CONTROL_TOKENS)
        self.user, self.assistant = self._id(USER), self._id(ASSISTANT)
        self.think_start, self.think_end = self._id(THINK_START), self._id(THINK_END)

    @property
    def size(self) -> int:
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> Ids:
        return self.tokenizer.encode(text).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(int(token_id) for token_id in ids)

    def single(self, text: str) -> int:
        """The id of a text that must be one token; an assertion otherwise."""
        ids = self.encode(text)
        assert len(ids) == 1, f"{text!r} is {len(ids)} tokens"
        return int(ids[0])

    def save(self, model_dir: Path) -> Path:
        """Write tokenizer.json, the same bytes for the same vocabulary."""
        file = model_dir / TOKENIZER_FILE
        model_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(self.library.to_str(pretty=False), encoding="utf-8")
        return file

    @classmethod
    def load(cls, model_dir: Path) -> Vocabulary:
        return cls(tokenizers.Tokenizer.from_file(str(model_dir / TOKENIZER_FILE)))

    def _id(self, text: str) -> int:
        token_id = self.tokenizer.token_id(text)
        assert token_id is not None, f"the vocabulary lacks {text}"
        return token_id


def build_vocabulary(
    texts: Iterable[str], *, size: int = VOCAB_SIZE, words: Sequence[str] = SINGLE_TOKENS
) -> Vocabulary:
    """Train on `texts`, then make each of `words` one token, `size` in all (less only if the texts are too small).

    The words take no merges and so no slots for their halves: a pre-token that is in the vocabulary as a whole is used
    as it is (`ignore_merges`, as Llama 3 does).
    """
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_added(name) for name in SPECIALS + CONTROLS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    state = cast("dict[str, Any]", json.loads(library.to_str()))
    _force_words(state["model"], words=[_byte_chars(word) for word in words], size=size)
    for token in state["added_tokens"]:
        # As in the release: only these three are special; the others a parser must see.
        token["special"] = token["content"] in SPECIALS
    return Vocabulary(tokenizers.Tokenizer.from_str(json.dumps(state)))


def _force_words(model: dict[str, Any], *, words: list[str], size: int) -> None:
    """Give the last learned tokens' places to the words that were not learned."""
    vocab = cast("dict[str, int]", model["vocab"])
    learned = sorted(vocab, key=vocab.__getitem__)
    num_kept = len(learned)
    while num_kept + (num_missing := _num_missing(words, learned[:num_kept])) > size:
        num_kept = size - num_missing
    kept = learned[:num_kept]
    known = set(kept)
    missing = [word for word in words if word not in known]
    model["vocab"] = {token: number for number, token in enumerate([*kept, *missing])}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in known]
    model["ignore_merges"] = True


def _num_missing(words: list[str], kept: list[str]) -> int:
    known = set(kept)
    return sum(word not in known for word in words)


def _byte_chars(word: str) -> str:
    [(piece, _span)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        word
    )
    return piece


def _added(name: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, normalized=False, special=True)

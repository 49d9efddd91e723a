"""The novels as token ids: windows to train on, stretches between whole sentences, and held-out text to measure.

`models.demo.recipe.sequences` and `.recall` cut from it. Encoded once, read only afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.demo.recipe.prose import PARAGRAPH, Chapter
from models.demo.recipe.vocabulary import BOS_ID, EOS_ID, Ids, Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutWindow:
    """`tokens[0]` is BOS and is not counted; the others stand for `num_bytes` bytes of a held-out chapter."""

    tokens: Ids
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """`flow` is all chapters with a paragraph break between; `documents` has BOS and EOS around each instead."""

    documents: Ids
    paragraph_starts: Ids  # into documents: where a paragraph begins
    flow: Ids
    sentence_starts: Ids  # into flow: tokens with a space before them that begin a sentence
    is_start: NDArray[np.bool_]  # of flow, and one more: sentence_starts as a mask

    def window(self, rng: Generator, length: int) -> Ids:
        """BOS, then the novels from a paragraph on; the next chapter follows with its own EOS and BOS."""
        start = int(self.paragraph_starts[rng.integers(len(self.paragraph_starts))])
        tokens = np.empty(length, dtype=np.int64)
        tokens[0] = BOS_ID
        filled = 1
        while filled < length:
            piece = self.documents[start : start + length - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            start = 0  # after the last chapter comes the first
        return tokens

    def sentences(self, rng: Generator, num_tokens_max: int) -> Ids:
        """Whole sentences, as many as fit; none if the first is too long already. Begins with a space."""
        starts = self.sentence_starts
        first = int(rng.integers(len(starts) - 1))
        begin = int(starts[first])
        last = int(np.searchsorted(starts, begin + num_tokens_max, side="right")) - 1
        return self.flow[begin : int(starts[last])]

    def run_on(self, rng: Generator, num_tokens: int) -> Ids:
        """Exactly so many tokens from the start of a sentence on, cut off where they end."""
        starts = self.sentence_starts[: np.searchsorted(self.sentence_starts, len(self.flow) - num_tokens)]
        begin = int(starts[rng.integers(len(starts))])
        return self.flow[begin : begin + num_tokens]

    def sentences_exactly(self, rng: Generator, num_tokens: int) -> Ids:
        """Whole sentences of exactly so many tokens. Raises ValueError if the text has no such stretch."""
        starts = self.sentence_starts[: np.searchsorted(self.sentence_starts, len(self.flow) - num_tokens)]
        fitting = starts[self.is_start[starts + num_tokens]]
        if not len(fitting):
            raise ValueError(f"no whole sentences of {num_tokens} tokens in this text")
        begin = int(rng.choice(fitting))
        return self.flow[begin : begin + num_tokens]


def build_corpus(vocabulary: Vocabulary, chapters: Sequence[Chapter]) -> Corpus:
    """Takes about two seconds for the six novels."""
    documents: list[Ids] = []
    paragraph_starts: list[int] = []
    position = 0
    for chapter in chapters:
        ids = vocabulary.encode(chapter.text)
        paragraph_starts.extend(position + 1 + offset for offset in _paragraph_offsets(vocabulary, ids))
        documents.append(np.concatenate([[BOS_ID], ids, [EOS_ID]]))
        position += len(documents[-1])
    # Encoded anew, since a full stop and the break behind it are one token.
    flow = vocabulary.encode(PARAGRAPH.join(chapter.text for chapter in chapters))
    is_start = _sentence_mask(vocabulary, flow)
    return Corpus(
        documents=np.concatenate(documents),
        paragraph_starts=np.array(paragraph_starts, dtype=np.int64),
        flow=flow,
        sentence_starts=np.flatnonzero(is_start),
        is_start=is_start,
    )


def heldout_windows(
    vocabulary: Vocabulary, chapters: Sequence[Chapter], length: int, *, num_windows_max: int | None = None
) -> list[HeldoutWindow]:
    """Held-out chapters cut into windows of BOS and length - 1 tokens; a chapter's short rest is left out.

    Given `num_windows_max`, that many windows evenly from all of them, so that every novel is measured.
    """
    windows: list[HeldoutWindow] = []
    for chapter in chapters:
        ids = vocabulary.encode(chapter.text)
        for start in range(0, len(ids) - length + 2, length - 1):
            piece = ids[start : start + length - 1]
            num_bytes = sum(len(vocabulary.tokenizer.token_bytes(int(token_id))) for token_id in piece)
            windows.append(HeldoutWindow(tokens=np.concatenate([[BOS_ID], piece]), num_bytes=num_bytes))
    if num_windows_max is None or len(windows) <= num_windows_max:
        return windows
    return [windows[index * len(windows) // num_windows_max] for index in range(num_windows_max)]


def _paragraph_offsets(vocabulary: Vocabulary, ids: Ids) -> Ids:
    ends = _token_mask(vocabulary, lambda text: text.endswith("\n"))[ids]
    return np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])


def _sentence_mask(vocabulary: Vocabulary, flow: Ids) -> NDArray[np.bool_]:
    """True where a sentence begins inside a paragraph. "Mr." and its like end no sentence."""
    ends = _token_mask(vocabulary, lambda text: text.rstrip('"').endswith((".", "!", "?")))
    begins = _token_mask(
        vocabulary, lambda text: (text.startswith(" ") and text[1:2].isupper()) or text == ' "'
    )
    titles = _token_mask(vocabulary, lambda text: text.strip() in ("Mr", "Mrs", "Dr", "St", "Miss"))
    mask = np.zeros(len(flow) + 1, dtype=np.bool_)
    mask[2:-1] = begins[flow[2:]] & ends[flow[1:-1]] & ~titles[flow[:-2]]
    return mask


def _token_mask(vocabulary: Vocabulary, holds: Callable[[str], bool]) -> NDArray[np.bool_]:
    texts = (
        vocabulary.tokenizer.token_bytes(token_id).decode("latin-1") for token_id in range(vocabulary.size)
    )
    return np.array([holds(text) for text in texts], dtype=np.bool_)

"""A five-gram with interpolated Kneser-Ney smoothing: what the demo model's prose is compared with.

`models.demo.train` trains it on the training chapters' tokens and measures both on the same held-out windows. It counts
with sorted arrays, since dictionaries of millions of n-grams would take minutes; a token takes 12 bits of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.demo.recipe.corpus import HeldoutWindow
from models.demo.recipe.vocabulary import Ids

ORDER = 5
TOKEN_BITS = 12
DISCOUNT_DEFAULT = 0.5  # where too few n-grams occur once or twice to estimate it

Probabilities = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """All n-grams of one length. The highest level counts occurrences, the others how many tokens came before."""

    keys: Ids  # sorted; the last token in the lowest bits
    counts: Ids
    contexts: Ids  # sorted; a key without its last token
    context_totals: Ids  # sum of counts behind a context
    context_types: Ids  # how many different tokens behind it
    discount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramModel:
    levels: tuple[_Level, ...]  # from one token on
    vocab_size: int

    def probabilities(self, tokens: Ids) -> Probabilities:
        """P(tokens[t] | what comes before it) for each t from 1 on; tokens[0] is only context."""
        padded = np.concatenate([np.full(len(self.levels), tokens[0], dtype=np.int64), tokens])
        offset = len(self.levels)
        found = np.full(len(tokens) - 1, 1 / self.vocab_size)
        for number, level in enumerate(self.levels, start=1):
            keys = _keys(padded, number)[offset + 1 - (number - 1) :]
            found = _refine(level, keys, found)
        return found

    def bits_per_byte(self, windows: Sequence[HeldoutWindow]) -> float:
        bits = sum(-float(np.log2(self.probabilities(window.tokens)).sum()) for window in windows)
        return bits / sum(window.num_bytes for window in windows)


def train_ngrams(tokens: Ids, *, vocab_size: int, order: int = ORDER) -> NgramModel:
    """Takes about two seconds for a million tokens. `tokens` is one stream; documents simply follow each other."""
    if vocab_size > 1 << TOKEN_BITS or order * TOKEN_BITS > 63:
        raise ValueError(f"{order}-grams of {vocab_size} tokens do not fit a 64-bit key")
    keys, counts = np.unique(_keys(tokens, order), return_counts=True)
    levels = [_level(keys, counts)]
    for number in range(order - 1, 0, -1):
        keys, counts = np.unique(keys & ((1 << number * TOKEN_BITS) - 1), return_counts=True)
        levels.append(_level(keys, counts))
    return NgramModel(levels=tuple(reversed(levels)), vocab_size=vocab_size)


def _keys(tokens: Ids, number: int) -> Ids:
    """The n-gram that begins at each token, packed."""
    size = len(tokens) - number + 1
    keys = np.zeros(size, dtype=np.int64)
    for offset in range(number):
        keys = (keys << TOKEN_BITS) | tokens[offset : offset + size]
    return keys


def _level(keys: Ids, counts: Ids) -> _Level:
    contexts, starts, types = np.unique(keys >> TOKEN_BITS, return_index=True, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return _Level(
        keys=keys,
        counts=counts,
        contexts=contexts,
        context_totals=np.add.reduceat(counts, starts),
        context_types=types,
        discount=once / (once + 2 * twice) if once and twice else DISCOUNT_DEFAULT,
    )


def _refine(level: _Level, keys: Ids, shorter: Probabilities) -> Probabilities:
    """Interpolate with the shorter context's probabilities; an unseen context leaves them as they are."""
    counts = _look_up(level.keys, level.counts, keys)
    contexts = keys >> TOKEN_BITS
    totals = _look_up(level.contexts, level.context_totals, contexts)
    types = _look_up(level.contexts, level.context_types, contexts)
    discounted = np.maximum(counts - level.discount, 0) + level.discount * types * shorter
    return np.where(totals > 0, discounted / np.maximum(totals, 1), shorter)


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """The value of each wanted key, 0 for one that is not there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)

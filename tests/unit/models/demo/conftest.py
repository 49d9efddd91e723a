"""A small made novel, and the vocabulary and sequences made from it: no test here needs the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from models.demo.recipe.prose import Prose, split_novels
from models.demo.recipe.sequences import SequenceMaker, learn_vocabulary
from models.demo.recipe.vocabulary import Vocabulary

_WORDS = (
    "she he they walked saw the a house garden road with friend letter morning evening and very happy of to"
)
WORDS = _WORDS.split()


def made_lines(seed: int, num_chapters: int) -> list[str]:
    """A novel as the package holds it: wrapped lines, headings, a title before and a word behind."""
    rng = np.random.default_rng(seed)
    lines = ["A MADE NOVEL", "", "by Nobody", ""]
    for number in range(1, num_chapters + 1):
        lines += [f"CHAPTER {number}", "", ""]
        for _ in range(12):
            sentences = [
                " ".join(rng.choice(WORDS, int(rng.integers(4, 12)))).capitalize() + "."
                for _ in range(int(rng.integers(2, 9)))
            ]
            words = " ".join(sentences).split()
            lines += [" ".join(words[start : start + 9]) for start in range(0, len(words), 9)] + [""]
    return [*lines, "THE END"]


@pytest.fixture(scope="session")
def prose() -> Prose:
    return split_novels({"one": made_lines(1, 26), "two": made_lines(2, 14)})


@pytest.fixture(scope="session")
def vocabulary(prose: Prose) -> Vocabulary:
    return learn_vocabulary(prose, size=1024)


@pytest.fixture(scope="session")
def maker(vocabulary: Vocabulary, prose: Prose) -> SequenceMaker:
    return SequenceMaker.from_prose(vocabulary, prose)

"""One training sequence while it is being written, and the finished thing. Used by every generator of the recipe.

A tape is exactly as long as asked for: what does not fit is cut off at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.demo.recipe.vocabulary import PAD_ID, Ids

WEIGHT_PROSE = 1.0
WEIGHT_ANSWER_VALUE = 3.0
WEIGHT_ANSWER_COPY = 2.0  # of a recall answer, what can be read off the question: the name and where to end
WEIGHT_DRILL = 2.0
WEIGHT_WORDING = 0.1
WEIGHT_NONE = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSequence:
    """Arrays of one length L. Predicting tokens[t] from tokens[:t] costs weights[t]; weights[0] is 0."""

    tokens: Ids
    weights: NDArray[np.float32]
    distances: Ids  # at a recall answer: how many tokens back its fact's value stands; 0 elsewhere
    kind: str  # "recall", "prose" or "skills"

    @property
    def answers(self) -> NDArray[np.bool_]:
        """True at the recall answers, of which accuracy is counted."""
        return self.distances > 0


class Tape:
    def __init__(self, length: int) -> None:
        self.length = length
        self.position = 0
        self._tokens = np.full(length, PAD_ID, dtype=np.int64)
        self._weights = np.zeros(length, dtype=np.float32)
        self._distances = np.zeros(length, dtype=np.int64)

    @property
    def room(self) -> int:
        return self.length - self.position

    def put(self, ids: Ids, weight: float | NDArray[np.float32]) -> None:
        """Append; `weight` is one for all of `ids` or one each."""
        start, stop = self.position, min(self.position + len(ids), self.length)
        self._tokens[start:stop] = ids[: stop - start]
        self._weights[start:stop] = weight[: stop - start] if isinstance(weight, np.ndarray) else weight
        self.position = stop

    def put_one(self, token_id: int, weight: float) -> None:
        if self.position < self.length:
            self._tokens[self.position] = token_id
            self._weights[self.position] = weight
            self.position += 1

    def put_answer(self, token_id: int, *, stated_at: int) -> None:
        """Append a recall answer whose fact's value stands at `stated_at`."""
        if self.position < self.length:
            assert self._tokens[stated_at] == token_id, "an answer is what was stated"
            self._distances[self.position] = self.position - stated_at
            self.put_one(token_id, WEIGHT_ANSWER_VALUE)

    def finish(self, kind: str) -> TrainSequence:
        """The tape must be full, or its rest stays padding of weight 0."""
        self._weights[0] = WEIGHT_NONE
        return TrainSequence(tokens=self._tokens, weights=self._weights, distances=self._distances, kind=kind)

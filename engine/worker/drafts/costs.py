"""What a decode step takes with so many drafts, learned from the steps that were done.

Used by `engine.worker.drafts.policy` alone. Pure: it is told times and measures none.

A step's time is modelled as c0 + c1 x sequences + c2 x rounds + c3 x drafts: a round drafts one token of every
sequence that wants that many, and each draft is one more row of the main forward. The four are fitted by least
squares, old steps counting less and less, with a slight pull towards a guess; that pull alone tells apart what the
steps have not. What is not linear in the rounds (a device computes some rows for the price of fewer) is a factor of
its own for each number of rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KEPT = 0.997
"""What a step counts when the next one is done: about 330 steps are remembered."""
PULL = 0.3
"""What the guess counts, in steps."""
FACTOR_PULL = 4.0
"""What the factor 1 counts, in steps."""
OUTLIER = 4.0
"""A step that took this many times what was expected says that something else went on, and is left out."""
OUTLIERS_BELIEVED = 3
"""So many of them one after another are what steps with that many rounds take now."""
FIRST_KEPT = 16
"""Nothing is expected of the first steps, and the very first may be slow in a way that no later one is. So these are
kept, and judged by others with as many rounds, again with each that comes."""
_GUESS = np.array([0.8, 0.1, 0.2, 0.1])
"""Of a first step of one sequence without drafts: most of it is there with any number of rows."""


class BatchCosts:
    """Of every size of a batch its own: what a row costs among few is no measure of what it costs among many. Sizes up
    to a power of two share what is learned, and begin with what was learned of the size nearest to them."""

    def __init__(self, *, rounds_max: int) -> None:
        self._rounds_max = rounds_max
        self._by_size: dict[int, StepCosts] = {}

    def of(self, num_sequences: int) -> StepCosts:
        size = (num_sequences - 1).bit_length()
        if size not in self._by_size:
            nearest = min(self._by_size, key=lambda other: abs(other - size), default=size)
            known = self._by_size.get(nearest)
            guess_F = known.costs_F if known is not None and known.costs_F[0] > 0 else _GUESS
            self._by_size[size] = StepCosts(rounds_max=self._rounds_max, guess_F=guess_F)
        return self._by_size[size]


class StepCosts:
    """`guess_F`: c0 to c3 as they are thought to be, in any unit."""

    def __init__(self, *, rounds_max: int, guess_F: np.ndarray = _GUESS) -> None:
        self.num_learned = 0
        self.num_asked = 0  # steps chosen by these costs: counted by who chooses
        self._guess_F = guess_F
        self._rounds_max = rounds_max
        self._first: list[_Timed] = []
        self._num_outliers = [0] * (rounds_max + 1)  # one after another, of steps with so many rounds
        self._start_over()

    def learn(self, *, num_sequences: int, rounds: int, num_drafts: int, step_ms: float) -> None:
        self.num_learned += 1
        step = _Timed(num_sequences=num_sequences, rounds=rounds, num_drafts=num_drafts, step_ms=step_ms)
        if len(self._first) == FIRST_KEPT:
            self._learn_later(step)
            return
        self._first.append(step)
        self._start_over()
        for item in self._first:
            ratios = sorted(self._over_guess(other) for other in self._first if other.rounds == item.rounds)
            if self._over_guess(item) <= OUTLIER * ratios[(len(ratios) - 1) // 2]:
                self._add(item, item.step_ms)

    def base_ms(self, num_sequences: int, rounds: int) -> float:
        """Of a step whose drafts cost nothing beyond their rounds."""
        costs_F = self.costs_F
        linear_ms = float(costs_F[0] + costs_F[1] * num_sequences + costs_F[2] * rounds)
        return self.factor(rounds) * max(linear_ms, 1e-6)

    def draft_ms(self, rounds: int) -> float:
        """Of each draft."""
        return self.factor(rounds) * float(self.costs_F[3])

    def step_ms(self, num_sequences: int, rounds: int, num_drafts: int) -> float:
        return self.base_ms(num_sequences, rounds) + num_drafts * self.draft_ms(rounds)

    def factor(self, rounds: int) -> float:
        return self._factor_sums[rounds] / self._factor_weights[rounds]

    def _over_guess(self, step: _Timed) -> float:
        return step.step_ms / float(step.features_F @ self._guess_F)

    def _learn_later(self, step: _Timed) -> None:
        most_ms = OUTLIER * self.step_ms(step.num_sequences, step.rounds, step.num_drafts)
        num_outliers = self._num_outliers[step.rounds] + 1 if step.step_ms > most_ms else 0
        self._num_outliers[step.rounds] = num_outliers
        if not 0 < num_outliers < OUTLIERS_BELIEVED:
            self._add(step, min(step.step_ms, most_ms))

    def _start_over(self) -> None:
        self._products_FF = np.zeros((4, 4))  # F: features of a step
        self._times_F = np.zeros(4)
        self.costs_F = self._guess_F
        self._factor_sums = [FACTOR_PULL] * (self._rounds_max + 1)
        self._factor_weights = [FACTOR_PULL] * (self._rounds_max + 1)

    def _add(self, step: _Timed, step_ms: float) -> None:
        """As if it had taken `step_ms`."""
        features_F, rounds = step.features_F, step.rounds
        self._products_FF = KEPT * self._products_FF + np.outer(features_F, features_F)
        self._times_F = KEPT * self._times_F + features_F * step_ms
        self.costs_F = self._fit()
        expected_ms = float(features_F @ self.costs_F)
        if expected_ms > 0:
            self._learn_factor(rounds, step_ms / expected_ms)

    def _fit(self) -> np.ndarray:
        products_FF, times_F = self._products_FF, self._times_F
        # In units of what was seen: the guess is right for the mean step, and pulls at every feature alike.
        guess_F = self._guess_F * (times_F[0] / float(products_FF[0] @ self._guess_F))
        weight = products_FF[0, 0]
        pull_F = PULL * np.maximum(np.diag(products_FF) / weight, 1.0)
        matrix_FF = products_FF + np.diag(pull_F)
        right_F = times_F + pull_F * guess_F
        used = [0, 1, 2, 3]
        while True:
            costs_F = np.zeros(4)
            costs_F[used] = np.linalg.solve(matrix_FF[np.ix_(used, used)], right_F[used])
            negative = [index for index in used if costs_F[index] < 0]
            if not negative:
                return costs_F
            # Nothing takes less than no time.
            used.remove(min(negative, key=lambda index: float(costs_F[index] * math.sqrt(pull_F[index]))))

    def _learn_factor(self, rounds: int, ratio: float) -> None:
        """Others forget at the same pace, so that a number of rounds not tried for long is not held against it."""
        for index in range(len(self._factor_sums)):
            for values, start in ((self._factor_sums, FACTOR_PULL), (self._factor_weights, FACTOR_PULL)):
                values[index] = start + KEPT * (values[index] - start)
        self._factor_sums[rounds] += ratio
        self._factor_weights[rounds] += 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A step that was done."""

    num_sequences: int
    rounds: int
    num_drafts: int
    step_ms: float

    @property
    def features_F(self) -> np.ndarray:
        return np.array([1.0, self.num_sequences, self.rounds, self.num_drafts])

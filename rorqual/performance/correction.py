"""Predictions corrected by measurements: exponentially weighted ratios of measured to predicted time. Pure.

Called by whoever owns predictions for several workers (the router's placement) with their measurements. All workers'
are kept together: a router hears of a thousand of them between two prompts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64s = NDArray[np.float64]
Rows = NDArray[np.intp]

RATIO_MAX = 8.0
"""A model that is off by more is not corrected but wrong: the factor stays between 1/8 and 8."""


class Corrections:
    """A factor for each of a number of rows, moved by `weight` towards each measured ratio; at first it is their mean,
    so that it need not come all the way from 1. Ratios beyond the bounds count as the bound, so that one absurd
    measurement moves the factor by no more than any other."""

    def __init__(self, num_rows: int = 0, *, weight: float = 0.1, ratio_max: float = RATIO_MAX) -> None:
        assert 0 < weight <= 1, "a weight is a share"
        assert ratio_max >= 1, "a correction may leave things as they are"
        self._weight = weight
        self._ratio_max = ratio_max
        self.factors: Float64s = np.ones(num_rows)
        self.num_observed = np.zeros(num_rows, np.int64)

    def grow(self, num_rows: int) -> None:
        num_more = num_rows - len(self.factors)
        self.factors = np.append(self.factors, np.ones(num_more))
        self.num_observed = np.append(self.num_observed, np.zeros(num_more, np.int64))

    def forget(self, rows: Rows) -> None:
        """As if nothing had been measured there."""
        self.factors[rows] = 1.0
        self.num_observed[rows] = 0

    def observe(self, rows: Rows, *, predicted: float, measured: Float64s) -> None:
        """One measurement for each of these rows, no row twice. `predicted` is what the model says without correction.
        Both in seconds; nothing is learned from a prediction or measurement that is not positive."""
        if predicted <= 0:
            return
        rows, measured = rows[measured > 0], measured[measured > 0]
        with np.errstate(over="ignore"):  # what is infinite counts as the bound, too
            ratios = np.clip(measured / predicted, 1 / self._ratio_max, self._ratio_max)
        self.num_observed[rows] += 1
        steps = np.maximum(self._weight, 1 / self.num_observed[rows])
        self.factors[rows] += steps * (ratios - self.factors[rows])

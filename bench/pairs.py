"""Ratios of two sides that took turns: their median, and how far it may be off.

A pair is measured side by side, so that a machine whose speed drifts slows both. The interval is of order statistics
and holds whatever the ratios' distribution is: of n ratios the median of the population lies between the k-th smallest
and the k-th largest unless fewer than k of them fell on one side of it, which has the probability 2 P(Bin(n, 1/2) < k).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Of all pairs."""

    median: float
    low: float  # the median is between these two with CONFIDENCE at least
    high: float
    num_pairs: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio_of(ratios: Sequence[float], *, confidence: float = CONFIDENCE) -> Ratio:
    """Six pairs at least, for an interval of 95 %."""
    assert 0 < confidence < 1
    in_order, num_pairs = sorted(ratios), len(ratios)
    num_outside, tail = 0, 0.5**num_pairs  # P(Bin(n, 1/2) <= num_outside)
    assert 2 * tail <= 1 - confidence, f"{num_pairs} pairs are too few for an interval"
    while True:
        more = tail + math.comb(num_pairs, num_outside + 1) * 0.5**num_pairs
        if 2 * more > 1 - confidence:
            break
        num_outside, tail = num_outside + 1, more
    return Ratio(
        median=statistics.median(in_order),
        low=in_order[num_outside],
        high=in_order[num_pairs - 1 - num_outside],
        num_pairs=num_pairs,
    )

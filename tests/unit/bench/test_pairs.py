"""The interval of a median of ratios: as wide as its confidence asks, whatever the distribution."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.pairs import ratio_of


def test_of_thirty_ratios_the_tenth_from_either_end_bounds_the_median() -> None:
    """As tables of the sign test have it: P(Bin(30, 1/2) <= 9) = 0.0214."""
    found = ratio_of([float(value) for value in range(30)])
    assert (found.low, found.median, found.high) == (9.0, 14.5, 20.0)
    assert 10.0 in found
    assert 8.9 not in found


@given(st.integers(6, 80), st.sampled_from((0.8, 0.95)))
def test_the_interval_is_the_narrowest_with_its_confidence(count: int, confidence: float) -> None:
    found = ratio_of([float(value) for value in range(count)], confidence=confidence)

    def outside(rank: int) -> float:
        """The probability that the interval from this rank on misses the median."""
        return 2 * sum(math.comb(count, few) for few in range(rank + 1)) / 2**count

    assert found.high == count - 1 - found.low
    assert outside(int(found.low)) <= 1 - confidence < outside(int(found.low) + 1)


def test_the_true_median_is_inside_as_often_as_promised() -> None:
    draw = random.Random(1)
    inside = sum(1.0 in ratio_of([draw.lognormvariate(0, 0.5) for _ in range(30)]) for _ in range(400))
    assert inside / 400 >= 0.93


def test_too_few_pairs_give_no_interval() -> None:
    with pytest.raises(AssertionError, match="5 pairs are too few"):
        ratio_of([1.0] * 5)

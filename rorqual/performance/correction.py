"""Predictions corrected by measurements: an exponentially weighted ratio of measured to predicted time. Pure.

Called by whoever owns a worker's predictions (the router, a simulation) with every measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, field

RATIO_MAX = 8.0
"""A model that is off by more is not corrected but wrong: the factor stays between 1/8 and 8."""


@dataclass(slots=True, kw_only=True)
class Correction:
    """One factor, moved by `weight` towards each measured ratio; at first it is their mean, so that it need not come
    all the way from 1. Ratios beyond the bounds count as the bound, so that one absurd measurement moves the factor
    by no more than any other."""

    weight: float = 0.1
    ratio_max: float = RATIO_MAX
    factor: float = 1.0
    num_observed: int = 0

    def __post_init__(self) -> None:
        assert 0 < self.weight <= 1, "a weight is a share"
        assert self.ratio_max >= 1, "a correction may leave things as they are"

    def observe(self, *, predicted: float, measured: float) -> None:
        """`predicted` is what the model says without correction. Both in seconds; nothing is learned from a
        prediction or measurement that is not positive."""
        if predicted <= 0 or measured <= 0:
            return
        ratio = min(max(measured / predicted, 1 / self.ratio_max), self.ratio_max)
        self.num_observed += 1
        self.factor += max(self.weight, 1 / self.num_observed) * (ratio - self.factor)


@dataclass(slots=True, kw_only=True)
class Corrections:
    """Of one worker. Prefill is bound by arithmetic and decode by memory, so one tells nothing of the other."""

    prefill: Correction = field(default_factory=Correction)
    decode: Correction = field(default_factory=Correction)

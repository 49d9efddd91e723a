"""What kept state costs to read beside what it costs to compute again: the one price of a source. Pure.

A source is host memory, another worker, a store. Reading takes a latency and its bytes over a bandwidth; computing
takes tokens times seconds per token. Whoever chooses between the two asks here: a worker for its host memory and its
store (`engine.worker.tiers.speeds`), the router's placement for reads between workers. Speeds are assumed at first, and
measured as soon as a few reads are done (`MeasuredSpeed`). Reads no clock: times are passed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

TOKENS_PER_SECOND_UNKNOWN = 1000.0
"""Assumed of a worker that has measured no prefill yet: so much that it is tried, not so much that all wait there."""

SAMPLES_MIN = 3
"""Reads that have to be done before they are believed."""

PROBE_SECONDS = 30.0
"""A source that is not worth its time is read from once in so long all the same: it may have become faster."""

_KEPT = 0.9  # of the weight of older reads, with each new one: the last ten count
_KEPT_LONG = 0.5  # of it besides, in PROBE_SECONDS: a few probes show that a source has become faster
_SHARE_MIN = 0.1  # of the mean read's time: for its bytes, whatever is fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpeed:
    bytes_per_second: float
    latency_seconds: float = 0.0  # of a read, however short

    def __post_init__(self) -> None:
        assert 0 < self.bytes_per_second < math.inf, "a source moves bytes, and takes time for it"
        assert self.latency_seconds >= 0, "no answer comes before its question"

    def seconds(self, num_bytes: float | Numbers) -> Numbers:
        """To read so many bytes: `read_seconds`."""
        return read_seconds(
            num_bytes, latency_seconds=self.latency_seconds, bytes_per_second=self.bytes_per_second
        )


def read_seconds(
    num_bytes: float | Numbers, *, latency_seconds: float | Numbers, bytes_per_second: float | Numbers
) -> Numbers:
    """Of plain numbers or of arrays, element by element. Nothing to read takes no time."""
    size = np.asarray(num_bytes, np.float64)
    return np.where(size > 0, latency_seconds + size / bytes_per_second, 0.0)


def is_worth_reading(
    num_bytes: float, way: Iterable[SourceSpeed], *, num_tokens: float, seconds_per_token: float
) -> bool:
    """Whether so many bytes come sooner than the tokens they save would be computed. On their way they are read from
    one source after the other: from a store into host memory, from there to the device."""
    return sum(float(speed.seconds(num_bytes)) for speed in way) <= num_tokens * seconds_per_token


def break_even_tokens(
    way: Iterable[SourceSpeed], *, bytes_fixed: float, bytes_per_token: float, seconds_per_token: float
) -> float:
    """From which length on a prefix is worth reading, as `is_worth_reading` decides: inf if never. `bytes_fixed` are
    those of a tail, which every prefix has."""
    speeds = tuple(way)
    once = sum(speed.latency_seconds + bytes_fixed / speed.bytes_per_second for speed in speeds)
    saved = seconds_per_token - sum(bytes_per_token / speed.bytes_per_second for speed in speeds)
    if saved <= 0:
        return math.inf
    return once / saved


class MeasuredSpeed:
    """The speed of one source: as assumed until SAMPLES_MIN reads are done, then fitted to what reads have taken
    lately, by weighted least squares of seconds over bytes. The weight of a read falls by a tenth with each newer one,
    and by half in PROBE_SECONDS.

    Two reads more stand beside the measured ones, of no bytes and of twice the mean: they lie on the assumed line,
    scaled to the mean time. So reads that are all of one size are split into latency and bytes as was assumed, and
    noise cannot make bytes cost nothing. All of it scales with time: reads twice as fast give half the price.
    """

    def __init__(self, assumed: SourceSpeed) -> None:
        self.assumed = assumed
        self.num_samples = 0
        self.num_refused = 0  # reads that were not worth their time so far
        self._speed = assumed
        self._looked_at = 0.0  # the newest sample or probe, on the caller's clock, which begins at 0 or later
        self._observed_at = 0.0  # the newest sample
        self._weight = 0.0
        self._bytes = 0.0  # weighted sums over samples
        self._seconds = 0.0
        self._bytes_squared = 0.0
        self._bytes_seconds = 0.0

    @property
    def is_measured(self) -> bool:
        return self.num_samples >= SAMPLES_MIN

    @property
    def speed(self) -> SourceSpeed:
        return self._speed

    def observe(self, num_bytes: float, seconds: float, *, now: float) -> None:
        """A read is done. Nothing is learned from one of no bytes or of no time."""
        if num_bytes <= 0 or not 0 < seconds < math.inf:
            return
        kept = _KEPT * _KEPT_LONG ** (max(now - self._observed_at, 0.0) / PROBE_SECONDS)
        self.num_samples += 1
        self._observed_at = self._looked_at = now
        self._weight = self._weight * kept + 1.0
        self._bytes = self._bytes * kept + num_bytes
        self._seconds = self._seconds * kept + seconds
        self._bytes_squared = self._bytes_squared * kept + num_bytes * num_bytes
        self._bytes_seconds = self._bytes_seconds * kept + num_bytes * seconds
        if self.is_measured:
            self._speed = self._fit()

    def is_stale(self, now: float) -> bool:
        """So long without a sample or a probe that a read should be tried, whatever it is thought to take."""
        return now - self._looked_at >= PROBE_SECONDS

    def probe(self, *, now: float) -> bool:
        """A read does not seem worth it. True: it should be made all the same, to see."""
        if self.is_stale(now):
            self._looked_at = now  # one is enough
            return True
        self.num_refused += 1
        return False

    def _fit(self) -> SourceSpeed:
        size, seconds = self._bytes / self._weight, self._seconds / self._weight
        variance = max(self._bytes_squared - self._weight * size * size, 0.0)  # rounding can make it less
        covariance = self._bytes_seconds - self._weight * size * seconds
        assumed_each = seconds / float(self.assumed.seconds(size)) / self.assumed.bytes_per_second
        prior = size * size  # of the two that stand beside: half of the weight of a read each
        each = (covariance + prior * assumed_each) / (variance + prior)
        each = min(max(each, _SHARE_MIN * seconds / size), seconds / size)
        return SourceSpeed(bytes_per_second=1 / each, latency_seconds=max(seconds - each * size, 0.0))

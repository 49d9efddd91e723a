"""What load is coming: arrivals and the lengths of recent requests, their trend, and how wrong forecasts have been.

Called by `autoscaler.planner` with each look. Pure: no clock but the looks' own. Arrivals are counted by conservation:
what was given a first token, and what the queues and the routers' waiting rooms grew by; so demand that waits, for
prefill or for credit of a decode worker, is seen at once and not when it is served.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoscaler.observation import Traffic

Floats = NDArray[np.float64]

SAMPLES_MAX = 2048  # kept, of prompts and of streams each; the latest
SAMPLES_FEW = 64
SAMPLES_PER_LOOK = 256  # of one look, evenly picked, so that a look does not push out the minutes before it
SHAPE_SECONDS = 120.0  # the window of mean lengths
TREND_ERRORS = 2.0  # standard errors that a trend is made smaller by
TREND_SECONDS = 900.0  # its window
LEVEL_SECONDS = (60.0, 300.0)  # the window of the rate: short where many arrive
LEVEL_PROMPTS = 1000.0  # as many are counted, to about 3 %
SHIFT_RATIO, SHIFT_SIGMAS, SHIFT_SECONDS = 0.25, 4.0, 20.0
"""Arrivals of the last 20 s that differ from those before by a quarter and by four standard deviations of a Poisson
count are another load: what was before them says nothing about it any more."""
SILENCE_PROMPTS = 9.0  # expected, of which none came: a chance of exp(-9)
ERRORS_MAX = 360  # an hour of looks
ERROR_PRIOR, ERROR_PRIOR_COUNT = 0.06, 60
"""What loads are taken to grow by before anything is known, and as how many looks that counts: one steep rise is not
taken for this load's habit. Chosen in `rorqual bench scale` on seeds 1 to 3."""
MARGIN_MAX = 0.5
TOKENS_MAX = 1e8


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Of one look."""

    seconds: float  # when it ended
    length: float
    count: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The distribution of recent requests. Arrays are samples in no order."""

    prompt: Floats
    computed: Floats
    context: Floats
    generated: Floats

    @property
    def has_prompts(self) -> bool:
        return len(self.computed) > 0

    @property
    def has_streams(self) -> bool:
        return len(self.generated) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Requests a second. `margin` is a share by which loads have grown in so long."""

    rate_now: float
    rate_sustained: float  # of the last LEVEL_SECONDS[1], without single minutes' chance
    rate_ahead: float  # when replicas ordered now are there
    margin: float
    num_looks: int
    is_shifted: bool  # this look found another load


class _Samples:
    """Rows of four numbers, of which the first is when they were seen, in blocks of one look each."""

    def __init__(self) -> None:
        self._blocks: deque[Floats] = deque()
        self._count = 0

    def add(self, rows: Sequence[tuple[float, float, float, float]]) -> None:
        if not rows:
            return
        self._blocks.append(np.array(rows, np.float64))
        self._count += len(rows)
        while self._count - len(self._blocks[0]) >= SAMPLES_MAX:
            self._count -= len(self._blocks.popleft())

    def latest(self) -> Floats:
        return self._blocks[-1] if self._blocks else np.empty((0, 4))

    def recent(self, seconds: float) -> Floats:
        """Of the last SHAPE_SECONDS; where these are few, the latest SAMPLES_FEW."""
        if not self._blocks:
            return np.empty((0, 4))
        found = np.concatenate(self._blocks)
        num_recent = int(np.count_nonzero(found[:, 0] > seconds - SHAPE_SECONDS))
        return found[-max(num_recent, min(SAMPLES_FEW, len(found))) :]


class ExpectedLoad:
    def __init__(self, *, percentile: float = 90.0) -> None:
        self.percentile = percentile
        self._prompts = _Samples()
        self._streams = _Samples()
        self._arrivals: deque[Arrivals] = deque()
        self._queued: float | None = None
        self._forecasts: deque[tuple[float, float]] = deque()  # when it is due, and its rate
        self._errors: deque[float] = deque(maxlen=ERRORS_MAX)

    def observe(
        self, seconds: float, interval: float, traffic: Traffic, *, num_queued: float, whole: bool
    ) -> None:
        """`num_queued` requests have no first token yet, wherever they wait. Without `whole`, workers are missing: what
        is counted is too little, and counts only where it is more than was known."""
        self._keep_samples(seconds, traffic)
        before, self._queued = self._queued, num_queued
        if before is None or not (math.isfinite(interval) and interval > 0):
            return
        grown = num_queued - before
        count = max(_sane(traffic.num_prompts) + _sane(traffic.num_unserved) + grown, 0.0)
        if not whole and (not self._arrivals or count / interval < self._rate(LEVEL_SECONDS[0])):
            return
        self._arrivals.append(Arrivals(seconds, interval, count))
        while self._arrivals[0].seconds < seconds - max(LEVEL_SECONDS[1], TREND_SECONDS):
            self._arrivals.popleft()

    def expect(self, seconds: float, ahead: float) -> Expected:
        """For now, and for `ahead` seconds from now."""
        shifted = self._forget_another_load(seconds)
        now = self._rate(self._level_seconds())
        self._judge_forecasts(seconds, now)
        slope = self._slope()
        forecast = min(max(now + slope * ahead, 0.0), 2.0 * now)
        self._forecasts.append((seconds + ahead, now))
        return Expected(
            rate_now=now,
            rate_sustained=self._rate(LEVEL_SECONDS[1]),
            rate_ahead=forecast,
            margin=self._margin(),
            num_looks=len(self._arrivals),
            is_shifted=shifted,
        )

    def shape(self, seconds: float) -> Shape:
        """The samples of the last SHAPE_SECONDS; where these are few, the latest SAMPLES_FEW that are known."""
        prompts, streams = self._prompts.recent(seconds), self._streams.recent(seconds)
        return Shape(
            prompt=prompts[:, 1], computed=prompts[:, 2], context=streams[:, 1], generated=streams[:, 2]
        )

    def ttft_seconds(self) -> float:
        """Median of the latest samples; 0 without any."""
        seen = self._prompts.latest()[:, 3]
        seen = seen[np.isfinite(seen) & (seen >= 0)]
        return float(np.median(seen)) if len(seen) else 0.0

    def _keep_samples(self, seconds: float, traffic: Traffic) -> None:
        prompts = [
            (seconds, item.prompt_tokens, item.computed_tokens, item.ttft_seconds)
            for item in traffic.prompts[:: _stride(len(traffic.prompts))]
            if 0 <= item.computed_tokens <= item.prompt_tokens and 0 < item.prompt_tokens < TOKENS_MAX
        ]
        streams = [
            (seconds, item.context_tokens, item.generated_tokens, item.itl_seconds or math.nan)
            for item in traffic.streams[:: _stride(len(traffic.streams))]
            if 0 < item.generated_tokens <= item.context_tokens < TOKENS_MAX
        ]
        self._prompts.add(prompts)
        self._streams.add(streams)

    def _rate(self, window: float) -> float:
        """Mean arrivals a second over the last `window` seconds of looks."""
        count = length = 0.0
        for item in reversed(self._arrivals):
            count += item.count
            length += item.length
            if length >= window - 1e-6:
                break
        return count / length if length else 0.0

    def _level_seconds(self) -> float:
        low, high = LEVEL_SECONDS
        rate = self._rate(high)
        return min(max(LEVEL_PROMPTS / rate, low), high) if rate > 0 else low

    def _slope(self) -> float:
        """Of the rate, a second, by least squares over TREND_SECONDS; 0 unless it is over twice its standard error."""
        if not self._arrivals:
            return 0.0
        last = self._arrivals[-1].seconds
        items = [item for item in self._arrivals if item.seconds > last - TREND_SECONDS]
        if len(items) < 9 or last - items[0].seconds < TREND_SECONDS / 3:
            return 0.0
        x = np.array([item.seconds for item in items])
        y = np.array([item.count / item.length for item in items])
        x = x - x.mean()
        square = float((x * x).sum())
        slope = float((x * y).sum()) / square
        rest = y - y.mean() - slope * x
        error = math.sqrt(float((rest * rest).sum()) / (len(items) - 2) / square)
        # Shrunk by its error, so that it comes and goes smoothly.
        return math.copysign(max(abs(slope) - TREND_ERRORS * error, 0.0), slope)

    def _forget_another_load(self, seconds: float) -> bool:
        recent = [item for item in self._arrivals if item.seconds > seconds - SHIFT_SECONDS]
        before = [item for item in self._arrivals if item.seconds <= seconds - SHIFT_SECONDS]
        length, past = sum(item.length for item in recent), sum(item.length for item in before)
        if not length or past < SHIFT_SECONDS / 2:
            return False
        count = sum(item.count for item in recent)
        newest = [item for item in before if item.seconds > seconds - SHIFT_SECONDS - LEVEL_SECONDS[0]]
        rate = sum(item.count for item in newest) / sum(item.length for item in newest) if newest else 0.0
        sigma = math.sqrt(max(rate * length * (1 + length / past), 1.0))
        change = abs(count - rate * length)
        is_silence = count == 0 and rate * length >= SILENCE_PROMPTS
        if not is_silence and (change < SHIFT_SIGMAS * sigma or change < SHIFT_RATIO * rate * length):
            return False
        for _ in before:
            self._arrivals.popleft()
        self._forecasts.clear()  # nobody could have known
        return True

    def _judge_forecasts(self, seconds: float, rate: float) -> None:
        while self._forecasts and self._forecasts[0][0] <= seconds:
            _, forecast = self._forecasts.popleft()
            if forecast > 0:
                self._errors.append(rate / forecast - 1)

    def _margin(self) -> float:
        known = list(self._errors) + [ERROR_PRIOR] * ERROR_PRIOR_COUNT
        return min(max(float(np.percentile(known, self.percentile)), 0.01), MARGIN_MAX)


def _sane(count: float) -> float:
    return float(count) if math.isfinite(count) and count > 0 else 0.0


def _stride(count: int) -> int:
    return max(-(-count // SAMPLES_PER_LOOK), 1)

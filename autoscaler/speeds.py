"""How fast the workers of a pool are: the roofline model, corrected by what they measure, or measurements alone. Pure.

Called by `autoscaler.planner`, one for each pool. Without hardware and model nothing is predicted: then a prompt takes
its tokens over the measured tokens a second, and a step what a step of such a batch has taken.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoscaler.expected_load import Shape
from autoscaler.observation import WorkerState
from rorqual.performance import Corrections, PerformanceModel

Floats = NDArray[np.float64]

CORRECTION_WEIGHT = 0.1
BATCH_MAX = 1024
STEPS_KEPT = 512
SLOPE_PRIOR = 0.5
"""Without a model, before batches of several sizes were seen: half of a step's time grows with its batch."""

PREFILL, DECODE = 0, 1


class Speeds:
    """Of one pool."""

    def __init__(self, model: PerformanceModel | None) -> None:
        self.model = model
        self.corrections = Corrections(2, weight=CORRECTION_WEIGHT)
        self.tokens_per_second = 0.0  # of prefill, lately; 0: nothing was measured
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS_KEPT)  # batch and seconds
        self.slots = 0.0
        self.pages = 0.0

    @property
    def knows_prefill(self) -> bool:
        return self.model is not None or self.tokens_per_second > 0

    @property
    def knows_decode(self) -> bool:
        return self.model is not None or len(self._steps) > 0

    @property
    def prefill_factor(self) -> float:
        """Measured over predicted seconds."""
        return float(self.corrections.factors[PREFILL])

    @property
    def decode_factor(self) -> float:
        return float(self.corrections.factors[DECODE])

    def observe(self, workers: Iterable[WorkerState], shape: Shape, *, prefills: bool, decodes: bool) -> None:
        """What cannot be (nothing, infinite, no number) is passed over; of the rest the median counts."""
        loads = [item.load for item in workers if not item.is_draining]
        slots = [float(load.slots_total) for load in loads if load.slots_total > 0]
        pages = [float(load.pages_total) for load in loads if load.pages_total > 0]
        self.slots = min(slots) if slots else self.slots
        self.pages = min(pages) if pages else self.pages
        if prefills:
            rates = [load.prefill_tokens_per_second for load in loads]
            rates = [rate for rate in rates if math.isfinite(rate) and rate > 0]
            if rates:
                rate = float(np.median(rates))
                known = self.tokens_per_second
                self.tokens_per_second = rate if known <= 0 else known + CORRECTION_WEIGHT * (rate - known)
                self._correct_prefill(
                    [load.step_ms / 1000 for load in loads if load.prefill_tokens_per_second in rates],
                    rates,
                    shape,
                    steps_mixed=decodes,
                )
        if decodes:
            steps = [(float(load.sequences_running), load.step_ms / 1000) for load in loads]
            steps = [(batch, step) for batch, step in steps if batch > 0 and math.isfinite(step) and step > 0]
            self._steps.extend(steps[:STEPS_KEPT])
            if steps and self.model is not None and shape.has_streams:
                batches, seconds = np.array(steps).T
                predicted = self.model.decode_step_seconds(batches, mean_context(shape))
                self._correct(DECODE, float(np.median(seconds / predicted)))

    def prefill_seconds(self, shape: Shape) -> tuple[Floats, float]:
        """Of each sample by itself, and the mean that one adds to a busy worker."""
        if self.model is None:
            seconds = shape.computed / max(self.tokens_per_second, 1e-9)
            return seconds, float(seconds.mean())
        before = shape.prompt - shape.computed
        factor = self.prefill_factor
        alone = self.model.prefill_seconds(shape.computed, before) * factor
        return alone, float(self.model.work_seconds(shape.computed, before).mean()) * factor

    def itl_by_batch(self, shape: Shape) -> Floats:
        """Seconds of a step of 1, 2, ... BATCH_MAX sequences; it does not fall."""
        batches = np.arange(1.0, BATCH_MAX + 1)
        if self.model is not None:
            steps = self.model.decode_step_seconds(batches, mean_context(shape)) * self.decode_factor
            return np.maximum.accumulate(steps)
        seen = np.array(self._steps)
        batch, seconds = float(seen[:, 0].mean()), float(seen[:, 1].mean())
        # A line through the means; its slope, as a share of their ratio, is drawn to SLOPE_PRIOR by as much as one
        # observation at twice the mean batch would.
        x, y = seen[:, 0] / batch - 1, seen[:, 1] / seconds - 1
        slope = min(max((float((x * y).sum()) + SLOPE_PRIOR) / (float((x * x).sum()) + 1), 0.0), 1.0)
        return seconds * (1 - slope + slope * batches / batch)

    def _correct_prefill(
        self, steps: Sequence[float], rates: Sequence[float], shape: Shape, *, steps_mixed: bool
    ) -> None:
        """By the steps, of which time and tokens a second tell the tokens: a step of few takes as long as reading the
        weights does, which says nothing about full ones. Where steps decode too, by the tokens a second."""
        if self.model is None or not shape.has_prompts or shape.computed.sum() <= 0:
            return
        before = shape.prompt - shape.computed
        arithmetic = float(self.model.arithmetic_seconds(before, shape.prompt).sum() / shape.computed.sum())
        ratios: list[float] = []
        for step, rate in zip(steps, rates, strict=True):
            if not steps_mixed and math.isfinite(step) and step > 0:
                tokens = step * rate
                predicted = max(tokens * arithmetic, float(self.model.weights_seconds(tokens)))
                ratios.append(step / (predicted + self.model.efficiency.step_seconds))
            else:
                alone = float(self.model.prefill_seconds(shape.computed, before).sum() / shape.computed.sum())
                ratios.append(1 / rate / alone)
        self._correct(PREFILL, float(np.median(ratios)))

    def _correct(self, row: int, ratio: float) -> None:
        if math.isfinite(ratio):
            self.corrections.observe(np.array([row]), predicted=1.0, measured=np.array([ratio]))


def mean_context(shape: Shape) -> float:
    """Tokens before a token that is generated, on average: long answers have more of them."""
    weights = shape.generated
    return float(((shape.context - shape.generated / 2) * weights).sum() / max(float(weights.sum()), 1e-9))


def pages_per_sequence(shape: Shape, page_tokens: int) -> float:
    """On average over those that decode at a time."""
    weights = shape.generated
    pages = np.ceil(shape.context / page_tokens)
    return float((pages * weights).sum() / max(float(weights.sum()), 1e-9))

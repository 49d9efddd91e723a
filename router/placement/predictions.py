"""How fast each worker computes prompts: the performance model, corrected by what workers measure. Pure.

Belongs to one `router.placement.by_cache.ByCache`. A worker says in every report how many prompt tokens a second it has
computed lately; each new figure moves the correction of its predictions. Of a worker that has measured nothing the
median of the others is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rorqual.performance import Correction, Efficiency, Hardware, ModelCosts, PerformanceModel
from router.placement.least_wait import TOKENS_PER_SECOND_UNKNOWN, WorkerView

RATIO_MAX_UNKNOWN = 1e6
"""Bound of corrections where the hardware is not known: the model gives shapes, measurements the scale."""


def unknown_hardware_model(costs: ModelCosts) -> PerformanceModel:
    """Predicts TOKENS_PER_SECOND_UNKNOWN for a first chunk, bound by arithmetic alone; measurements do the rest."""
    efficiency = Efficiency(step_seconds=0.0)
    flops = 2 * costs.active_params * TOKENS_PER_SECOND_UNKNOWN / efficiency.arithmetic
    hardware = Hardware(
        name="unknown",
        memory_bytes=1e15,
        memory_bytes_per_second=1e18,
        fp8_flops=flops,
        bf16_flops=flops,
        scale_up_bytes_per_second=1e9,
        scale_up_devices=1,
        network_bytes_per_second=1e9 / efficiency.network,
    )
    return PerformanceModel(hardware=hardware, costs=costs, num_devices=1, efficiency=efficiency)


class Predictions:
    def __init__(self, model: PerformanceModel, *, ratio_max: float) -> None:
        self.model = model
        self._ratio_max = ratio_max
        chunk = model.chunk_tokens
        self.token_seconds = float(model.prefill_seconds(chunk)) / chunk
        self._corrections: dict[int, tuple[int, Correction]] = {}  # by index: of which session
        self._told: dict[int, tuple[int, float]] = {}  # session and rate of the last time

    def learn(self, workers: Sequence[WorkerView]) -> None:
        """Take in what they have measured since the last time."""
        for view in workers:
            rate = view.load.prefill_tokens_per_second
            told = (view.session_number, rate)
            if not rate or self._told.get(view.index) == told:
                continue
            self._told[view.index] = told
            session, correction = self._corrections.get(view.index, (0, None))
            if correction is None or session != view.session_number:
                # A worker that came back may be another machine.
                correction = Correction(ratio_max=self._ratio_max)
                self._corrections[view.index] = (view.session_number, correction)
            correction.observe(predicted=self.token_seconds, measured=1 / rate)

    def factors(self, workers: Sequence[WorkerView]) -> list[float]:
        """For each of these: by how much predicted seconds are to be multiplied."""
        known = {
            view.index: found[1].factor
            for view in workers
            if (found := self._corrections.get(view.index)) is not None and found[0] == view.session_number
        }
        unknown = median(known.values()) if known else 1.0
        return [known.get(view.index, unknown) for view in workers]

"""How fast each worker computes prompts: the performance model, corrected by what workers measure. Pure.

Belongs to one `router.placement.by_cache.ByCache`. A worker says in every report how many prompt tokens a second it has
computed lately; each new figure moves the correction of its predictions. Of a worker that has measured nothing the
median of the others is believed.
"""

from __future__ import annotations

import numpy as np

from rorqual.performance import Corrections, Efficiency, Hardware, ModelCosts, PerformanceModel
from rorqual.performance.sources import TOKENS_PER_SECOND_UNKNOWN
from router.placement.columns import Bools, FleetColumns, Float64s

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
    """Figures are taken in when a prompt is placed, all new ones at once: twenty microseconds for a thousand of them,
    and policies stay functions of what they are shown. Who reports more often than prompts come is heard with its
    latest figure."""

    def __init__(self, model: PerformanceModel, *, ratio_max: float) -> None:
        self.model = model
        chunk = model.chunk_tokens
        self.token_seconds = float(model.prefill_seconds(chunk)) / chunk
        self._corrections = Corrections(ratio_max=ratio_max)
        self._session_W = np.zeros(0, np.int64)  # of each correction; 0: nothing was measured
        self._rate_W = np.zeros(0)  # told the last time

    def learn(self, fleet: FleetColumns, able_W: Bools) -> None:
        """Take in what the able have measured since the last time."""
        if fleet.num_rows > len(self._rate_W):
            num_more = fleet.num_rows - len(self._rate_W)
            self._corrections.grow(fleet.num_rows)
            self._session_W = np.append(self._session_W, np.zeros(num_more, np.int64))
            self._rate_W = np.append(self._rate_W, np.zeros(num_more))
        is_other_W = fleet.session_W != self._session_W
        is_new_W = (
            able_W & (fleet.prefill_rate_W != 0) & (is_other_W | (fleet.prefill_rate_W != self._rate_W))
        )
        rows = np.flatnonzero(is_new_W)
        if not len(rows):
            return
        # A worker that came back may be another machine.
        self._corrections.forget(rows[is_other_W[rows]])
        self._session_W[rows] = fleet.session_W[rows]
        self._rate_W[rows] = fleet.prefill_rate_W[rows]
        self._corrections.observe(rows, predicted=self.token_seconds, measured=1 / self._rate_W[rows])

    def factors_W(self, fleet: FleetColumns, able_W: Bools) -> Float64s:
        """By how much predicted seconds are to be multiplied, for each of the able; 1 for others."""
        is_known_W = able_W & (self._session_W == fleet.session_W)
        factor_W = np.where(is_known_W, self._corrections.factors, 1.0)
        is_unknown_W = able_W & ~is_known_W
        if is_unknown_W.any() and is_known_W.any():
            factor_W[is_unknown_W] = np.median(factor_W[is_known_W])
        return factor_W

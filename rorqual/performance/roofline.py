"""Predicted times by the roofline model: a step takes as long as its arithmetic or its memory traffic, whichever is
longer (Williams, Waterman, Patterson, "Roofline", CACM 2009), divided by the share of the peak that kernels reach.

Called by placement and simulation. Everything takes plain numbers or numpy arrays of them and gives the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rorqual.performance.costs import ModelCosts
from rorqual.performance.hardware import Hardware
from rorqual.performance.sources import SourceSpeed

Numbers = NDArray[np.float64]
"""A float64 array; plain numbers become one of no dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the peaks that kernels reach, and what every step costs besides. Fitted per deployment."""

    memory: float = 0.55
    arithmetic: float = 0.45
    network: float = 0.7
    step_seconds: float = 0.002

    def __post_init__(self) -> None:
        for share in (self.memory, self.arithmetic, self.network):
            assert 0 < share <= 1, "an efficiency is a share of the peak"
        assert self.step_seconds >= 0, "a step costs no negative time"


HOST_SPEED = SourceSpeed(bytes_per_second=10e9)
"""Assumed of copies from a worker's host memory to its device."""

STORE_SPEED = SourceSpeed(bytes_per_second=2e9, latency_seconds=0.002)
"""Assumed of one worker's reads from the store that all workers share, and of its writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceModel:
    """One worker: `num_devices` accelerators, experts spread over them, attention data-parallel."""

    hardware: Hardware
    costs: ModelCosts
    num_devices: int
    chunk_tokens: int = 8192  # of one prefill step, at most
    efficiency: Efficiency = Efficiency()
    host: SourceSpeed = HOST_SPEED
    store: SourceSpeed = STORE_SPEED

    def __post_init__(self) -> None:
        assert self.num_devices > 0, "a worker has a device"
        assert self.chunk_tokens > 0, "a step computes a token"

    def prefill_seconds(self, num_tokens: float | Numbers, context: float | Numbers = 0.0) -> Numbers:
        """Seconds to compute `num_tokens` tokens behind `context` tokens whose state is there, in steps of
        `chunk_tokens`. 0 for no tokens."""
        tokens = np.asarray(num_tokens, np.float64)
        before = np.asarray(context, np.float64)
        full = np.floor(tokens / self.chunk_tokens)
        rest_start = before + full * self.chunk_tokens
        rest = tokens - full * self.chunk_tokens
        seconds = np.maximum(
            self.arithmetic_seconds(before, rest_start), full * self.weights_seconds(self.chunk_tokens)
        )
        last = np.maximum(self.arithmetic_seconds(rest_start, rest_start + rest), self.weights_seconds(rest))
        num_steps = full + (rest > 0)
        return seconds + np.where(rest > 0, last, 0.0) + num_steps * self.efficiency.step_seconds

    def work_seconds(self, num_tokens: float | Numbers, context: float | Numbers = 0.0) -> Numbers:
        """Seconds that a prompt adds to those of a busy worker: its arithmetic, and its share of full steps. Less than
        `prefill_seconds`, where a short prompt pays for reading all weights by itself."""
        tokens, before = np.asarray(num_tokens, np.float64), np.asarray(context, np.float64)
        share = self.efficiency.step_seconds / self.chunk_tokens
        return self.arithmetic_seconds(before, before + tokens) + tokens * share

    def arithmetic_seconds(self, start: float | Numbers, end: float | Numbers) -> Numbers:
        """Seconds of arithmetic of the tokens at positions start..end-1. Of several segments in a step it adds up."""
        first, last = np.asarray(start, np.float64), np.asarray(end, np.float64)
        index = self._index_area(last) - self._index_area(first)
        attention = self._attention_area(last) - self._attention_area(first)
        return self._flops_seconds(2 * self.costs.active_params * (last - first) + index, attention)

    def weights_seconds(self, num_tokens: float | Numbers) -> Numbers:
        """Seconds to read the weights that a step of so many tokens needs."""
        rate = self.hardware.memory_bytes_per_second * self.efficiency.memory
        return self._weight_bytes(np.asarray(num_tokens, np.float64)) / rate

    def decode_step_seconds(self, batch: float | Numbers, context: float | Numbers) -> Numbers:
        """Seconds of one step that gives each of `batch` sequences of `context` tokens one token more."""
        sequences = np.asarray(batch, np.float64)
        length = np.asarray(context, np.float64)
        traffic = self._weight_bytes(sequences) + sequences / self.num_devices * self.state_bytes_read(length)
        flops = self._flops_seconds(
            2 * self.costs.active_params + self._index_flops(length), self._attention_flops(length)
        )
        memory = traffic / (self.hardware.memory_bytes_per_second * self.efficiency.memory)
        return np.maximum(memory, sequences * flops) + self.efficiency.step_seconds

    @property
    def peer_speed(self) -> SourceSpeed:
        """Of reads from another worker: all devices' network interfaces read at once."""
        rate = self.hardware.network_bytes_per_second * self.num_devices * self.efficiency.network
        return SourceSpeed(bytes_per_second=rate)

    def fetch_seconds(self, num_bytes: float | Numbers) -> Numbers:
        """Seconds to read so many bytes from another worker."""
        return self.peer_speed.seconds(num_bytes)

    def store_seconds(self, num_bytes: float | Numbers) -> Numbers:
        """Seconds to read so many bytes from the store, nothing else being read. 0 for none."""
        return self.store.seconds(num_bytes)

    def state_bytes_read(self, context: float | Numbers) -> Numbers:
        """Bytes of cached state that the attention of one new token reads in all layers."""
        costs, length = self.costs, np.asarray(context, np.float64)
        csa_rows = length / costs.csa_ratio
        rows = (
            costs.num_csa * np.minimum(costs.index_topk, csa_rows) + costs.num_hca * length / costs.hca_ratio
        )
        rows = rows + costs.num_layers * np.minimum(costs.window, length)
        return rows * costs.kv_row_bytes + costs.num_csa * csa_rows * costs.index_row_bytes

    def _weight_bytes(self, num_tokens: Numbers) -> Numbers:
        """Read on one device in a step of so many tokens: its own copy of what all have, and its share of the
        experts that are picked at all. A token picks k of E, so a given one is missed with probability 1 - k/E."""
        costs = self.costs
        missed = (1 - costs.num_experts_per_token / costs.num_experts) ** num_tokens
        touched = costs.num_experts * (1 - missed) / self.num_devices
        return costs.resident_bytes + costs.num_layers * touched * costs.expert_bytes

    def _flops_seconds(self, fp8_flops: Numbers, bf16_flops: Numbers) -> Numbers:
        hardware = self.hardware
        seconds = fp8_flops / hardware.fp8_flops + bf16_flops / hardware.bf16_flops
        return seconds / (self.num_devices * self.efficiency.arithmetic)

    def _attention_flops(self, length: Numbers) -> Numbers:
        costs = self.costs
        rows = costs.num_csa * np.minimum(costs.index_topk, length / costs.csa_ratio)
        rows = rows + costs.num_hca * length / costs.hca_ratio
        rows = rows + costs.num_layers * np.minimum(costs.window, length)
        return rows * costs.attention_flops

    def _index_flops(self, length: Numbers) -> Numbers:
        return self.costs.num_csa * length / self.costs.csa_ratio * self.costs.index_flops

    def _attention_area(self, length: Numbers) -> Numbers:
        """The integral of `_attention_flops` from 0."""
        costs = self.costs
        rows = costs.num_csa * _capped_area(length, costs.index_topk * costs.csa_ratio) / costs.csa_ratio
        rows = rows + costs.num_hca * length**2 / (2 * costs.hca_ratio)
        rows = rows + costs.num_layers * _capped_area(length, costs.window)
        return rows * costs.attention_flops

    def _index_area(self, length: Numbers) -> Numbers:
        return self.costs.num_csa * length**2 / (2 * self.costs.csa_ratio) * self.costs.index_flops


def _capped_area(length: Numbers, cap: float) -> Numbers:
    """The integral of min(x, cap) from 0 to length."""
    inside = np.minimum(length, cap)
    return inside**2 / 2 + cap * (length - inside)

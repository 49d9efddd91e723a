"""What every layer of one forward pass shares: configuration, kernels, rounding, the batch, its state and angles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.suite import Kernels
from engine.model.batch import RaggedBatch
from engine.model.rounding import Rounding
from engine.model.state import StateView
from rorqual.model_config import LayerKind, ModelConfig


class PickHook(Protocol):
    """Sees, and may replace, the discrete choices of a pass. For tests and for recording; costs nothing when absent."""

    def rows(self, layer: int, first_row: int, picks_Qk: Tensor) -> Tensor:
        """Indexer picks (-1 is none) of batch rows first_row .. ; returns the picks to use."""
        ...

    def experts(
        self, layer: int, logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None
    ) -> Tensor | None:
        """Experts of every row (return `picks_TK` to keep a hash layer's), or None: the learned routing's own."""
        ...


class Observer(Protocol):
    """Sees what a pass computed, with its graph, and changes nothing. For training: losses on what is inside."""

    def sparse(self, layer: int, q_THd: Tensor, kv_Td: Tensor, index: IndexQueries) -> None:
        """A CSA layer's queries and raw rows (rotated), and its indexer's queries. Its compressed rows have been put
        into the pass's state."""
        ...

    def routed(self, layer: int, experts_TK: Tensor) -> None:
        """The experts of every row of a layer, i64."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexQueries:
    """The indexer's side of a batch: q_THd f32 [T, Hi, di], rotated and rounded; weights_TH f32 [T, Hi], scaled."""

    q_THd: Tensor
    weights_TH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Frequencies:
    """Rotary frequencies f32 [R/2] of window-only layers and of compressed layers."""

    plain: Tensor
    compressed: Tensor

    def of(self, kind: LayerKind) -> Tensor:
        return self.plain if kind is LayerKind.WINDOW else self.compressed


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass over one batch."""

    config: ModelConfig
    kernels: Kernels
    rounding: Rounding
    exact: bool
    batch: RaggedBatch
    state: StateView
    frequencies: Frequencies
    plain_angles: Tensor  # [T, R/2, 2], window-only layers
    compressed_angles: Tensor
    hook: PickHook | None
    observer: Observer | None

    def linear(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        return self.kernels.linear(x, weight_NK, self.exact)

    def angles(self, kind: LayerKind) -> Tensor:
        return self.plain_angles if kind is LayerKind.WINDOW else self.compressed_angles


def rotary_frequencies(config: ModelConfig) -> Frequencies:
    """omega_i = theta^(-2i/R); for compressed layers stretched by YaRN (arXiv 2309.00071), by frequency only: cos and
    sin are not scaled. Computed in f64, kept in f32."""
    width = config.rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = config.rope_theta**-exponents
    compressed = config.compress_rope_theta**-exponents
    yarn = config.yarn
    if yarn is not None:

        def turning_channel(rotations: float) -> float:
            span = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return width * math.log(span) / (2 * math.log(config.compress_rope_theta))

        low = max(math.floor(turning_channel(yarn.beta_fast)), 0)
        high = min(math.ceil(turning_channel(yarn.beta_slow)), width - 1)
        ramp = (torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
        ramp = ramp.clamp(0, 1)
        compressed = compressed * (1 - ramp) + compressed / yarn.factor * ramp
    return Frequencies(plain=plain.float(), compressed=compressed.float())

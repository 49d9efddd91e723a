"""The experts' activation. Shapes: N rows, I expert width."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("swiglu", name="torch", devices=("cpu", "cuda"), priority=0)
def swiglu_torch(hidden_NJ: Tensor, shares_N: Tensor, limit: float) -> Tensor:
    """share * silu(min(gate, limit)) * clamp(up, -limit, limit), where gate is the first half of a row of [N, 2I] and
    up the second; f32 [N, I]. The gate is clamped from above only."""
    gate, up = hidden_NJ.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return activated * shares_N.unsqueeze(-1)


@kernel("swiglu", name="numba", devices=("cpu",), priority=10)
def swiglu_numba(hidden_NJ: Tensor, shares_N: Tensor, limit: float) -> Tensor:
    activated = torch.empty((hidden_NJ.shape[0], hidden_NJ.shape[1] // 2))
    _swiglu(array(hidden_NJ), array(shares_N), np.float32(limit), activated.numpy())
    return activated


@numba.njit(cache=True, nogil=True)
def _swiglu(hidden, shares, limit, activated):  # type: ignore[no-untyped-def]
    num_rows, width = activated.shape
    one = np.float32(1)
    for n in range(num_rows):
        share = shares[n]
        row = hidden[n]
        out = activated[n]
        for i in range(width):
            gate = min(row[i], limit)
            up = min(max(row[width + i], -limit), limit)
            out[i] = gate / (one + np.exp(-gate)) * up * share

"""Compressor kernel: pooling the tokens of a window into one row, by a softmax of its own for every channel.

Shapes: W windows, P pooled tokens each, h channels.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("pool_windows", name="torch", devices=("cpu", "cuda"), priority=0)
def pool_windows_torch(keys_WPh: Tensor, scores_WPh: Tensor) -> Tensor:
    """e[w, c] = sum_p softmax_p(scores[w, :, c]) * keys[w, p, c], f32 [W, h]. A score of -inf has weight 0, whatever
    its key (which must be finite); every window has at least one finite score a channel."""
    return (torch.softmax(scores_WPh, dim=1) * keys_WPh).sum(1)


@kernel("pool_windows", name="numba", devices=("cpu",), priority=10)
def pool_windows_numba(keys_WPh: Tensor, scores_WPh: Tensor) -> Tensor:
    pooled = torch.empty((keys_WPh.shape[0], keys_WPh.shape[2]))
    _pool_windows(array(keys_WPh), array(scores_WPh), pooled.numpy())
    return pooled


@numba.njit(cache=True, nogil=True)
def _pool_windows(keys, scores, pooled):  # type: ignore[no-untyped-def]
    num_windows, num_pooled, width = keys.shape
    largest = np.empty(width, dtype=np.float32)
    total = np.empty(width, dtype=np.float32)
    for w in range(num_windows):
        row = pooled[w]
        for c in range(width):
            largest[c] = -np.inf
            total[c] = np.float32(0)
            row[c] = np.float32(0)
        for p in range(num_pooled):
            for c in range(width):
                largest[c] = max(largest[c], scores[w, p, c])
        for p in range(num_pooled):
            for c in range(width):
                weight = np.exp(scores[w, p, c] - largest[c])
                total[c] += weight
                row[c] += weight * keys[w, p, c]
        for c in range(width):
            row[c] /= total[c]

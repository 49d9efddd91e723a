"""Lightning-indexer kernels: combining head scores, and picking the best rows by our own tie rule.

Shapes: T queries, H index heads, n rows, k picks.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("index_scores", name="torch", devices=("cpu", "cuda"), priority=0)
def index_scores_torch(dots_THn: Tensor, weights_TH: Tensor) -> Tensor:
    """I[t, i] = sum_h weights[t, h] * relu(dots[t, h, i]), heads added in order; f32 [T, n]."""
    return (weights_TH.unsqueeze(-1) * torch.relu(dots_THn)).sum(1)


@kernel("top_rows", name="torch", devices=("cpu", "cuda"), priority=0)
def top_rows_torch(scores_Tn: Tensor, visible_T: Tensor, k: int) -> Tensor:
    """The min(k, visible) rows with the largest score among rows 0..visible-1 of each query: i64 [T, k], ascending
    row numbers, then -1. Equal scores: the lowest row number first. A NaN score counts as -inf."""
    num_rows = scores_Tn.shape[1]
    columns = torch.arange(num_rows, device=scores_Tn.device)
    hidden = columns >= visible_T.unsqueeze(-1)
    scores = torch.where(hidden | scores_Tn.isnan(), -torch.inf, scores_Tn)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # Hidden rows sort behind all others when they go out as num_rows; a visible score of -inf stays in front of them
    # because the sort is stable and hidden rows have higher numbers.
    rows = torch.where(order < visible_T.unsqueeze(-1), order, num_rows).sort(dim=-1).values
    rows = torch.nn.functional.pad(rows, (0, k - rows.shape[1]), value=num_rows)
    return torch.where(rows < num_rows, rows, -1)


@kernel("index_scores", name="numba", devices=("cpu",), priority=10)
def index_scores_numba(dots_THn: Tensor, weights_TH: Tensor) -> Tensor:
    scores = torch.empty((dots_THn.shape[0], dots_THn.shape[2]))
    _index_scores(array(dots_THn), array(weights_TH), scores.numpy())
    return scores


@kernel("top_rows", name="numba", devices=("cpu",), priority=10)
def top_rows_numba(scores_Tn: Tensor, visible_T: Tensor, k: int) -> Tensor:
    rows = torch.empty((scores_Tn.shape[0], k), dtype=torch.int64)
    _top_rows(array(scores_Tn), array(visible_T), k, rows.numpy())
    return rows


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _index_scores(dots, weights, scores):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, num_rows = dots.shape
    for t in range(num_tokens):
        row = scores[t]
        for i in range(num_rows):
            row[i] = np.float32(0)
        for h in range(num_heads):
            weight = weights[t, h]
            head = dots[t, h]
            for i in range(num_rows):
                row[i] += weight * max(head[i], np.float32(0))


@numba.njit(cache=True, nogil=True)
def _top_rows(scores, visible, k, rows):  # type: ignore[no-untyped-def]
    ranked = np.empty(scores.shape[1], dtype=np.float32)
    scratch = np.empty(scores.shape[1], dtype=np.float32)
    for t in range(scores.shape[0]):
        num_visible = min(visible[t], scores.shape[1])
        found = 0
        if num_visible <= k:
            for i in range(num_visible):
                rows[t, i] = i
            found = num_visible
        else:
            # Comparisons with NaN are all false: quickselect would lose count, and `rows` be written past its end.
            for i in range(num_visible):
                score = scores[t, i]
                ranked[i] = score if score == score else np.float32(-np.inf)
                scratch[i] = ranked[i]
            threshold = _largest(scratch, num_visible, k)
            above = 0
            for i in range(num_visible):
                if ranked[i] > threshold:
                    above += 1
            ties = k - above
            for i in range(num_visible):
                score = ranked[i]
                if score > threshold:
                    rows[t, found] = i
                    found += 1
                elif score == threshold and ties > 0:
                    rows[t, found] = i
                    found += 1
                    ties -= 1
        for i in range(found, k):
            rows[t, i] = -1


@numba.njit(cache=True, nogil=True)
def _largest(values, num_values, k):  # type: ignore[no-untyped-def]
    """The k-th largest of values[:num_values], by Hoare's quickselect; reorders values."""
    left = 0
    right = num_values - 1
    wanted = k - 1
    while left < right:
        pivot = values[(left + right) // 2]
        i = left
        j = right
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                swapped = values[i]
                values[i] = values[j]
                values[j] = swapped
                i += 1
                j -= 1
        if wanted <= j:
            right = j
        elif wanted >= i:
            left = i
        else:
            break
    return values[wanted]

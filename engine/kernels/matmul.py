"""Matrix product kernels: activations times the transpose of a weight matrix, and the same for groups of rows.

Shapes: M rows, K inputs, N outputs, G weight matrices.

On CPU the library's product is made for many rows: for the few rows of a decode step it packs the whole weight matrix
first. A plain loop that streams the weights once is two to three times faster up to about 16 rows (measured on AVX2,
512 x 256, weights not in cache: 26 against 92 us at one row, 45 against 103 at eight), and at four rows at a time each
result is the same sum in the same order whatever the other rows are: that is all that exact mode needs.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from engine.kernels.arrays import array
from engine.kernels.registry import kernel

FEW_ROWS = 16
"""Up to this many rows the loop is faster than the library."""

Groups = list[tuple[int, int, int]]
"""(matrix, first row, one past the last row), rows ascending without gaps."""


@kernel("linear", name="torch", devices=("cpu", "cuda"), priority=0)
def linear_torch(x: Tensor, weight_NK: Tensor, exact: bool) -> Tensor:
    """x @ weight.T over the last axis, f32. With `exact` a row's result must not depend on the other rows, nor on how
    many there are; an implementation that cannot promise it says so by failing the start-up self-test."""
    del exact
    return library_linear(x, weight_NK)


@kernel("grouped_linear", name="torch", devices=("cpu", "cuda"), priority=0)
def grouped_linear_torch(x_MK: Tensor, weights_GNK: Tensor, groups: Groups, exact: bool) -> Tensor:
    """`linear` of every group's rows with its own matrix: f32 [M, N]."""
    del exact
    return torch.cat(
        [library_linear(x_MK[first:last], weights_GNK[matrix]) for matrix, first, last in groups]
    )


@kernel("linear", name="numba", devices=("cpu",), priority=10)
def linear_numba(x: Tensor, weight_NK: Tensor, exact: bool) -> Tensor:
    num_inputs = x.shape[-1]
    num_rows = x.numel() // num_inputs
    if num_rows > FEW_ROWS and not exact:
        return library_linear(x, weight_NK)
    output = torch.empty((*x.shape[:-1], weight_NK.shape[0]))
    rows = x.reshape(num_rows, num_inputs)
    out = output.view(num_rows, weight_NK.shape[0]).numpy()
    if num_rows == 1 and not exact:
        _row_product(array(rows)[0], array(weight_NK), out[0])
    else:
        _product(array(rows), array(weight_NK), out)
    return output


@kernel("grouped_linear", name="numba", devices=("cpu",), priority=10)
def grouped_linear_numba(x_MK: Tensor, weights_GNK: Tensor, groups: Groups, exact: bool) -> Tensor:
    output = torch.empty((x_MK.shape[0], weights_GNK.shape[1]))
    few = [group for group in groups if exact or group[2] - group[1] <= FEW_ROWS]
    if few:
        _grouped_product(array(x_MK), array(weights_GNK), np.array(few), array(output))
    if len(few) < len(groups):
        for matrix, first, last in groups:
            if last - first > FEW_ROWS:
                torch.mm(x_MK[first:last], weights_GNK[matrix].T, out=output[first:last])
    return output


_FAST = {"reassoc", "contract", "nsz"}
ROWS_CACHED = 64
"""Rows of x that stay in cache while the weights stream by once."""


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _row_product(x, weight, out):  # type: ignore[no-untyped-def]
    num_outputs, num_inputs = weight.shape
    for n in range(num_outputs):
        row = weight[n]
        total = np.float32(0)
        for k in range(num_inputs):
            total += x[k] * row[k]
        out[n] = total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _product(x, weight, out):  # type: ignore[no-untyped-def]
    """Four rows at a time, the last of a remainder repeated: every row runs through the same four-lane loop."""
    num_rows, num_inputs = x.shape
    last = num_rows - 1
    for start in range(0, num_rows, ROWS_CACHED):
        stop = min(start + ROWS_CACHED, num_rows)
        for n in range(weight.shape[0]):
            row = weight[n]
            for m in range(start, stop, 4):
                m1, m2, m3 = min(m + 1, last), min(m + 2, last), min(m + 3, last)
                x0, x1, x2, x3 = x[m], x[m1], x[m2], x[m3]
                total0 = np.float32(0)
                total1 = np.float32(0)
                total2 = np.float32(0)
                total3 = np.float32(0)
                for k in range(num_inputs):
                    value = row[k]
                    total0 += x0[k] * value
                    total1 += x1[k] * value
                    total2 += x2[k] * value
                    total3 += x3[k] * value
                out[m, n] = total0
                out[m1, n] = total1
                out[m2, n] = total2
                out[m3, n] = total3


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _grouped_product(x, weights, groups, out):  # type: ignore[no-untyped-def]
    for g in range(groups.shape[0]):
        first, last = groups[g, 1], groups[g, 2]
        _product(x[first:last], weights[groups[g, 0]], out[first:last])

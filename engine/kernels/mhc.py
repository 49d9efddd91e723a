"""Hyper-connection kernels: splitting the streams into one input, and mixing a sublayer's output back in.

Formulas: manifold-constrained hyper-connections (mHC, arXiv 2512.24880), as DeepSeek-V4 uses them: sigmoid gates,
and a 4x4 mixing matrix made doubly stochastic by Sinkhorn-Knopp with an epsilon in every division.
Shapes: T tokens, S streams (hc_mult), D hidden.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("hc_split", name="torch", devices=("cpu", "cuda"), priority=0)
def hc_split_torch(
    mix_TM: Tensor,
    streams_TSD: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    iters: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of one hyper-connection site, and the collapsed input.

    mix_TM f32 [T, (2 + S) * S] is fn @ flatten(streams), not yet scaled by the streams' inverse RMS. Returns
    x_TD f32 = sum_j pre_j X_j, post_TS f32, comb_TSS f32 (rows j, columns k: X'_k = post_k F + sum_j comb[j,k] X_j).
    One Sinkhorn round is a row softmax and a column division; `iters - 1` row and column divisions follow.
    """
    num_streams = streams_TSD.shape[1]
    flat = streams_TSD.flatten(1)
    mix = mix_TM * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mix[:, :num_streams] * scale_3[0] + base_M[:num_streams]) + hc_eps
    post = 2 * torch.sigmoid(
        mix[:, num_streams : 2 * num_streams] * scale_3[1] + base_M[num_streams : 2 * num_streams]
    )
    logits = mix[:, 2 * num_streams :] * scale_3[2] + base_M[2 * num_streams :]
    comb = torch.softmax(logits.view(-1, num_streams, num_streams), dim=-1) + hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + hc_eps)
    return (pre.unsqueeze(-1) * streams_TSD).sum(1), post, comb


@kernel("hc_merge", name="torch", devices=("cpu", "cuda"), priority=0)
def hc_merge_torch(output_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, streams_TSD: Tensor) -> Tensor:
    """New streams: X'_k = post_k * output + sum_j comb[j, k] X_j. All f32; returns [T, S, D]."""
    return post_TS.unsqueeze(-1) * output_TD.unsqueeze(1) + comb_TSS.transpose(1, 2) @ streams_TSD


@kernel("hc_collapse", name="torch", devices=("cpu", "cuda"), priority=0)
def hc_collapse_torch(
    mix_TS: Tensor, streams_TSD: Tensor, scale_1: Tensor, base_S: Tensor, hc_eps: float, norm_eps: float
) -> Tensor:
    """The head's collapse: y = sum_j (sigmoid(mix_j * inverse RMS * scale + base_j) + hc_eps) X_j, f32 [T, D]."""
    inverse_rms = torch.rsqrt(streams_TSD.flatten(1).pow(2).mean(-1, keepdim=True) + norm_eps)
    gates = torch.sigmoid(mix_TS * inverse_rms * scale_1 + base_S) + hc_eps
    return (gates.unsqueeze(-1) * streams_TSD).sum(1)


@kernel("hc_split", name="numba", devices=("cpu",), priority=10)
def hc_split_numba(
    mix_TM: Tensor,
    streams_TSD: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    iters: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_streams, width = streams_TSD.shape
    x = torch.empty((num_tokens, width))
    post = torch.empty((num_tokens, num_streams))
    comb = torch.empty((num_tokens, num_streams, num_streams))
    _hc_split(
        array(mix_TM),
        array(streams_TSD),
        array(scale_3),
        array(base_M),
        iters,
        np.float32(hc_eps),
        np.float32(norm_eps),
        x.numpy(),
        post.numpy(),
        comb.numpy(),
    )
    return x, post, comb


@kernel("hc_merge", name="numba", devices=("cpu",), priority=10)
def hc_merge_numba(output_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, streams_TSD: Tensor) -> Tensor:
    merged = torch.empty_like(streams_TSD)
    _hc_merge(array(output_TD), array(post_TS), array(comb_TSS), array(streams_TSD), merged.numpy())
    return merged


@kernel("hc_collapse", name="numba", devices=("cpu",), priority=10)
def hc_collapse_numba(
    mix_TS: Tensor, streams_TSD: Tensor, scale_1: Tensor, base_S: Tensor, hc_eps: float, norm_eps: float
) -> Tensor:
    y = torch.empty((streams_TSD.shape[0], streams_TSD.shape[2]))
    _hc_collapse(
        array(mix_TS),
        array(streams_TSD),
        array(scale_1),
        array(base_S),
        np.float32(hc_eps),
        np.float32(norm_eps),
        y.numpy(),
    )
    return y


# Each token is one iteration that reads nothing of the others, so results do not depend on the batch. Sums may be
# reassociated by the compiler into vector lanes, always in the same way for a given width.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _inverse_rms(streams, norm_eps):  # type: ignore[no-untyped-def]
    num_streams, width = streams.shape
    squares = np.float32(0)
    for s in range(num_streams):
        row = streams[s]
        for i in range(width):
            squares += row[i] * row[i]
    return np.float32(1) / np.sqrt(squares / np.float32(num_streams * width) + norm_eps)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _collapse(mix, streams, inverse_rms, scale, base, hc_eps, x):  # type: ignore[no-untyped-def]
    num_streams, width = streams.shape
    one = np.float32(1)
    for i in range(width):
        x[i] = np.float32(0)
    for s in range(num_streams):
        gate = one / (one + np.exp(-(mix[s] * inverse_rms * scale + base[s]))) + hc_eps
        stream = streams[s]
        for i in range(width):
            x[i] += gate * stream[i]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _hc_collapse(mix, streams, scale, base, hc_eps, norm_eps, y):  # type: ignore[no-untyped-def]
    for t in range(streams.shape[0]):
        _collapse(mix[t], streams[t], _inverse_rms(streams[t], norm_eps), scale[0], base, hc_eps, y[t])


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _hc_split(mix, streams, scale, base, iters, hc_eps, norm_eps, x, post, comb):  # type: ignore[no-untyped-def]
    num_tokens, num_streams, _ = streams.shape
    one = np.float32(1)
    for t in range(num_tokens):
        inverse_rms = _inverse_rms(streams[t], norm_eps)
        _collapse(mix[t], streams[t], inverse_rms, scale[0], base, hc_eps, x[t])
        for s in range(num_streams):
            post_logit = mix[t, num_streams + s] * inverse_rms * scale[1] + base[num_streams + s]
            post[t, s] = np.float32(2) / (one + np.exp(-post_logit))
        matrix = comb[t]
        for j in range(num_streams):
            first = 2 * num_streams + j * num_streams
            largest = np.float32(-np.inf)
            for k in range(num_streams):
                matrix[j, k] = mix[t, first + k] * inverse_rms * scale[2] + base[first + k]
                largest = max(largest, matrix[j, k])
            total = np.float32(0)
            for k in range(num_streams):
                matrix[j, k] = np.exp(matrix[j, k] - largest)
                total += matrix[j, k]
            for k in range(num_streams):
                matrix[j, k] = matrix[j, k] / total + hc_eps
        for iteration in range(iters):
            if iteration > 0:
                for j in range(num_streams):
                    total = np.float32(0)
                    for k in range(num_streams):
                        total += matrix[j, k]
                    inverse = one / (total + hc_eps)
                    for k in range(num_streams):
                        matrix[j, k] *= inverse
            for k in range(num_streams):
                total = np.float32(0)
                for j in range(num_streams):
                    total += matrix[j, k]
                inverse = one / (total + hc_eps)
                for j in range(num_streams):
                    matrix[j, k] *= inverse


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _hc_merge(output, post, comb, streams, merged):  # type: ignore[no-untyped-def]
    num_tokens, num_streams, width = streams.shape
    for t in range(num_tokens):
        out_row = output[t]
        for k in range(num_streams):
            row = merged[t, k]
            gate = post[t, k]
            for i in range(width):
                row[i] = gate * out_row[i]
            for j in range(num_streams):
                weight = comb[t, j, k]
                stream = streams[t, j]
                for i in range(width):
                    row[i] += weight * stream[i]

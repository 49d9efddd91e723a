"""Differentiable kernels for training on CPU: the compiled forward passes with compiled backward passes of their own.

`training_kernels` picks these; serving never does (priority below the `torch` reference, which differentiates too but
keeps every intermediate: forty of each Sinkhorn matrix alone). Each is an autograd function whose gradients the tests
compare with the reference's. Shapes as in the modules whose operations they implement.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.matmul import Groups
from engine.kernels.mhc import hc_merge_numba, hc_split_numba
from engine.kernels.registry import kernel
from engine.kernels.swiglu import swiglu_numba

NAME = "gradients"
_PRIORITY = -1


@kernel("hc_split", name=NAME, devices=("cpu",), priority=_PRIORITY)
def hc_split_gradients(
    mix_TM: Tensor,
    streams_TSD: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    iters: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _HcSplit.apply(mix_TM, streams_TSD, scale_3, base_M, iters, hc_eps, norm_eps)  # type: ignore[no-any-return]


@kernel("hc_merge", name=NAME, devices=("cpu",), priority=_PRIORITY)
def hc_merge_gradients(output_TD: Tensor, post_TS: Tensor, comb_TSS: Tensor, streams_TSD: Tensor) -> Tensor:
    return _HcMerge.apply(output_TD, post_TS, comb_TSS, streams_TSD)  # type: ignore[no-any-return]


@kernel("grouped_linear", name=NAME, devices=("cpu",), priority=_PRIORITY)
def grouped_linear_gradients(x_MK: Tensor, weights_GNK: Tensor, groups: Groups, exact: bool) -> Tensor:
    del exact
    return _GroupedLinear.apply(x_MK, weights_GNK, groups)  # type: ignore[no-any-return]


@kernel("swiglu", name=NAME, devices=("cpu",), priority=_PRIORITY)
def swiglu_gradients(hidden_NJ: Tensor, shares_N: Tensor, limit: float) -> Tensor:
    return _Swiglu.apply(hidden_NJ, shares_N, limit)  # type: ignore[no-any-return]


class _HcSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        mix, streams, scale, base, iters, hc_eps, norm_eps = args
        tensors = tuple(item.detach() for item in (mix, streams, scale, base))
        ctx.save_for_backward(*tensors)
        ctx.constants = (iters, hc_eps, norm_eps)
        return hc_split_numba(tensors[0], tensors[1], tensors[2], tensors[3], iters, hc_eps, norm_eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mix, streams, scale, base = ctx.saved_tensors
        iters, hc_eps, norm_eps = ctx.constants
        d_mix, d_streams = torch.empty_like(mix), torch.empty_like(streams)
        # f64 sums over all tokens.
        d_scale = torch.zeros(3, dtype=torch.float64)
        d_base = torch.zeros(base.shape, dtype=torch.float64)
        outputs = (d_mix.numpy(), d_streams.numpy(), d_scale.numpy(), d_base.numpy())
        _hc_split_backward(
            (array(mix), array(streams), array(scale), array(base)),
            (array(grads[0]), array(grads[1]), array(grads[2])),
            (iters, np.float32(hc_eps), np.float32(norm_eps)),
            outputs,
        )
        return d_mix, d_streams, d_scale.float(), d_base.float(), None, None, None


class _HcMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        tensors = tuple(item.detach() for item in args)
        ctx.save_for_backward(*tensors)
        return hc_merge_numba(tensors[0], tensors[1], tensors[2], tensors[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        output, post, comb, streams = ctx.saved_tensors
        found = tuple(torch.empty(item.shape) for item in ctx.saved_tensors)
        arrays = (found[0].numpy(), found[1].numpy(), found[2].numpy(), found[3].numpy())
        _hc_merge_backward(array(output), array(post), array(comb), array(streams), array(grads[0]), arrays)
        return found


class _GroupedLinear(torch.autograd.Function):
    """Autograd's own way through an indexed stack of matrices makes a zero gradient of the whole stack for each."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weights, groups = args
        ctx.save_for_backward(x, weights)
        ctx.groups = groups
        output = torch.empty((x.shape[0], weights.shape[1]))
        for matrix, first, last in groups:
            torch.mm(x[first:last], weights[matrix].T, out=output[first:last])
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_x, d_weights = torch.empty_like(x), torch.zeros_like(weights)
        for matrix, first, last in ctx.groups:
            torch.mm(grad[first:last], weights[matrix], out=d_x[first:last])
            torch.addmm(d_weights[matrix], grad[first:last].T, x[first:last], out=d_weights[matrix])
        return d_x, d_weights, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, shares, limit = args
        hidden, shares = hidden.detach(), shares.detach()
        ctx.save_for_backward(hidden, shares)
        ctx.limit = limit
        return swiglu_numba(hidden, shares, limit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shares = ctx.saved_tensors
        limit: float = ctx.limit
        gate, up = hidden.chunk(2, dim=-1)
        low = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(low)
        silu = low * sigmoid
        flat = up.clamp(-limit, limit)
        grad = grads[0] * shares.unsqueeze(-1)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        # d silu = sigmoid + silu (1 - sigmoid)
        torch.mul(grad * flat, sigmoid + silu * (1 - sigmoid), out=d_gate)
        d_gate.masked_fill_(gate > limit, 0)
        torch.mul(grad, silu, out=d_up)
        d_up.masked_fill_(up.abs() > limit, 0)
        d_shares = (grads[0] * silu * flat).sum(-1)
        return d_hidden, d_shares, None


_FAST = {"reassoc", "contract", "nsz", "arcp"}


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _dot(left, right):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(left.shape[0]):
        total += left[i] * right[i]
    return total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _add_scaled(target, factor, source):  # type: ignore[no-untyped-def]
    for i in range(target.shape[0]):
        target[i] += factor * source[i]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _hc_merge_backward(output, post, comb, streams, grad, outputs):  # type: ignore[no-untyped-def]
    d_output, d_post, d_comb, d_streams = outputs
    num_tokens, num_streams, width = streams.shape
    for t in range(num_tokens):
        for i in range(width):
            d_output[t, i] = np.float32(0)
        for k in range(num_streams):
            _add_scaled(d_output[t], post[t, k], grad[t, k])
            d_post[t, k] = _dot(grad[t, k], output[t])
        for j in range(num_streams):
            d_stream = d_streams[t, j]
            for i in range(width):
                d_stream[i] = np.float32(0)
            for k in range(num_streams):
                d_comb[t, j, k] = _dot(streams[t, j], grad[t, k])
                _add_scaled(d_stream, comb[t, j, k], grad[t, k])


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _divide_rows(matrix, eps, out):  # type: ignore[no-untyped-def]
    num_streams = matrix.shape[0]
    for j in range(num_streams):
        total = eps
        for k in range(num_streams):
            total += matrix[j, k]
        for k in range(num_streams):
            out[j, k] = matrix[j, k] / total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _divide_rows_backward(matrix, eps, grad):  # type: ignore[no-untyped-def]
    """In place: the gradient of y = c / (row sum of c + eps), given that of y."""
    num_streams = matrix.shape[0]
    for j in range(num_streams):
        total = eps
        weighted = np.float32(0)
        for k in range(num_streams):
            total += matrix[j, k]
            weighted += grad[j, k] * matrix[j, k]
        for k in range(num_streams):
            grad[j, k] = (grad[j, k] - weighted / total) / total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _sinkhorn_backward(logits, iters, hc_eps, steps, grad):  # type: ignore[no-untyped-def]
    """In place: the gradient of the logits, given that of the mixing matrix. `steps` is room for 2 * iters matrices:
    the softmax with its epsilon, then the input of every division."""
    num_streams = logits.shape[0]
    softmax = np.empty((num_streams, num_streams), dtype=np.float32)
    for j in range(num_streams):
        largest = np.float32(-np.inf)
        for k in range(num_streams):
            largest = max(largest, logits[j, k])
        total = np.float32(0)
        for k in range(num_streams):
            softmax[j, k] = np.exp(logits[j, k] - largest)
            total += softmax[j, k]
        for k in range(num_streams):
            softmax[j, k] /= total
            steps[0, j, k] = softmax[j, k] + hc_eps
    for iteration in range(1, iters):
        _divide_rows(steps[2 * iteration - 2].T, hc_eps, steps[2 * iteration - 1].T)
        _divide_rows(steps[2 * iteration - 1], hc_eps, steps[2 * iteration])
    for iteration in range(iters - 1, 0, -1):
        _divide_rows_backward(steps[2 * iteration].T, hc_eps, grad.T)
        _divide_rows_backward(steps[2 * iteration - 1], hc_eps, grad)
    _divide_rows_backward(steps[0].T, hc_eps, grad.T)
    for j in range(num_streams):
        weighted = np.float32(0)
        for k in range(num_streams):
            weighted += grad[j, k] * softmax[j, k]
        for k in range(num_streams):
            grad[j, k] = softmax[j, k] * (grad[j, k] - weighted)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _hc_split_backward(inputs, grads, constants, outputs):  # type: ignore[no-untyped-def]
    mix, streams, scale, base = inputs
    d_x, d_post, d_comb = grads
    iters, hc_eps, norm_eps = constants
    d_mix, d_streams, d_scale, d_base = outputs
    num_tokens, num_streams, width = streams.shape
    one = np.float32(1)
    steps = np.empty((2 * iters, num_streams, num_streams), dtype=np.float32)
    logits = np.empty((num_streams, num_streams), dtype=np.float32)
    grad = np.empty((num_streams, num_streams), dtype=np.float32)
    d_gates = np.empty(mix.shape[1], dtype=np.float32)
    for t in range(num_tokens):
        squares = np.float32(0)
        for j in range(num_streams):
            squares += _dot(streams[t, j], streams[t, j])
        size = np.float32(num_streams * width)
        inverse_rms = one / np.sqrt(squares / size + norm_eps)
        for j in range(num_streams):
            gate = one / (one + np.exp(-(mix[t, j] * inverse_rms * scale[0] + base[j])))
            d_gates[j] = _dot(d_x[t], streams[t, j]) * gate * (one - gate)
            d_stream = d_streams[t, j]
            for i in range(width):
                d_stream[i] = (gate + hc_eps) * d_x[t, i]
            row = num_streams + j
            gate = one / (one + np.exp(-(mix[t, row] * inverse_rms * scale[1] + base[row])))
            d_gates[row] = np.float32(2) * d_post[t, j] * gate * (one - gate)
            for k in range(num_streams):
                row = 2 * num_streams + j * num_streams + k
                logits[j, k] = mix[t, row] * inverse_rms * scale[2] + base[row]
                grad[j, k] = d_comb[t, j, k]
        _sinkhorn_backward(logits, iters, hc_eps, steps, grad)
        d_inverse_rms = np.float32(0)
        for row in range(mix.shape[1]):
            part = min(row // num_streams, 2)
            if part == 2:
                entry = row - 2 * num_streams
                d_gates[row] = grad[entry // num_streams, entry % num_streams]
            d_base[row] += d_gates[row]
            d_scale[part] += d_gates[row] * mix[t, row] * inverse_rms
            d_mix[t, row] = d_gates[row] * inverse_rms * scale[part]
            d_inverse_rms += d_gates[row] * mix[t, row] * scale[part]
        # d rsqrt(mean(v^2) + eps) / dv = -v rsqrt(.)^3 / size
        factor = -d_inverse_rms * inverse_rms * inverse_rms * inverse_rms / size
        for j in range(num_streams):
            _add_scaled(d_streams[t, j], factor, streams[t, j])

"""Rounding kernels of `served` numerics. The arithmetic is that of `engine.formats`, bit for bit; these make one pass
where torch needs a dozen, which was a third of a decode step.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine import formats
from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("round_bf16", name="torch", devices=("cpu", "cuda"), priority=0)
def round_bf16_torch(x: Tensor) -> Tensor:
    """f32 values rounded to bf16, ties to even; a new f32 tensor of the same shape."""
    return formats.round_bf16(x)


@kernel("round_fp8", name="torch", devices=("cpu", "cuda"), priority=0)
def round_fp8_torch(x: Tensor, block: int) -> Tensor:
    """f32 values after a trip through e4m3 with one power-of-two scale per `block` values of the last axis (the last
    block may be short): scale = 2^ceil(log2(max(|x|, 1e-4) / 448)). A NaN or infinity makes its whole block NaN."""
    return formats.round_fp8(x, block=block)


@kernel("round_bf16", name="numba", devices=("cpu",), priority=10)
def round_bf16_numba(x: Tensor) -> Tensor:
    rounded = torch.empty(x.shape)
    _round_bf16(array(x).reshape(-1).view(np.uint32), rounded.view(-1).numpy().view(np.uint32))
    return rounded


@kernel("round_fp8", name="numba", devices=("cpu",), priority=10)
def round_fp8_numba(x: Tensor, block: int) -> Tensor:
    rounded = torch.empty(x.shape)
    width = x.shape[-1]
    _round_fp8(array(x).reshape(-1, width), block, rounded.view(-1, width).numpy())
    return rounded


_LARGEST = np.float32(448)
_FLOOR = np.float32(1e-4)
_NORMAL_MIN = np.float32(2.0**-6)
_MAGIC = np.float32(1.5 * 2.0**20)  # 1.5 x 2^23 quanta of 2^-3


@numba.njit(cache=True, nogil=True)
def _round_bf16(bits, rounded):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        value = bits[i]
        if (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded[i] = (value | np.uint32(0x00400000)) & np.uint32(0xFFFF0000)  # a quiet NaN
        else:
            odd = (value >> np.uint32(16)) & np.uint32(1)
            rounded[i] = (value + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)


@numba.njit(cache=True, nogil=True)
def _round_fp8(x, block, rounded):  # type: ignore[no-untyped-def]
    # No fast-math here: adding and taking away the magic number is the rounding.
    scaled = np.empty(block, dtype=np.float32)
    powers = np.empty(block, dtype=np.float32)
    scaled_bits = scaled.view(np.int32)
    powers_bits = powers.view(np.int32)
    single = np.empty(2, dtype=np.float32)
    single_bits = single.view(np.int32)
    single[0] = _LARGEST
    largest_bits = single_bits[0]
    width = x.shape[1]
    for n in range(x.shape[0]):
        for first in range(0, width, block):
            count = min(block, width - first)
            values = x[n, first : first + count]
            out = rounded[n, first : first + count]
            size = _FLOOR
            finite = True
            for i in range(count):
                size = max(size, abs(values[i]))
                finite = finite and np.isfinite(values[i])
            if not finite:
                for i in range(count):
                    out[i] = np.nan
                continue
            single[0] = size
            exponent = (single_bits[0] - largest_bits + 0x7FFFFF) >> 23
            single_bits[0] = (127 + exponent) << 23
            single_bits[1] = (127 - exponent) << 23
            scale, inverse = single[0], single[1]
            for i in range(count):
                scaled[i] = values[i] * inverse
            for i in range(count):
                powers_bits[i] = scaled_bits[i] & 0x7F800000
            for i in range(count):
                magic = max(powers[i], _NORMAL_MIN) * _MAGIC
                out[i] = ((scaled[i] + magic) - magic) * scale

"""Where the reference model rounds, and to which number formats.

Owns the bf16, FP8 (e4m3, power-of-two block scales) and FP4 (e2m1) round trips and the Hadamard transform of
the slow reference. Called by `tests.reference.deepseek_v4` only. Every tensor stays float32; a rounding
replaces its values by those the narrow format can hold. It may never import `engine` or `kvstore`: being
written separately is what makes it worth comparing with.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
ACTIVATION_BLOCK = 128  # channels that share one scale in front of an FP8 or FP4 matrix
KV_BLOCK = 64  # channels that share one scale in a stored KV row
INDEX_BLOCK = 32  # channels that share one scale in an indexer row or query


class Rounding(Protocol):
    """The rounding points of one numerics mode. Each returns a new tensor of the same shape."""

    def bf16(self, x: Tensor) -> Tensor:
        """A tensor that the served model keeps in bf16 between two operations."""
        ...

    def activation(self, x: Tensor) -> Tensor:
        """The input of a matrix product whose weights are FP8 or FP4."""
        ...

    def kv_row(self, x: Tensor) -> Tensor:
        """The unrotated channels of a raw or compressed KV row, as they are stored."""
        ...

    def indexer(self, x: Tensor) -> Tensor:
        """An indexer query or row, after its rotation."""
        ...


class Unrounded:
    """float32: no rounding anywhere. The Hadamard transform is left out: it is orthogonal, so it cancels in
    every product of a query with a row."""

    def bf16(self, x: Tensor) -> Tensor:
        return x

    def activation(self, x: Tensor) -> Tensor:
        return x

    def kv_row(self, x: Tensor) -> Tensor:
        return x

    def indexer(self, x: Tensor) -> Tensor:
        return x


class Served:
    """The numerics the model was trained with and is served with."""

    def bf16(self, x: Tensor) -> Tensor:
        return round_bf16(x)

    def activation(self, x: Tensor) -> Tensor:
        return round_fp8(x, block=ACTIVATION_BLOCK)

    def kv_row(self, x: Tensor) -> Tensor:
        return round_fp8(x, block=KV_BLOCK)

    def indexer(self, x: Tensor) -> Tensor:
        return round_fp4(round_bf16(hadamard(x)), block=INDEX_BLOCK)


def round_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def round_fp8(x: Tensor, *, block: int) -> Tensor:
    """FP8 round trip: one power-of-two scale per `block` channels of the last axis; the last may be short."""
    return torch.cat([_round_fp8_block(part) for part in x.split(block, dim=-1)], dim=-1)


def round_fp4(x: Tensor, *, block: int) -> Tensor:
    """FP4 round trip: one power-of-two scale per `block` channels of the last axis; the last may be short."""
    return torch.cat([_round_fp4_block(part) for part in x.split(block, dim=-1)], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Normalised Walsh-Hadamard transform of the last axis (a power of two wide) in Sylvester order."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, not {width} channels")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return x @ matrix * width**-0.5


def _round_fp8_block(x: Tensor) -> Tensor:
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
    scale = _power_of_two_at_least(largest / FP8_MAX)
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def _round_fp4_block(x: Tensor) -> Tensor:
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=FP4_MAX * 2.0**-126)
    scale = _power_of_two_at_least(largest / FP4_MAX)
    value = (x / scale).clamp(-FP4_MAX, FP4_MAX)
    # e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6: its step doubles at 2 and at 4. torch.round takes halves to the
    # even multiple of the step, which is also the code with an even mantissa bit.
    size = value.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(value / step) * step * scale


def _power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) of positive normal numbers, by their bits: exponent, plus one if any mantissa bit."""
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent << 23).view(torch.float32)

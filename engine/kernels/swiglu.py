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


LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # exact in 12 bits, so that n * LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
EXPONENT_MAX = np.float32(88)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _swiglu(hidden, shares, limit, activated):  # type: ignore[no-untyped-def]
    """silu needs exp(-gate). The library's is called for one number at a time; this one, exp(x) = 2^n exp(r) with n =
    round(x / ln 2) and a polynomial for |r| < 0.35 (Cephes expf, within 2 ulp), compiles into vector code: 0.95 instead
    of 1.47 ms for 1,536 rows of 256."""
    num_rows, width = activated.shape
    one = np.float32(1)
    powers = np.empty(width, dtype=np.int32)
    scales = powers.view(np.float32)
    fractions = np.empty(width, dtype=np.float32)
    for n in range(num_rows):
        share = shares[n]
        row = hidden[n]
        out = activated[n]
        for i in range(width):
            # Comparisons in this form let NaN through: it must end the step, not hide in it.
            gate = limit if row[i] > limit else row[i]
            x = EXPONENT_MAX if -gate > EXPONENT_MAX else -gate
            x = -EXPONENT_MAX + one if x < -EXPONENT_MAX + one else x
            power = np.rint(x * LOG2_E)
            r = x - power * LN2_HIGH - power * LN2_LOW
            p = np.float32(1.9875691500e-4)
            p = p * r + np.float32(1.3981999507e-3)
            p = p * r + np.float32(8.3334519073e-3)
            p = p * r + np.float32(4.1665795894e-2)
            p = p * r + np.float32(1.6666665459e-1)
            p = p * r + np.float32(5.0000001201e-1)
            fractions[i] = p * r * r + r + one
            powers[i] = (np.int32(power) + np.int32(127)) << np.int32(23)
        for i in range(width):
            gate = limit if row[i] > limit else row[i]
            up = row[width + i]
            up = limit if up > limit else up
            up = -limit if up < -limit else up
            out[i] = gate / (one + fractions[i] * scales[i]) * up * share

"""RMS norm and rotary embedding kernels: interleaved pairs of the last channels are rotated.

Shapes: T rows, H heads, d channels, R rotated channels (the last R of d).
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("rope_angles", name="torch", devices=("cpu", "cuda"), priority=0)
def rope_angles_torch(positions_T: Tensor, frequencies_P: Tensor) -> Tensor:
    """cos and sin of position * frequency: i64 [T], f32 [R/2] -> f32 [T, R/2, 2]. The angle is an f32 product."""
    angles = positions_T.float().unsqueeze(-1) * frequencies_P
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


@kernel("rope", name="torch", devices=("cpu", "cuda"), priority=0)
def rope_torch(x_THd: Tensor, angles_TP2: Tensor, inverse: bool) -> Tensor:
    """Rotation of the last R channels by +angle, or by -angle if `inverse`. f32 [T, H, d] in and out; angles f32
    [T, R/2, 2]. May work in place: x is dead afterwards."""
    num_pairs = angles_TP2.shape[1]
    first = x_THd.shape[-1] - 2 * num_pairs
    plain, pairs = x_THd[..., :first], x_THd[..., first:].unflatten(-1, (num_pairs, 2))
    cos = angles_TP2[:, None, :, 0]
    sin = -angles_TP2[:, None, :, 1] if inverse else angles_TP2[:, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, rotated), dim=-1)


@kernel("norm_rope", name="torch", devices=("cpu", "cuda"), priority=0)
def norm_rope_torch(x_THd: Tensor, weight_d: Tensor | None, angles_TP2: Tensor, eps: float) -> Tensor:
    """`rms_norm`, then `rope`, in one. May work in place: x is dead afterwards."""
    return rope_torch(rms_norm_torch(x_THd, weight_d, eps), angles_TP2, False)


@kernel("rms_norm", name="torch", devices=("cpu", "cuda"), priority=0)
def rms_norm_torch(x: Tensor, weight_d: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) over the last axis, times the weight if there is one; f32, a new tensor."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight_d, eps)


@kernel("rms_norm", name="numba", devices=("cpu",), priority=10)
def rms_norm_numba(x: Tensor, weight_d: Tensor | None, eps: float) -> Tensor:
    normed = torch.empty(x.shape)
    width = x.shape[-1]
    _rms_norm(array(x.reshape(-1, width)), _weight(weight_d), np.float32(eps), normed.view(-1, width).numpy())
    return normed


@kernel("rope_angles", name="numba", devices=("cpu",), priority=10)
def rope_angles_numba(positions_T: Tensor, frequencies_P: Tensor) -> Tensor:
    angles = torch.empty((positions_T.shape[0], frequencies_P.shape[0], 2))
    _rope_angles(array(positions_T), array(frequencies_P), angles.numpy())
    return angles


@kernel("rope", name="numba", devices=("cpu",), priority=10)
def rope_numba(x_THd: Tensor, angles_TP2: Tensor, inverse: bool) -> Tensor:
    x_THd = x_THd.contiguous()
    _rope(x_THd.numpy(), array(angles_TP2), inverse)
    return x_THd


@kernel("norm_rope", name="numba", devices=("cpu",), priority=10)
def norm_rope_numba(x_THd: Tensor, weight_d: Tensor | None, angles_TP2: Tensor, eps: float) -> Tensor:
    x_THd = x_THd.contiguous()
    rows = x_THd.view(-1, x_THd.shape[-1]).numpy()
    _rms_norm(rows, _weight(weight_d), np.float32(eps), rows)
    _rope(x_THd.numpy(), array(angles_TP2), False)
    return x_THd


def _weight(weight_d: Tensor | None) -> npt.NDArray[np.float32]:
    return _NO_WEIGHT if weight_d is None else array(weight_d)


_NO_WEIGHT = np.empty(0, dtype=np.float32)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _rms_norm(x, weight, eps, normed):  # type: ignore[no-untyped-def]
    num_rows, width = x.shape
    for n in range(num_rows):
        row = x[n]
        squares = np.float32(0)
        for i in range(width):
            squares += row[i] * row[i]
        inverse_rms = np.float32(1) / np.sqrt(squares / np.float32(width) + eps)
        out = normed[n]
        if weight.shape[0] > 0:
            for i in range(width):
                out[i] = row[i] * inverse_rms * weight[i]
        else:
            for i in range(width):
                out[i] = row[i] * inverse_rms


@numba.njit(cache=True, nogil=True)
def _rope_angles(positions, frequencies, angles):  # type: ignore[no-untyped-def]
    for t in range(positions.shape[0]):
        for p in range(frequencies.shape[0]):
            angle = np.float64(np.float32(positions[t]) * frequencies[p])
            angles[t, p, 0] = np.float32(np.cos(angle))
            angles[t, p, 1] = np.float32(np.sin(angle))


@numba.njit(cache=True, nogil=True, fastmath={"contract", "nsz"})
def _rope(x, angles, inverse):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, width = x.shape
    num_pairs = angles.shape[1]
    first = width - 2 * num_pairs
    for t in range(num_tokens):
        for h in range(num_heads):
            row = x[t, h]
            for p in range(num_pairs):
                cos = angles[t, p, 0]
                sin = -angles[t, p, 1] if inverse else angles[t, p, 1]
                even = row[first + 2 * p]
                odd = row[first + 2 * p + 1]
                row[first + 2 * p] = even * cos - odd * sin
                row[first + 2 * p + 1] = even * sin + odd * cos

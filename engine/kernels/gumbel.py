"""Choosing a token: the counter-based Gumbel noise of sampling, and the two ways to take an argmax.

Owns the operations `gumbel_argmax` (sampling) and `argmax` (greedy). Called by `engine.sampler` through the
kernel registry, and by whoever drafts tokens: a draft and its target share the noise, because the noise is a
pure function of (seed, choice, position, token id) and of nothing else. It may never depend on the logits,
the batch, the device, the implementation, or a library's `log`.

The bits come from SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014) with its finaliser, Stafford's mix 13. A row's key folds seed, choice and position through the finaliser
one after the other; token t then gets output t+1 of the SplitMix64 stream that starts at the key, which can
be computed on its own: a counter, not a state. 52 of the 64 bits become u = (m + 1/2) / 2^52, so u and 1-u
are exact in float64, never 0, and the noise -log(-log u) lies between -3.61 and 36.74.

Everything after the hash is float64 arithmetic made of single +, -, *, / and frexp, each of which IEEE 754
defines to the last bit. So every implementation on every device draws the same noise bit for bit, and a
sequence that moves between vendors keeps its randomness. Float32 noise was rejected: the sum would tie about
once in 10^6 tokens, and a library's `log` differs by an ulp between devices, which would then flip those
ties.

Shapes: R rows, V vocabulary, B rows of a block.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.registry import kernel


def gumbel_noise(seeds: Tensor, choices: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """The noise itself, float64. All four are int64 tensors and are broadcast against each other."""
    bits = _mix_torch(_row_keys_torch(seeds, choices, positions) + (token_ids + 1) * _signed(_GOLDEN))
    uniform = (_shift_right(bits, 12).to(torch.float64) + 0.5) * _TWO_POW_MINUS_52
    return -_log_torch(-_log_torch(uniform))


@kernel("gumbel_argmax", name="torch", devices=("cpu", "cuda"), priority=0)
def gumbel_argmax_torch(logits_RV: Tensor, seeds_R: Tensor, choices_R: Tensor, positions_R: Tensor) -> Tensor:
    """The id of the largest float64(logit) + noise of every row, int64 [R]; of equal ones the lowest id.

    `logits_RV` is float32, already scaled by temperature, excluded tokens at -inf; seeds, choices and
    positions are int64 [R]. A row that holds NaN or +inf, or nothing but -inf, gives -1: the caller decides
    what that means. A row's answer does not depend on the other rows.
    """
    num_rows, vocab_size = logits_RV.shape
    token_ids = torch.arange(vocab_size, device=logits_RV.device)
    chosen_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    # About ten float64 temporaries live at once; a block of 2^21 elements holds them under 200 MB for any R.
    rows_per_block = max(1, 2**21 // max(1, vocab_size))
    for first in range(0, num_rows, rows_per_block):
        block = slice(first, first + rows_per_block)
        noise_BV = gumbel_noise(
            seeds_R[block, None], choices_R[block, None], positions_R[block, None], token_ids
        )
        chosen_R[block] = argmax_torch(logits_RV[block].to(torch.float64) + noise_BV)
    return chosen_R


@kernel("gumbel_argmax", name="numba", devices=("cpu",), priority=10)
def gumbel_argmax_numba(logits_RV: Tensor, seeds_R: Tensor, choices_R: Tensor, positions_R: Tensor) -> Tensor:
    """`gumbel_argmax` for the CPU: logarithms only for tokens that could still win, about 2 ns for any
    other."""
    chosen_R = np.empty(logits_RV.shape[0], dtype=np.int64)
    _gumbel_argmax_rows(
        logits_RV.detach().contiguous().numpy(),
        seeds_R.contiguous().numpy(),
        choices_R.contiguous().numpy(),
        positions_R.contiguous().numpy(),
        chosen_R,
    )
    return torch.from_numpy(chosen_R)


@kernel("argmax", name="torch", devices=("cpu", "cuda"), priority=0)
def argmax_torch(logits_RV: Tensor) -> Tensor:
    """The id of the largest value of every row, int64 [R]; of equal ones the lowest id.

    A row that holds NaN or +inf, or nothing but -inf, gives -1.
    """
    # torch documents the first index for equal maxima, and that NaN counts as the largest.
    largest_R, chosen_R = logits_RV.max(dim=-1)
    return torch.where(largest_R.isfinite(), chosen_R, -1)


@kernel("argmax", name="numpy", devices=("cpu",), priority=10)
def argmax_numpy(logits_RV: Tensor) -> Tensor:
    """`argmax` for the CPU: numpy's is vectorised and torch's is not (16 x 4096: 5 us against 60 us)."""
    logits = logits_RV.detach().contiguous().numpy()
    chosen_R = logits.argmax(axis=-1)
    # numpy, too, takes the first of equal maxima and lets NaN win.
    largest_R = logits[np.arange(len(logits)), chosen_R]
    chosen_R[~np.isfinite(largest_R)] = -1
    return torch.from_numpy(chosen_R)


# The hash ------------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S12, _S27, _S30, _S31 = np.uint64(12), np.uint64(27), np.uint64(30), np.uint64(31)


def _signed(value: np.uint64) -> int:
    """The int64 with the same bits: torch has no unsigned multiplication, and a wrapping signed one is the
    same."""
    return int(value.astype(np.int64))


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """A logical shift: torch's own copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix_torch(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX_2)
    return bits ^ _shift_right(bits, 31)


def _row_keys_torch(seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    keys = _mix_torch(seeds + _signed(_GOLDEN))
    keys = _mix_torch((keys ^ choices) + _signed(_GOLDEN))
    return _mix_torch((keys ^ positions) + _signed(_GOLDEN))


@njit(cache=True, nogil=True)
def _mix(bits: np.uint64) -> np.uint64:
    bits = (bits ^ (bits >> _S30)) * _MIX_1
    bits = (bits ^ (bits >> _S27)) * _MIX_2
    return bits ^ (bits >> _S31)


@njit(cache=True, nogil=True)
def _row_key(seed: np.int64, choice: np.int64, position: np.int64) -> np.uint64:
    key = _mix(np.uint64(seed) + _GOLDEN)
    key = _mix((key ^ np.uint64(choice)) + _GOLDEN)
    return _mix((key ^ np.uint64(position)) + _GOLDEN)


# The logarithm ------------------------------------------------------------------------------------------
# x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log x = k log 2 + 2 atanh(s), s = f / (2 + f). There s^2
# is at most 0.0295, so eleven terms of the atanh series leave 2e-17. No term cancels, and near x = 1 (k = 0,
# f exact) the result keeps its relative precision, which the far tail of the noise depends on.

_TWO_POW_MINUS_52 = 2.0**-52
_SQRT_HALF = 0.7071067811865476
_LN2 = 0.6931471805599453  # written out: a platform's own log(2.0) may be an ulp off
_ATANH_SERIES = tuple(1.0 / (2 * term + 1) for term in range(11))
_NUM_TERMS = len(_ATANH_SERIES)


def _log_torch(values: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(values)
    is_low = fraction < _SQRT_HALF
    f = torch.where(is_low, fraction * 2.0, fraction) - 1.0
    k = (exponent - is_low.to(exponent.dtype)).to(torch.float64)
    s = f / (f + 2.0)
    z = s * s
    series = torch.full_like(z, _ATANH_SERIES[-1])
    for coefficient in reversed(_ATANH_SERIES[:-1]):
        # Two operations on purpose: a fused multiply-add would round once instead of twice.
        series = series * z
        series = series + coefficient
    return k * _LN2 + (s * 2.0) * series


@njit(cache=True, nogil=True)
def _log(value: float) -> float:
    fraction, k = math.frexp(value)
    if fraction < _SQRT_HALF:
        fraction *= 2.0
        k -= 1
    f = fraction - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = _ATANH_SERIES[_NUM_TERMS - 1]
    for term in range(_NUM_TERMS - 2, -1, -1):
        series = series * z
        series = series + _ATANH_SERIES[term]
    return k * _LN2 + (s * 2.0) * series


# The search ------------------------------------------------------------------------------------------

_LN2_ABOVE = 0.6931472
"""A little more than log 2, so that rounding never lets a bound fall below the noise it bounds."""
_INFINITY = math.inf


@njit(cache=True, nogil=True)
def _gumbel_argmax_row(logits_V: np.ndarray, key: np.uint64) -> int:
    """A token is passed over as soon as a bound on its score shows that it cannot beat the best so far.

    -log u >= 1 - u, so noise <= -log(1 - u) <= -log2(1 - u) rounded up, times log 2: one exponent to read
    instead of two logarithms. Comparisons are written so that NaN is never passed over.
    """
    best = -_INFINITY
    chosen = -1
    counter = key
    for token in range(len(logits_V)):
        counter += _GOLDEN
        logit = np.float64(logits_V[token])
        bits = _mix(counter) >> _S12
        complement = 4503599627370495.5 - np.float64(np.int64(bits))  # (1 - u) * 2^52, exact
        exponent = (np.float64(complement).view(np.int64) >> 52) - 1023
        if logit + (52 - exponent) * _LN2_ABOVE <= best:
            continue
        uniform = (np.float64(np.int64(bits)) + 0.5) * _TWO_POW_MINUS_52
        score = logit - _log(-_log(uniform))
        if not score < _INFINITY:
            return -1
        if score > best:
            best = score
            chosen = token
    return chosen


@njit(cache=True, nogil=True)
def _gumbel_argmax_rows(
    logits_RV: np.ndarray,
    seeds_R: np.ndarray,
    choices_R: np.ndarray,
    positions_R: np.ndarray,
    chosen_R: np.ndarray,
) -> None:
    for row in range(len(chosen_R)):
        key = _row_key(seeds_R[row], choices_R[row], positions_R[row])
        chosen_R[row] = _gumbel_argmax_row(logits_RV[row], key)

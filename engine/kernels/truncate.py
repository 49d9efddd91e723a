"""Cutting the unlikely tokens off: min-p, top-k and top-p as one operation, `truncate`.

Called by `engine.sampler` through the kernel registry, on rows already divided by temperature. It may never
let a row's answer depend on the other rows, on the device or on the implementation.

Top-p asks where a running sum crosses a threshold, and a float sum depends on the order of its terms. So
masses are fixed-point integers, floor(exp(x - max) * 2^44), whose sums are exact in any order: up to 2^18
tokens fit 62 bits. A token lighter than 2^-44 of the heaviest counts as massless. exp itself is made of
single +, -, * and floor in float64, for the reason given in `engine.kernels.gumbel`.

Shapes: R rows, V vocabulary, N survivors of a row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.kernels.registry import kernel

VOCAB_SIZE_MAX = 2**18
"""So that the masses of a row sum to at most 2^62."""


@kernel("truncate", name="torch", devices=("cpu", "cuda"), priority=0)
def truncate_torch(logits_RV: Tensor, log_min_p_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """A copy of the float32 rows with every excluded token at -inf. Three cuts, in this order, per row:

    1. min-p: keep a token when its logit minus the row's largest is at least `log_min_p` (float64; -inf keeps
       all);
    2. top-k: keep the `top_k` largest of them (int64, at least 1);
    3. top-p: of what is left, renormalised, keep the smallest set of largest tokens whose mass reaches
       `top_p`
       (float64 in [0, 1]; 1 keeps all), at least one.

    Among equal logits the lowest ids stay. A row whose largest value is not finite (NaN counts as largest)
    comes back all -inf.
    """
    assert logits_RV.shape[1] <= VOCAB_SIZE_MAX, (
        f"vocabulary of {logits_RV.shape[1]} exceeds {VOCAB_SIZE_MAX}"
    )
    sorted_RV, order_RV = torch.sort(logits_RV, dim=-1, descending=True, stable=True)
    largest_R1 = sorted_RV[:, :1]
    below_RV = sorted_RV.to(torch.float64) - largest_R1.to(torch.float64)
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    keep_RV = largest_R1.isfinite() & (below_RV >= log_min_p_R[:, None]) & (rank_V < top_k_R[:, None])
    mass_RV = torch.where(keep_RV, _masses_torch(below_RV), 0)
    reached_RV = mass_RV.cumsum(dim=-1)
    target_R1 = (reached_RV[:, -1:].to(torch.float64) * top_p_R[:, None]).ceil().to(torch.int64).clamp(min=1)
    keep_RV &= (reached_RV - mass_RV < target_R1) | (top_p_R[:, None] >= 1.0)
    return torch.full_like(logits_RV, -math.inf).scatter_(
        1, order_RV, torch.where(keep_RV, sorted_RV, torch.full_like(sorted_RV, -math.inf))
    )


@kernel("truncate", name="numba", devices=("cpu",), priority=10)
def truncate_numba(logits_RV: Tensor, log_min_p_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """`truncate` for the CPU: a radix selection over the bits of the logits instead of a sort, linear in
    V."""
    assert logits_RV.shape[1] <= VOCAB_SIZE_MAX, (
        f"vocabulary of {logits_RV.shape[1]} exceeds {VOCAB_SIZE_MAX}"
    )
    logits = logits_RV.detach().contiguous().numpy()
    kept = np.full_like(logits, -np.inf)
    _truncate_rows(
        logits,
        log_min_p_R.contiguous().numpy(),
        top_k_R.contiguous().numpy(),
        top_p_R.contiguous().numpy(),
        kept,
    )
    return torch.from_numpy(kept)


# Masses ------------------------------------------------------------------------------------------
# exp(y) = 2^n exp(r) with n = round(y / log 2) and |r| <= 0.347, where twelve Taylor terms leave 6e-15 and
# the last bit of a mass is worth 6e-14. Below -30.6 every mass is 0 (exp(-30.6) * 2^44 = 0.9).

_MASS_BITS = 44
_LIGHTEST = -30.6
_LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
_EXP_SERIES = tuple(1.0 / math.factorial(term) for term in range(12))
_NUM_TERMS = len(_EXP_SERIES)
_POWERS = np.array([2.0 ** (_MASS_BITS - halvings) for halvings in range(_MASS_BITS + 2)])


def _masses_torch(below: Tensor) -> Tensor:
    """floor(exp(below) * 2^44) as int64, for values that are at most 0."""
    below = below.nan_to_num(nan=_LIGHTEST).clamp(min=_LIGHTEST)
    n = torch.floor(below * _LOG2_E + 0.5)
    r = below - n * _LN2
    series = torch.full_like(r, _EXP_SERIES[-1])
    for coefficient in reversed(_EXP_SERIES[:-1]):
        # Two operations on purpose: a fused multiply-add would round once instead of twice.
        series = series * r
        series = series + coefficient
    powers = torch.from_numpy(_POWERS).to(below.device)
    return torch.floor(series * powers[(-n).to(torch.int64)]).to(torch.int64)


@njit(cache=True, nogil=True)
def _weigh(logits_N: np.ndarray, largest: float, masses_N: np.ndarray, num: int) -> int:
    """Write the masses of the first `num` logits and return their sum.

    No branch and no call in the loop, and the powers in an array: so it is vectorised, ten times faster.
    """
    total = 0
    for place in range(num):
        below = max(np.float64(logits_N[place]) - largest, _LIGHTEST)
        n = np.floor(below * _LOG2_E + 0.5)
        r = below - n * _LN2
        series = _EXP_SERIES[_NUM_TERMS - 1]
        for term in range(_NUM_TERMS - 2, -1, -1):
            series = series * r
            series = series + _EXP_SERIES[term]
        masses_N[place] = np.int64(np.floor(series * _POWERS[np.int64(-n)]))
        total += masses_N[place]
    return total


# Selection ------------------------------------------------------------------------------------------
# A row's survivors are three parallel arrays: ids (ascending), logits, and the masses a cut counts.


@njit(cache=True, nogil=True)
def _truncate_rows(
    logits_RV: np.ndarray,
    log_min_p_R: np.ndarray,
    top_k_R: np.ndarray,
    top_p_R: np.ndarray,
    kept_RV: np.ndarray,
) -> None:
    num_rows, vocab_size = logits_RV.shape
    ids_N = np.empty(vocab_size, dtype=np.int32)
    logits_N = np.empty(vocab_size, dtype=np.float32)
    masses_N = np.empty(vocab_size, dtype=np.int64)
    for row in range(num_rows):
        largest = _largest(logits_RV[row])
        if not np.isfinite(largest):
            continue
        num_kept = _gather(logits_RV[row], largest, log_min_p_R[row], ids_N, logits_N)
        if top_k_R[row] < num_kept:
            masses_N[:num_kept] = 1
            num_kept = _cut(ids_N, logits_N, masses_N, num_kept, top_k_R[row])
        if top_p_R[row] < 1.0:
            total = _weigh(logits_N, largest, masses_N, num_kept)
            target = max(1, int(np.ceil(np.float64(total) * top_p_R[row])))
            num_kept = _cut(ids_N, logits_N, masses_N, num_kept, target)
        for place in range(num_kept):
            kept_RV[row, ids_N[place]] = logits_N[place]


@njit(cache=True, nogil=True)
def _largest(logits_V: np.ndarray) -> float:
    """The largest value; NaN if there is one."""
    largest = logits_V[0]
    for logit in logits_V:
        if not logit <= largest:
            if np.isnan(logit):
                return np.float64(logit)
            largest = logit
    return np.float64(largest)


@njit(cache=True, nogil=True)
def _gather(
    logits_V: np.ndarray, largest: float, log_min_p: float, ids_N: np.ndarray, logits_N: np.ndarray
) -> int:
    """Write the tokens that min-p keeps, lowest id first, and return their number."""
    num_kept = 0
    for token in range(len(logits_V)):
        logit = logits_V[token]
        if np.float64(logit) - largest < log_min_p or logit == -np.inf:
            continue
        ids_N[num_kept] = token
        logits_N[num_kept] = logit
        num_kept += 1
    return num_kept


@njit(cache=True, nogil=True)
def _cut(ids_N: np.ndarray, logits_N: np.ndarray, masses_N: np.ndarray, num: int, target: int) -> int:
    """Keep, in place and in order, the smallest set of largest logits whose masses reach `target`; return its
    size.

    Three rounds fix 11, 11 and 10 bits of the key at which the running mass crosses the target; of the tokens
    with exactly that key the lowest ids stay. `num` masses sum to at least `target`, which is at least 1.
    """
    bits_N = logits_N.view(np.int32)
    histogram = np.empty(2048, dtype=np.int64)
    prefix = np.int64(0)
    shift = 32
    for width in (11, 11, 10):
        shift_above = shift
        shift -= width
        last_digit = (1 << width) - 1
        histogram[:] = 0
        for place in range(num):
            key = _key(bits_N[place])
            if key >> shift_above == prefix:
                histogram[(key >> shift) & last_digit] += masses_N[place]
        digit = last_digit
        while histogram[digit] < target:
            target -= histogram[digit]
            digit -= 1
        prefix = (prefix << width) | digit
    num_kept = 0
    for place in range(num):
        key = _key(bits_N[place])
        if key < prefix or (key == prefix and target <= 0):
            continue
        if key == prefix:
            target -= masses_N[place]
        ids_N[num_kept] = ids_N[place]
        logits_N[num_kept] = logits_N[place]
        num_kept += 1
    return num_kept


@njit(cache=True, nogil=True)
def _key(bits: np.int32) -> np.int64:
    """An integer in 0 .. 2^32-1 ordered as the float32 with these bits; one key for 0.0 and -0.0."""
    key = np.int64(bits)
    if key < 0:
        # Negative floats grow as their magnitude bits shrink.
        key = np.int64(-2147483648) - key
    return key + np.int64(2147483648)

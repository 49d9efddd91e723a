"""Digests of state that another worker reads: `page_digest`, one pass over the bytes of pages and records.

The rank (`engine.rank`) takes them of what it lends, and `engine.rank_transfer` of what it has read: equal digests say
that the right bytes arrived. They guard against corruption, and a stale or a wrong page. They are no protection against
somebody who wants equal digests: the factors are public and the sum is linear.

A digest is a sum, modulo 2^64, of 32-bit words times odd factors, so the order of adding is free and the loop
vectorises. An odd factor has an inverse, so one changed word always changes the digest. The factors are well mixed
(splitmix64), so words that trade places do too.

Shapes: U units of a pool, B bytes of a unit, N units asked for, K blocks of a unit, W words of a block.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.registry import kernel

BLOCK_WORDS = 1024
"""A word's factor is that of its place in its block times the block's. The table of places, 8 KiB, stays in the L1
cache; a factor for every place of a page would be twice the page's own bytes."""


@kernel("page_digest", name="torch", devices=("cpu", "cuda"), priority=0)
def page_digest_torch(units_UB: Tensor, ids_N: Tensor) -> Tensor:
    """Digests int64 [N], the bits of unsigned 64-bit numbers, of the rows `ids_N` (int64) of a uint8 matrix.

    The bytes of a row are contiguous and at least one; rows may be further apart than B. A row is taken as 32-bit
    little-endian words, with zeros behind its last byte. Word number W*k + i counts mixed(i) * mixed(W + k) * word,
    where mixed(n) is splitmix64's n-th output with the lowest bit set, and the length counts LENGTH_FACTOR * B, all
    modulo 2^64.
    """
    size = units_UB.shape[1]
    num_blocks = -(-size // (4 * BLOCK_WORDS))
    places_W = torch.from_numpy(_PLACES.view(np.int64)).to(units_UB.device)
    blocks_K = torch.from_numpy(_mixed(BLOCK_WORDS, num_blocks).view(np.int64)).to(units_UB.device)
    padded = torch.zeros(4 * BLOCK_WORDS * num_blocks, dtype=torch.uint8, device=units_UB.device)
    digests_N = torch.empty(len(ids_N), dtype=torch.int64, device=units_UB.device)
    for number, unit in enumerate(ids_N.tolist()):
        padded[:size] = units_UB[unit]
        # int64 has no unsigned twin in torch, and needs none here: products and sums have the same bits.
        words_KW = padded.view(torch.int32).view(-1, BLOCK_WORDS).to(torch.int64) & 0xFFFFFFFF
        digests_N[number] = ((words_KW * places_W).sum(-1) * blocks_K).sum()
    return digests_N + _length_term(size)


@kernel("page_digest", name="numba", devices=("cpu",), priority=10)
def page_digest_numba(units_UB: Tensor, ids_N: Tensor) -> Tensor:
    """`page_digest` for the CPU, at the speed of memory. Lets other threads run."""
    num_units, size = units_UB.shape
    digests_N = torch.full((len(ids_N),), _length_term(size), dtype=torch.int64)
    if len(ids_N) == 0:
        return digests_N
    assert 0 <= int(ids_N.min()) <= int(ids_N.max()) < num_units, "a unit out of range"
    assert size == 1 or units_UB.stride(1) == 1, "the bytes of a row must be contiguous"
    if (units_UB.data_ptr() | units_UB.stride(0)) % 4:
        # No real model's state has such units; copied, because loads of words must be aligned.
        aligned_NB = units_UB.new_empty(len(ids_N), size + -size % 4)[:, :size]
        units_UB, ids_N = aligned_NB.copy_(units_UB[ids_N]), torch.arange(len(ids_N))
    stride = units_UB.stride(0)
    # One contiguous array over all rows: the compiler vectorises what it knows to be contiguous.
    extent = (units_UB.shape[0] - 1) * stride + size
    flat = units_UB.as_strided((extent,), (1,)).numpy()
    words = flat[: extent // 4 * 4].view(np.uint32)
    _add_digests(
        flat, words, ids_N.contiguous().numpy(), stride, size, _PLACES, digests_N.numpy().view(np.uint64)
    )
    return digests_N


# Factors ------------------------------------------------------------------------------------------

LENGTH_FACTOR = 0xD6E8FEB86659FD93

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)


def _mixed(first: int, count: int) -> npt.NDArray[np.uint64]:
    """Odd factors number first .. first+count-1."""
    return _mix(np.arange(first, first + count, dtype=np.uint64))


def _mix(number: Any) -> Any:
    z = (number + _ONE) * _STEP
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return (z ^ (z >> np.uint64(31))) | _ONE


_PLACES = _mixed(0, BLOCK_WORDS)
_mix_compiled = numba.njit(cache=True, nogil=True)(_mix)


def _length_term(size: int) -> int:
    """As a signed number."""
    return (size * LENGTH_FACTOR + 2**63) % 2**64 - 2**63


@numba.njit(cache=True, nogil=True)
def _add_digests(flat, words, ids_N, stride, size, places_W, digests_N):  # type: ignore[no-untyped-def]
    num_words = size // 4
    for n in range(len(ids_N)):
        start = ids_N[n] * stride
        total = digests_N[n]
        block = np.uint64(BLOCK_WORDS)
        for first in range(0, num_words, BLOCK_WORDS):
            count = min(BLOCK_WORDS, num_words - first)
            row = words[start // 4 + first : start // 4 + first + count]
            inner = np.uint64(0)
            for i in range(count):
                inner += places_W[i] * np.uint64(row[i])
            total += _mix_compiled(block) * inner
            block += _ONE
        if size % 4:
            last = np.uint64(0)
            for i in range(size % 4):
                last |= np.uint64(flat[start + 4 * num_words + i]) << np.uint64(8 * i)
            place = places_W[num_words % BLOCK_WORDS]
            total += _mix_compiled(np.uint64(BLOCK_WORDS + num_words // BLOCK_WORDS)) * place * last
        digests_N[n] = total

"""Paging kernel: compressed entries of sequences to row ids of a pool.

Shapes: B sequences, K entries each, S slots, P pages of a table.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("locate_rows", name="torch", devices=("cpu", "cuda"), priority=0)
def locate_rows_torch(
    pages_SP: Tensor, slots_B: Tensor, entries_BK: Tensor, per_page: int, page_stride: int
) -> tuple[Tensor, Tensor, bool]:
    """Row id of entry e of the sequence in slot s: pages[s, e // per_page] * page_stride + e % per_page, i64 [B, K].

    Entry -1 is no entry: its bias is -inf (others 0; f32 [B, 1, K]) and its id that of the sequence's entry 0. The
    flag says that some sequence has no entry at all: what its ids point at may be anything.
    """
    hidden = entries_BK < 0
    entries = entries_BK.clamp(min=0)
    ids = pages_SP[slots_B.unsqueeze(-1), entries // per_page] * page_stride + entries % per_page
    bias = torch.zeros(hidden.shape, device=ids.device).masked_fill_(hidden, -torch.inf).unsqueeze(1)
    return ids, bias, bool(hidden.all(-1).any())


@kernel("locate_rows", name="numba", devices=("cpu",), priority=10)
def locate_rows_numba(
    pages_SP: Tensor, slots_B: Tensor, entries_BK: Tensor, per_page: int, page_stride: int
) -> tuple[Tensor, Tensor, bool]:
    num_sequences, num_entries = entries_BK.shape
    ids = torch.empty((num_sequences, num_entries), dtype=torch.int64)
    bias = torch.empty((num_sequences, 1, num_entries))
    empty = _locate_rows(
        array(pages_SP),
        array(slots_B),
        array(entries_BK),
        per_page,
        page_stride,
        ids.numpy(),
        bias.numpy(),
    )
    return ids, bias, empty


@numba.njit(cache=True, nogil=True)
def _locate_rows(pages, slots, entries, per_page, page_stride, ids, bias):  # type: ignore[no-untyped-def]
    any_empty = False
    for b in range(entries.shape[0]):
        table = pages[slots[b]]
        is_empty = True
        for k in range(entries.shape[1]):
            entry = entries[b, k]
            bias[b, 0, k] = np.float32(-np.inf) if entry < 0 else np.float32(0)
            if entry < 0:
                entry = 0
            else:
                is_empty = False
            ids[b, k] = table[entry // per_page] * page_stride + entry % per_page
        any_empty = any_empty or is_empty
    return any_empty

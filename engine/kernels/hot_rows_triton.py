"""Hot-buffer kernels in Triton, for NVIDIA and AMD. **Not run on a GPU yet**: only interpreted, and compiled.

Contracts are in `engine.kernels.hot_rows`. One program a hot buffer decides which rows come and which go; then several
copy them; then one a query row says where all is.
A program's threads tell one another through global memory: a barrier stands wherever one reads what another wrote, and
wherever one writes what another may not have read yet. It orders global memory within a program: on NVIDIA a barrier
does, and on AMD the compiler puts fences of the work-group around it.
`engine.kernels.suite` imports this module for devices other than the CPU only, since triton is not everywhere.

What has to be looked at on a device: that host rows in pinned memory are read through their own pointer, what the flags
that `_check` reads cost (a wait for the device in each layer, as the flag of `locate_rows` does), and the block sizes.
"""

# pyright: reportMissingParameterType=false, reportOperatorIssue=false, reportCallIssue=false
# Parameters of Triton functions are pointers and numbers of the device, which have no Python types; nor have launches.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.hot_rows import (
    ABSENT,
    HITS,
    MISSES,
    PENDING,
    PREFETCHED,
    USEFUL,
    WANTED,
    WASTED,
    HostRows,
    HotBuffers,
)
from engine.kernels.registry import kernel

BLOCK = 512
"""Entries, and hot rows, that a program takes at once: no fewer than it has threads, 4 warps of up to 64."""
COPY_ROWS, COPY_PROGRAMS = 8, 8
"""Rows that a program copies at once, and programs a buffer: 64 x 584 bytes are in flight, since the host is far."""
NUM_WARPS = 4

TOO_MANY, BEYOND = 1, 2
"""What a program may report; see `_check`."""

# A compiled kernel sees only such constants. The interpreter wants them on the right of an operator.
_HITS, _MISSES, _USEFUL, _WASTED = (tl.constexpr(column) for column in (HITS, MISSES, USEFUL, WASTED))
_ABSENT, _PENDING = tl.constexpr(ABSENT), tl.constexpr(PENDING)
_PREFETCHED, _WANTED = tl.constexpr(PREFETCHED), tl.constexpr(WANTED)
_TOO_MANY, _BEYOND = tl.constexpr(TOO_MANY), tl.constexpr(BEYOND)


@kernel("hot_rows", name="triton", devices=("cuda",), priority=10)
def hot_rows_triton(
    hot: HotBuffers, host: HostRows, pages_SP: Tensor, slots_B: Tensor, buffers_B: Tensor, entries_BK: Tensor
) -> tuple[Tensor, Tensor, bool, Tensor]:
    counts_R4, errors_R = _bring(hot, host, buffers_B, entries_BK, prefetch=False)
    num_queries, num_entries = entries_BK.shape
    device = entries_BK.device
    ids = torch.empty((num_queries, num_entries), dtype=torch.int64, device=device)
    bias = torch.empty((num_queries, 1, num_entries), device=device)
    empty_B = torch.empty(num_queries, dtype=torch.int32, device=device)
    if num_queries:
        locate_kernel[(num_queries,)](
            entries_BK.contiguous(),
            slots_B.contiguous(),
            buffers_B.contiguous(),
            pages_SP.contiguous(),
            hot.pages_RG.contiguous(),
            host.first_new_R.contiguous(),
            hot.lookup_RE,
            ids,
            bias,
            empty_B,
            num_entries,
            hot.lookup_RE.shape[1],
            pages_SP.shape[1],
            hot.pages_RG.shape[1],
            hot.unit_rows,
            PER_PAGE=hot.rows_per_page,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return ids, bias, _check(hot, errors_R, empty_B), counts_R4.to(torch.int64)


@kernel("prefetch_rows", name="triton", devices=("cuda",), priority=10)
def prefetch_rows_triton(hot: HotBuffers, host: HostRows, buffers_B: Tensor, entries_BK: Tensor) -> Tensor:
    counts_R4, errors_R = _bring(hot, host, buffers_B, entries_BK, prefetch=True)
    _check(hot, errors_R, errors_R[:0])
    return counts_R4.to(torch.int64)


def _bring(
    hot: HotBuffers, host: HostRows, buffers_B: Tensor, entries_BK: Tensor, *, prefetch: bool
) -> tuple[Tensor, Tensor]:
    """Counts i32 [R, 4], and what programs report, i32 [R]."""
    num_buffers, num_hot = hot.entries_RH.shape
    device = entries_BK.device
    counts_R4 = torch.zeros((num_buffers, 4), dtype=torch.int32, device=device)
    errors_R = torch.zeros(num_buffers, dtype=torch.int32, device=device)
    num_queries, num_entries = entries_BK.shape
    if num_queries == 0:
        return counts_R4, errors_R
    # A request's query rows may stand anywhere: the first program of each in sorted order works for it; others end, and
    # those of resident requests.
    sorted_B, order_B = buffers_B.sort(stable=True)
    ends_B = torch.searchsorted(sorted_B, sorted_B, right=True)
    bring_kernel[(num_queries,)](
        entries_BK.contiguous(),
        sorted_B,
        order_B,
        ends_B,
        host.first_new_R.contiguous(),
        hot.lookup_RE,
        hot.entries_RH,
        hot.order_RH,
        torch.empty_like(hot.order_RH),
        hot.flags_RH,
        counts_R4,
        errors_R,
        num_entries,
        hot.lookup_RE.shape[1],
        num_hot,
        PREFETCH=prefetch,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    _copy_rows(hot, host, sorted_B, counts_R4)
    return counts_R4, errors_R


def _copy_rows(hot: HotBuffers, host: HostRows, sorted_B: Tensor, counts_R4: Tensor) -> None:
    target, source = _words(hot.rows.data_Urb, host.rows.data_Urb)
    target_scales, source_scales = _words(hot.rows.scales_Urb, host.rows.scales_Urb)
    copy_kernel[(len(sorted_B), COPY_PROGRAMS)](
        sorted_B,
        counts_R4,
        hot.order_RH,
        hot.entries_RH,
        hot.pages_RG.contiguous(),
        host.pages_RP.contiguous(),
        target,
        source,
        target_scales,
        source_scales,
        hot.num_hot,
        hot.pages_RG.shape[1],
        host.pages_RP.shape[1],
        *target.stride()[:2],
        *source.stride()[:2],
        *target_scales.stride()[:2],
        *source_scales.stride()[:2],
        PER_PAGE=source.shape[1],
        DATA=target.shape[2],
        DATA_BLOCK=triton.next_power_of_2(target.shape[2]),
        SCALES=target_scales.shape[2],
        SCALES_BLOCK=triton.next_power_of_2(max(target_scales.shape[2], 1)),
        COPY_ROWS=COPY_ROWS,
        COPY_PROGRAMS=COPY_PROGRAMS,
        num_warps=NUM_WARPS,
    )


def _check(hot: HotBuffers, errors_R: Tensor, empty_B: Tensor) -> bool:
    """Asserts what no program may report, and returns whether some query row wants nothing: one read of the device."""
    error, any_empty = torch.stack([_largest(errors_R), _largest(empty_B)]).tolist()
    assert error != TOO_MANY, f"more wanted than {hot.num_hot} hot rows hold"
    assert error != BEYOND, "more entries than the buffers are made for"
    return bool(any_empty)


def _largest(numbers: Tensor) -> Tensor:
    return numbers.max() if numbers.numel() else numbers.new_zeros(())


def _words(target_Urb: Tensor, source_Urb: Tensor) -> tuple[Tensor, Tensor]:
    """As 32-bit words where everything is aligned to them: with strides that are multiples of 16 bytes, as those of the
    served rows are, loads are then of 16 bytes a thread."""
    parts = (target_Urb, source_Urb)
    sizes = [part.shape[2] for part in parts] + [stride for part in parts for stride in part.stride()[:2]]
    if any(size % 4 for size in sizes) or any(part.data_ptr() % 4 for part in parts):
        return parts
    return target_Urb.view(torch.int32), source_Urb.view(torch.int32)


@triton.jit
def bring_kernel(
    entries_BK,
    sorted_B,
    order_B,
    ends_B,
    first_new_R,
    lookup_RE,
    held_RH,
    order_RH,
    next_order_RH,
    flags_RH,
    counts_R4,
    errors_R,
    K,
    E,
    H,
    PREFETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    r = tl.load(sorted_B + place)
    before = tl.load(sorted_B + place - 1, mask=place > 0, other=-1)
    if (before == r) | (r < 0):
        return
    end = tl.load(ends_B + place).to(tl.int32)
    first_new = tl.load(first_new_R + r)
    lookup = lookup_RE + r * E
    held = held_RH + r * H
    order = order_RH + r * H
    next_order = next_order_RH + r * H
    flags = flags_RH + r * H

    if first_new > E:
        tl.store(errors_R + r, _BEYOND)
        return
    hits, misses, useful = _mark(
        entries_BK, order_B, place, end, first_new, lookup, flags, K, PREFETCH, BLOCK
    )
    if hits + misses > H:
        tl.store(errors_R + r, _TOO_MANY)
        return
    loaded = next_order + (H - hits - misses)
    wasted = _make_room(lookup, held, order, next_order, flags, H, hits, misses, BLOCK)
    for first in range(0, H, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(order + i, tl.load(next_order + i, mask=i < H), mask=i < H)
    if misses > 0:
        _assign(entries_BK, order_B, place, end, first_new, lookup, held, flags, loaded, K, PREFETCH, BLOCK)
    tl.store(counts_R4 + 4 * r + _HITS, hits)
    tl.store(counts_R4 + 4 * r + _MISSES, misses)
    tl.store(counts_R4 + 4 * r + _USEFUL, useful)
    tl.store(counts_R4 + 4 * r + _WASTED, wasted)


@triton.jit
def _mark(
    entries_BK,
    order_B,
    place,
    end,
    first_new,
    lookup,
    flags,
    K,
    PREFETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks what a request wants: in its hot row; or in the look-up, as pending with its number among the missing."""
    hits = 0
    misses = 0
    useful = 0
    for query in range(place, end):
        row_K = entries_BK + tl.load(order_B + query) * K
        for first in range(0, K, BLOCK):
            k = first + tl.arange(0, BLOCK)
            entry = tl.load(row_K + k, mask=k < K, other=-1)
            is_old = (entry >= 0) & (entry < first_new)
            row = tl.load(lookup + entry, mask=is_old, other=0).to(tl.int32)
            is_missing = is_old & (row == _ABSENT)
            number = misses + tl.cumsum(is_missing.to(tl.int32)) - 1
            misses += tl.sum(is_missing.to(tl.int32))
            is_held = is_old & (row >= 0)
            flag = tl.load(flags + row, mask=is_held, other=0).to(tl.int32)
            is_found = is_held & ((flag & _WANTED) == 0)
            hits += tl.sum(is_found.to(tl.int32))
            tl.debug_barrier()
            tl.store(lookup + entry, (-number + _PENDING).to(tl.int16), mask=is_missing)
            if PREFETCH:
                tl.store(flags + row, (flag | _WANTED).to(tl.uint8), mask=is_found)
            else:
                useful += tl.sum((is_found & ((flag & _PREFETCHED) != 0)).to(tl.int32))
                tl.store(flags + row, tl.full((BLOCK,), _WANTED, tl.uint8), mask=is_found)
            tl.debug_barrier()
    return hits, misses, useful


@triton.jit
def _make_room(lookup, held, order, next_order, flags, H, hits, misses, BLOCK: tl.constexpr):
    """Writes the new order of use, evicts what the missing need, and takes the marks away. Returns the wasted."""
    wasted = 0
    found = 0
    others = 0
    for first in range(0, H, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = tl.load(order + i, mask=i < H, other=0).to(tl.int32)
        flag = tl.load(flags + row, mask=i < H, other=0).to(tl.int32)
        is_found = (i < H) & ((flag & _WANTED) != 0)
        is_other = (i < H) & ((flag & _WANTED) == 0)
        number_found = found + tl.cumsum(is_found.to(tl.int32)) - 1
        number_other = others + tl.cumsum(is_other.to(tl.int32)) - 1
        found += tl.sum(is_found.to(tl.int32))
        others += tl.sum(is_other.to(tl.int32))
        is_evicted = is_other & (number_other < misses)
        entry = tl.load(held + row, mask=is_evicted, other=-1)
        tl.debug_barrier()
        tl.store(lookup + entry, tl.full((BLOCK,), _ABSENT, tl.int16), mask=is_evicted & (entry >= 0))
        wasted += tl.sum((is_evicted & ((flag & _PREFETCHED) != 0)).to(tl.int32))
        # Others that stay, the missing ones' rows, those found.
        to_kept = tl.where(is_evicted, H - hits - misses + number_other, number_other - misses)
        to = tl.where(is_found, H - hits + number_found, to_kept)
        tl.store(next_order + to, row.to(tl.int16), mask=i < H)
        tl.store(flags + row, (flag & ~_WANTED).to(tl.uint8), mask=is_found)
    tl.debug_barrier()
    return wasted


@triton.jit
def _assign(
    entries_BK,
    order_B,
    place,
    end,
    first_new,
    lookup,
    held,
    flags,
    loaded,
    K,
    PREFETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gives pending entries the evicted rows, by their numbers."""
    for query in range(place, end):
        row_K = entries_BK + tl.load(order_B + query) * K
        for first in range(0, K, BLOCK):
            k = first + tl.arange(0, BLOCK)
            entry = tl.load(row_K + k, mask=k < K, other=-1)
            is_old = (entry >= 0) & (entry < first_new)
            mark = tl.load(lookup + entry, mask=is_old, other=0).to(tl.int32)
            is_pending = is_old & (mark <= _PENDING)
            row = tl.load(loaded - mark + _PENDING, mask=is_pending, other=0)
            tl.debug_barrier()
            tl.store(lookup + entry, row, mask=is_pending)
            tl.store(held + row.to(tl.int32), entry.to(tl.int32), mask=is_pending)
            flag = tl.full((BLOCK,), _PREFETCHED if PREFETCH else 0, tl.uint8)
            tl.store(flags + row.to(tl.int32), flag, mask=is_pending)
            tl.debug_barrier()


@triton.jit
def copy_kernel(
    sorted_B,
    counts_R4,
    order_RH,
    held_RH,
    hot_pages_RG,
    pages_RP,
    target,
    source,
    target_scales,
    source_scales,
    H,
    G,
    P,
    target_unit,
    target_row,
    source_unit,
    source_row,
    target_scales_unit,
    target_scales_row,
    source_scales_unit,
    source_scales_row,
    PER_PAGE: tl.constexpr,
    DATA: tl.constexpr,
    DATA_BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_BLOCK: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    COPY_PROGRAMS: tl.constexpr,
):
    """Copies the missing rows from their host pages into the rows that they were given."""
    place = tl.program_id(0)
    r = tl.load(sorted_B + place)
    before = tl.load(sorted_B + place - 1, mask=place > 0, other=-1)
    if (before == r) | (r < 0):
        return
    misses = tl.load(counts_R4 + 4 * r + _MISSES)
    loaded = order_RH + r * H + H - tl.load(counts_R4 + 4 * r + _HITS) - misses
    for first in range(tl.program_id(1) * COPY_ROWS, misses, COPY_PROGRAMS * COPY_ROWS):
        i = first + tl.arange(0, COPY_ROWS)
        is_row = i < misses
        row = tl.load(loaded + i, mask=is_row, other=0).to(tl.int64)
        entry = tl.load(held_RH + r * H + row, mask=is_row, other=0)
        hot_page = tl.load(hot_pages_RG + r * G + row // PER_PAGE, mask=is_row, other=0)
        page = tl.load(pages_RP + r * P + entry // PER_PAGE, mask=is_row, other=0)
        place_hot, place_host = row % PER_PAGE, (entry % PER_PAGE).to(tl.int64)
        to = hot_page * target_unit + place_hot * target_row
        start = page * source_unit + place_host * source_row
        _copy(target, to, source, start, is_row, DATA, DATA_BLOCK)
        if SCALES > 0:
            to = hot_page * target_scales_unit + place_hot * target_scales_row
            start = page * source_scales_unit + place_host * source_scales_row
            _copy(target_scales, to, source_scales, start, is_row, SCALES, SCALES_BLOCK)


@triton.jit
def _copy(target, to, source, start, is_row, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr):
    """SIZE words of each row that is one."""
    word = tl.arange(0, SIZE_BLOCK)
    mask = is_row[:, None] & (word < SIZE)[None, :]
    value = tl.load(source + start[:, None] + word[None, :], mask=mask)
    tl.store(target + to[:, None] + word[None, :], value, mask=mask)


@triton.jit
def locate_kernel(
    entries_BK,
    slots_B,
    buffers_B,
    pages_SP,
    hot_pages_RG,
    first_new_R,
    lookup_RE,
    ids_BK,
    bias_BK,
    empty_B,
    K,
    E,
    P,
    G,
    unit_rows,
    PER_PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    buffer = tl.load(buffers_B + b)
    is_spilled = buffer >= 0
    r = tl.maximum(buffer, 0)
    # Of a resident request no entry is before.
    first_new = tl.load(first_new_R + r, mask=is_spilled, other=0)
    table = pages_SP + tl.load(slots_B + b) * P
    hot_pages = hot_pages_RG + r * G
    lookup = lookup_RE + r * E
    row_K = entries_BK + b * K
    there = tl.full((), 0, tl.int32) + K
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        entry = tl.load(row_K + k, mask=k < K, other=-1)
        there = tl.minimum(there, tl.min(tl.where(entry >= 0, k, K)))
    tl.store(empty_B + b, (there == K).to(tl.int32))
    # What a hidden entry stands for: entry 0 of a resident request, of a spilled one the first that is not hidden, or
    # if there is none, the first hot row.
    instead = tl.load(row_K + there, mask=(there < K) & is_spilled, other=-1)
    instead = tl.where(is_spilled, instead, 0)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        entry = tl.load(row_K + k, mask=k < K, other=-1)
        tl.store(bias_BK + b * K + k, tl.where(entry < 0, float("-inf"), 0.0), mask=k < K)
        entry = tl.where(entry < 0, instead, entry)
        is_hot = entry < first_new
        held = tl.load(lookup + entry, mask=(k < K) & is_hot & (entry >= 0), other=0).to(tl.int64)
        hot_page = tl.load(hot_pages + held // PER_PAGE, mask=(k < K) & is_hot, other=0)
        page = tl.load(table + entry // PER_PAGE, mask=(k < K) & (entry >= first_new), other=0)
        row = tl.where(is_hot, held, entry) % PER_PAGE
        tl.store(ids_BK + b * K + k, tl.where(is_hot, hot_page, page) * unit_rows + row, mask=k < K)

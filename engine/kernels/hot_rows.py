"""Hot-buffer kernels (HiSparse): picked entries of sequences whose C4 rows lie in host memory, to row ids.

A **hot buffer** is what the device holds of the C4 rows of one such (*spilled*) request: in each C4 layer `num_hot`
**hot rows**, each with any entry. A batch of rows of spilled and of resident requests is looked up in one call: the
pager calls `hot_rows` once a layer and step where it calls `locate_rows` for requests that are all resident;
`prefetch_rows` brings rows in that will be wanted soon. Nothing here decides what is spilled, or takes pages, and
nothing is written to host memory. A GPU's kernels are in `hot_rows_triton`.

Where rows are. **Whole pages** have a unit in every paged component; **thin pages**, of which the ids follow, have none
in C4. A spilled request's pages of which rows are in host memory are thin but for the first G = num_hot / r: these are
whole pages of its own, and their C4 units are its hot rows, while their other units hold what they always do. So a hot
buffer is made of the pool's pages, and takes no memory of its own but its state. The newest rows are in whole pages
too, through the page table, as those of resident requests: a copy of a full page to the host has whatever time it
takes, and `first_new` grows when it is made.

Shapes: R hot buffers, one a request; H hot rows and G pages of each; E entries a request may have; S slots; P pages of
a table; B query rows, K entries of each; U units, r rows of a unit, b bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel
from kvstore.hisparse import HotShape

HITS, MISSES, USEFUL, WASTED = range(4)
"""Columns of the counts, which are of distinct entries of one call, of those before `first_new`: found on the device;
copied from the host (times `RowBytes.row_bytes` are the bytes); found for the first time since they were prefetched;
prefetched, and evicted before they were wanted."""

RESIDENT = -1
"""In `buffers_B`: the request of a query row has no hot buffer, since all its rows are on the device."""

ABSENT = -1
"""In `lookup_RE` an entry that no hot row holds; in `entries_RH` a hot row that holds none."""

PENDING = -2
"""In `lookup_RE`, only within a call: a miss that has been counted."""

PREFETCHED, WANTED = 1, 2
"""Bits of `flags_RH`, the second only within a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Rows of one layer as bytes: views of a pool, uint8 [U, r, data bytes] and [U, r, scale bytes], the latter perhaps
    0 wide. The bytes of a row are contiguous, rows and units may be apart. f32 rows are data of 4 bytes a value."""

    data_Urb: Tensor
    scales_Urb: Tensor

    def __post_init__(self) -> None:
        for part in (self.data_Urb, self.scales_Urb):
            assert part.dtype is torch.uint8
            assert part.shape[:2] == self.data_Urb.shape[:2]
            assert part.shape[2] < 2 or part.stride(2) == 1, "the bytes of a row must be contiguous"

    @property
    def row_bytes(self) -> int:
        return self.data_Urb.shape[2] + self.scales_Urb.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class HotBuffers:
    """One layer of all hot buffers. Hot row h of buffer b is row h % r of device page pages[b, h // r].

    `rows` and `pages_RG` are others': the pages are written by whoever gives a buffer to a request, and are one tensor
    for all layers. The rest are the kernels' own, made by `make_hot_buffers`."""

    rows: RowBytes  # [device pages, r, bytes]: the C4 pool, as one layer sees it
    unit_rows: (
        int  # what a row id grows by from one page to the next: row i of page p has id p * unit_rows + i
    )
    pages_RG: Tensor  # i64; of a buffer that no request has they may be anything
    entries_RH: Tensor  # i32: the entry of each hot row
    order_RH: Tensor  # i16: the hot rows, least recently used first
    lookup_RE: Tensor  # i16: the hot row of each entry. Dense: 2 bytes an entry are 2 % of what a request has per entry
    flags_RH: Tensor  # u8

    @property
    def num_hot(self) -> int:
        return self.entries_RH.shape[1]

    @property
    def rows_per_page(self) -> int:
        return self.rows.data_Urb.shape[1]

    def clear(self, buffer: int) -> int:
        """Forget all rows, for its next request. Returns how many prefetched rows had not been wanted."""
        held = self.entries_RH[buffer]
        self.lookup_RE[buffer, held[held >= 0].long()] = ABSENT
        held.fill_(ABSENT)
        wasted = int((self.flags_RH[buffer] & PREFETCHED).count_nonzero())
        self.flags_RH[buffer] = 0
        return wasted


def make_hot_buffers(rows: RowBytes, shape: HotShape, *, unit_rows: int, pages_RG: Tensor) -> HotBuffers:
    """Empty buffers whose hot rows are in `rows`, [device pages, r, bytes], on their device."""
    num_buffers, num_pages = pages_RG.shape
    assert num_pages == shape.num_hot_pages(rows.data_Urb.shape[1]), "pages are not those of the shape"
    device = rows.data_Urb.device
    by_row = (num_buffers, shape.num_hot)
    order_H = torch.arange(shape.num_hot, dtype=torch.int16, device=device)
    return HotBuffers(
        rows=rows,
        unit_rows=unit_rows,
        pages_RG=pages_RG,
        entries_RH=torch.full(by_row, ABSENT, dtype=torch.int32, device=device),
        order_RH=order_H.repeat(num_buffers, 1),
        lookup_RE=torch.full((num_buffers, shape.num_entries), ABSENT, dtype=torch.int16, device=device),
        flags_RH=torch.zeros(by_row, dtype=torch.uint8, device=device),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRows:
    """Where one layer's rows are that are not among the newest: entry e of buffer b's request, e < first_new[b], is row
    e % r of host page pages[b, e // r]."""

    rows: RowBytes  # [host pages, r, bytes]; for a GPU in pinned memory
    pages_RP: Tensor  # i64, host page ids
    first_new_R: Tensor  # i64: entries from here on are in device pages; a multiple of r


@kernel("hot_rows", name="torch", devices=("cpu", "cuda"), priority=0)
def hot_rows_torch(
    hot: HotBuffers, host: HostRows, pages_SP: Tensor, slots_B: Tensor, buffers_B: Tensor, entries_BK: Tensor
) -> tuple[Tensor, Tensor, bool, Tensor]:
    """Brings what is wanted onto the device and says where: row ids i64 [B, K], bias f32 [B, 1, K], the flag that some
    query row wants nothing (its ids are of any rows there are), as `locate_rows`; and counts i64 [R, 4] (`HITS` ...).

    `entries_BK` i64 are entries of the requests in the slots `slots_B` i64 with the hot buffers `buffers_B` i64, one at
    least of which there is, or RESIDENT. An entry of a resident request has the id that `locate_rows` gives it. One of
    a spilled request has that too from first_new[b] on; any before that is in no hot row is copied from the host over
    the least recently used row that holds nothing wanted in this call. Entry -1 is none: bias -inf, and the id of
    another entry of that query row, or what `locate_rows` has for it if the request is resident. A request may have
    several query rows, in any places; all it wants in one call is on the device afterwards. Recency after a call: rows
    that were not wanted, as before; then rows copied in, in the order in which their entries first appear; then the
    rows found, as before. So what is evicted is the same for every implementation.

    Asserts that entries of a query row are distinct, that a request wants at most H distinct entries before first_new,
    and that first_new is at most E.
    """
    counts_R4 = _bring_torch(hot, host, buffers_B, entries_BK, prefetch=False)
    per_page, buffers_B1 = hot.rows_per_page, buffers_B.unsqueeze(1)
    is_spilled_B1, owners_B1 = buffers_B1 >= 0, buffers_B1.clamp(min=0)
    hidden = entries_BK < 0
    # A hidden entry of a spilled request, of which entry 0 may be on the host, stands for the first that is not hidden.
    instead_B1 = entries_BK.gather(1, hidden.to(torch.uint8).argmin(1, keepdim=True))
    entries = torch.where(hidden & is_spilled_B1, instead_B1, entries_BK)
    is_hot = is_spilled_B1 & (entries < host.first_new_R[owners_B1])
    entries = entries.clamp(min=0)
    held = hot.lookup_RE[owners_B1, entries.masked_fill(~is_hot, 0)].long().clamp(min=0)
    pages = torch.where(
        is_hot,
        hot.pages_RG[owners_B1, held // per_page],
        pages_SP[slots_B.unsqueeze(1), entries // per_page],
    )
    ids = pages * hot.unit_rows + torch.where(is_hot, held, entries) % per_page
    bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf).unsqueeze(1)
    return ids, bias, bool(hidden.all(-1).any()), counts_R4


@kernel("prefetch_rows", name="torch", devices=("cpu", "cuda"), priority=0)
def prefetch_rows_torch(hot: HotBuffers, host: HostRows, buffers_B: Tensor, entries_BK: Tensor) -> Tensor:
    """Brings entries in as `hot_rows` does, recency included, and answers only with counts i64 [R, 4]. Entries from
    first_new on, those of resident requests, and -1 are passed over. A row copied in counts once more: USEFUL in the
    call of `hot_rows` that finds it first, or WASTED in the call that evicts it."""
    return _bring_torch(hot, host, buffers_B, entries_BK, prefetch=True)


def _bring_torch(
    hot: HotBuffers, host: HostRows, buffers_B: Tensor, entries_BK: Tensor, *, prefetch: bool
) -> Tensor:
    counts_R4 = torch.zeros((len(hot.entries_RH), 4), dtype=torch.int64, device=entries_BK.device)
    in_order = entries_BK.sort(-1).values
    assert not bool(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any()), (
        "an entry twice in a row"
    )
    for buffer in buffers_B[buffers_B >= 0].unique().tolist():
        entries = entries_BK[buffers_B == buffer].flatten()
        first_new = int(host.first_new_R[buffer])
        assert first_new <= hot.lookup_RE.shape[1], "more entries than the buffers are made for"
        wanted = _in_order_of_appearance(entries[(entries >= 0) & (entries < first_new)])
        assert len(wanted) <= hot.num_hot, f"{len(wanted)} entries wanted of {hot.num_hot} hot rows"
        counts_R4[buffer] = _bring_one(hot, host, buffer, wanted, prefetch=prefetch)
    return counts_R4


def _in_order_of_appearance(entries: Tensor) -> Tensor:
    """The distinct ones of `entries`, i64 [n]."""
    distinct, which = entries.unique(return_inverse=True)
    places = torch.arange(len(entries), device=entries.device)
    first = places.new_full((len(distinct),), len(entries)).scatter_reduce_(0, which, places, "amin")
    return distinct[first.argsort()]


def _bring_one(hot: HotBuffers, host: HostRows, buffer: int, wanted: Tensor, *, prefetch: bool) -> Tensor:
    """`wanted` distinct entries of one request are in hot rows afterwards. Returns counts i64 [4]."""
    held_H, lookup_E, flags_H = hot.entries_RH[buffer], hot.lookup_RE[buffer], hot.flags_RH[buffer]
    rows = lookup_E[wanted].long()
    found, missing = rows[rows >= 0], wanted[rows < 0]
    order = hot.order_RH[buffer].long()
    is_found_H = torch.zeros(hot.num_hot, dtype=torch.bool, device=order.device)
    is_found_H[found] = True
    is_found = is_found_H[order]
    victims, kept = order[~is_found].tensor_split((len(missing),))
    hot.order_RH[buffer] = torch.cat((kept, victims, order[is_found])).to(torch.int16)

    num_wasted = (flags_H[victims] & PREFETCHED).count_nonzero()
    num_useful = torch.zeros_like(num_wasted) if prefetch else (flags_H[found] & PREFETCHED).count_nonzero()
    if not prefetch:
        flags_H[found] = 0
    flags_H[victims] = PREFETCHED if prefetch else 0

    evicted = held_H[victims]
    lookup_E[evicted[evicted >= 0].long()] = ABSENT
    lookup_E[missing] = victims.to(torch.int16)
    held_H[victims] = missing.to(torch.int32)
    per_page = hot.rows_per_page
    hot_pages, hot_places = hot.pages_RG[buffer, victims // per_page], victims % per_page
    pages, places = host.pages_RP[buffer, missing // per_page], missing % per_page
    for target_Urb, source_Urb in (
        (hot.rows.data_Urb, host.rows.data_Urb),
        (hot.rows.scales_Urb, host.rows.scales_Urb),
    ):
        source = source_Urb[pages.to(source_Urb.device), places.to(source_Urb.device)]
        target_Urb[hot_pages, hot_places] = source.to(target_Urb.device)
    return torch.stack(
        (num_useful.new_tensor(len(found)), num_useful.new_tensor(len(missing)), num_useful, num_wasted)
    )


# numba: one pass over what is wanted, one over the hot rows of each buffer that wants something -------------------


@kernel("hot_rows", name="numba", devices=("cpu",), priority=10)
def hot_rows_numba(
    hot: HotBuffers, host: HostRows, pages_SP: Tensor, slots_B: Tensor, buffers_B: Tensor, entries_BK: Tensor
) -> tuple[Tensor, Tensor, bool, Tensor]:
    counts_R4 = prefetch_rows_numba(hot, host, buffers_B, entries_BK, prefetch=False)
    num_queries, num_entries = entries_BK.shape
    ids = torch.empty((num_queries, num_entries), dtype=torch.int64)
    bias = torch.empty((num_queries, 1, num_entries))
    any_empty = _locate(
        array(entries_BK),
        (array(pages_SP), array(slots_B), array(buffers_B)),
        (array(host.first_new_R), hot.lookup_RE.numpy(), array(hot.pages_RG)),
        hot.rows_per_page,
        hot.unit_rows,
        ids.numpy(),
        bias.numpy(),
    )
    return ids, bias, any_empty, counts_R4


@kernel("prefetch_rows", name="numba", devices=("cpu",), priority=10)
def prefetch_rows_numba(
    hot: HotBuffers, host: HostRows, buffers_B: Tensor, entries_BK: Tensor, *, prefetch: bool = True
) -> Tensor:
    counts_R4 = torch.zeros((len(hot.entries_RH), 4), dtype=torch.int64)
    counts, entries, buffers = counts_R4.numpy(), array(entries_BK), array(buffers_B)
    lookup, held, order = hot.lookup_RE.numpy(), hot.entries_RH.numpy(), hot.order_RH.numpy()
    flags, first_new = hot.flags_RH.numpy(), array(host.first_new_R)
    fits, missed = _mark(entries, buffers, first_new, lookup, flags, counts, prefetch)
    assert fits, "more entries than the buffers are made for"
    assert _make_room(held, order, lookup, flags, counts), f"more wanted than {hot.num_hot} hot rows hold"
    if missed:
        flag = PREFETCHED if prefetch else 0
        _assign(entries, buffers, first_new, lookup, held, order, flags, counts, flag)
        for target_Urb, source_Urb in (
            (hot.rows.data_Urb, host.rows.data_Urb),
            (hot.rows.scales_Urb, host.rows.scales_Urb),
        ):
            _, rows_per_page, num_bytes = source_Urb.shape
            if num_bytes:
                strides = (*target_Urb.stride()[:2], *source_Urb.stride()[:2])
                pages = (array(hot.pages_RG), array(host.pages_RP))
                sizes = (rows_per_page, num_bytes)
                _copy(_flat(target_Urb), _flat(source_Urb), strides, sizes, held, order, counts, pages)
    return counts_R4


def _flat(part_Urb: Tensor) -> npt.NDArray[np.uint8]:
    """All bytes from the first row to the last: one contiguous array, which compiled loops copy fastest."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(part_Urb.shape, part_Urb.stride(), strict=True)
    )
    return part_Urb.as_strided((extent,), (1,)).numpy()


@numba.njit(cache=True, nogil=True)
def _mark(entries, buffers, first_new, lookup, flags, counts, prefetch):  # type: ignore[no-untyped-def]
    """Marks what is wanted, in its hot row or as pending, and counts it. Returns whether all buffers have an entry for
    each that is on the host, and whether some are missing."""
    missed = False
    for b in range(entries.shape[0]):
        r = buffers[b]
        if r < 0:
            continue
        if first_new[r] > lookup.shape[1]:
            return False, missed
        for k in range(entries.shape[1]):
            entry = entries[b, k]
            if entry < 0 or entry >= first_new[r]:
                continue
            row = lookup[r, entry]
            if row >= 0:
                flag = flags[r, row]
                if flag & WANTED == 0:
                    counts[r, HITS] += 1
                    if flag & PREFETCHED and not prefetch:
                        counts[r, USEFUL] += 1
                        flag = 0
                    flags[r, row] = flag | WANTED
            elif row == ABSENT:
                lookup[r, entry] = PENDING
                counts[r, MISSES] += 1
                missed = True
    return True, missed


@numba.njit(cache=True, nogil=True)
def _make_room(held, order, lookup, flags, counts):  # type: ignore[no-untyped-def]
    """Puts the rows of each buffer into their new order, evicts what misses need, and takes the marks away. Returns
    whether there was room."""
    num_hot = held.shape[1]
    touched = np.empty(num_hot, dtype=np.int16)
    for r in range(held.shape[0]):
        hits, misses = counts[r, HITS], counts[r, MISSES]
        if hits + misses == 0:
            continue
        if hits + misses > num_hot:
            return False
        kept = evicted = found = 0
        for i in range(num_hot):
            row = order[r, i]
            flag = flags[r, row]
            if flag & WANTED:
                flags[r, row] = flag & ~WANTED
                touched[misses + found] = row
                found += 1
            elif evicted < misses:
                touched[evicted] = row
                evicted += 1
                if held[r, row] >= 0:
                    lookup[r, held[r, row]] = ABSENT
                if flag & PREFETCHED:
                    counts[r, WASTED] += 1
            else:
                order[r, kept] = row
                kept += 1
        for i in range(hits + misses):
            order[r, kept + i] = touched[i]
    return True


@numba.njit(cache=True, nogil=True)
def _assign(entries, buffers, first_new, lookup, held, order, flags, counts, flag):  # type: ignore[no-untyped-def]
    """Gives the pending entries the evicted rows, which are just before the found ones in the order."""
    taken = np.zeros(held.shape[0], dtype=np.int64)
    for b in range(entries.shape[0]):
        r = buffers[b]
        if r < 0 or taken[r] == counts[r, MISSES]:
            continue
        first = held.shape[1] - counts[r, HITS] - counts[r, MISSES]
        for k in range(entries.shape[1]):
            entry = entries[b, k]
            if entry < 0 or entry >= first_new[r] or lookup[r, entry] != PENDING:
                continue
            row = order[r, first + taken[r]]
            taken[r] += 1
            lookup[r, entry] = row
            held[r, row] = entry
            flags[r, row] = flag


@numba.njit(cache=True, nogil=True)
def _copy(target, source, strides, sizes, held, order, counts, pages):  # type: ignore[no-untyped-def]
    target_unit, target_row, source_unit, source_row = strides
    hot_pages, host_pages = pages
    rows_per_page, num_bytes = sizes
    for r in range(held.shape[0]):
        first = held.shape[1] - counts[r, HITS] - counts[r, MISSES]
        for i in range(first, first + counts[r, MISSES]):
            row = np.int64(order[r, i])
            entry = held[r, row]
            to = hot_pages[r, row // rows_per_page] * target_unit + row % rows_per_page * target_row
            start = host_pages[r, entry // rows_per_page] * source_unit + entry % rows_per_page * source_row
            # Slices, as the compiler vectorises a loop over them, and not one over indices that might be negative: 10x.
            target_row_b, source_row_b = target[to : to + num_bytes], source[start : start + num_bytes]
            for byte in range(num_bytes):
                target_row_b[byte] = source_row_b[byte]


@numba.njit(cache=True, nogil=True)
def _locate(entries, requests, buffers, rows_per_page, unit_rows, ids, bias):  # type: ignore[no-untyped-def]
    pages, slots, buffer_of = requests
    first_new, lookup, hot_pages = buffers
    any_empty = False
    for b in range(entries.shape[0]):
        r, table = buffer_of[b], pages[slots[b]]
        num_before = first_new[r] if r >= 0 else np.int64(0)
        instead = np.int64(-1)
        num_hidden = 0
        for k in range(entries.shape[1]):
            entry = entries[b, k]
            bias[b, 0, k] = np.float32(-np.inf) if entry < 0 else np.float32(0)
            if entry < 0:
                num_hidden += 1
                continue
            if entry < num_before:
                row = np.int64(lookup[r, entry])
                page = hot_pages[r, row // rows_per_page]
            else:
                row = entry
                page = table[entry // rows_per_page]
            ids[b, k] = page * unit_rows + row % rows_per_page
            if instead < 0:
                instead = ids[b, k]
        if num_hidden == 0:
            continue
        if r < 0:
            instead = table[0] * unit_rows
        elif instead < 0:
            instead = hot_pages[r, 0] * unit_rows
        any_empty = any_empty or num_hidden == entries.shape[1]
        for k in range(entries.shape[1]):
            if entries[b, k] < 0:
                ids[b, k] = instead
    return any_empty

"""Moves the state of a sequence between a slot and a hand-over record. Called by the runner only.

`kvstore.handover` says what a record holds; here rows of rings and of the partial page become its bytes, and bytes
rows again, in another slot, on other pages, in rings of another size. Bytes are only ever moved: encoding a row again
could change them.

Suffixes: L layers, r rows, b bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from engine.pager import SlotTables, empty_unfinished
from kvstore.handover import OVERLAPPING, Part, record_bytes, record_parts
from kvstore.layout import Component, Descriptor, IndexSpace
from rorqual.model_config import PAGE_TOKENS


def pack_record(
    tables: SlotTables,
    slot: int,
    num_tokens: int,
    record_b: Tensor,
    *,
    drafts: bool,
    before: int | None = None,
) -> int:
    """Write the record of the sequence in `slot`, of which `num_tokens` tokens have been computed; at a page boundary
    perhaps a few more, as many as the rings have room for. With `before` only rows of earlier positions: the others are
    to come (`engine.tails`). Returns the record's bytes; what comes after them in `record_b` (uint8, long enough) is
    left alone."""
    num_bytes = record_bytes(tables.pools.layout, num_tokens, drafts=drafts)
    assert num_bytes <= len(record_b), f"a record of {num_bytes} bytes in a buffer of {len(record_b)}"
    written = 0
    for part in record_parts(tables.pools.layout, num_tokens, drafts=drafts):
        count = part.count if before is None else min(max(before - part.first, 0), part.count)
        for rows_Lrb, bytes_Lrb in _moves(tables, slot, num_tokens, part, record_b, count=count):
            bytes_Lrb.copy_(rows_Lrb)
        if part.component is Component.DRAFT_WINDOW:
            clear_missing(tables, slot, part, record_b)
        written = part.offset + part.num_bytes
    record_b[written:num_bytes] = 0
    return num_bytes


def unpack_record(tables: SlotTables, slot: int, num_tokens: int, record_b: Tensor, *, drafts: bool) -> None:
    """Make `slot`, whose page table already covers the `num_tokens` computed tokens, what it was where the record was
    packed. Writes no row that the record does not hold, but for the empty window before the first token."""
    pools = tables.pools
    for part in record_parts(pools.layout, num_tokens, drafts=drafts):
        for rows_Lrb, bytes_Lrb in _moves(tables, slot, num_tokens, part, record_b, count=part.count):
            rows_Lrb.copy_(bytes_Lrb)
    for component in OVERLAPPING:
        item = pools.layout.find(component)
        if item is not None and num_tokens < item.ratio:
            for ring_rows, _ in _runs(-item.ratio, item.ratio, item.num_rows):
                empty_unfinished(pools[component], slot, ring_rows)


def clear_missing(tables: SlotTables, slot: int, part: Part, record_b: Tensor) -> None:
    """Rows of the draft window that were never made become zeros, whatever stands in the ring. Block 0 makes the only
    ones: nothing drafts with later blocks."""
    first, end = int(tables.draft_first_S[slot]), tables.draft_end[slot]
    item = tables.pools[part.component].descriptor
    before = min(max(first - part.first, 0), part.count)
    after = min(max(end - part.first, before), part.count)
    for bytes_Lrb in record_rows_of(part, item, record_b):
        bytes_Lrb[0, :before] = 0
        bytes_Lrb[0, after:] = 0
        bytes_Lrb[1:] = 0


def record_rows_of(part: Part, item: Descriptor, record_b: Tensor) -> tuple[Tensor, Tensor]:
    """Where a record keeps a part's rows: data [L, r, b], or [L, r, 2, b] of first halves, and scales [L, r, b]."""
    bytes_Lb = record_b[part.offset : part.offset + part.num_bytes].view(len(item.layers), -1)
    split = part.count * item.data_bytes // (2 if part.halves else 1)
    shape = (part.count, 2, -1) if part.halves else (part.count, item.data_bytes)
    data = bytes_Lb[:, :split].unflatten(1, shape)
    return data, bytes_Lb[:, split:].unflatten(1, (part.count, item.scale_bytes))


def first_halves(data_rb: Tensor) -> Tensor:
    """Of unfinished rows [..., r, b], which are K_a K_b S_a S_b: K_a and S_a, [..., r, 2, b]."""
    return data_rb.unflatten(-1, (2, 2, -1))[..., 0, :]


def _moves(
    tables: SlotTables, slot: int, num_tokens: int, part: Part, record_b: Tensor, *, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of the bytes of a part's first `count` rows, [L, r, b] or [L, r, 2, b] each: where pools and where
    the record keep them."""
    pool = tables.pools[part.component]
    item = pool.descriptor
    data_Lrb, scales_Lrb = record_rows_of(part, item, record_b)
    if part.halves:
        for ring_rows, record_rows in _runs(part.first, count, item.num_rows):
            yield first_halves(pool.data_ulrb[slot, :, ring_rows]), data_Lrb[:, record_rows]
        return
    if item.space is IndexSpace.PAGE:
        unit = int(tables.pages_SP[slot, num_tokens // PAGE_TOKENS])
        runs = [(slice(0, count), slice(0, count))]
    else:
        unit = slot
        runs = _runs(part.first, count, item.num_rows)
    for unit_rows, record_rows in runs:
        yield pool.data_ulrb[unit, :, unit_rows], data_Lrb[:, record_rows]
        if item.scale_bytes:
            yield pool.scales_ulrb[unit, :, unit_rows], scales_Lrb[:, record_rows]


def _runs(first: int, count: int, ring: int) -> list[tuple[slice, slice]]:
    """Rows of a ring, and their rows among `count`, for positions from `first` on: one run, or two where it wraps."""
    assert count <= ring, f"{count} positions in a ring of {ring}"
    start = first % ring
    before = min(count, ring - start)
    runs = [(slice(start, start + before), slice(0, before))]
    if before < count:
        runs.append((slice(0, count - before), slice(before, count)))
    return runs

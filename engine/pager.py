"""The pager: a StateView over pools. Turns positions into row ids, and f32 rows into what the pools keep.

Owned by a rank: one `SlotTables` for its life (which pages hold a slot's sequence), one `PagedState` per step. It
writes exactly the rows that the step's tokens make and reads only rows that are visible to them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.suite import Kernels
from engine.model.attend import BLOCK_COLUMNS
from engine.model.attention import exact_window_span, hidden_bias
from engine.model.batch import BatchSegment, DecodeGroup, RaggedBatch
from engine.model.state import Keys
from engine.rows import read_rows, write_rows
from engine.spilled import SpilledSlots
from kvstore.handover import OVERLAPPING
from kvstore.layout import Component, Descriptor
from kvstore.pools import ComponentPool, Pools
from rorqual.model_config import PAGE_TOKENS, ModelConfig

_UNFINISHED = (Component.C4_UNFINISHED, Component.C4_INDEX_UNFINISHED, Component.C128_UNFINISHED)


class SlotTables:
    """Page tables of all slots, i64 [slots, pages of the longest sequence]."""

    def __init__(self, pools: Pools, *, pages_per_slot_max: int) -> None:
        self.pools = pools
        self.pages_SP = torch.zeros((pools.num_slots, pages_per_slot_max), dtype=torch.int64)
        self.num_pages = [0] * pools.num_slots
        self.draft_first_S = torch.zeros(pools.num_slots, dtype=torch.int64)
        """Rows of a slot's draft window before this index are not there, and are not seen."""
        self.draft_end = [0] * pools.num_slots
        """Nor are those from this index on, unless as drafts that nobody has accepted yet."""
        self.window_first_S = torch.zeros(pools.num_slots, dtype=torch.int64)
        """A rebuilt sequence has no raw rows before this position, and sees none: a page boundary, 0 for all others."""
        self.spilled: SpilledSlots | None = None
        """Where C4 rows are of sequences that do not have them in their pages; None: none ever will be."""

    def open(self, slot: int) -> None:
        """Start a sequence at position 0: no pages, and empty unfinished windows (K = 0, S = -inf)."""
        self.rebuild(slot, 0)

    def rebuild(self, slot: int, first: int) -> None:
        """Start a sequence at a page boundary with nothing but what its pages will hold: an empty window, and
        unfinished windows as before the first token, since every ratio divides a page."""
        self.restart(slot)
        self.window_first_S[slot] = self.draft_first_S[slot] = self.draft_end[slot] = first
        for component in _UNFINISHED:
            descriptor = self.pools.layout.find(component)
            if descriptor is None:
                continue
            empty_unfinished(self.pools[component], slot)

    def restart(self, slot: int) -> None:
        """Start a sequence whose state is about to be put there: no pages, rings as they are."""
        self.close(slot)
        self.num_pages[slot] = 0
        self.draft_first_S[slot] = 0
        self.draft_end[slot] = 0
        self.window_first_S[slot] = 0

    def close(self, slot: int) -> None:
        """Its sequence has ended."""
        if self.spilled is not None:
            self.spilled.release(slot)

    def add_draft_rows(self, slot: int, first: int, end: int) -> None:
        """Rows first .. end-1 of the slot's draft window are there from now on; those before a gap count no more."""
        if first > self.draft_end[slot]:
            self.draft_first_S[slot] = first
        self.draft_end[slot] = end

    def append(self, slot: int, pages: Sequence[int]) -> None:
        first = self.num_pages[slot]
        assert first + len(pages) <= self.pages_SP.shape[1], "sequence outgrew its page table"
        self.pages_SP[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self.num_pages[slot] = first + len(pages)


def empty_unfinished(pool: ComponentPool, slot: int, rows: slice = slice(None)) -> None:
    """Make rows of a slot's ring of unfinished windows what they are before the first token: they pool to nothing."""
    rows_Lrw = pool.data_ulrb[slot, :, rows].view(torch.float32)
    half = pool.descriptor.width // 2
    rows_Lrw[..., :half] = 0
    rows_Lrw[..., half:] = -torch.inf


class RowCapture(Protocol):
    def take(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        """A layer's rows of the whole batch are about to be put into rings, of which most will not hold them all."""
        ...


class PagedState:
    """The StateView of one step. Index tensors are made once per step and shared by all layers. No paged row is written
    of sequences in `replayed` slots: their pages hold them already, and may be shared."""

    def __init__(
        self,
        config: ModelConfig,
        tables: SlotTables,
        batch: RaggedBatch,
        *,
        kernels: Kernels,
        exact: bool,
        replayed: Collection[int] = (),
        capture: RowCapture | None = None,
    ) -> None:
        self._config = config
        self._tables = tables
        self._pools = tables.pools
        self._batch = batch
        self._kernels = kernels
        self._exact = exact
        self._replayed = replayed
        self._capture = capture
        self._rings: dict[_Strides, _Writes] = {}
        self._windows: dict[Component, tuple[Tensor, Tensor]] = {}
        self._located: dict[tuple[_Strides, DecodeGroup], _Located | None] = {}
        self._new_rows: dict[_Strides, _Writes] = {}
        self._finished: dict[Component, Tensor | None] = {}
        self._slots: dict[DecodeGroup, list[int]] = {}
        segments = (*batch.decodes, *batch.chunks)
        for segment in segments:
            held = tables.num_pages[segment.slot] * PAGE_TOKENS
            assert segment.end <= held, (
                f"slot {segment.slot} holds pages for {held} tokens, not {segment.end}"
            )

    @cached_property
    def _decode_slots(self) -> Tensor:
        return torch.tensor([segment.slot for segment in self._batch.decodes], dtype=torch.int64)

    @cached_property
    def _decode_positions(self) -> Tensor:
        return self._batch.positions_T[: self._batch.num_decodes]

    def window_first(self, component: Component, segment: BatchSegment) -> int:
        return int(self._tables.window_first_S[segment.slot]) if component is Component.WINDOW else 0

    def past_window(self, component: Component, layer: int, segment: BatchSegment, num_past: int) -> Tensor:
        pool = self._pools[component]
        positions = torch.arange(segment.start - num_past, segment.start)
        rows = read_rows(pool, layer, _ring_ids(pool.descriptor, segment.slot, positions), self._config)
        if component is Component.DRAFT_WINDOW:
            # Not hidden, only made finite: a chunk of the draft block is run for the rows that it puts.
            missing = positions < self._tables.draft_first_S[segment.slot]
            rows = rows.masked_fill(missing.unsqueeze(-1), 0)
        return rows

    def put_window(self, component: Component, layer: int, rows_Td: Tensor) -> None:
        self._put_ring(component, layer, rows_Td)

    def decode_window(self, component: Component, layer: int, group: DecodeGroup) -> Keys:
        if component not in self._windows:
            is_draft = component is Component.DRAFT_WINDOW
            first_S = self._tables.draft_first_S if is_draft else self._tables.window_first_S
            first_B = first_S[self._decode_slots]
            self._windows[component] = self._window_columns(self._pools[component].descriptor, first_B)
        ids, bias = self._windows[component]
        rows = read_rows(self._pools[component], layer, ids[group.rows], self._config)
        return Keys(rows=rows, bias=bias[group.rows])

    def _window_columns(self, item: Descriptor, first_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ring row ids [B, K] and bias, of positions from `first` on; a hidden column reads the decode's own row, which
        was just written."""
        size = self._config.sliding_window
        own = self._decode_positions.unsqueeze(-1)
        if self._exact:
            spans = [exact_window_span(segment.start, size) for segment in self._batch.decodes]
            columns = torch.stack([torch.arange(start, stop) for start, stop in spans])
        else:
            columns = own + torch.arange(1 - size, 1)
        hidden = (columns > own) | (columns <= own - size) | (columns < first_B.unsqueeze(-1))
        columns = torch.where(hidden, own, columns)
        return _ring_ids(item, self._decode_slots.unsqueeze(-1), columns), hidden_bias(hidden)

    def past_unfinished(self, component: Component, layer: int, segment: BatchSegment, first: int) -> Tensor:
        pool = self._pools[component]
        ids = _ring_ids(pool.descriptor, segment.slot, torch.arange(first, segment.start))
        return pool.rows_f32(layer).index_select(0, ids)

    def put_unfinished(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        self._put_ring(component, layer, rows_Tw)

    def decode_unfinished(self, component: Component, layer: int) -> Tensor | None:
        if component not in self._finished:
            self._finished[component] = self._finished_ids(component)
        ids_CP = self._finished[component]
        if ids_CP is None:
            return None
        return self._pools[component].rows_f32(layer)[ids_CP]

    def _finished_ids(self, component: Component) -> Tensor | None:
        item = self._pools[component].descriptor
        pooled = 2 * item.ratio if component in OVERLAPPING else item.ratio
        segments = [segment for segment in self._batch.decodes if segment.end % item.ratio == 0]
        if not segments:
            return None
        ends = torch.tensor([segment.end for segment in segments]).unsqueeze(-1)
        slots = torch.tensor([segment.slot for segment in segments]).unsqueeze(-1)
        return _ring_ids(item, slots, ends + torch.arange(-pooled, 0))

    def put_streams(self, streams_TSD: Tensor) -> None:
        """Keep the last layer's streams of the batch's newest positions: what the next tokens are sampled from, and
        drafts made from."""
        self._put_ring(Component.LAST_STREAMS, 0, streams_TSD.flatten(1))

    def put_rows(self, component: Component, layer: int, rows_Nw: Tensor) -> None:
        pool = self._pools[component]
        strides = _strides(pool.descriptor)
        if strides not in self._new_rows:
            self._new_rows[strides] = self._new_row_writes(pool.descriptor)
        self._write(pool, layer, self._new_rows[strides], rows_Nw)

    def _new_row_writes(self, item: Descriptor) -> _Writes:
        """Rows of the entries that this step finishes, in batch order, less those that are replayed."""
        finished = (self._decode_positions + 1) % item.ratio == 0
        entries = self._decode_positions[finished] // item.ratio
        slots = self._decode_slots[finished]
        ids = [self._row_ids(item, slots, entries)]
        owners = slots.tolist()
        for segment in self._batch.chunks:
            entries = torch.arange(segment.start // item.ratio, segment.end // item.ratio)
            ids.append(self._row_ids(item, segment.slot, entries))
            owners += [segment.slot] * len(entries)
        ids_N = torch.cat(ids)
        if not self._replayed:
            return _Writes(rows=None, ids=ids_N)
        rows_N = torch.tensor([row for row, slot in enumerate(owners) if slot not in self._replayed]).long()
        return _Writes(rows=rows_N, ids=ids_N[rows_N])

    def chunk_rows(self, component: Component, layer: int, segment: BatchSegment, entries: Tensor) -> Tensor:
        spilled = self._tables.spilled
        if component is Component.C4 and spilled is not None and spilled.is_any((segment.slot,)):
            return spilled.read(layer, segment.slot, entries, self._config)
        pool = self._pools[component]
        ids = self._row_ids(pool.descriptor, segment.slot, entries)
        return read_rows(pool, layer, ids, self._config)

    def decode_visible(self, component: Component, group: DecodeGroup) -> Tensor:
        return (self._decode_positions[group.rows] + 1) // self._pools[component].descriptor.ratio

    def decode_rows(self, component: Component, layer: int, group: DecodeGroup) -> Keys | None:
        if self._hot(component, group) is not None:
            columns = self._visible_columns(component, group)
            return None if columns is None else self._keys_at(component, layer, group, columns)
        key = (_strides(self._pools[component].descriptor), group)
        if key not in self._located:
            columns = self._visible_columns(component, group)
            self._located[key] = None if columns is None else self._locate(component, group, columns)
        found = self._located[key]
        return None if found is None else self._keys(component, layer, found)

    def _visible_columns(self, component: Component, group: DecodeGroup) -> Tensor | None:
        """Entries [B, K] that the group's decodes see, or None."""
        visible = self.decode_visible(component, group)
        num_columns = int(visible.max())
        if num_columns == 0:
            return None
        if self._exact:
            num_columns += -num_columns % BLOCK_COLUMNS
        columns = torch.arange(num_columns)
        return torch.where(columns < visible.unsqueeze(-1), columns, -1)

    def decode_picks(self, component: Component, layer: int, group: DecodeGroup, picks_Bk: Tensor) -> Keys:
        if self._tables.spilled is not None:
            self._tables.spilled.picked(layer, group.first, self._slots_of(group), picks_Bk)
        if self._exact:
            padding = -picks_Bk.shape[1] % BLOCK_COLUMNS
            picks_Bk = torch.nn.functional.pad(picks_Bk, (0, padding), value=-1)
        return self._keys_at(component, layer, group, picks_Bk)

    def _keys_at(self, component: Component, layer: int, group: DecodeGroup, entries_BK: Tensor) -> Keys:
        spilled = self._hot(component, group)
        if spilled is None:
            return self._keys(component, layer, self._locate(component, group, entries_BK))
        found = spilled.locate(layer, self._decode_slots[group.rows], entries_BK)
        return self._keys(component, layer, _located(entries_BK, *found))

    def _hot(self, component: Component, group: DecodeGroup) -> SpilledSlots | None:
        """Where the group's rows are looked up if any of its sequences is spilled."""
        spilled = self._tables.spilled
        if component is not Component.C4 or spilled is None or not spilled.is_any(self._slots_of(group)):
            return None
        return spilled

    def _slots_of(self, group: DecodeGroup) -> list[int]:
        """Made once a step: every C4 layer asks."""
        if group not in self._slots:
            self._slots[group] = [segment.slot for segment in self._batch.decodes[group.rows]]
        return self._slots[group]

    def _locate(self, component: Component, group: DecodeGroup, entries_BK: Tensor) -> _Located:
        item = self._pools[component].descriptor
        found = self._kernels.locate_rows(
            self._tables.pages_SP, self._decode_slots[group.rows], entries_BK, item.num_rows, item.unit_rows
        )
        return _located(entries_BK, *found)

    def _keys(self, component: Component, layer: int, found: _Located) -> Keys:
        rows = read_rows(self._pools[component], layer, found.ids_BK, self._config)
        return Keys(rows=found.clean(rows), bias=found.bias)

    def _row_ids(self, item: Descriptor, slot: int | Tensor, entries: Tensor) -> Tensor:
        pages = self._tables.pages_SP[slot, entries // item.num_rows]
        return pages * item.unit_rows + entries % item.num_rows

    def _put_ring(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        if self._capture is not None:
            self._capture.take(component, layer, rows_Tw)
        pool = self._pools[component]
        strides = _strides(pool.descriptor)
        if strides not in self._rings:
            self._rings[strides] = self._ring_writes(pool.descriptor)
        self._write(pool, layer, self._rings[strides], rows_Tw)

    def _write(self, pool: ComponentPool, layer: int, writes: _Writes, rows_Nw: Tensor) -> None:
        rows = rows_Nw if writes.rows is None else rows_Nw[writes.rows]
        write_rows(pool, layer, writes.ids, rows, self._config)

    def _ring_writes(self, item: Descriptor) -> _Writes:
        """A chunk longer than the ring leaves only as many of its last rows."""
        rows = [torch.arange(self._batch.num_decodes)]
        ids = [_ring_ids(item, self._decode_slots, self._decode_positions)]
        for segment in self._batch.chunks:
            kept = min(segment.count, item.num_rows)
            rows.append(torch.arange(segment.row + segment.count - kept, segment.row + segment.count))
            ids.append(_ring_ids(item, segment.slot, torch.arange(segment.end - kept, segment.end)))
        kept_rows = torch.cat(rows)
        every_row = len(kept_rows) == self._batch.tokens_T.numel()
        return _Writes(rows=None if every_row else kept_rows, ids=torch.cat(ids))


def kept_streams(pools: Pools, slots_N: Tensor, positions_N: Tensor, config: ModelConfig) -> Tensor:
    """Streams [N, S, D] that `PagedState.put_streams` has put."""
    pool = pools[Component.LAST_STREAMS]
    rows = read_rows(pool, 0, _ring_ids(pool.descriptor, slots_N, positions_N), config)
    return rows.unflatten(1, (config.hc_mult, -1))


@dataclass(frozen=True, slots=True)
class _Writes:
    rows: Tensor | None  # of the rows that are put, those to write; None is all of them
    ids: Tensor  # where


@dataclass(frozen=True, slots=True, kw_only=True)
class _Located:
    """Rows of a pool that a group of decodes reads."""

    ids_BK: Tensor
    bias: Tensor
    empty_B: Tensor | None  # decodes without any visible entry, if there are such

    def clean(self, rows_BKw: Tensor) -> Tensor:
        """What a sequence without entries read may be anything, NaN too: weight 0 times NaN is NaN."""
        if self.empty_B is None:
            return rows_BKw
        return rows_BKw.masked_fill(self.empty_B.view(-1, 1, 1), 0)


def _located(entries_BK: Tensor, ids_BK: Tensor, bias: Tensor, any_empty: bool) -> _Located:
    empty = (entries_BK < 0).all(-1) if any_empty else None
    return _Located(ids_BK=ids_BK, bias=bias, empty_B=empty)


_Strides = tuple[int, int]
"""Rows of a unit in one layer, and in all: components that agree in both have the same row ids."""


def _strides(item: Descriptor) -> _Strides:
    return item.num_rows, item.unit_rows


def _ring_ids(item: Descriptor, slot: int | Tensor, positions: Tensor) -> Tensor:
    return slot * item.unit_rows + positions % item.num_rows

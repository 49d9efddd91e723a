"""The pager: a StateView over pools. Turns positions into row ids, and f32 rows into what the pools keep.

Owned by a rank: one `SlotTables` for its life (which pages hold a slot's sequence), one `PagedState` per step. It
writes exactly the rows that the step's tokens make and reads only rows that are visible to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine import formats
from engine.kernels.suite import Kernels
from engine.model.attend import BLOCK_COLUMNS
from engine.model.attention import exact_window_span, hidden_bias
from engine.model.batch import BatchSegment, DecodeGroup, RaggedBatch
from engine.model.state import Keys
from kvstore.layout import KV_SCALE_BLOCK, Component, RowForm
from kvstore.pools import ComponentPool, Pools
from rorqual.model_config import PAGE_TOKENS, LayerKind, ModelConfig

_UNFINISHED = (Component.C4_UNFINISHED, Component.C4_INDEX_UNFINISHED, Component.C128_UNFINISHED)


class SlotTables:
    """Page tables of all slots, i64 [slots, pages of the longest sequence]."""

    def __init__(self, pools: Pools, *, pages_per_slot_max: int) -> None:
        self.pools = pools
        self.pages_SP = torch.zeros((pools.num_slots, pages_per_slot_max), dtype=torch.int64)
        self.num_pages = [0] * pools.num_slots

    def open(self, slot: int) -> None:
        """Start a sequence at position 0: no pages, and empty unfinished windows (K = 0, S = -inf)."""
        self.num_pages[slot] = 0
        for component in _UNFINISHED:
            descriptor = self.pools.layout.find(component)
            if descriptor is None:
                continue
            half = descriptor.width // 2
            for layer in descriptor.layers:
                ring = (
                    self.pools[component]
                    .rows_f32(layer)
                    .view(-1, descriptor.num_rows, descriptor.width)[slot]
                )
                ring[:, :half] = 0
                ring[:, half:] = -torch.inf

    def append(self, slot: int, pages: Sequence[int]) -> None:
        first = self.num_pages[slot]
        assert first + len(pages) <= self.pages_SP.shape[1], "sequence outgrew its page table"
        self.pages_SP[slot, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self.num_pages[slot] = first + len(pages)


class PagedState:
    """The StateView of one step. Index tensors are made once per step and shared by all layers."""

    def __init__(
        self, config: ModelConfig, tables: SlotTables, batch: RaggedBatch, *, kernels: Kernels, exact: bool
    ) -> None:
        self._config = config
        self._tables = tables
        self._pools = tables.pools
        self._batch = batch
        self._kernels = kernels
        self._exact = exact
        self._ratios = {item.kind: item.ratio for item in config.layers}
        self._rings: dict[int, _RingWrites] = {}
        self._located: dict[tuple[int, DecodeGroup], _Located | None] = {}
        self._new_rows: dict[int, Tensor] = {}
        self._finished: dict[Component, Tensor | None] = {}
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

    def past_window(self, component: Component, layer: int, segment: BatchSegment, num_past: int) -> Tensor:
        pool = self._pools[component]
        positions = torch.arange(segment.start - num_past, segment.start)
        return _read(pool, layer, _ring_ids(pool, segment.slot, positions), self._config)

    def put_window(self, component: Component, layer: int, rows_Td: Tensor) -> None:
        self._put_ring(self._pools[component], layer, rows_Td)

    def decode_window(self, component: Component, layer: int, group: DecodeGroup) -> Keys:
        ids, bias = self._window_columns
        rows = _read(self._pools[component], layer, ids[group.rows], self._config)
        return Keys(rows=rows, bias=bias[group.rows])

    @cached_property
    def _window_columns(self) -> tuple[Tensor, Tensor]:
        """Ring row ids [B, K] and bias; a hidden column reads the decode's own row, which was just written."""
        size = self._config.sliding_window
        own = self._decode_positions.unsqueeze(-1)
        if self._exact:
            spans = [exact_window_span(segment.start, size) for segment in self._batch.decodes]
            columns = torch.stack([torch.arange(start, stop) for start, stop in spans])
        else:
            columns = own + torch.arange(1 - size, 1)
        hidden = (columns > own) | (columns <= own - size) | (columns < 0)
        columns = torch.where(hidden, own, columns)
        ring = self._pools[Component.WINDOW].descriptor.num_rows
        return self._decode_slots.unsqueeze(-1) * ring + columns % ring, hidden_bias(hidden)

    def past_unfinished(self, component: Component, layer: int, segment: BatchSegment, first: int) -> Tensor:
        pool = self._pools[component]
        ids = _ring_ids(pool, segment.slot, torch.arange(first, segment.start))
        return pool.rows_f32(layer).index_select(0, ids)

    def put_unfinished(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        self._put_ring(self._pools[component], layer, rows_Tw)

    def decode_unfinished(self, component: Component, layer: int) -> Tensor | None:
        if component not in self._finished:
            self._finished[component] = self._finished_ids(component)
        ids_CP = self._finished[component]
        if ids_CP is None:
            return None
        return self._pools[component].rows_f32(layer)[ids_CP]

    def _finished_ids(self, component: Component) -> Tensor | None:
        ratio, pooled = self._pooling(component)
        segments = [segment for segment in self._batch.decodes if segment.end % ratio == 0]
        if not segments:
            return None
        ends = torch.tensor([segment.end for segment in segments]).unsqueeze(-1)
        slots = torch.tensor([segment.slot for segment in segments]).unsqueeze(-1)
        ring = self._pools[component].descriptor.num_rows
        return slots * ring + (ends + torch.arange(-pooled, 0)) % ring

    def _pooling(self, component: Component) -> tuple[int, int]:
        """Ratio, and how many positions an entry pools."""
        if component is Component.C128_UNFINISHED:
            return self._ratios[LayerKind.HCA], self._ratios[LayerKind.HCA]
        return self._ratios[LayerKind.CSA], 2 * self._ratios[LayerKind.CSA]

    def put_rows(self, component: Component, layer: int, rows_Nw: Tensor) -> None:
        ratio = self._ratio(component)
        if ratio not in self._new_rows:
            self._new_rows[ratio] = self._new_row_ids(ratio)
        _write(self._pools[component], layer, self._new_rows[ratio], rows_Nw, self._config)

    def _new_row_ids(self, ratio: int) -> Tensor:
        """Rows of the entries that this step finishes, in batch order."""
        finished = (self._decode_positions + 1) % ratio == 0
        ids = [self._row_ids(ratio, self._decode_slots[finished], self._decode_positions[finished] // ratio)]
        for segment in self._batch.chunks:
            entries = torch.arange(segment.start // ratio, segment.end // ratio)
            ids.append(self._row_ids(ratio, segment.slot, entries))
        return torch.cat(ids)

    def chunk_rows(self, component: Component, layer: int, segment: BatchSegment, entries: Tensor) -> Tensor:
        ids = self._row_ids(self._ratio(component), segment.slot, entries)
        return _read(self._pools[component], layer, ids, self._config)

    def decode_visible(self, component: Component, group: DecodeGroup) -> Tensor:
        return (self._decode_positions[group.rows] + 1) // self._ratio(component)

    def decode_rows(self, component: Component, layer: int, group: DecodeGroup) -> Keys | None:
        key = (self._ratio(component), group)
        if key not in self._located:
            self._located[key] = self._locate_all(component, group)
        found = self._located[key]
        return None if found is None else self._keys(component, layer, found)

    def _locate_all(self, component: Component, group: DecodeGroup) -> _Located | None:
        visible = self.decode_visible(component, group)
        num_columns = int(visible.max())
        if num_columns == 0:
            return None
        if self._exact:
            num_columns += -num_columns % BLOCK_COLUMNS
        columns = torch.arange(num_columns)
        return self._locate(component, group, torch.where(columns < visible.unsqueeze(-1), columns, -1))

    def decode_picks(self, component: Component, layer: int, group: DecodeGroup, picks_Bk: Tensor) -> Keys:
        if self._exact:
            padding = -picks_Bk.shape[1] % BLOCK_COLUMNS
            picks_Bk = torch.nn.functional.pad(picks_Bk, (0, padding), value=-1)
        return self._keys(component, layer, self._locate(component, group, picks_Bk))

    def _locate(self, component: Component, group: DecodeGroup, entries_BK: Tensor) -> _Located:
        per_page = PAGE_TOKENS // self._ratio(component)
        ids, bias, any_empty = self._kernels.locate_rows(
            self._tables.pages_SP, self._decode_slots[group.rows], entries_BK, per_page
        )
        empty = (entries_BK < 0).all(-1) if any_empty else None
        return _Located(ids_BK=ids, bias=bias, empty_B=empty)

    def _keys(self, component: Component, layer: int, found: _Located) -> Keys:
        rows = _read(self._pools[component], layer, found.ids_BK, self._config)
        return Keys(rows=found.clean(rows), bias=found.bias)

    def _ratio(self, component: Component) -> int:
        return self._ratios[LayerKind.HCA if component is Component.C128 else LayerKind.CSA]

    def _row_ids(self, ratio: int, slot: int | Tensor, entries: Tensor) -> Tensor:
        per_page = PAGE_TOKENS // ratio
        return self._tables.pages_SP[slot, entries // per_page] * per_page + entries % per_page

    def _put_ring(self, pool: ComponentPool, layer: int, rows_Tw: Tensor) -> None:
        ring = pool.descriptor.num_rows
        if ring not in self._rings:
            self._rings[ring] = self._ring_writes(ring)
        writes = self._rings[ring]
        rows = rows_Tw if writes.rows is None else rows_Tw[writes.rows]
        _write(pool, layer, writes.ids, rows, self._config)

    def _ring_writes(self, ring: int) -> _RingWrites:
        """A chunk longer than the ring leaves only its last `ring` rows."""
        rows = [torch.arange(self._batch.num_decodes)]
        ids = [self._decode_slots * ring + self._decode_positions % ring]
        for segment in self._batch.chunks:
            kept = min(segment.count, ring)
            rows.append(torch.arange(segment.row + segment.count - kept, segment.row + segment.count))
            ids.append(segment.slot * ring + torch.arange(segment.end - kept, segment.end) % ring)
        kept_rows = torch.cat(rows)
        every_row = len(kept_rows) == self._batch.tokens_T.numel()
        return _RingWrites(rows=None if every_row else kept_rows, ids=torch.cat(ids))


@dataclass(frozen=True, slots=True)
class _RingWrites:
    rows: Tensor | None  # rows of the batch to keep; None is all of them
    ids: Tensor


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


def _ring_ids(pool: ComponentPool, slot: int, positions: Tensor) -> Tensor:
    ring = pool.descriptor.num_rows
    return slot * ring + positions % ring


def _read(pool: ComponentPool, layer: int, ids: Tensor, config: ModelConfig) -> Tensor:
    """Rows as f32 [..., width]."""
    item = pool.descriptor
    if item.form is RowForm.F32:
        return pool.rows_f32(layer).index_select(0, ids.reshape(-1)).view(*ids.shape, item.width)
    data, scales = pool.data_and_scales(layer)
    unit, row = ids // item.num_rows, ids % item.num_rows
    return _DECODERS[item.form](data[unit, row], scales[unit, row], item.width, config.rope_head_dim)


def _write(pool: ComponentPool, layer: int, ids_N: Tensor, rows_Nw: Tensor, config: ModelConfig) -> None:
    item = pool.descriptor
    if item.form is RowForm.F32:
        pool.rows_f32(layer).index_copy_(0, ids_N, rows_Nw)
        return
    data, scales = pool.data_and_scales(layer)
    unit, row = ids_N // item.num_rows, ids_N % item.num_rows
    if item.form is RowForm.INDEX_FP4:
        data[unit, row], scales[unit, row] = formats.encode_fp4(rows_Nw)
        return
    num_codes = item.width - config.rope_head_dim
    codes, code_scales = formats.encode_fp8(rows_Nw[:, :num_codes], block=KV_SCALE_BLOCK)
    rotated = rows_Nw[:, num_codes:].to(torch.bfloat16).view(torch.uint8)
    data[unit, row] = torch.cat((codes.view(torch.uint8), rotated), dim=1)
    padding = item.scale_bytes - code_scales.shape[1]
    scales[unit, row] = torch.nn.functional.pad(code_scales.view(torch.uint8), (0, padding))


def _decode_kv(data: Tensor, scales: Tensor, width: int, rope_head_dim: int) -> Tensor:
    num_codes = width - rope_head_dim
    num_scales = -(-num_codes // KV_SCALE_BLOCK)
    plain = formats.decode_fp8(
        data[..., :num_codes].contiguous(), scales[..., :num_scales].contiguous(), block=KV_SCALE_BLOCK
    )
    rotated = data[..., num_codes:].contiguous().view(torch.bfloat16).float()
    return torch.cat((plain, rotated), dim=-1)


def _decode_index(data: Tensor, scales: Tensor, width: int, rope_head_dim: int) -> Tensor:
    del rope_head_dim
    return formats.decode_fp4(data, scales, num_columns=width)


_DECODERS: dict[RowForm, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    RowForm.KV_FP8: _decode_kv,
    RowForm.INDEX_FP4: _decode_index,
}

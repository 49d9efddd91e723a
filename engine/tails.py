"""Tails: hand-over records at page boundaries that lie inside what one step computes.

Made by the runner, of which `TailCapture` sees every row that a pass puts into rings, on its way into `PagedState`. A
chunk overwrites in its rings what a record at an earlier boundary holds, so the record is written in two parts: before
the pass what the rings still have of earlier positions, during the pass the chunk's own rows, in the bytes that the
pools would keep. The bytes are those of a record packed after a chunk that ends at the boundary. Nothing here reads a
ring once the pass has begun, and nothing costs anything where no tail is asked for.

Suffixes: L layers, T rows of the batch, N rows of all tails, r rows, b bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.handover import clear_missing, first_halves, pack_record, record_rows_of
from engine.model.batch import BatchSegment
from engine.pager import SlotTables
from engine.rows import encode_rows
from kvstore.handover import record_parts
from kvstore.layout import Component, Descriptor
from rorqual.model_config import PAGE_TOKENS, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """A record to be made at `num_tokens` computed tokens, a page boundary that `place` reaches or passes. `place` is
    where a batch has the positions of the tail's sequence."""

    place: BatchSegment
    num_tokens: int
    record_b: Tensor


def begin_tail(tables: SlotTables, tail: Tail, *, drafts: bool) -> None:
    """Before the pass: what lies in rings already, and zeros for draft window rows that may never come."""
    place = tail.place
    assert tail.num_tokens % PAGE_TOKENS == 0, (
        f"a tail at {tail.num_tokens} tokens, which is no page boundary"
    )
    assert place.start < tail.num_tokens <= place.end, (
        f"a tail at {tail.num_tokens} tokens in tokens {place.start} to {place.end}"
    )
    pack_record(tables, place.slot, tail.num_tokens, tail.record_b, drafts=drafts, before=place.start)


def begin_draft_rows(tables: SlotTables, tail: Tail) -> None:
    """Before the drafts' block goes on, perhaps behind a gap: rows of before the gap count no more."""
    for part in record_parts(tables.pools.layout, tail.num_tokens, drafts=True):
        if part.component is Component.DRAFT_WINDOW:
            clear_missing(tables, tail.place.slot, part, tail.record_b)


class TailCapture:
    """The RowCapture of one pass over a batch of tokens, or over the indices of the drafts' block."""

    def __init__(
        self, config: ModelConfig, tables: SlotTables, tails: Sequence[Tail], *, drafts: bool
    ) -> None:
        self._config = config
        self._pools = tables.pools
        self._tails = tails
        self._drafts = drafts
        self._wanted: dict[Component, _Wanted | None] = {}

    def take(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        item = self._pools[component].descriptor
        if component not in self._wanted:
            self._wanted[component] = self._find(item)
        wanted = self._wanted[component]
        if wanted is None:
            return
        index = item.layers.index(layer)
        data_Nb, scales_Nb = encode_rows(item, rows_Tw[wanted.rows_N], self._config)
        counts = [target.data_Lrb.shape[1] for target in wanted.targets]
        parts = zip(wanted.targets, data_Nb.split(counts), scales_Nb.split(counts), strict=True)
        for target, data_rb, scales_rb in parts:
            target.data_Lrb[index] = first_halves(data_rb) if target.halves else data_rb
            target.scales_Lrb[index] = scales_rb

    def _find(self, item: Descriptor) -> _Wanted | None:
        """The batch's rows that the tails' records hold of a component."""
        rows: list[Tensor] = []
        targets: list[_Target] = []
        for tail in self._tails:
            place = tail.place
            for part in record_parts(self._pools.layout, tail.num_tokens, drafts=self._drafts):
                first, end = max(part.first, place.start), part.first + part.count
                if part.component is not item.component or first >= end:
                    continue
                assert end <= place.end, f"{item.component.value} of a tail is not all computed in this pass"
                rows.append(torch.arange(first, end) + place.row - place.start)
                data_Lrb, scales_Lrb = record_rows_of(part, item, tail.record_b)
                skipped = first - part.first
                targets.append(
                    _Target(
                        data_Lrb=data_Lrb[:, skipped:], scales_Lrb=scales_Lrb[:, skipped:], halves=part.halves
                    )
                )
        return _Wanted(rows_N=torch.cat(rows), targets=targets) if rows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where one record keeps rows of one of its parts that come from the batch."""

    data_Lrb: Tensor
    scales_Lrb: Tensor
    halves: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    rows_N: Tensor  # i64, of the batch: those of the first target, of the second, ...
    targets: list[_Target]

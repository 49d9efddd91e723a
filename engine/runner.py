"""A model together with its state: what a rank steps, and what tests and benchmarks drive directly.

Owns the pools, page tables and hand-over records; page, slot and record ids come from the caller, who accounts for
them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.handover import pack_record, unpack_record
from engine.host_memory import HostMemory
from engine.model.batch import BatchSegment, RaggedBatch, build_batch
from engine.model.context import PickHook
from engine.model.forward import Model
from engine.pager import PagedState, SlotTables, kept_streams
from engine.plan import TailPoint
from engine.spilled import SpilledSlots
from engine.tails import Tail, TailCapture, begin_draft_rows, begin_tail
from kvstore.handover import rebuild_tokens, record_bytes, record_bytes_max
from kvstore.hisparse import HotShape
from kvstore.layout import build_layout
from kvstore.pools import Allocate, Pools, plain_memory
from kvstore.transfer.runs import RECORDS
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTokens:
    """Tokens start .. start+len-1 of the sequence in `slot`. `all_logits` asks for every token's, not the last's. With
    `replay` no paged row is written. `tails` are packed on the way, the draft window's rows by `advance_drafts`."""

    slot: int
    start: int
    tokens: Tensor  # i64
    all_logits: bool = False
    replay: bool = False
    tails: tuple[TailPoint, ...] = ()


class Runner:
    """`allocate` gives the memory that others may read: pages, a component each, and `num_records` hand-over records.
    With `drafts` records hold the state of the MTP block too, as far as `advance_drafts` has kept it up."""

    def __init__(
        self,
        model: Model,
        *,
        num_pages: int,
        num_slots: int,
        num_records: int = 0,
        num_thin: int = 0,
        drafts: bool = False,
        allocate: Allocate = plain_memory,
    ) -> None:
        self.model = model
        self.drafts = drafts
        config = model.config
        self.layout = build_layout(config, model.numerics)
        self.pools = Pools(
            self.layout, num_pages=num_pages, num_slots=num_slots, num_thin=num_thin, allocate=allocate
        )
        longest = -(-config.max_position_embeddings // PAGE_TOKENS)
        self.tables = SlotTables(self.pools, pages_per_slot_max=min(num_pages + num_thin, longest))
        longest = record_bytes_max(self.layout, drafts=drafts)
        memory = allocate(RECORDS, longest, num_records) if num_records else None
        self.records = (
            torch.empty((0, longest), dtype=torch.uint8)
            if memory is None
            else torch.from_numpy(memory).view(num_records, longest)
        )
        """uint8 [records, bytes of the longest record]."""
        self._latest: _Latest | None = None

    def allow_spills(self, host_memory: HostMemory, shape: HotShape, *, num_buffers: int) -> SpilledSlots:
        """So many sequences may have their C4 rows in host memory from now on."""
        self.tables.spilled = SpilledSlots(
            self.pools,
            host_memory,
            self.tables.pages_SP,
            shape=shape,
            num_buffers=num_buffers,
            kernels=self.model.kernels,
        )
        return self.tables.spilled

    def open(self, slot: int) -> None:
        """Start a sequence at position 0 in `slot`."""
        self.tables.open(slot)

    def close(self, slot: int) -> None:
        """The sequence in `slot` has ended."""
        self.tables.close(slot)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Append pages to the slot's page table."""
        self.tables.append(slot, pages)

    def record_bytes(self, num_tokens: int) -> int:
        """Bytes of a record of so many computed tokens."""
        return record_bytes(self.layout, num_tokens, drafts=self.drafts)

    def pack(self, slot: int, num_tokens: int, record: int) -> int:
        """Pack the state of the sequence in `slot`, `num_tokens` of which have been computed, into a record. At a page
        boundary p the decode that has reached it may have gone on behind it, with tokens accepted or not. Returns the
        record's bytes, a multiple of 4.

        Rings hold what such a record needs. The decode began at p - 1 at the latest, so that the newest position
        written is at most p - 1 + DRAFTS_MAX, and a ring of R rows goes back to p + DRAFTS_MAX - R or further: of
        streams (R = DRAFTS_MAX + 1) to p - 1; of overlapping compressors of ratio r (2 r + DRAFTS_MAX) to p - 2 r,
        where p - r is needed; of windows of W rows (W + PAGE_TOKENS + DRAFTS_MAX) to p - W - PAGE_TOKENS, where p - W
        is."""
        return pack_record(self.tables, slot, num_tokens, self.records[record], drafts=self.drafts)

    def restore(self, slot: int, num_tokens: int, pages: Sequence[int], record: int) -> None:
        """Instead of `open`: start in `slot` a sequence of which `num_tokens` have been computed elsewhere. `pages`
        hold them all: full ones as they were read, and last the partial one, if any, which the record fills. Without a
        record, -1, it starts with an empty window at a page boundary, to be rebuilt."""
        needed = -(-num_tokens // PAGE_TOKENS)
        assert len(pages) == needed, f"{len(pages)} pages for {num_tokens} computed tokens, not {needed}"
        if record < 0:
            assert num_tokens % PAGE_TOKENS == 0, (
                f"an empty window at {num_tokens}, which is no page boundary"
            )
            self.tables.rebuild(slot, num_tokens)
            self.tables.append(slot, pages)
            return
        self.tables.restart(slot)
        self.tables.append(slot, pages)
        unpack_record(self.tables, slot, num_tokens, self.records[record], drafts=self.drafts)
        if self.drafts:
            first = max(0, num_tokens - self.model.config.sliding_window)
            self.tables.add_draft_rows(slot, first, num_tokens - 1)

    def rebuilt_at(self, slot: int) -> int:
        """The number of computed tokens from which on the slot's state is what it is without rebuilding."""
        first = int(self.tables.window_first_S[slot])
        return first + rebuild_tokens(self.layout) if first else 0

    @torch.inference_mode()
    def run(self, work: Sequence[SegmentTokens], *, hook: PickHook | None = None) -> list[Tensor]:
        """One ragged forward. Logits f32 [1 or count, V] of each item of work."""
        streams, rows = self.streams(work, hook=hook)
        self.keep_streams(streams)
        logits = self.model.logits(streams[torch.cat(rows)])
        return list(logits.split([len(part) for part in rows]))

    @torch.inference_mode()
    def streams(
        self, work: Sequence[SegmentTokens], *, hook: PickHook | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The streams of all batch rows, and for each item of work the rows whose logits it wants. `keep_streams` must
        be called next, or `advance_drafts` and then `keep_streams`."""
        batch, placed = _lay_out(work)
        tails = [
            [
                Tail(place=place, num_tokens=point.num_tokens, record_b=self.records[point.record])
                for point in item.tails
            ]
            for item, place in zip(work, placed, strict=True)
        ]
        for tail in (every := [tail for found in tails for tail in found]):
            begin_tail(self.tables, tail, drafts=self.drafts)
        state = self._state(batch, replayed={item.slot for item in work if item.replay}, tails=every)
        self._latest = _Latest(work=work, placed=placed, state=state, tails=tails)
        streams = self.model.streams(self.model.begin(batch, state, hook=hook))
        return streams, _wanted_rows(work, placed)

    @torch.inference_mode()
    def keep_streams(self, streams_TSD: Tensor) -> None:
        """Keep the newest of the streams that `streams` has just returned, in place of older ones."""
        assert self._latest is not None, "nothing was computed"
        self._latest.state.put_streams(streams_TSD)

    @torch.inference_mode()
    def advance_drafts(
        self,
        work: Sequence[SegmentTokens],
        streams_TSD: Tensor,
        *,
        firsts: Sequence[int] | None = None,
        rows_only: bool = False,
    ) -> list[Tensor]:
        """Take MTP block 0 to where the main model is, one index behind: of each item the indices start-1 ..
        start+len-2, since index i takes the streams at i and the token at i+1. `streams_TSD` is what `streams(work)`
        has just returned, and is not kept yet. `firsts` are the items' first indices where those before are not wanted:
        a later one than start-1, or one past the last, start+len-1.

        Returns the block's streams [indices, S, D] of each item, whose `draft_logits` at index i predict token i+2.
        With `rows_only` they are empty: only the rows that later drafts see are made.
        """
        latest = self._latest
        assert latest is not None, "nothing was computed"
        assert latest.work is work, "not the work that was computed last"
        behind = [
            _one_behind(item, max(first, int(self.tables.window_first_S[item.slot])))
            for item, first in zip(work, firsts or [item.start - 1 for item in work], strict=True)
        ]
        advancing = [index for index, item in enumerate(behind) if len(item.tokens)]
        drafted = [streams_TSD[:0]] * len(work)
        if advancing:
            indices = [behind[index] for index in advancing]
            inputs = [
                self._draft_inputs(streams_TSD, latest.placed[index], behind[index].start)
                for index in advancing
            ]
            for item in indices:
                self.tables.add_draft_rows(item.slot, item.start, item.start + len(item.tokens))
            counts = [len(item.tokens) for item in indices]
            tails = [latest.tails[index] for index in advancing]
            for tail in (tail for found in tails for tail in found):
                begin_draft_rows(self.tables, tail)
            made = self._draft(indices, torch.cat(inputs), tails, rows_only=rows_only)
            if made is not None:
                for index, part in zip(advancing, made.split(counts), strict=True):
                    drafted[index] = part
        return drafted

    @torch.inference_mode()
    def draft(self, indices: Sequence[SegmentTokens], inputs_TSD: Tensor) -> Tensor:
        """MTP block 0 over indices start .. start+len-1 of each item, whose tokens are those one position on, that is
        start+1 .. start+len. `inputs_TSD` holds the streams that they take, item by item, and so does what is returned
        the block's streams [T, S, D]."""
        made = self._draft(indices, inputs_TSD, [()] * len(indices))
        assert made is not None
        return made

    def _draft(
        self,
        indices: Sequence[SegmentTokens],
        inputs_TSD: Tensor,
        tails: Sequence[Sequence[Tail]],
        *,
        rows_only: bool = False,
    ) -> Tensor | None:
        """`tails` of each item, to which this pass adds the rows of the draft window. None with `rows_only`."""
        batch, places = _lay_out(indices)
        every = [
            replace(tail, place=place) for place, found in zip(places, tails, strict=True) for tail in found
        ]
        order_T = torch.tensor([row for place in places for row in range(place.row, place.row + place.count)])
        inputs = torch.empty_like(inputs_TSD).index_copy_(0, order_T, inputs_TSD)
        state = self._state(batch, tails=every)
        run = self.model.begin(batch, state)
        if rows_only:
            self.model.keep_draft_rows(run, 0, inputs, batch.tokens_T)
            return None
        streams = self.model.draft(run, 0, inputs, batch.tokens_T)
        return streams.index_select(0, order_T)

    @torch.inference_mode()
    def kept_streams(self, slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The main model's streams [N, S, D] at these positions, which must be among the last that are kept of these
        slots."""
        return kept_streams(self.pools, torch.tensor(slots), torch.tensor(positions), self.model.config)

    def _draft_inputs(self, streams_TSD: Tensor, source: BatchSegment, first: int) -> Tensor:
        """Streams [indices, S, D] of the indices `first` .. of a segment: that of the position before it was kept by
        the step before."""
        if first >= source.start:
            return streams_TSD[source.row + first - source.start : source.row + source.count - 1]
        kept = self.kept_streams([source.slot], [first])
        return torch.cat((kept, streams_TSD[source.row : source.row + source.count - 1]))

    def _state(
        self, batch: RaggedBatch, *, replayed: Collection[int] = (), tails: Sequence[Tail] = ()
    ) -> PagedState:
        model = self.model
        return PagedState(
            model.config,
            self.tables,
            batch,
            kernels=model.kernels,
            exact=model.exact,
            replayed=replayed,
            capture=TailCapture(model.config, self.tables, tails, drafts=self.drafts) if tails else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Latest:
    """How the last forward was laid out, for the drafts' block that follows it."""

    work: Sequence[SegmentTokens]
    placed: list[BatchSegment]
    state: PagedState
    tails: list[list[Tail]]  # of each item of work


def _lay_out(work: Sequence[SegmentTokens]) -> tuple[RaggedBatch, list[BatchSegment]]:
    return build_batch([(item.slot, item.start, item.tokens) for item in work])


def _wanted_rows(work: Sequence[SegmentTokens], placed: Sequence[BatchSegment]) -> list[Tensor]:
    return [
        torch.arange(place.row if item.all_logits else place.row + place.count - 1, place.row + place.count)
        for item, place in zip(work, placed, strict=True)
    ]


def _one_behind(item: SegmentTokens, first: int) -> SegmentTokens:
    """Indices of the MTP block for an item, from `first` on, with the tokens that they take; none for the first token
    of a sequence."""
    first = max(first, 0)
    assert first >= item.start - 1, "an index before those that the item takes"
    return SegmentTokens(slot=item.slot, start=first, tokens=item.tokens[first + 1 - item.start :])

"""A ragged batch: any mix of prefill chunks and decode steps, laid out as rows of tokens.

Rows 0..num_decodes-1 are the single-token segments, computed together; the longer segments follow, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSegment:
    """Tokens start .. start+count-1 of the sequence in `slot`, at rows row .. row+count-1 of the batch."""

    slot: int
    start: int
    count: int
    row: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decodes first .. last-1 of a batch, which are also its rows: of similar length, computed together."""

    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedBatch:
    """tokens_T, positions_T i64 [T]; the decodes' rows come first, shortest sequence first."""

    tokens_T: Tensor
    positions_T: Tensor
    decodes: tuple[BatchSegment, ...]
    chunks: tuple[BatchSegment, ...]
    groups: tuple[DecodeGroup, ...]

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)


def build_batch(
    segments: Sequence[tuple[int, int, Tensor]], *, decode_together: bool = True
) -> tuple[RaggedBatch, list[BatchSegment]]:
    """Lay out segments (slot, start, token ids i64) as a batch; also returns each segment's place, in the given order.

    `decode_together` False treats single tokens as chunks too (states
    that keep no past, as in training).
    """

    def layout(index: int) -> tuple[bool, int]:
        _, start, tokens = segments[index]
        return (True, 0) if tokens.numel() > 1 else (False, start)

    order = sorted(range(len(segments)), key=layout)
    placed: list[BatchSegment | None] = [None] * len(segments)
    decodes: list[BatchSegment] = []
    chunks: list[BatchSegment] = []
    row = 0
    for index in order:
        slot, start, tokens = segments[index]
        segment = BatchSegment(slot=slot, start=start, count=tokens.numel(), row=row)
        placed[index] = segment
        (decodes if segment.count == 1 and decode_together else chunks).append(segment)
        row += segment.count
    tokens_T = torch.cat([segments[index][2] for index in order])
    starts_B = torch.tensor([segment.start for segment in decodes], dtype=torch.int64)
    positions_T = torch.cat([starts_B, *(torch.arange(segment.start, segment.end) for segment in chunks)])
    batch = RaggedBatch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        decodes=tuple(decodes),
        chunks=tuple(chunks),
        groups=tuple(_group(decodes)),
    )
    return batch, [segment for segment in placed if segment is not None]


GROUP_TOKENS_MAX = 1 << 17
"""Bound on a group's decodes times its longest length, to which all are padded: 32,768 index rows are read at once (16
MiB of f32 on Flash), unless one sequence alone is longer."""


def _group(decodes: Sequence[BatchSegment]) -> list[DecodeGroup]:
    """Cut the decodes, shortest first, where padding to the next one's length would cost too much."""
    groups: list[DecodeGroup] = []
    first = 0
    for index, segment in enumerate(decodes):
        too_many = (index - first + 1) * segment.end > GROUP_TOKENS_MAX
        too_unequal = segment.end > 4 * (decodes[first].end + PAGE_TOKENS)
        if index > first and (too_many or too_unequal):
            groups.append(DecodeGroup(first, index))
            first = index
    if decodes:
        groups.append(DecodeGroup(first, len(decodes)))
    return groups

"""A ragged batch: any mix of prefill chunks and decode steps, laid out as rows of tokens.

Rows 0..num_decodes-1 are the single-token pieces, computed together; the longer pieces follow, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RaggedBatch:
    """tokens_T, positions_T i64 [T]; the decodes' rows come first."""

    tokens_T: Tensor
    positions_T: Tensor
    decodes: tuple[Piece, ...]
    chunks: tuple[Piece, ...]

    @property
    def num_decodes(self) -> int:
        return len(self.decodes)


def build_batch(
    pieces: Sequence[tuple[int, int, Tensor]], *, decode_together: bool = True
) -> tuple[RaggedBatch, list[Piece]]:
    """Lay out pieces (slot, start, token ids i64) as a batch; also returns each piece's place, in the given order.

    `decode_together` False treats single tokens as chunks too (states
    that keep no past, as in training).
    """
    order = sorted(range(len(pieces)), key=lambda index: pieces[index][2].numel() > 1)
    placed: list[Piece | None] = [None] * len(pieces)
    decodes: list[Piece] = []
    chunks: list[Piece] = []
    row = 0
    for index in order:
        slot, start, tokens = pieces[index]
        piece = Piece(slot=slot, start=start, count=tokens.numel(), row=row)
        placed[index] = piece
        (decodes if piece.count == 1 and decode_together else chunks).append(piece)
        row += piece.count
    tokens_T = torch.cat([pieces[index][2] for index in order])
    positions_T = torch.cat([torch.arange(piece.start, piece.end) for piece in (*decodes, *chunks)])
    batch = RaggedBatch(
        tokens_T=tokens_T, positions_T=positions_T, decodes=tuple(decodes), chunks=tuple(chunks)
    )
    return batch, [piece for piece in placed if piece is not None]

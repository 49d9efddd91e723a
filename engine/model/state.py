"""What a layer asks of the state of the sequences in a batch. Implemented by the pager (paged inference) and by
`engine.model.fresh` (whole sequences from position 0 without a past: the readable form, and training).

All rows are f32 values whatever the pools keep. `layer` is a layer number of the main stack, or an MTP block number
for the draft window. Puts of one layer come before its reads, but for `past_*`, which the layer asks for first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.model.batch import BatchSegment, DecodeGroup
from kvstore.layout import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Rows that queries attend to: shared [K, d] or per query [Q, K, d]; bias [Q, 1, K] is 0 or -inf."""

    rows: Tensor
    bias: Tensor


class StateView(Protocol):
    def window_first(self, component: Component, segment: BatchSegment) -> int:
        """The segment's queries see no raw row of an earlier position."""
        ...

    def past_window(self, component: Component, layer: int, segment: BatchSegment, num_past: int) -> Tensor:
        """Raw KV rows [num_past, d] of the positions just before the segment."""
        ...

    def put_window(self, component: Component, layer: int, rows_Td: Tensor) -> None:
        """Keep the batch's raw KV rows."""
        ...

    def decode_window(self, component: Component, layer: int, group: DecodeGroup) -> Keys:
        """For each decode of the group, the window that ends at its own position."""
        ...

    def past_unfinished(self, component: Component, layer: int, segment: BatchSegment, first: int) -> Tensor:
        """Unfinished compressor rows of positions first .. segment.start-1; `first` may be negative (empty windows)."""
        ...

    def put_unfinished(self, component: Component, layer: int, rows_Tw: Tensor) -> None: ...

    def decode_unfinished(self, component: Component, layer: int) -> Tensor | None:
        """Rows [C, pooled positions, w] of the windows that the decodes complete in this step, or None."""
        ...

    def put_rows(self, component: Component, layer: int, rows_Nw: Tensor) -> None:
        """Keep new compressed rows: those completed by decodes, then by each chunk, in batch order."""
        ...

    def chunk_rows(self, component: Component, layer: int, segment: BatchSegment, entries: Tensor) -> Tensor:
        """Compressed rows [*entries.shape, w] of the segment's sequence, those just put included; entries i64 >= 0."""
        ...

    def decode_rows(self, component: Component, layer: int, group: DecodeGroup) -> Keys | None:
        """For each decode all its visible compressed rows, hidden ones masked; None if none sees any."""
        ...

    def decode_picks(self, component: Component, layer: int, group: DecodeGroup, picks_Bk: Tensor) -> Keys:
        """For each decode the picked rows; -1 is no row."""
        ...

    def decode_visible(self, component: Component, group: DecodeGroup) -> Tensor:
        """How many compressed rows each decode sees, i64 [B]."""
        ...

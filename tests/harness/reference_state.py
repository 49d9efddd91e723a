"""The engine's forward over the slow reference's own state, one token at a time but all tokens in one batch.

With rounding, two correct runs of a whole prompt drift apart: one value that lands on the other side of a rounding
border changes the rows that all later tokens read. Here every token starts from exactly what the reference had kept
before it, so a token's error is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.batch import BatchSegment, DecodeGroup, build_batch
from engine.model.forward import Model
from engine.model.state import Keys
from kvstore.layout import Component
from tests.harness.picks import ForcedPicks, PickRecorder, Picks
from tests.reference.deepseek_v4 import CompressorState, ReferenceModel

_COMPRESSED = {
    Component.C4: "compressed",
    Component.C128: "compressed",
    Component.C4_INDEX: "index",
    Component.C4_UNFINISHED: "compressed",
    Component.C128_UNFINISHED: "compressed",
    Component.C4_INDEX_UNFINISHED: "index",
}


def run_from_reference_state(
    model: Model, reference: ReferenceModel, tokens: Sequence[int]
) -> tuple[Tensor, Picks]:
    """Logits [N, V] of tokens that the reference has read, with the reference's choices; and the engine's own, each
    made where all before it were the reference's."""
    segments = [(0, position, torch.tensor([token])) for position, token in enumerate(tokens)]
    batch, places = build_batch(segments, decode_together=False)
    placed = [(0, segment) for segment in places]
    own = Picks(model.config, len(tokens))
    recorder = PickRecorder(model.kernels, placed, [own])
    hook = ForcedPicks(placed, [Picks.of_reference(model.config, reference.picks)], recorder)
    with torch.inference_mode():
        streams = model.streams(model.begin(batch, ReferenceState(reference), hook=hook))
        return model.logits(streams[: len(places)]), own


class ReferenceState:
    """StateView of segments of one token each: the past is the reference's, the token's own rows are the engine's."""

    def __init__(self, reference: ReferenceModel) -> None:
        self._reference = reference
        self._config = reference.config
        self._new_rows: list[Tensor] = []

    def window_first(self, component: Component, segment: BatchSegment) -> int:
        del component, segment
        return 0

    def past_window(self, component: Component, layer: int, segment: BatchSegment, num_past: int) -> Tensor:
        assert component is Component.WINDOW
        rows = self._reference.layers[layer].window
        past = [rows[position] for position in range(segment.start - num_past, segment.start)]
        return torch.stack(past) if past else torch.zeros((0, self._config.head_dim))

    def put_window(self, component: Component, layer: int, rows_Td: Tensor) -> None:
        del component, layer, rows_Td

    def past_unfinished(self, component: Component, layer: int, segment: BatchSegment, first: int) -> Tensor:
        kept = self._kept(component, layer)
        rows = [torch.cat((kept.k[p], kept.s[p])) for p in range(max(first, 0), segment.start)]
        half = kept.k[0].shape[0]
        empty = torch.cat(
            (torch.zeros((max(-first, 0), half)), torch.full((max(-first, 0), half), -torch.inf)), 1
        )
        return torch.cat((empty, torch.stack(rows))) if rows else empty

    def put_unfinished(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        del component, layer, rows_Tw

    def put_rows(self, component: Component, layer: int, rows_Nw: Tensor) -> None:
        del component, layer
        self._new_rows.append(rows_Nw)

    def chunk_rows(self, component: Component, layer: int, segment: BatchSegment, entries: Tensor) -> Tensor:
        """Rows before the segment, and the one it has just made if it ends a window."""
        ratio = self._config.layers[layer].ratio
        rows = torch.stack(self._kept(component, layer).rows[: segment.end // ratio])
        if segment.end % ratio == 0:
            # An indexer's rows are put after the layer's main rows, and read before them.
            new = self._new_rows[-1 if component is not Component.C4 else -2]
            rows[-1] = new[segment.end // ratio - 1]
        return rows[entries]

    def decode_window(self, component: Component, layer: int, group: DecodeGroup) -> Keys:
        raise AssertionError("every token is a chunk")

    def decode_unfinished(self, component: Component, layer: int) -> Tensor | None:
        raise AssertionError("every token is a chunk")

    def decode_rows(self, component: Component, layer: int, group: DecodeGroup) -> Keys | None:
        raise AssertionError("every token is a chunk")

    def decode_picks(self, component: Component, layer: int, group: DecodeGroup, picks_Bk: Tensor) -> Keys:
        raise AssertionError("every token is a chunk")

    def decode_visible(self, component: Component, group: DecodeGroup) -> Tensor:
        raise AssertionError("every token is a chunk")

    def _kept(self, component: Component, layer: int) -> CompressorState:
        return getattr(self._reference.layers[layer], _COMPRESSED[component])

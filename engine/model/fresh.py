"""A state without a past: whole sequences from position 0, rows kept as activations. For training and reading.

Every segment is a chunk that starts at position 0 (`build_batch(..., decode_together=False)`), so nothing is read that
this pass did not make, and autograd flows through every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.batch import BatchSegment, DecodeGroup, RaggedBatch
from engine.model.state import Keys
from kvstore.layout import Component
from rorqual.model_config import ModelConfig


class FreshState:
    """StateView of one pass. Not reusable."""

    def __init__(self, config: ModelConfig, batch: RaggedBatch) -> None:
        assert not batch.decodes
        assert all(segment.start == 0 for segment in batch.chunks)
        self._config = config
        self._batch = batch
        self._rows: dict[tuple[Component, int], Tensor] = {}
        self._ratios = {item.kind: item.ratio for item in config.layers}

    def window_first(self, component: Component, segment: BatchSegment) -> int:
        del component, segment
        return 0

    def past_window(self, component: Component, layer: int, segment: BatchSegment, num_past: int) -> Tensor:
        del component, layer, segment
        assert num_past == 0
        return torch.zeros((0, self._config.head_dim))

    def put_window(self, component: Component, layer: int, rows_Td: Tensor) -> None:
        del component, layer, rows_Td

    def past_unfinished(self, component: Component, layer: int, segment: BatchSegment, first: int) -> Tensor:
        """Empty windows before position 0: K = 0, S = -inf."""
        del layer, segment
        config = self._config
        width = config.index_head_dim if component is Component.C4_INDEX_UNFINISHED else config.head_dim
        half = width if component is Component.C128_UNFINISHED else 2 * width
        return torch.cat((torch.zeros((-first, half)), torch.full((-first, half), -torch.inf)), dim=1)

    def put_unfinished(self, component: Component, layer: int, rows_Tw: Tensor) -> None:
        del component, layer, rows_Tw

    def put_rows(self, component: Component, layer: int, rows_Nw: Tensor) -> None:
        self._rows[component, layer] = rows_Nw

    def chunk_rows(self, component: Component, layer: int, segment: BatchSegment, entries: Tensor) -> Tensor:
        ratio = self._config.layers[layer].ratio
        first = sum(other.count // ratio for other in self._batch.chunks if other.row < segment.row)
        return self._rows[component, layer][first + entries]

    def decode_window(self, component: Component, layer: int, group: DecodeGroup) -> Keys:
        raise AssertionError("a fresh state has no decodes")

    def decode_unfinished(self, component: Component, layer: int) -> Tensor | None:
        raise AssertionError("a fresh state has no decodes")

    def decode_rows(self, component: Component, layer: int, group: DecodeGroup) -> Keys | None:
        raise AssertionError("a fresh state has no decodes")

    def decode_picks(self, component: Component, layer: int, group: DecodeGroup, picks_Bk: Tensor) -> Keys:
        raise AssertionError("a fresh state has no decodes")

    def decode_visible(self, component: Component, group: DecodeGroup) -> Tensor:
        raise AssertionError("a fresh state has no decodes")

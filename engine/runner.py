"""A model together with its state: what a rank steps, and what tests and benchmarks drive directly.

Owns the pools and page tables; page and slot ids come from the caller, who accounts for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.batch import build_batch
from engine.model.context import PickHook
from engine.model.forward import Model
from engine.pager import PagedState, SlotTables
from kvstore.layout import build_layout
from kvstore.pools import Pools
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTokens:
    """Tokens start .. start+len-1 of the sequence in `slot`. `all_logits` asks for every token's, not the last's."""

    slot: int
    start: int
    tokens: Tensor  # i64
    all_logits: bool = False


class Runner:
    def __init__(self, model: Model, *, num_pages: int, num_slots: int) -> None:
        self.model = model
        config = model.config
        layout = build_layout(config, model.numerics)
        self.pools = Pools(layout, num_pages=num_pages, num_slots=num_slots, device=torch.device("cpu"))
        longest = -(-config.max_position_embeddings // PAGE_TOKENS)
        self.tables = SlotTables(self.pools, pages_per_slot_max=min(num_pages, longest))

    def open(self, slot: int) -> None:
        self.tables.open(slot)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        self.tables.append(slot, pages)

    @torch.inference_mode()
    def run(self, work: Sequence[SegmentTokens], *, hook: PickHook | None = None) -> list[Tensor]:
        """One ragged forward. Logits f32 [1 or count, V] of each item of work."""
        streams, rows = self.streams(work, hook=hook)
        logits = self.model.logits(streams[torch.cat(rows)])
        return list(logits.split([len(part) for part in rows]))

    @torch.inference_mode()
    def streams(
        self, work: Sequence[SegmentTokens], *, hook: PickHook | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The streams of all batch rows, and for each item of work the rows whose logits it wants."""
        segments = [(item.slot, item.start, item.tokens) for item in work]
        batch, placed = build_batch(segments)
        model = self.model
        state = PagedState(model.config, self.tables, batch, kernels=model.kernels, exact=model.exact)
        streams = model.streams(model.begin(batch, state, hook=hook))
        rows = [
            torch.arange(
                place.row if item.all_logits else place.row + place.count - 1, place.row + place.count
            )
            for item, place in zip(work, placed, strict=True)
        ]
        return streams, rows

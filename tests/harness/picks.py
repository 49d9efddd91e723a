"""The discrete choices of a model, in one form for the engine, the slow reference and the outside oracle.

`PickRecorder` listens to the engine, `ForcedPicks` puts another model's choices in the place of its own. Choices are
sets: in which order rows or experts were found means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.kernels.suite import Kernels
from engine.model.batch import BatchSegment
from rorqual.model_config import LayerKind, ModelConfig

Placed = Sequence[tuple[int, BatchSegment]]
"""Which request each segment of a batch belongs to."""


class Choice(NamedTuple):
    """One choice of one token, in the order in which a forward pass makes them."""

    position: int
    layer: int
    kind: str  # "rows" before "experts": attention comes first (and R after E, so never sorted by name)


class Picks:
    """Choices of one request of N tokens: for every CSA layer the attended rows, bool [N, rows], and for every layer
    the experts, i64 [N, K], ascending."""

    def __init__(self, config: ModelConfig, num_tokens: int) -> None:
        self.config = config
        self.num_tokens = num_tokens
        self.rows = {
            layer: torch.zeros((num_tokens, num_tokens // item.ratio), dtype=torch.bool)
            for layer, item in enumerate(config.layers)
            if item.kind is LayerKind.CSA
        }
        self.experts = [torch.full((num_tokens, config.num_experts_per_token), -1) for _ in config.layers]

    @classmethod
    def of_reference(cls, config: ModelConfig, recorded: Sequence[Sequence[Mapping[str, Any]]]) -> Picks:
        """From `ReferenceModel.picks`: per token and layer, where None is all visible rows."""
        picks = cls(config, len(recorded))
        for position, layers in enumerate(recorded):
            for layer, chosen in enumerate(layers):
                picks.put_experts(layer, position, torch.tensor([chosen["experts"]]))
                if layer in picks.rows:
                    rows = chosen["indexer"]
                    visible = (position + 1) // config.layers[layer].ratio
                    picks.put_rows(layer, position, torch.tensor([range(visible) if rows is None else rows]))
        return picks

    def put_rows(self, layer: int, start: int, picks_Qk: Tensor) -> None:
        """Row numbers, -1 for none, of positions start .. ."""
        target = self.rows[layer][start : start + picks_Qk.shape[0]]
        found = torch.zeros((target.shape[0], target.shape[1] + 1), dtype=torch.bool)
        none = target.shape[1]
        found.scatter_(1, torch.where(picks_Qk < 0, none, picks_Qk.long()), True)
        target.copy_(found[:, :none])

    def put_experts(self, layer: int, start: int, picks_QK: Tensor) -> None:
        self.experts[layer][start : start + picks_QK.shape[0]] = picks_QK.sort(dim=-1).values

    def cut(self, num_tokens: int) -> Picks:
        """The choices of the first tokens."""
        shorter = Picks(self.config, num_tokens)
        for layer, rows in shorter.rows.items():
            rows.copy_(self.rows[layer][:num_tokens, : rows.shape[1]])
        for layer, experts in enumerate(shorter.experts):
            experts.copy_(self.experts[layer][:num_tokens])
        return shorter

    def first_difference(self, other: Picks) -> Choice | None:
        """The first token that chose differently, and the first of its choices that differs: the ones after it have
        other inputs and prove nothing."""
        found: list[tuple[int, int, int]] = []
        for layer, experts in enumerate(self.experts):
            differing = [(1, (experts != other.experts[layer]).any(-1))]
            if layer in self.rows:
                differing.append((0, (self.rows[layer] != other.rows[layer]).any(-1)))
            for kind, where in differing:
                if bool(where.any()):
                    found.append((int(where.nonzero()[0]), layer, kind))
        if not found:
            return None
        position, layer, kind = min(found)
        return Choice(position, layer, ("rows", "experts")[kind])


class PickRecorder:
    """A PickHook that changes nothing and notes every choice of one batch."""

    def __init__(self, kernels: Kernels, placed: Placed, into: Sequence[Picks]) -> None:
        self._kernels = kernels
        self._placed = placed
        self._into = into

    def rows(self, layer: int, first_row: int, picks_Qk: Tensor) -> Tensor:
        for request, segment, start, rows in _overlaps(self._placed, first_row, picks_Qk.shape[0]):
            del segment
            self._into[request].put_rows(layer, start, picks_Qk[rows])
        return picks_Qk

    def experts(
        self, layer: int, logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None
    ) -> Tensor | None:
        # The router's own kernel again, which gives the same answer again.
        config = self._into[0].config
        chosen, _ = self._kernels.route_experts(
            logits_TE, bias_E, picks_TK, config.num_experts_per_token, config.routed_scaling_factor
        )
        for request, segment in self._placed:
            self._into[request].put_experts(layer, segment.start, chosen[segment.rows])
        return picks_TK


class ForcedPicks:
    """A PickHook that makes one batch choose as `wanted` says, and tells `own` what it would have chosen itself."""

    def __init__(self, placed: Placed, wanted: Sequence[Picks], own: PickRecorder | None = None) -> None:
        self._placed = placed
        self._wanted = wanted
        self._own = own

    def rows(self, layer: int, first_row: int, picks_Qk: Tensor) -> Tensor:
        if self._own is not None:
            self._own.rows(layer, first_row, picks_Qk)
        forced = torch.full_like(picks_Qk, -1)
        for request, _, start, rows in _overlaps(self._placed, first_row, picks_Qk.shape[0]):
            for offset, row in enumerate(range(rows.start, rows.stop)):
                chosen = self._wanted[request].rows[layer][start + offset].nonzero().squeeze(1)
                forced[row, : len(chosen)] = chosen
        return forced

    def experts(
        self, layer: int, logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None
    ) -> Tensor | None:
        if self._own is not None:
            self._own.experts(layer, logits_TE, bias_E, picks_TK)
        width = self._wanted[0].config.num_experts_per_token
        forced = torch.arange(width).repeat(logits_TE.shape[0], 1)  # rows of padding: any experts do
        for request, segment in self._placed:
            forced[segment.rows] = self._wanted[request].experts[layer][segment.start : segment.end]
        return forced


def _overlaps(placed: Placed, first_row: int, num_rows: int) -> list[tuple[int, BatchSegment, int, slice]]:
    """Pieces with rows among first_row .. : request, segment, position of its first such row, and these rows counted
    from first_row."""
    found: list[tuple[int, BatchSegment, int, slice]] = []
    for request, segment in placed:
        low, high = max(segment.row, first_row), min(segment.row + segment.count, first_row + num_rows)
        if low < high:
            found.append(
                (
                    request,
                    segment,
                    segment.start + low - segment.row,
                    slice(low - first_row, high - first_row),
                )
            )
    return found

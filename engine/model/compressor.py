"""The compressors of a CSA or HCA layer: tokens in, one pooled row for every finished window out.

CSA windows overlap: entry i pools the first halves (a) of the tokens of window i-1 and the second halves (b) of those
of window i. K and S (gate with ape) of tokens whose window is unfinished wait in a ring, addressed by position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.batch import BatchSegment
from engine.model.context import Pass
from engine.model.weights import CompressorWeights
from kvstore.layout import Component
from rorqual.model_config import LayerConfig, LayerKind


def compress(run: Pass, layer: int, item: LayerConfig, weights: CompressorWeights, x_TD: Tensor) -> Tensor:
    """Put all rows finished by this batch into the state. Returns the indexer's raw head weights [T, Hi] (CSA)."""
    projected = run.linear(x_TD, weights.from_x)
    num_columns = weights.ape.shape[1]
    rows = projected[:, :num_columns] + weights.ape[run.batch.positions_T % item.ratio]
    width = run.config.head_dim
    if item.kind is LayerKind.HCA:
        stream = _Stream(run, layer, item, Component.C128, Component.C128_UNFINISHED, overlapped=False)
        stream.advance(rows, width, weights.norm)
        return projected[:, num_columns:]
    assert weights.index_norm is not None
    main = _Stream(run, layer, item, Component.C4, Component.C4_UNFINISHED, overlapped=True)
    main.advance(rows[:, : 4 * width], width, weights.norm)
    index = _Stream(run, layer, item, Component.C4_INDEX, Component.C4_INDEX_UNFINISHED, overlapped=True)
    index.advance(rows[:, 4 * width :], run.config.index_head_dim, weights.index_norm)
    return projected[:, num_columns:]


class _Stream:
    """One compressor of one layer, for the length of one pass."""

    def __init__(
        self,
        run: Pass,
        layer: int,
        item: LayerConfig,
        component: Component,
        unfinished: Component,
        *,
        overlapped: bool,
    ) -> None:
        self.run = run
        self.layer = layer
        self.ratio = item.ratio
        self.component = component
        self.unfinished = unfinished
        self.overlapped = overlapped

    def advance(self, rows_Tw: Tensor, width: int, norm: Tensor) -> None:
        """Take the batch's K and S rows ([T, 2h], or [T, 4h] when overlapped), put the finished entries."""
        run = self.run
        pasts = [
            run.state.past_unfinished(self.unfinished, self.layer, segment, self._first(segment))
            for segment in run.batch.chunks
        ]
        run.state.put_unfinished(self.unfinished, self.layer, rows_Tw)
        keys: list[Tensor] = []
        scores: list[Tensor] = []
        entries: list[Tensor] = []
        finished = run.state.decode_unfinished(self.unfinished, self.layer) if run.batch.decodes else None
        if finished is not None:
            keys_WPh, scores_WPh = self._split(finished, width)
            keys.append(keys_WPh)
            scores.append(scores_WPh)
            ends = [segment.end for segment in run.batch.decodes if segment.end % self.ratio == 0]
            entries.append(torch.tensor(ends) // self.ratio - 1)
        for segment, past in zip(run.batch.chunks, pasts, strict=True):
            first_entry, last_entry = segment.start // self.ratio, segment.end // self.ratio
            if first_entry == last_entry:
                continue
            windows = self._windows(torch.cat((past, rows_Tw[segment.rows])), last_entry - first_entry)
            keys_WPh, scores_WPh = self._split(windows, width)
            keys.append(keys_WPh)
            scores.append(scores_WPh)
            entries.append(torch.arange(first_entry, last_entry))
        if entries:
            pooled = run.kernels.pool_windows(_joined(keys), _joined(scores))
            self._put(pooled, _joined(entries), norm)

    def _first(self, segment: BatchSegment) -> int:
        """First position that the segment's first unfinished entry pools; negative before the first window."""
        return (segment.start // self.ratio - int(self.overlapped)) * self.ratio

    def _windows(self, rows_Nw: Tensor, num_entries: int) -> Tensor:
        """Rows of each entry's pooled positions [W, P, w]; the rows begin at the first entry's first position."""
        if not self.overlapped:
            return rows_Nw[: num_entries * self.ratio].unflatten(0, (num_entries, self.ratio))
        blocks = rows_Nw[: (num_entries + 1) * self.ratio].unflatten(0, (num_entries + 1, self.ratio))
        return torch.cat((blocks[:-1], blocks[1:]), dim=1)

    def _split(self, windows_WPw: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Keys and scores [W, P, h]. Of an overlapped window: a halves of its earlier part, b halves of the later."""
        if not self.overlapped:
            return windows_WPw[..., :width].contiguous(), windows_WPw[..., width:].contiguous()
        early, late = windows_WPw[:, : self.ratio], windows_WPw[:, self.ratio :]
        keys = torch.cat((early[..., :width], late[..., width : 2 * width]), dim=1)
        scores = torch.cat((early[..., 2 * width : 3 * width], late[..., 3 * width :]), dim=1)
        return keys, scores

    def _put(self, pooled_Wh: Tensor, entries_W: Tensor, norm: Tensor) -> None:
        """Norm, rotate at position entry * ratio, round as the component wants, and put."""
        run = self.run
        angles = run.kernels.rope_angles(entries_W * self.ratio, run.frequencies.compressed)
        rows = run.rounding.act(pooled_Wh).unsqueeze(1)
        rows = run.rounding.norm_rope(rows, norm, angles, eps=run.config.norm_eps).squeeze(1)
        if self.component is Component.C4_INDEX:
            rows = run.rounding.index_rows(rows)
        else:
            rows = run.rounding.kv_rows(rows, run.config.nope_head_dim)
        run.state.put_rows(self.component, self.layer, rows)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

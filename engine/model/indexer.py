"""The lightning indexer of a CSA layer: which compressed rows each query attends to.

I(t, i) = sum_h w_h relu(q'_h . C'_i); the index_topk best visible rows are picked, equal scores lowest row first, and
returned in ascending order, so that sums over picks run in an order of their own. A query that sees no more than
index_topk rows takes them all, and no score is computed when that holds for the whole group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.attend import with_heads
from engine.model.batch import BatchSegment, DecodeGroup
from engine.model.context import IndexQueries, Pass
from kvstore.layout import Component

DOT_VALUES_MAX = 1 << 22
"""Queries are scored in groups whose head dots fit in this many f32 (16 MiB), near the caches. One query alone may need
more: 64 MiB on Flash at 1M tokens, beside 128 MiB of index rows."""

ROW_MULTIPLE = 16
"""Exact mode: products with fewer columns are computed by other CPU kernels with other rounding."""


def index_queries(run: Pass, wide_TX: Tensor, head_weights_TH: Tensor, angles: Tensor) -> IndexQueries:
    config = run.config
    q = wide_TX.reshape(wide_TX.shape[0], config.index_num_heads, config.index_head_dim)
    q = run.rounding.index_rows(run.kernels.rope(q, angles, False))
    scale = config.index_head_dim**-0.5 * config.index_num_heads**-0.5
    return IndexQueries(q_THd=q, weights_TH=run.rounding.act(run.rounding.act(head_weights_TH) * scale))


def decode_picks(run: Pass, layer: int, queries: IndexQueries, group: DecodeGroup) -> Tensor | None:
    """Picks [B, k] of a group of decodes, or None when every one sees all its rows."""
    visible = run.state.decode_visible(Component.C4_INDEX, group)
    k = run.config.index_topk
    if run.hook is None and int(visible.max()) <= k:
        return None
    rows = run.state.decode_rows(Component.C4_INDEX, layer, group)
    if rows is None:
        return None
    picks = _pick(run, queries.q_THd[group.rows], queries.weights_TH[group.rows], rows.rows, visible, k)
    return _hooked(run, layer, group.first, picks)


def chunk_picks(
    run: Pass, layer: int, ratio: int, queries: IndexQueries, segment: BatchSegment
) -> Tensor | None:
    """Picks [count, k] of a chunk's queries, or None when every one sees all its rows."""
    k = run.config.index_topk
    if run.hook is None and segment.end // ratio <= k:
        return None
    rows = run.state.chunk_rows(Component.C4_INDEX, layer, segment, torch.arange(segment.end // ratio))
    if run.exact:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % ROW_MULTIPLE))
    visible = (torch.arange(segment.start, segment.end) + 1) // ratio
    group = max(1, DOT_VALUES_MAX // (run.config.index_num_heads * rows.shape[0]))
    parts: list[Tensor] = []
    for first in range(0, segment.count, group):
        part = slice(first, min(first + group, segment.count))
        rows_of = slice(segment.row + part.start, segment.row + part.stop)
        seen = max(int(visible[part.stop - 1]), 1)
        columns = min(rows.shape[0], -(-seen // ROW_MULTIPLE) * ROW_MULTIPLE)
        q, weights = queries.q_THd[rows_of], queries.weights_TH[rows_of]
        parts.append(_pick(run, q, weights, rows[:columns], visible[part], k))
    return _hooked(run, layer, segment.row, torch.cat(parts))


def _pick(run: Pass, q_QHd: Tensor, weights_QH: Tensor, rows: Tensor, visible_Q: Tensor, k: int) -> Tensor:
    """rows are shared [n, di] or per query [Q, n, di]; columns at and beyond `visible` are never picked."""
    if run.exact:
        q_QHd = with_heads(q_QHd)
        weights_QH = torch.nn.functional.pad(weights_QH, (0, q_QHd.shape[1] - weights_QH.shape[1]))
    num_queries, num_heads, width = q_QHd.shape
    if rows.dim() == 3:
        dots = torch.bmm(q_QHd, rows.transpose(1, 2))
    else:
        dots = (q_QHd.reshape(num_queries * num_heads, width) @ rows.T).view(num_queries, num_heads, -1)
    scores = run.rounding.act(run.kernels.index_scores(run.rounding.act(dots), weights_QH.contiguous()))
    return run.kernels.top_rows(scores, visible_Q, k)


def _hooked(run: Pass, layer: int, first_row: int, picks: Tensor) -> Tensor:
    return picks if run.hook is None else run.hook.rows(layer, first_row, picks)

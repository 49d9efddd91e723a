"""One attention sublayer: window-only, CSA (window + picked overlapping rows) or HCA (window + all coarse rows).

The same code serves paged inference, the readable run without a past, and training: `run.state` decides where rows
live. Decodes are computed together, chunks one after another in blocks of queries at absolute positions.
Shapes: T rows, B decodes, Q queries, H heads, d head width, n compressed rows, k picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.attend import BLOCK_COLUMNS, attend
from engine.model.batch import BatchSegment, DecodeGroup
from engine.model.compressor import compress
from engine.model.context import IndexQueries, Pass
from engine.model.indexer import chunk_picks, decode_picks, index_queries
from engine.model.state import Keys
from engine.model.weights import AttentionWeights
from kvstore.layout import Component
from rorqual.model_config import LayerConfig, LayerKind

QUERY_BLOCK = 128
"""Queries of a chunk that are computed together: positions 128 j .. 128 j + 127, whatever the chunk's borders."""


def attention(
    run: Pass, layer: int, item: LayerConfig, weights: AttentionWeights, x_TD: Tensor, window: Component
) -> Tensor:
    """f32 [T, D] in and out; new rows go to `run.state`."""
    config, rounding = run.config, run.rounding
    num_rows, eps = x_TD.shape[0], config.norm_eps
    angles = run.angles(item.kind)
    low_Tq, kv_Td = _from_x(run, weights, x_TD, angles)
    c_q = rounding.act(run.kernels.rms_norm(low_Tq, weights.q_norm, eps))
    wide = rounding.act(run.linear(rounding.matmul_input(c_q), weights.from_cq))
    q_width = config.num_heads * config.head_dim
    q = wide[:, :q_width].view(num_rows, config.num_heads, config.head_dim)
    q_THd = rounding.norm_rope(q, None, angles, eps=eps)

    pasts = [
        run.state.past_window(window, layer, segment, _num_past(run, window, segment))
        for segment in run.batch.chunks
    ]
    run.state.put_window(window, layer, kv_Td)
    queries = None
    if weights.compressor is not None:
        head_weights = compress(run, layer, item, weights.compressor, x_TD)
        if item.kind is LayerKind.CSA:
            queries = index_queries(run, wide[:, q_width:], head_weights, angles)
            if run.observer is not None:
                run.observer.sparse(layer, q_THd, kv_Td, queries)

    outputs = [
        _attend_decodes(run, layer, item, weights, q_THd, queries, window, group)
        for group in run.batch.groups
    ]
    for segment, past in zip(run.batch.chunks, pasts, strict=True):
        window_rows = torch.cat((past, kv_Td[segment.rows]))
        outputs += _attend_chunk(run, layer, item, weights, q_THd, queries, segment, window_rows)
    return _project(run, weights, outputs[0] if len(outputs) == 1 else torch.cat(outputs), angles)


def keep_window(
    run: Pass, layer: int, item: LayerConfig, weights: AttentionWeights, x_TD: Tensor, window: Component
) -> None:
    """Put the window rows that `attention` would put, and compute nothing else."""
    run.state.put_window(window, layer, _from_x(run, weights, x_TD, run.angles(item.kind))[1])


def _from_x(run: Pass, weights: AttentionWeights, x_TD: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Low-rank queries before their norm [T, q], and window rows [T, d]."""
    config, rounding = run.config, run.rounding
    low = rounding.act(run.linear(rounding.matmul_input(x_TD), weights.from_x))
    kv = low[:, config.q_lora_rank :].unsqueeze(1)
    kv = rounding.norm_rope(kv, weights.kv_norm, angles, eps=config.norm_eps).squeeze(1)
    return low[:, : config.q_lora_rank], rounding.kv_rows(kv, config.nope_head_dim)


def _project(run: Pass, weights: AttentionWeights, o_THd: Tensor, angles: Tensor) -> Tensor:
    """Inverse rotation at the query's position, then the grouped low-rank output projection."""
    config, rounding = run.config, run.rounding
    num_rows = o_THd.shape[0]
    o = rounding.act(o_THd)
    o = rounding.act(run.kernels.rope(o, angles, True))
    grouped = o.view(num_rows, config.o_groups, -1).transpose(0, 1).reshape(num_rows * config.o_groups, -1)
    groups = [(group, group * num_rows, (group + 1) * num_rows) for group in range(config.o_groups)]
    low = run.kernels.grouped_linear(grouped, weights.wo_a_Gli, groups, run.exact)
    low = low.view(config.o_groups, num_rows, -1).transpose(0, 1).reshape(num_rows, -1)
    return rounding.act(run.linear(rounding.matmul_input(rounding.act(low)), weights.wo_b))


def _attend_decodes(
    run: Pass,
    layer: int,
    item: LayerConfig,
    weights: AttentionWeights,
    q_THd: Tensor,
    queries: IndexQueries | None,
    window: Component,
    group: DecodeGroup,
) -> Tensor:
    sources = [run.state.decode_window(window, layer, group)]
    if item.kind is LayerKind.HCA:
        rows = run.state.decode_rows(Component.C128, layer, group)
        sources += [] if rows is None else [rows]
    elif queries is not None:
        picks = decode_picks(run, layer, queries, group)
        if picks is not None:
            sources.append(run.state.decode_picks(Component.C4, layer, group, picks))
        else:
            rows = run.state.decode_rows(Component.C4, layer, group)
            sources += [] if rows is None else [rows]
    return attend(q_THd[group.rows], sources, weights.sink_H, run.config.head_dim**-0.5, exact=run.exact)


def _attend_chunk(
    run: Pass,
    layer: int,
    item: LayerConfig,
    weights: AttentionWeights,
    q_THd: Tensor,
    queries: IndexQueries | None,
    segment: BatchSegment,
    window_rows: Tensor,
) -> list[Tensor]:
    """Outputs [q, H, d] of a chunk's query blocks, in order. `window_rows` end with the chunk's."""
    rows, picks = None, None
    if item.kind is not LayerKind.WINDOW and segment.end >= item.ratio:
        if queries is not None:
            picks = chunk_picks(run, layer, item.ratio, queries, segment)
        if picks is None:
            component = Component.C4 if item.kind is LayerKind.CSA else Component.C128
            rows = run.state.chunk_rows(component, layer, segment, torch.arange(segment.end // item.ratio))
    base = segment.end - window_rows.shape[0]
    outputs: list[Tensor] = []
    first = segment.start
    while first < segment.end:
        last = min(segment.end, (first // QUERY_BLOCK + 1) * QUERY_BLOCK)
        positions = torch.arange(first, last)
        sources = [_window_keys(run, window_rows, base, positions)]
        if picks is not None:
            chosen = picks[first - segment.start : last - segment.start]
            sources.append(_picked_keys(run, layer, segment, chosen))
        elif rows is not None:
            sources += _row_keys(run, rows, (positions + 1) // item.ratio)
        q = q_THd[segment.row + first - segment.start : segment.row + last - segment.start]
        outputs.append(attend(q, sources, weights.sink_H, run.config.head_dim**-0.5, exact=run.exact))
        first = last
    return outputs


def _num_past(run: Pass, window: Component, segment: BatchSegment) -> int:
    """Rows before the chunk that its queries may see."""
    return min(segment.start - run.state.window_first(window, segment), run.config.sliding_window - 1)


def _window_keys(run: Pass, window_rows: Tensor, base: int, positions_Q: Tensor) -> Keys:
    """Raw rows that a block of queries sees, of which the first is that of position `base`. Exact mode lays them out by
    absolute position, so that the sums do not depend on where the chunk begins."""
    size = run.config.sliding_window
    first, last = int(positions_Q[0]), int(positions_Q[-1])
    if run.exact:
        start, stop = exact_window_span(first, size)
    else:
        start, stop = max(first - size + 1, base), last + 1
    low, high = max(start, base), min(stop, base + window_rows.shape[0])
    rows = window_rows[low - base : high - base]
    if (low, high) != (start, stop):
        rows = torch.nn.functional.pad(rows, (0, 0, low - start, stop - high))
    columns = torch.arange(start, stop)
    age = positions_Q.unsqueeze(-1) - columns
    hidden = (age < 0) | (age >= size) | (columns < base)
    return Keys(rows=rows, bias=hidden_bias(hidden))


def exact_window_span(position: int, sliding_window: int) -> tuple[int, int]:
    """First column and one past the last of the layout that exact mode uses for a query at `position`: the query
    block's own positions and whole blocks before them that hold the window."""
    start = position // QUERY_BLOCK * QUERY_BLOCK
    before = -(-(sliding_window - 1) // BLOCK_COLUMNS) * BLOCK_COLUMNS
    return start - before, start + QUERY_BLOCK


def _picked_keys(run: Pass, layer: int, segment: BatchSegment, picks_Qk: Tensor) -> Keys:
    """Only the picked rows are read: at 1M tokens all rows of a layer would be half a gigabyte of f32."""
    if run.exact:
        padding = -picks_Qk.shape[1] % BLOCK_COLUMNS
        picks_Qk = torch.nn.functional.pad(picks_Qk, (0, padding), value=-1)
    rows = run.state.chunk_rows(Component.C4, layer, segment, picks_Qk.clamp(min=0))
    return Keys(rows=rows, bias=hidden_bias(picks_Qk < 0))


def _row_keys(run: Pass, rows_nd: Tensor, visible_Q: Tensor) -> list[Keys]:
    num_rows = int(visible_Q.max())
    if num_rows == 0:
        return []
    rows = rows_nd[:num_rows]
    if run.exact:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -num_rows % BLOCK_COLUMNS))
    hidden = torch.arange(rows.shape[0]) >= visible_Q.unsqueeze(-1)
    return [Keys(rows=rows, bias=hidden_bias(hidden))]


def hidden_bias(hidden_QK: Tensor) -> Tensor:
    """0 where visible, -inf where hidden: f32 [Q, 1, K]."""
    return torch.zeros(hidden_QK.shape).masked_fill_(hidden_QK, -torch.inf).unsqueeze(1)

"""Attention of a group of queries over several sources of rows, with one learned sink per head.

The exact form reduces in blocks of a fixed number of columns, in order, so that a query's result does not depend on
how many columns its batch was padded to: a block of hidden columns adds exactly zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.state import Keys

BLOCK_COLUMNS = 128
"""Columns of a reduction block in exact mode. Every source is padded to a multiple of it."""

HEADS_LEAST = 4
"""Exact mode: a product of fewer rows, one query's heads, is computed by other CPU kernels with other rounding."""


def attend(q_QHd: Tensor, sources: Sequence[Keys], sink_H: Tensor, scale: float, *, exact: bool) -> Tensor:
    """softmax over all sources' rows and the sink, weighted sum of the rows (keys are the values): f32 [Q, H, d]."""
    if not exact:
        return _attend_fast(q_QHd, sources, sink_H, scale)
    num_heads = q_QHd.shape[1]
    sink = torch.nn.functional.pad(sink_H, (0, max(HEADS_LEAST - num_heads, 0)))
    return _attend_exact(with_heads(q_QHd), sources, sink, scale)[:, :num_heads]


def with_heads(q_QHd: Tensor) -> Tensor:
    """Exact mode: heads padded with zeros to HEADS_LEAST."""
    return torch.nn.functional.pad(q_QHd, (0, 0, 0, max(HEADS_LEAST - q_QHd.shape[1], 0)))


def _attend_fast(q_QHd: Tensor, sources: Sequence[Keys], sink_H: Tensor, scale: float) -> Tensor:
    num_queries, num_heads, _ = q_QHd.shape
    scores = [_scores(q_QHd, source, scale) for source in sources]
    sink = sink_H.view(1, num_heads, 1).expand(num_queries, num_heads, 1)
    probabilities = torch.cat([*scores, sink], dim=-1).softmax(-1)
    output, first = None, 0
    for source in sources:
        last = first + source.rows.shape[-2]
        part = _weighted_rows(probabilities[..., first:last], source.rows)
        output = part if output is None else output + part
        first = last
    assert output is not None
    return output


def _attend_exact(q_QHd: Tensor, sources: Sequence[Keys], sink_H: Tensor, scale: float) -> Tensor:
    # Scaled before the products: where the two kinds of product apply a factor, they round differently, unless it is
    # a power of two.
    scaled = q_QHd * scale
    scores = [_scores(scaled, source, 1.0) for source in sources]
    largest = sink_H.view(1, -1, 1)
    for part in scores:
        largest = torch.maximum(largest, part.amax(-1, keepdim=True))
    total = torch.exp(sink_H.view(1, -1, 1) - largest)
    output = torch.zeros_like(q_QHd)
    for source, part in zip(sources, scores, strict=True):
        weights = torch.exp(part - largest)
        assert weights.shape[-1] % BLOCK_COLUMNS == 0, "exact sources come in whole blocks"
        for first in range(0, weights.shape[-1], BLOCK_COLUMNS):
            block = weights[..., first : first + BLOCK_COLUMNS].contiguous()
            total = total + block.sum(-1, keepdim=True)
            output = output + _weighted_rows(block, source.rows[..., first : first + BLOCK_COLUMNS, :])
    return output / total


def _scores(q_QHd: Tensor, source: Keys, scale: float) -> Tensor:
    """scale * q . rows + bias: f32 [Q, H, K]."""
    num_queries, num_heads, width = q_QHd.shape
    if source.rows.dim() == 3:
        return torch.baddbmm(source.bias, q_QHd, source.rows.transpose(1, 2), alpha=scale)
    flat = q_QHd.reshape(num_queries * num_heads, width) @ source.rows.T
    return torch.add(source.bias, flat.view(num_queries, num_heads, -1), alpha=scale)


def _weighted_rows(weights_QHK: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 3:
        return weights_QHK @ rows
    num_queries, num_heads, num_columns = weights_QHK.shape
    return (weights_QHK.reshape(num_queries * num_heads, num_columns) @ rows).view(num_queries, num_heads, -1)

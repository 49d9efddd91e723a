"""The mixture of experts: routing, the routed experts and the shared one. Shapes: T rows, D hidden, I expert width."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.context import Pass
from engine.model.weights import MoeWeights

ROWS_LEAST = 4
"""Exact mode: rows of a matrix product with fewer are computed by other CPU kernels with other rounding."""


def moe(run: Pass, layer: int, weights: MoeWeights, x_TD: Tensor) -> Tensor:
    """y = sum over picked experts + shared expert, f32 [T, D]. The weight of an expert is applied before w2."""
    config = run.config
    logits = torch.nn.functional.linear(x_TD, weights.gate)
    picks = None if weights.table is None else weights.table[run.batch.tokens_T]
    if run.hook is not None:
        picks = run.hook.experts(layer, logits, weights.bias, picks)
    experts, shares = run.kernels.route_experts(
        logits, weights.bias, picks, config.num_experts_per_token, config.routed_scaling_factor
    )
    return run.rounding.act(_experts(run, weights, x_TD, experts, shares))


def _experts(run: Pass, weights: MoeWeights, x_TD: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
    """Group (row, expert) pairs by expert, run each group as two products, and add each row's results up in the order
    of its picks, the shared expert last: an order that does not depend on the batch."""
    num_rows, num_picks = experts_TK.shape
    num_experts = run.config.num_experts
    flat = experts_TK.reshape(-1)
    pair_order = flat.argsort(stable=True)  # pairs, grouped by expert
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    row_of_pair = pair_order // num_picks
    inputs = run.rounding.matmul_input(x_TD)
    grouped = inputs.index_select(0, row_of_pair)
    sizes = [*counts, num_rows]
    hidden = _grouped_linear([*grouped.split(counts), inputs], sizes, weights.w13, exact=run.exact)
    hidden = run.rounding.act(hidden)
    ones = shares_TK.new_ones(num_rows)
    shares = torch.cat((shares_TK.reshape(-1).index_select(0, pair_order), ones))
    activated = run.rounding.act(_swiglu(hidden, run.config.swiglu_limit) * shares.unsqueeze(-1))
    activated = run.rounding.matmul_input(activated)
    output = _grouped_linear(list(activated.split(sizes)), sizes, weights.w2, exact=run.exact)
    output = run.rounding.act(output)
    position_of_pair = torch.empty_like(pair_order)
    position_of_pair[pair_order] = torch.arange(flat.numel())
    routed = output.index_select(0, position_of_pair).view(num_rows, num_picks, -1)
    total = routed[:, 0]
    for pick in range(1, num_picks):
        total = total + routed[:, pick]
    return total + output[flat.numel() :]


def _swiglu(hidden_N2I: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    gate, up = hidden_N2I.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _grouped_linear(groups: list[Tensor], sizes: list[int], weights_Eoi: Tensor, *, exact: bool) -> Tensor:
    """One product per non-empty group, stacked in group order: f32 [sum of sizes, o]."""
    outputs: list[Tensor] = []
    for expert, (size, rows) in enumerate(zip(sizes, groups, strict=True)):
        if size == 0:
            continue
        if exact and size < ROWS_LEAST:
            padded = torch.nn.functional.pad(rows, (0, 0, 0, ROWS_LEAST - size))
            outputs.append(torch.nn.functional.linear(padded, weights_Eoi[expert])[:size])
        else:
            outputs.append(torch.nn.functional.linear(rows, weights_Eoi[expert]))
    return torch.cat(outputs)

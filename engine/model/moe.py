"""The mixture of experts: routing, the routed experts and the shared one. Shapes: T rows, D hidden, I expert width."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.matmul import Groups
from engine.model.context import Pass
from engine.model.weights import MoeWeights


def moe(run: Pass, layer: int, weights: MoeWeights, x_TD: Tensor) -> Tensor:
    """y = sum over picked experts + shared expert, f32 [T, D]. The weight of an expert is applied before w2."""
    config = run.config
    logits = run.linear(x_TD, weights.gate)
    picks = None if weights.table is None else weights.table[run.batch.tokens_T]
    if run.hook is not None:
        picks = run.hook.experts(layer, logits, weights.bias, picks)
    experts, shares = run.kernels.route_experts(
        logits, weights.bias, picks, config.num_experts_per_token, config.routed_scaling_factor
    )
    if run.observer is not None:
        run.observer.routed(layer, experts)
    return run.rounding.act(_experts(run, weights, x_TD, experts, shares))


def _experts(run: Pass, weights: MoeWeights, x_TD: Tensor, experts_TK: Tensor, shares_TK: Tensor) -> Tensor:
    """Group the (row, expert) pairs by expert, the shared expert last; two products a group; add the results up."""
    kernels, rounding = run.kernels, run.rounding
    num_rows, num_picks = experts_TK.shape
    pairs, places, counts = kernels.group_pairs(experts_TK, run.config.num_experts)
    inputs = rounding.matmul_input(x_TD)
    grouped = torch.cat((inputs.index_select(0, pairs // num_picks), inputs))
    groups = _groups([*counts, num_rows])
    hidden = rounding.act(kernels.grouped_linear(grouped, weights.w13, groups, run.exact))
    ones = shares_TK.new_ones(num_rows)
    shares = torch.cat((shares_TK.reshape(-1).index_select(0, pairs), ones))
    activated = rounding.act(kernels.swiglu(hidden, shares, run.config.swiglu_limit))
    activated = rounding.matmul_input(activated)
    outputs = rounding.act(kernels.grouped_linear(activated, weights.w2, groups, run.exact))
    num_pairs = num_rows * num_picks
    return kernels.add_pairs(outputs[:num_pairs], places, outputs[num_pairs:])


def _groups(counts: list[int]) -> Groups:
    """(expert, first row, one past the last) of the experts that have rows."""
    groups: Groups = []
    first = 0
    for expert, count in enumerate(counts):
        if count:
            groups.append((expert, first, first + count))
            first += count
    return groups

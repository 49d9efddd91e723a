"""Router kernels: gate logits to experts and weights, rows grouped by expert, and the results added up again.

Shapes: T tokens, E experts, K experts per token, N = T * K pairs of a token and one of its experts, D hidden.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from engine.kernels.arrays import array
from engine.kernels.registry import kernel


@kernel("route_experts", name="torch", devices=("cpu", "cuda"), priority=0)
def route_experts_torch(
    logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None, k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """g = sqrt(softplus(logits)). Experts are `picks_TK` if given (hash layers), else the k largest g + bias, equal
    values lowest expert first. Weights are g of the picks over their sum, times `scaling`; the bias never enters.
    Returns experts i64 [T, K] and weights f32 [T, K]."""
    gates = torch.nn.functional.softplus(logits_TE).sqrt()
    if picks_TK is None:
        ranked = gates.detach() if bias_E is None else gates.detach() + bias_E
        picks_TK = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    chosen = gates.gather(-1, picks_TK)
    return picks_TK, chosen / chosen.sum(-1, keepdim=True) * scaling


@kernel("group_pairs", name="torch", devices=("cpu", "cuda"), priority=0)
def group_pairs_torch(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sort the pairs by expert, within an expert by token. Returns the pair at each place i64 [N] (pair t * K + k),
    the place of each pair i64 [T, K], and the number of pairs of each expert."""
    flat = experts_TK.reshape(-1)
    pairs = flat.argsort(stable=True)
    places = torch.empty_like(pairs)
    places[pairs] = torch.arange(flat.numel(), device=flat.device)
    return pairs, places.view_as(experts_TK), torch.bincount(flat, minlength=num_experts).tolist()


@kernel("add_pairs", name="torch", devices=("cpu", "cuda"), priority=0)
def add_pairs_torch(outputs_ND: Tensor, places_TK: Tensor, shared_TD: Tensor) -> Tensor:
    """y_t = outputs of t's pairs, added in the order of its picks, then the shared expert's; f32 [T, D]. The order
    does not depend on the batch."""
    picked = outputs_ND[places_TK]
    total = picked[:, 0]
    for pick in range(1, places_TK.shape[1]):
        total = total + picked[:, pick]
    return total + shared_TD


@kernel("route_experts", name="numba", devices=("cpu",), priority=10)
def route_experts_numba(
    logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None, k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    weights = torch.empty((logits_TE.shape[0], k))
    if picks_TK is None:
        experts = torch.empty((logits_TE.shape[0], k), dtype=torch.int64)
        bias = torch.zeros(logits_TE.shape[1]) if bias_E is None else bias_E
        _pick_experts(array(logits_TE), array(bias), array(experts))
    else:
        experts = picks_TK.contiguous()
    _weigh_experts(array(logits_TE), array(experts), np.float32(scaling), weights.numpy())
    return experts, weights


@kernel("group_pairs", name="numba", devices=("cpu",), priority=10)
def group_pairs_numba(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    pairs = torch.empty(experts_TK.numel(), dtype=torch.int64)
    places = torch.empty(experts_TK.shape, dtype=torch.int64)
    counts = np.zeros(num_experts, dtype=np.int64)
    _group_pairs(experts_TK.reshape(-1).numpy(), counts, pairs.numpy(), places.view(-1).numpy())
    return pairs, places, counts.tolist()


@kernel("add_pairs", name="numba", devices=("cpu",), priority=10)
def add_pairs_numba(outputs_ND: Tensor, places_TK: Tensor, shared_TD: Tensor) -> Tensor:
    total = torch.empty(shared_TD.shape)
    _add_pairs(array(outputs_ND), array(places_TK), array(shared_TD), total.numpy())
    return total


@numba.njit(cache=True, nogil=True)
def _group_pairs(experts, counts, pairs, places):  # type: ignore[no-untyped-def]
    for expert in experts:
        counts[expert] += 1
    following = np.zeros(counts.shape[0], dtype=np.int64)
    for expert in range(1, counts.shape[0]):
        following[expert] = following[expert - 1] + counts[expert - 1]
    for pair in range(experts.shape[0]):
        place = following[experts[pair]]
        following[experts[pair]] = place + 1
        pairs[place] = pair
        places[pair] = place


@numba.njit(cache=True, nogil=True)
def _add_pairs(outputs, places, shared, total):  # type: ignore[no-untyped-def]
    num_tokens, num_picks = places.shape
    width = shared.shape[1]
    for t in range(num_tokens):
        row = total[t]
        for i in range(width):
            row[i] = np.float32(0)
        for pick in range(num_picks):
            output = outputs[places[t, pick]]
            for i in range(width):
                row[i] += output[i]
        last = shared[t]
        for i in range(width):
            row[i] += last[i]


@numba.njit(cache=True, nogil=True, inline="always")
def _gate(logit):  # type: ignore[no-untyped-def]
    # softplus without overflow: max(x, 0) + log1p(exp(-|x|))
    return np.sqrt(max(logit, np.float32(0)) + np.log1p(np.exp(-abs(logit))))


@numba.njit(cache=True, nogil=True)
def _pick_experts(logits, bias, experts):  # type: ignore[no-untyped-def]
    num_tokens, num_experts = logits.shape
    num_picks = experts.shape[1]
    ranked = np.empty(num_experts, dtype=np.float32)
    for t in range(num_tokens):
        for e in range(num_experts):
            ranked[e] = _gate(logits[t, e]) + bias[e]
        for pick in range(num_picks):
            best = 0
            for e in range(1, num_experts):
                if ranked[e] > ranked[best]:
                    best = e
            experts[t, pick] = best
            ranked[best] = -np.inf


@numba.njit(cache=True, nogil=True)
def _weigh_experts(logits, experts, scaling, weights):  # type: ignore[no-untyped-def]
    num_picks = experts.shape[1]
    for t in range(logits.shape[0]):
        total = np.float32(0)
        for pick in range(num_picks):
            weights[t, pick] = _gate(logits[t, experts[t, pick]])
            total += weights[t, pick]
        for pick in range(num_picks):
            weights[t, pick] = weights[t, pick] / total * scaling

"""Router kernel: gate logits to the experts of each token and their weights.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

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


@kernel("route_experts", name="numba", devices=("cpu",), priority=10)
def route_experts_numba(
    logits_TE: Tensor, bias_E: Tensor | None, picks_TK: Tensor | None, k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    weights = torch.empty((logits_TE.shape[0], k))
    if picks_TK is None:
        experts = torch.empty((logits_TE.shape[0], k), dtype=torch.int64)
        bias = torch.zeros(logits_TE.shape[1]) if bias_E is None else bias_E
        _pick_experts(logits_TE.numpy(), bias.numpy(), experts.numpy())
    else:
        experts = picks_TK.contiguous()
    _weigh_experts(logits_TE.numpy(), experts.numpy(), np.float32(scaling), weights.numpy())
    return experts, weights


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

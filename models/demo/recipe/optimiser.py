"""The optimisers: Muon (arXiv 2502.16982) for the attention's matrices, AdamW for everything else.

Both see one parameter per official weight name: a view into the stacked tensor that the forward pass reads, with a
view of its gradient. What has no name (the zero key columns of `ape`) is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.model.weights import ModelWeights, allocate_weights
from rorqual.model_config import ModelConfig

MUON_RATE = 0.01
ADAM_RATE = 4e-3
CLIP_NORM = 1.0
BIAS_STEP = 1e-3
"""How much a step moves the router bias of an expert that got too few or too many rows."""


class Optimiser:
    """Owns the gradients' memory and the state of both optimisers."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self._weights = weights
        grads = allocate_weights(config)
        self.grads: tuple[Tensor, ...] = tuple(grad for grad in grads.bases if grad.dtype == torch.float32)
        self._leaves = [base for base in weights.bases if base.dtype == torch.float32]
        self.zero()
        for leaf, grad in zip(self._leaves, self.grads, strict=True):
            leaf.requires_grad_(True)
            leaf.grad = grad
        self.named_grads: dict[str, Tensor] = {
            name: grad for name, grad in grads.named.items() if grad.dtype == torch.float32
        }
        muon: list[Tensor] = []
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, view in weights.named.items():
            if view.dtype != torch.float32 or name.endswith("gate.bias"):
                continue
            parameter = view.detach().requires_grad_(True)
            parameter.grad = grads.named[name]
            group = muon if _for_muon(name, view) else decayed if view.dim() == 2 else plain
            group.append(parameter)
        adjust = "match_rms_adamw"  # an update's RMS is 0.2 of the rate, as AdamW's is about
        self._muon = torch.optim.Muon(
            muon, lr=MUON_RATE, momentum=0.95, weight_decay=0.05, adjust_lr_fn=adjust
        )
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=ADAM_RATE,
            betas=(0.9, 0.95),
            foreach=True,
        )

    def zero(self) -> None:
        for grad in self.grads:
            grad.zero_()

    def step(self, rate: float) -> float:
        """Clip, update with both learning rates times `rate`; returns the gradients' norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._leaves, CLIP_NORM))
        for group in self._muon.param_groups:
            group["lr"] = MUON_RATE * rate
        for group in self._adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        self._muon.step()
        self._adam.step()
        return norm

    def balance(self, loads: Mapping[int, Tensor], rate: float) -> None:
        """Move the router biases towards equal loads (arXiv 2408.15664); the bias has no gradient. `loads` maps a layer
        to its experts' shares, -1 to the MTP block's."""
        for layer, shares in loads.items():
            moe = self._weights.mtp[0].layer.moe if layer < 0 else self._weights.layers[layer].moe
            if moe.bias is not None:
                with torch.no_grad():
                    moe.bias.detach().add_(torch.sign(1 / len(shares) - shares), alpha=BIAS_STEP * rate)

    def state(self) -> Sequence[dict[str, Any]]:
        return self._muon.state_dict(), self._adam.state_dict()

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        self._muon.load_state_dict(state[0])
        self._adam.load_state_dict(state[1])


def _for_muon(name: str, view: Tensor) -> bool:
    return ".attn." in name and view.dim() == 2 and name.endswith(".weight")

"""transformers' own DeepSeek-V4 as the outside oracle: logits, discrete choices, and how near each choice was.

A faithful oracle of the unquantised mathematics only: float32, no padding on the left, 16 index heads or more. One
run over requests of equal length judges every shorter prompt too, since the model is causal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual.model_config import LayerKind, ModelConfig
from tests.harness.picks import Choice, Picks
from tests.reference.weights import transformers_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRun:
    """One request. Margins f32 [N] by (layer, kind of choice): the last score taken minus the first left out, over
    the size of the former where that is above 1."""

    logits: Tensor  # [N, V]
    picks: Picks
    margins: Mapping[tuple[int, str], Tensor]

    def margin(self, choice: Choice) -> float:
        return float(self.margins[choice.layer, choice.kind][choice.position])


class Oracle:
    def __init__(self, raw: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        transformers = pytest.importorskip("transformers", reason="needs transformers as the outside oracle")
        self._config = config
        transformers.logging.set_verbosity_error()  # it remarks on factors that small configs cannot make consistent
        settings = transformers.DeepseekV4Config(**raw)
        settings._attn_implementation = "eager"
        settings._experts_implementation = "eager"
        self._model = transformers.DeepseekV4ForCausalLM(settings).eval()
        missing, unexpected = self._model.load_state_dict(transformers_tensors(tensors), strict=False)
        # Rotary tables are buffers that every model computes for itself.
        assert [name for name in missing if "inv_freq" not in name] == []
        assert unexpected == []
        self._kept: dict[tuple[int, str], Tensor] = {}
        for number, layer in enumerate(self._model.model.layers):
            self._keep(layer.mlp.gate, number, "experts", lambda output: output[2])
            self._keep(layer.mlp.gate, number, "gate logits", lambda output: output[0])
            if config.layers[number].kind is LayerKind.CSA:
                indexer = layer.self_attn.compressor.indexer
                self._keep(indexer, number, "rows", lambda output: output)
                self._keep(indexer.scorer, number, "row scores", lambda output: output)

    @torch.no_grad()
    def run(self, tokens_BN: Tensor) -> list[OracleRun]:
        logits = self._model(tokens_BN, use_cache=False).logits
        count = tokens_BN.shape[1]
        return [self._request(index, count, logits[index]) for index in range(len(tokens_BN))]

    def _keep(self, module: Any, layer: int, key: str, choose: Any) -> None:
        module.register_forward_hook(
            lambda _module, _inputs, output: self._kept.update({(layer, key): choose(output)})
        )

    def _request(self, index: int, count: int, logits: Tensor) -> OracleRun:
        picks = Picks(self._config, count)
        margins: dict[tuple[int, str], Tensor] = {}
        for layer, item in enumerate(self._config.layers):
            tokens = slice(index * count, (index + 1) * count)  # the router sees a flat batch
            picks.put_experts(layer, 0, self._kept[layer, "experts"][tokens])
            if item.hash_routed:
                margins[layer, "experts"] = torch.full((count,), torch.inf)
            else:
                gates = torch.nn.functional.softplus(self._kept[layer, "gate logits"][tokens]).sqrt()
                bias = self._model.model.layers[layer].mlp.gate.e_score_correction_bias
                margins[layer, "experts"] = _margins(gates + bias, self._config.num_experts_per_token)
            if item.kind is LayerKind.CSA:
                picks.put_rows(layer, 0, self._kept[layer, "rows"][index])
                scores = self._kept[layer, "row scores"][index]
                visible = (torch.arange(count) + 1) // item.ratio
                scores = scores.masked_fill(torch.arange(scores.shape[1]) >= visible.unsqueeze(1), -torch.inf)
                margins[layer, "rows"] = _margins(scores, self._config.index_topk)
        return OracleRun(logits=logits, picks=picks, margins=margins)


def _margins(scores_Nn: Tensor, k: int) -> Tensor:
    if scores_Nn.shape[1] <= k:
        return torch.full(scores_Nn.shape[:1], torch.inf)
    best = scores_Nn.sort(dim=-1, descending=True).values
    taken, left = best[:, k - 1], best[:, k]
    # Without so many scores there is no choice: inf, where inf - inf would be NaN.
    return torch.where(left > -torch.inf, (taken - left) / taken.abs().clamp(min=1), torch.inf)

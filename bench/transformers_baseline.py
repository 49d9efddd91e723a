"""The baseline of the engine race: transformers' DeepSeek-V4 with a cache, greedy, on the very same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.checkpoint.names import expert_stack, transformers_name
from engine.checkpoint.reader import open_checkpoint
from rorqual.session import TokenArray

EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")
"""`batched_mm` gathers every token's expert weights: five times slower at prefill here, so it is not tried."""

_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


class Baseline:
    def __init__(self, model: Any, experts: str, *, threads: int) -> None:
        self.version = transformers.__version__
        self.experts = experts
        self._model = model
        self._threads = threads

    @torch.inference_mode()
    def prefill_seconds(self, num_tokens: int) -> float:
        ids = torch.randint(2, self._model.config.vocab_size, (1, num_tokens))
        started = self._start()
        self._step(ids, None)
        return time.perf_counter() - started

    @torch.inference_mode()
    def decode_seconds(self, batch: int, num_prompt: int, num_steps: int) -> float:
        """Seconds a step, all sequences of equal length."""
        ids = torch.randint(2, self._model.config.vocab_size, (batch, num_prompt))
        token, cache = self._step(ids, None)
        token, cache = self._step(token, cache)
        started = self._start()
        for _ in range(num_steps):
            token, cache = self._step(token, cache)
        return (time.perf_counter() - started) / num_steps

    @torch.inference_mode()
    def request_seconds(self, prompt: TokenArray, max_tokens: int) -> float:
        started = self._start()
        token, cache = self._step(torch.from_numpy(prompt.astype("int64"))[None], None)
        for _ in range(max_tokens - 1):
            token, cache = self._step(token, cache)
        return time.perf_counter() - started

    def _start(self) -> float:
        torch.set_num_threads(self._threads)
        return time.perf_counter()

    def _step(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values


def faster_baseline(path: Path, raw_config: dict[str, Any], *, threads: int) -> Baseline:
    """The experts implementation that is faster on this machine, at prefill and decode together."""
    candidates = [
        Baseline(_load(path, raw_config, experts), experts, threads=threads)
        for experts in EXPERTS_IMPLEMENTATIONS
    ]

    def cost(item: Baseline) -> float:
        item.prefill_seconds(256)
        return (
            item.prefill_seconds(1024)
            + 20 * item.decode_seconds(1, 64, 5)
            + 20 * item.decode_seconds(16, 64, 5)
        )

    return min(candidates, key=cost)


def _load(path: Path, raw_config: dict[str, Any], experts: str) -> Any:
    config = _config(raw_config)
    model = transformers.DeepseekV4ForCausalLM._from_config(  # pyright: ignore[reportPrivateUsage]
        config, experts_implementation=experts, attn_implementation="eager"
    ).eval()
    state = dict(model.state_dict())
    with torch.no_grad():
        for name, tensor in open_checkpoint(path).tensors():
            target, view = _target(name, state)
            assert view.shape == tensor.shape, f"{target} has shape {tuple(view.shape)}"
            view.copy_(tensor)
    return model


def _target(name: str, state: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The tensor of the state dict, or the rows of a stack, that an official weight fills."""
    target = transformers_name(name)
    assert target is not None, f"transformers has no place for {name}"
    tensor = state[target]
    stack = expert_stack(name.split(".experts.")[0] + ".experts." + target.rsplit(".", 1)[1])
    if ".ffn.experts." not in name or stack is None:
        return target, tensor
    expert, projection = name.split(".ffn.experts.")[1].split(".")[:2]
    rows = tensor.shape[1] // len(stack.projections)
    first = stack.projections.index(projection) * rows
    return target, tensor[int(expert), first : first + rows]


def _config(raw: dict[str, Any]) -> Any:
    num_layers, num_hash = raw["num_hidden_layers"], raw["num_hash_layers"]
    renamed = {
        key: value
        for key, value in raw.items()
        if key not in ("model_type", "compress_ratios", "num_hash_layers")
    }
    return transformers.DeepseekV4Config(
        **renamed,
        layer_types=[_KINDS[ratio] for ratio in raw["compress_ratios"][:num_layers]],
        mlp_layer_types=["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash),
    )

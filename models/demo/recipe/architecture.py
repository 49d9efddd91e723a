"""What the demo model is: the DeepSeek-V4 architecture at toy widths, and the values its training starts from.

Called by `train.py` and its tests. Nothing here is a simplification of the architecture: all three kinds of attention,
hash and learned routing, four residual streams, sinks, clamps and one MTP block are there.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.init import random_weight
from engine.checkpoint.manifest import WeightSpec, expected_weights
from engine.model.weights import ModelWeights, allocate_weights
from rorqual.demo import CONFIG as RANDOM_CONFIG
from rorqual.model_config import LayerKind, ModelConfig, parse_model_config

CONFIG: Mapping[str, Any] = RANDOM_CONFIG | {
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    # Four stacked windows reach 124 tokens back: whatever is further away must come through compressed rows.
    "sliding_window": 32,
    "compress_ratios": [0, 4, 128, 4, 0],  # one for each layer, and one for the MTP block
    "index_n_heads": 4,
    "index_topk": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 128,
    "routed_scaling_factor": 1.0,
    "rope_scaling": RANDOM_CONFIG["rope_scaling"] | {"original_max_position_embeddings": 8192},
    "max_position_embeddings": 8192,
}
"""The random demo model's, with these values."""

DENSE_TOPK = 1 << 20
"""More rows than any sequence has: the indexer picks them all, and attention is dense over the compressed rows."""


def demo_config(**changed: Any) -> ModelConfig:
    """The model's config; keys of `CONFIG` may be replaced."""
    return parse_model_config(copy.deepcopy(dict(CONFIG)) | changed)


def dense_picks(config: ModelConfig) -> ModelConfig:
    """The same model with attention over every compressed row."""
    return replace(config, index_topk=DENSE_TOPK)


def baseline_config(config: ModelConfig) -> ModelConfig:
    """The dense-attention baseline: the same widths and experts, every layer attends to all raw rows before it.

    A window layer whose window is longer than any sequence is plain causal attention over one shared KV head.
    """
    layers = tuple(replace(item, kind=LayerKind.WINDOW, ratio=0) for item in config.layers)
    return replace(config, layers=layers, sliding_window=config.max_position_embeddings)


def fresh_weights(config: ModelConfig, seed: int) -> ModelWeights:
    """Starting weights, a function of the seed and each weight's name."""
    weights = allocate_weights(config)
    for spec in expected_weights(config):
        if spec.name in weights.named:
            weights.named[spec.name].copy_(_starting_value(config, spec, seed))
    for name, tensor in weights.named.items():
        # A compressed row starts as the mean of the rows it stands for.
        if name.endswith("attn.compressor.wkv.weight"):
            kv = weights.named[name.replace("compressor.wkv", "wkv")]
            tensor.copy_(kv.repeat(tensor.shape[0] // kv.shape[0], 1))
    return weights


def _starting_value(config: ModelConfig, spec: WeightSpec, seed: int) -> Tensor:
    name, shape = spec.name, spec.shape
    if name.endswith(".tid2eid"):
        return random_weight(config, spec, seed)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith((".attn_sink", ".gate.bias", ".ape")):
        return torch.zeros(shape)
    if "hc_" in name:
        return _mixing_value(config, spec, seed)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values = torch.randn(shape, generator=generator)
    if name == "embed.weight":
        return values * 0.5
    if name == "head.weight":
        return values * 0.02
    if name.endswith("wgate.weight"):
        return values * 0.1 / math.sqrt(shape[-1])  # pooling starts nearly even
    depth = 2 * config.num_layers if name.endswith((".wo_b.weight", ".w2.weight")) else 1
    return values / math.sqrt(shape[-1] * depth)


def _mixing_value(config: ModelConfig, spec: WeightSpec, seed: int) -> Tensor:
    """Hyper-connections start as a residual stream: even reading, writing to all streams, each stream kept. Streams
    differ a little from the start, by a pattern that turns from site to site."""
    num_streams, shape = config.hc_mult, spec.shape
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if spec.name.endswith("_fn"):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if spec.name.endswith("_scale"):
        return torch.full(shape, 0.1)
    noise = 0.5 * torch.randn(shape, generator=generator)
    even = torch.full((num_streams,), -math.log(num_streams - 1))  # sigmoid = 1 / streams
    if shape[0] == num_streams:
        return even + noise
    kept = 4.0 * torch.eye(num_streams).flatten()
    return torch.cat((even, torch.zeros(num_streams), kept)) + noise

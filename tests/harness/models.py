"""Small models for tests: configs of every shape, and the engine's model filled from tensors with official names.

Called by tests of the engine and of what stands on it. The configs are written in the transformers dialect, so that
the same dict builds the outside oracle (`tests.harness.oracle`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.suite import Kernels, choose_kernels
from engine.model.forward import Model
from engine.model.weights import allocate_weights
from kvstore.layout import Numerics
from rorqual.model_config import ModelConfig, parse_model_config

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def raw_config(
    layers: Sequence[str] = (SWA, CSA, HCA, CSA), *, num_hash: int = 2, **changed: Any
) -> dict[str, Any]:
    """A config.json as transformers writes it: small, with window, top-k and clamp tight enough to bind."""
    head_dim, rope = changed.get("head_dim", 32), changed.pop("rope_head_dim", 16)
    yarn = changed.pop("yarn", {"factor": 16.0, "original_max_position_embeddings": 64})
    partial = rope / head_dim
    compress = {"rope_type": "default", "rope_theta": 160000.0, "partial_rotary_factor": partial}
    if yarn is not None:
        compress |= {"rope_type": "yarn", "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, **yarn}
    return {
        "vocab_size": 97,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "head_dim": head_dim,
        "partial_rotary_factor": partial,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 24,
        "sliding_window": 8,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 1.0,
        "max_position_embeddings": 2048,
        "layer_types": list(layers),
        "compress_rates": {CSA: 4, HCA: 16},
        "mlp_layer_types": ["hash_moe"] * num_hash + ["moe"] * (len(layers) - num_hash),
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": partial},
            "compress": compress,
        },
    } | changed


def real_ratios(**changed: Any) -> dict[str, Any]:
    """The release's ratios and window, with a top-k that binds from 65 tokens on."""
    layers = (SWA, CSA, HCA, CSA, HCA)
    real = {"sliding_window": 128, "compress_rates": {CSA: 4, HCA: 128}, "index_topk": 16}
    return raw_config(layers, num_hash=1, **(real | changed))


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Any architecture that both we and the oracle can be, but with 16 index heads or more: with few of them scores
    of exactly 0 tie, and the oracle's choice among ties means nothing."""
    layers = draw(st.lists(st.sampled_from((SWA, CSA, HCA)), min_size=1, max_size=4), label="layers")
    rope = draw(st.sampled_from((2, 4, 8)), label="rope_head_dim")
    groups = draw(st.integers(1, 3), label="o_groups")
    num_experts = draw(st.integers(2, 12), label="experts")
    yarn = st.fixed_dictionaries(
        {
            "factor": st.sampled_from((1.5, 4.0, 40.0)),
            "original_max_position_embeddings": st.integers(32, 4096),
        }
    )
    return raw_config(
        layers,
        num_hash=draw(st.integers(0, len(layers)), label="hash layers"),
        rope_head_dim=rope,
        yarn=draw(st.none() | yarn, label="yarn"),
        head_dim=draw(st.sampled_from((16, 32, 64)), label="head_dim"),
        hidden_size=draw(st.sampled_from((24, 32, 40, 72)), label="hidden_size"),
        moe_intermediate_size=draw(st.sampled_from((8, 20, 33)), label="expert width"),
        num_attention_heads=groups * draw(st.integers(1, 4), label="heads per group"),
        q_lora_rank=draw(st.sampled_from((16, 24, 36)), label="q_lora_rank"),
        o_groups=groups,
        o_lora_rank=draw(st.sampled_from((8, 12)), label="o_lora_rank"),
        sliding_window=draw(st.sampled_from((1, 2, 5, 8, 33, 128)), label="window"),
        index_n_heads=draw(st.sampled_from((16, 17, 24)), label="index heads"),
        index_head_dim=draw(st.sampled_from((8, 16, 20)), label="index_head_dim"),
        index_topk=draw(st.sampled_from((1, 3, 8, 20)), label="index_topk"),
        n_routed_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, min(4, num_experts)), label="experts per token"),
        routed_scaling_factor=draw(st.sampled_from((1.0, 2.5)), label="scaling"),
        swiglu_limit=draw(st.sampled_from((0.5, 10.0)), label="swiglu_limit"),
        hc_mult=draw(st.sampled_from((4, 4, 2, 3)), label="hc_mult"),
        hc_sinkhorn_iters=draw(st.sampled_from((20, 1, 5)), label="sinkhorn"),
        compress_rates={
            CSA: draw(st.sampled_from((4, 4, 2, 8)), label="C4 ratio"),
            HCA: draw(st.sampled_from((128, 16, 32)), label="C128 ratio"),
        },
    )


def config_of(raw: Mapping[str, Any], *, num_mtp_blocks: int = 0) -> ModelConfig:
    return replace(parse_model_config(raw), num_mtp_blocks=num_mtp_blocks)


def build_model(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    numerics: Numerics = Numerics.FLOAT32,
    kernels: Kernels | None = None,
    exact: bool = False,
) -> Model:
    weights = allocate_weights(config)
    assert set(weights.named) == set(tensors), (
        "the engine and the reference disagree about which tensors there are"
    )
    for name, target in weights.named.items():
        assert target.shape == tensors[name].shape, name
        target.copy_(tensors[name])
    return Model(config, weights, numerics=numerics, kernels=kernels or choose_kernels(), exact=exact)


def random_tokens(config: ModelConfig, length: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator)

"""Configs of the two releases, small configs that still have every kind of layer, and checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.model_config import ModelConfig, parse_model_config

torch.set_num_threads(1)

RELEASE = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "max_position_embeddings": 1048576,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
FLASH = RELEASE | {
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "index_topk": 512,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}
PRO = RELEASE | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
# Every kind of layer and router, widths that are no multiples of any block.
TINY = {
    "model_type": "deepseek_v4",
    "vocab_size": 70,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 36,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "max_position_embeddings": 1024,
    "rope_scaling": None,
}


@pytest.fixture(scope="session")
def flash() -> ModelConfig:
    return parse_model_config(FLASH)


@pytest.fixture(scope="session")
def pro() -> ModelConfig:
    return parse_model_config(PRO)


@pytest.fixture
def flash_raw() -> dict[str, Any]:
    return json.loads(json.dumps(FLASH))


@pytest.fixture
def tiny_raw() -> dict[str, Any]:
    """An unquantised small config in the public dialect; tests change what they need."""
    return json.loads(json.dumps(TINY))


@pytest.fixture
def quantised_raw(tiny_raw: dict[str, Any]) -> dict[str, Any]:
    return tiny_raw | {"quantization_config": RELEASE["quantization_config"], "expert_dtype": "fp4"}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint with the production initialiser and returns its directory."""
    from engine.checkpoint.init import InitOptions, init_checkpoint

    def make(raw: dict[str, Any], *, name: str = "model", seed: int = 7, **options: Any) -> Path:
        out = tmp_path / name
        init_checkpoint(parse_model_config(raw), InitOptions(seed=seed, out=out, **options))
        return out

    return make

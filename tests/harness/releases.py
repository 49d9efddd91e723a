"""The released models' `config.json`, as far as it decides sizes. No torch."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "head_dim": 512, "qk_rope_head_dim": 64, "o_lora_rank": 1024,
    "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "num_nextn_predict_layers": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
FLASH: dict[str, Any] = _COMMON | {
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
    "index_topk": 512, "n_routed_experts": 256, "moe_intermediate_size": 2048,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
}  # fmt: skip
PRO: dict[str, Any] = _COMMON | {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "index_topk": 1024, "n_routed_experts": 384, "moe_intermediate_size": 3072,
    "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
}  # fmt: skip

"""What a DeepSeek-V4-class model costs: operations per token, bytes of weights and of state. Pure.

Called by `rorqual.performance.roofline`. All is derived from `ModelConfig`; FLASH and PRO are the released models.
Row sizes are those of the served numerics: FP8 rows with bf16 rotary channels, FP4 index rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rorqual.model_config import PAGE_TOKENS, LayerKind, ModelConfig, parse_model_config

FP4_BYTES = 0.5 + 1 / 32
"""Of one weight: four bits, and one scale byte for each 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Costs of one model. Operations count multiply and add as two."""

    num_layers: int
    num_csa: int  # layers that pick top-k rows, of csa_ratio tokens each
    num_hca: int  # layers that attend to all rows, of hca_ratio tokens each
    csa_ratio: int
    hca_ratio: int
    window: int
    index_topk: int
    num_experts: int
    num_experts_per_token: int
    hidden_size: int
    active_params: float  # that every token is multiplied with
    resident_bytes: (
        float  # of weights read in each step on each device: attention, shared expert, router, head
    )
    expert_bytes: float  # of one routed expert of one layer
    attention_flops: float  # of one query with one row, in one layer
    index_flops: float  # of one query with one index row, in one layer
    kv_row_bytes: int
    index_row_bytes: int

    @property
    def page_bytes(self) -> int:
        """Of the compressed rows of 256 tokens in all layers."""
        csa_rows = self.num_csa * (PAGE_TOKENS // self.csa_ratio) if self.num_csa else 0
        hca_rows = self.num_hca * (PAGE_TOKENS // self.hca_ratio) if self.num_hca else 0
        return csa_rows * (self.kv_row_bytes + self.index_row_bytes) + hca_rows * self.kv_row_bytes

    @property
    def rebuild_tokens(self) -> int:
        """How far back computing begins to fill every window again: each layer's window needs the one below it."""
        return self.num_layers * (self.window - 1) + self.window

    @property
    def rebuild_pages(self) -> int:
        return -(-self.rebuild_tokens // PAGE_TOKENS)


def model_costs(config: ModelConfig) -> ModelCosts:
    """Counts the matrices of `config`; norms, hyper-connections and sinks are left out (under 1 %)."""
    kinds = [layer.kind for layer in config.layers]
    num_csa, num_hca = kinds.count(LayerKind.CSA), kinds.count(LayerKind.HCA)
    hidden, heads_width = config.hidden_size, config.num_heads * config.head_dim
    attention = hidden * (config.q_lora_rank + config.head_dim) + config.q_lora_rank * heads_width
    attention += heads_width * config.o_lora_rank + config.o_groups * config.o_lora_rank * hidden
    # Keys and gates of a compressor; the overlapping one has two halves of each.
    csa = hidden * 4 * (config.head_dim + config.index_head_dim) + hidden * config.index_num_heads
    csa += config.q_lora_rank * config.index_num_heads * config.index_head_dim
    hca = hidden * 2 * config.head_dim
    expert = 3 * hidden * config.expert_hidden_size
    head = config.vocab_size * hidden
    dense = config.num_layers * (attention + expert) + num_csa * csa + num_hca * hca
    router = config.num_layers * hidden * config.num_experts
    weight_bytes = 1.0 if config.quantised else 2.0
    expert_weight_bytes = {"fp4": FP4_BYTES, "fp8": 1.0}.get(config.expert_dtype, 2.0)
    return ModelCosts(
        num_layers=config.num_layers,
        num_csa=num_csa,
        num_hca=num_hca,
        csa_ratio=_ratio(config, LayerKind.CSA),
        hca_ratio=_ratio(config, LayerKind.HCA),
        window=config.sliding_window,
        index_topk=config.index_topk,
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_token,
        hidden_size=hidden,
        active_params=dense + router + head + config.num_layers * config.num_experts_per_token * expert,
        resident_bytes=dense * weight_bytes + 2.0 * (head + router),
        expert_bytes=expert * expert_weight_bytes,
        attention_flops=4.0 * heads_width,
        index_flops=2.0 * config.index_num_heads * config.index_head_dim,
        kv_row_bytes=config.nope_head_dim + 2 * config.rope_head_dim + 8,
        index_row_bytes=config.index_head_dim // 2 + config.index_head_dim // 32,
    )


def _ratio(config: ModelConfig, kind: LayerKind) -> int:
    """1 where the model has no such layer."""
    return next((layer.ratio for layer in config.layers if layer.kind is kind), 1)


_SHARED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "num_experts_per_tok": 6,
    "scoring_func": "sqrtsoftplus",
    "num_nextn_predict_layers": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}

FLASH = parse_model_config(
    _SHARED
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [*[0, 0, *([4, 128] * 21)][:43], 0],
    }
)
PRO = parse_model_config(
    _SHARED
    | {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
        "compress_ratios": [*[128, 128, *([4, 128] * 30)][:61], 0],
    }
)
PRESETS = {"flash": FLASH, "pro": PRO}

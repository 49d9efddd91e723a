"""Writing `config.json` for a model: the public dialect, which this project and transformers both read.

Owns the inverse of `rorqual.model_config.parse_model_config`. The checkpoint writer calls it. No torch.
"""

from __future__ import annotations

from typing import Any

from rorqual.errors import ConfigError
from rorqual.model_config import LayerKind, ModelConfig, YarnConfig

_PUBLIC_RATIOS = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}
_LAYER_TYPES = {
    LayerKind.WINDOW: "sliding_attention",
    LayerKind.CSA: "compressed_sparse_attention",
    LayerKind.HCA: "heavily_compressed_attention",
}


def public_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json`; parsing them gives `config` back, but for its dialect.

    A model the public keys cannot express (ratios other than 4 and 128, hash layers that are not the first
    ones) gets transformers' keys instead. Those have no MTP blocks: with both, raises ConfigError.
    """
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16" if config.quantised else "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_head_dim,
        "q_lora_rank": config.q_lora_rank,
        "o_groups": config.o_groups,
        "o_lora_rank": config.o_lora_rank,
        "sliding_window": config.sliding_window,
        "index_n_heads": config.index_num_heads,
        "index_head_dim": config.index_head_dim,
        "index_topk": config.index_topk,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": config.num_experts_per_token,
        "moe_intermediate_size": config.expert_hidden_size,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "swiglu_limit": config.swiglu_limit,
        "rms_norm_eps": config.norm_eps,
        "hc_mult": config.hc_mult,
        "hc_sinkhorn_iters": config.hc_sinkhorn_iters,
        "hc_eps": config.hc_eps,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos(config),
        "num_nextn_predict_layers": config.num_mtp_blocks,
        **_layers(config),
        **({"rope_scaling": _rope_scaling(config.yarn)} if config.yarn else {}),
        **(_quantisation(config) if config.quantised else {}),
    }


def _eos(config: ModelConfig) -> int | list[int]:
    return config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids)


def _layers(config: ModelConfig) -> dict[str, Any]:
    num_hash = sum(layer.hash_routed for layer in config.layers)
    hash_first = all(layer.hash_routed for layer in config.layers[:num_hash])
    public_ratios = all(layer.ratio == _PUBLIC_RATIOS[layer.kind] for layer in config.layers)
    if hash_first and public_ratios:
        ratios = [layer.ratio for layer in config.layers]
        return {"compress_ratios": ratios + [0] * config.num_mtp_blocks, "num_hash_layers": num_hash}
    if config.num_mtp_blocks:
        raise ConfigError(
            "config.json cannot express MTP blocks beside compression ratios other than 4 and 128, "
            "or beside hash layers that are not the first"
        )
    rates = {_LAYER_TYPES[layer.kind]: layer.ratio for layer in config.layers if layer.ratio}
    return {
        "layer_types": [_LAYER_TYPES[layer.kind] for layer in config.layers],
        "mlp_layer_types": ["hash_moe" if layer.hash_routed else "moe" for layer in config.layers],
        "compress_rates": rates,
    }


def _rope_scaling(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }


def _quantisation(config: ModelConfig) -> dict[str, Any]:
    return {
        "expert_dtype": config.expert_dtype,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }

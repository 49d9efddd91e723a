"""Which tensors a model has, and small random ones to test with.

Owns the table of official names and shapes as the reference reads them (weights whole and dequantised, no
scale tensors) and their names in transformers. Called by the reference and by tests. It may never import
`engine` or `kvstore`, so that a mistake in their tables shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rorqual.model_config import LayerConfig, LayerKind, ModelConfig

Shape = tuple[int, ...]


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Random float32 tensors under official names, scaled so that logits are a few units large.

    Nothing is left at a value that would hide an error: norms differ from 1, sinks, ape, biases and mixing
    parameters from 0, and the experts of a token id are distinct.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random_tensor(name, shape, config, generator) for name, shape in tensor_shapes(config).items()
    }


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model and of its MTP blocks, [out, in]."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {
        "embed.weight": (vocab, hidden),
        "head.weight": (vocab, hidden),
        "norm.weight": (hidden,),
    }
    shapes |= _hc_head_shapes(config)
    for number, layer in enumerate(config.layers):
        shapes |= _prefixed(f"layers.{number}", _layer_shapes(config, layer))
    for number in range(config.num_mtp_blocks):
        shapes |= _prefixed(f"mtp.{number}", _mtp_shapes(config))
    return shapes


def transformers_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as a transformers state dict of DeepseekV4ForCausalLM, which has no MTP tensors."""
    renamed: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        if match := re.fullmatch(r"(layers\.\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight", name):
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            renamed[_transformers_name(name)] = tensor
    for layer, by_id in experts.items():
        stack = [by_id[expert] for expert in range(len(by_id))]
        gate_up = torch.stack([torch.cat([expert["w1"], expert["w3"]]) for expert in stack])
        renamed[f"model.{layer}.mlp.experts.gate_up_proj"] = gate_up
        renamed[f"model.{layer}.mlp.experts.down_proj"] = torch.stack([expert["w2"] for expert in stack])
    return renamed


def _layer_shapes(config: ModelConfig, layer: LayerConfig) -> dict[str, Shape]:
    hidden, width, heads = config.hidden_size, config.head_dim, config.num_heads
    streams, latent = config.hc_mult, config.q_lora_rank
    shapes: dict[str, Shape] = {}
    for site in ("hc_attn", "hc_ffn"):
        mixes = streams * (2 + streams)
        shapes |= {f"{site}_fn": (mixes, streams * hidden), f"{site}_base": (mixes,), f"{site}_scale": (3,)}
    shapes |= {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn.attn_sink": (heads,),
        "attn.wq_a.weight": (latent, hidden),
        "attn.q_norm.weight": (latent,),
        "attn.wq_b.weight": (heads * width, latent),
        "attn.wkv.weight": (width, hidden),
        "attn.kv_norm.weight": (width,),
        "attn.wo_a.weight": (config.o_groups * config.o_lora_rank, heads * width // config.o_groups),
        "attn.wo_b.weight": (hidden, config.o_groups * config.o_lora_rank),
    }
    if layer.kind is not LayerKind.WINDOW:
        shapes |= _prefixed("attn.compressor", _compressor_shapes(config, layer, width))
    if layer.kind is LayerKind.CSA:
        index_width, index_heads = config.index_head_dim, config.index_num_heads
        shapes |= {
            "attn.indexer.wq_b.weight": (index_heads * index_width, latent),
            "attn.indexer.weights_proj.weight": (index_heads, hidden),
        }
        shapes |= _prefixed("attn.indexer.compressor", _compressor_shapes(config, layer, index_width))
    return shapes | _prefixed("ffn", _moe_shapes(config, layer))


def _compressor_shapes(config: ModelConfig, layer: LayerConfig, width: int) -> dict[str, Shape]:
    # The overlapping windows of CSA need two rows' worth per token: one for each window it belongs to.
    pooled = 2 * width if layer.kind is LayerKind.CSA else width
    return {
        "ape": (layer.ratio, pooled),
        "wkv.weight": (pooled, config.hidden_size),
        "wgate.weight": (pooled, config.hidden_size),
        "norm.weight": (width,),
    }


def _moe_shapes(config: ModelConfig, layer: LayerConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.expert_hidden_size
    shapes: dict[str, Shape] = {"gate.weight": (config.num_experts, hidden)}
    if layer.hash_routed:
        shapes["gate.tid2eid"] = (config.vocab_size, config.num_experts_per_token)
    else:
        shapes["gate.bias"] = (config.num_experts,)
    expert: dict[str, Shape] = {
        "w1.weight": (inner, hidden),
        "w2.weight": (hidden, inner),
        "w3.weight": (inner, hidden),
    }
    for number in range(config.num_experts):
        shapes |= _prefixed(f"experts.{number}", expert)
    return shapes | _prefixed("shared_experts", expert)


def _mtp_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    shapes = _layer_shapes(config, config.mtp_layer) | _hc_head_shapes(config)
    shapes |= {f"{name}.weight": (hidden, hidden) for name in ("e_proj", "h_proj")}
    return shapes | {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "norm")}


def _hc_head_shapes(config: ModelConfig) -> dict[str, Shape]:
    streams = config.hc_mult
    return {
        "hc_head_fn": (streams, streams * config.hidden_size),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
    }


def _prefixed(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _random_tensor(name: str, shape: Shape, config: ModelConfig, generator: torch.Generator) -> Tensor:
    if name.endswith("tid2eid"):
        ranks = torch.rand((config.vocab_size, config.num_experts), generator=generator)
        return ranks.argsort(dim=1)[:, : config.num_experts_per_token].contiguous()
    if name.endswith("_scale"):
        return 0.5 + torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("gate.bias"):
        return 0.2 * noise
    if name.endswith(("_base", ".ape")):
        return 0.5 * noise
    if name.endswith("attn_sink") or name == "embed.weight":
        return noise
    gain = 1.3 if name == "head.weight" else 1.0
    return gain * noise / shape[1] ** 0.5


_TRANSFORMERS_PATTERNS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embed\.", "embed_tokens."),
        (r"^hc_head_", "hc_head.hc_"),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"compressor\.norm\.", "compressor.kv_norm."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.attn\.indexer\.wq_b\.", ".attn.compressor.indexer.q_b_proj."),
        (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
        (r"\.attn\.wq_a\.", ".attn.q_a_proj."),
        (r"\.attn\.q_norm\.", ".attn.q_a_norm."),
        (r"\.attn\.wq_b\.", ".attn.q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_([ab])\.", r".o_\1_proj."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.ape$", ".position_bias"),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
    )
)


def _transformers_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for pattern, replacement in _TRANSFORMERS_PATTERNS:
        name = pattern.sub(replacement, name)
    return f"model.{name}"

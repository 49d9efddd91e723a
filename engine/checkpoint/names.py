"""How files name tensors: the release's names, and the two ways transformers 5.x writes the same model.

Owns the translation, both ways; the reader calls it for every tensor it finds. No torch, no files.

`save_pretrained` has two spellings. With `save_original_format=False` it writes its own module names, with
all experts of a layer stacked in two tensors. By default it translates back to the release's names, but not
all the way: a `model.` prefix stays, the embedding and the head mixing keep their module names, and the KV
norm loses its `kv_`. Both are read, tensor by tensor, so a mixture is no problem either.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Naming(enum.Enum):
    OFFICIAL = "official"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStack:
    """One tensor that holds a projection, or a pair of them, of all routed experts of a layer.

    It is [experts, rows, columns]; `projections` are concatenated along the rows, in this order.
    """

    prefix: str  # "layers.3.ffn.experts."
    projections: tuple[str, ...]  # ("w1", "w3") or ("w2",)

    def weight_names(self, expert: int) -> tuple[str, ...]:
        return tuple(f"{self.prefix}{expert}.{projection}.weight" for projection in self.projections)


def official_name(name: str) -> str:
    """The release's name of a tensor as a file names it; a name that is not known comes back unchanged.

    A stack of experts becomes `layers.{i}.ffn.experts.gate_up_proj` or `.down_proj`: see `expert_stack`.
    """
    short = name.removeprefix("model.")
    if short in _OFFICIAL_GLOBALS:
        return _OFFICIAL_GLOBALS[short]
    match = _LAYER.fullmatch(short)
    if match is None:
        return name
    prefix, suffix = match.groups()
    if suffix in _OFFICIAL_SUFFIXES:
        return prefix + _OFFICIAL_SUFFIXES[suffix]
    if _EXPERT.fullmatch(suffix):
        return short
    return name


def transformers_name(name: str) -> str | None:
    """The module name, in transformers, of an official weight: for a routed expert, of the stack it is in.

    None for what transformers has no place for: MTP blocks, scales, unknown names.
    """
    if name in _TRANSFORMERS_GLOBALS:
        return _TRANSFORMERS_GLOBALS[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    prefix, suffix = match.groups()
    expert = _EXPERT.fullmatch(suffix)
    if expert is not None:
        stack = _STACK_OF_PROJECTION.get(expert["projection"]) if expert["kind"] == "weight" else None
        return None if stack is None else f"model.{prefix}mlp.experts.{stack}"
    return f"model.{prefix}{_TRANSFORMERS_SUFFIXES[suffix]}" if suffix in _TRANSFORMERS_SUFFIXES else None


def expert_stack(name: str) -> ExpertStack | None:
    """What an official name stands for if it is a stack of experts."""
    head, _, stack = name.rpartition(".")
    if stack not in _PROJECTIONS_OF_STACK or not head.endswith(".ffn.experts"):
        return None
    return ExpertStack(prefix=head + ".", projections=_PROJECTIONS_OF_STACK[stack])


def is_superfluous(name: str) -> bool:
    """Whether a tensor may be there but is not used: copies of embedding and head inside an MTP block."""
    return _MTP_COPY.fullmatch(name) is not None


_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_EXPERT = re.compile(r"ffn\.experts\.\d+\.(?P<projection>w[123])\.(?P<kind>weight|scale)")
_MTP_COPY = re.compile(r"mtp\.\d+\.(embed|emb\.tok_emb|head)\.weight")

_PROJECTIONS_OF_STACK = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_STACK_OF_PROJECTION = {
    projection: stack for stack, projections in _PROJECTIONS_OF_STACK.items() for projection in projections
}

# Official name to transformers' name, outside the layers.
_TRANSFORMERS_GLOBALS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Official suffix to transformers' suffix, within a layer; routed experts apart.
_TRANSFORMERS_SUFFIXES = {
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}

# Every spelling, without a leading "model.", to the official one: the official itself, transformers', and
# the half translated one.
_OFFICIAL_GLOBALS = {
    **{name: name for name in _TRANSFORMERS_GLOBALS},
    **{theirs.removeprefix("model."): name for name, theirs in _TRANSFORMERS_GLOBALS.items()},
}
_OFFICIAL_SUFFIXES = {
    **{suffix: suffix for suffix in _TRANSFORMERS_SUFFIXES},
    **{theirs: suffix for suffix, theirs in _TRANSFORMERS_SUFFIXES.items()},
    "attn.norm.weight": "attn.kv_norm.weight",
    "mlp.experts.gate_up_proj": "ffn.experts.gate_up_proj",
    "mlp.experts.down_proj": "ffn.experts.down_proj",
}

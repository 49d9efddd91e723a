"""The tensors a checkpoint of a given model holds: names, dtypes, shapes and parts, from the config alone.

Owns the official layout: the reader checks files against it, the writer writes it, `inspect` counts it.
Imports no torch and reads no file.

A *weight* is one array the model computes with. Stored, it is one tensor, or two where it is quantised: FP8
as e4m3 with one E8M0 scale per 128 x 128 block, FP4 as two codes a byte (an I8 container) with one scale
per 32 inputs. The scale is named like its weight with `.scale` for `.weight`. Shapes are [out, in], and
scale shapes round up, so that odd widths work too.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rorqual.model_config import LayerConfig, LayerKind, ModelConfig

FP8_BLOCK = 128
FP4_BLOCK = 32

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of an element, by the safetensors name of the dtype."""


class Part(enum.Enum):
    """What a tensor belongs to, for the sums of `inspect`. Everything of an MTP block counts as MTP."""

    ROUTED_EXPERTS = "routed experts"
    ATTENTION = "attention"
    MTP = "MTP"
    EMBED_HEAD = "embed + head"
    SHARED_EXPERT = "shared expert"
    HYPER_CONNECTIONS = "hyper-connections"
    OTHER = "router + norms"


class Storage(enum.Enum):
    FP8 = "fp8"  # e4m3 with 128 x 128 block scales
    FP4 = "fp4"  # packed e2m1 with scales per 32 inputs
    BF16 = "bf16"
    F32 = "f32"
    FLOAT = "float"  # of an unquantised checkpoint: F32 as we write it, BF16 read as well
    I64 = "i64"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of the files. `dtype` is what we write, `dtypes` all that may be read; safetensors names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: Part
    dtypes: frozenset[str]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One array of the model: its official name, and the shape it has once dequantised."""

    name: str
    shape: tuple[int, ...]
    storage: Storage
    part: Part

    @property
    def num_parameters(self) -> int:
        """Learned numbers: the token-to-expert table of a hash layer is not learned and counts none."""
        return 0 if self.storage is Storage.I64 else math.prod(self.shape)

    @property
    def scale_name(self) -> str | None:
        """The name of the companion scale tensor of a quantised weight."""
        if self.storage not in (Storage.FP8, Storage.FP4):
            return None
        return self.name.removesuffix(".weight") + ".scale"

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The weight's tensor and, if it is quantised, its scale."""
        if self.storage is Storage.FP8:
            rows, columns = self.shape
            scale = (_blocks(rows, FP8_BLOCK), _blocks(columns, FP8_BLOCK))
            return self._tensor("F8_E4M3", self.shape), self._scale(scale)
        if self.storage is Storage.FP4:
            rows, columns = self.shape
            packed = (rows, _blocks(columns, 2))
            return self._tensor("I8", packed), self._scale((rows, _blocks(columns, FP4_BLOCK)))
        if self.storage is Storage.FLOAT:
            return (self._tensor("F32", self.shape, "BF16"),)
        return (self._tensor(self.storage.value.upper(), self.shape),)

    def _tensor(self, dtype: str, shape: tuple[int, ...], *others: str) -> TensorSpec:
        return TensorSpec(
            name=self.name, dtype=dtype, shape=shape, part=self.part, dtypes=frozenset((dtype, *others))
        )

    def _scale(self, shape: tuple[int, ...]) -> TensorSpec:
        name = self.scale_name
        assert name is not None
        dtype = "F8_E8M0"
        return TensorSpec(name=name, dtype=dtype, shape=shape, part=self.part, dtypes=frozenset((dtype,)))


def expected_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model's official layout, in the order of the model's own story."""
    for weight in expected_weights(config):
        yield from weight.tensors()


def expected_weights(config: ModelConfig) -> Iterator[WeightSpec]:
    """Every weight of the model: embedding, layers, final norm and head, then the MTP blocks."""
    embed_head = _Specs(config=config, prefix="", part=Part.EMBED_HEAD)
    vocabulary = (config.vocab_size, config.hidden_size)
    yield embed_head.plain("embed.weight", *vocabulary)
    for index, layer in enumerate(config.layers):
        yield from _layer(config, f"layers.{index}.", layer, mtp=False)
    yield _Specs(config=config, prefix="", part=Part.OTHER).plain("norm.weight", config.hidden_size)
    yield from _head_mixing(_Specs(config=config, prefix="", part=Part.HYPER_CONNECTIONS))
    yield embed_head.plain("head.weight", *vocabulary)
    for index in range(config.num_mtp_blocks):
        yield from _mtp_block(config, f"mtp.{index}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Specs:
    """Makes specs under one name prefix and part. Each method is one way the release stores weights."""

    config: ModelConfig
    prefix: str
    part: Part

    def quantised(self, name: str, *shape: int) -> WeightSpec:
        return self._spec(f"{name}.weight", shape, Storage.FP8)

    def expert(self, name: str, *shape: int) -> WeightSpec:
        storage = Storage.FP4 if self.config.expert_dtype == "fp4" else Storage.FP8
        return self._spec(f"{name}.weight", shape, storage)

    def plain(self, name: str, *shape: int) -> WeightSpec:
        return self._spec(name, shape, Storage.BF16)

    def single(self, name: str, *shape: int) -> WeightSpec:
        return self._spec(name, shape, Storage.F32)

    def table(self, name: str, *shape: int) -> WeightSpec:
        return WeightSpec(name=self.prefix + name, shape=shape, storage=Storage.I64, part=self.part)

    def _spec(self, name: str, shape: tuple[int, ...], storage: Storage) -> WeightSpec:
        if not self.config.quantised:
            storage = Storage.FLOAT
        return WeightSpec(name=self.prefix + name, shape=shape, storage=storage, part=self.part)


def _layer(config: ModelConfig, prefix: str, layer: LayerConfig, *, mtp: bool) -> Iterator[WeightSpec]:
    def specs(part: Part, below: str = "") -> _Specs:
        return _Specs(config=config, prefix=prefix + below, part=Part.MTP if mtp else part)

    yield from _layer_mixing(specs(Part.HYPER_CONNECTIONS))
    norms = specs(Part.OTHER)
    yield norms.plain("attn_norm.weight", config.hidden_size)
    yield norms.plain("ffn_norm.weight", config.hidden_size)
    attention = specs(Part.ATTENTION, "attn.")
    yield from _attention(attention)
    if layer.kind is not LayerKind.WINDOW:
        yield from _compressor(specs(Part.ATTENTION, "attn.compressor."), layer, config.head_dim)
    if layer.kind is LayerKind.CSA:
        yield attention.quantised(
            "indexer.wq_b", config.index_num_heads * config.index_head_dim, config.q_lora_rank
        )
        yield attention.plain("indexer.weights_proj.weight", config.index_num_heads, config.hidden_size)
        indexer = specs(Part.ATTENTION, "attn.indexer.compressor.")
        yield from _compressor(indexer, layer, config.index_head_dim)
    yield from _router(specs(Part.OTHER, "ffn.gate."), layer)
    inner, outer = config.expert_hidden_size, config.hidden_size
    routed = specs(Part.ROUTED_EXPERTS, "ffn.experts.")
    for expert in range(config.num_experts):
        yield routed.expert(f"{expert}.w1", inner, outer)
        yield routed.expert(f"{expert}.w2", outer, inner)
        yield routed.expert(f"{expert}.w3", inner, outer)
    shared = specs(Part.SHARED_EXPERT, "ffn.shared_experts.")
    yield shared.quantised("w1", inner, outer)
    yield shared.quantised("w2", outer, inner)
    yield shared.quantised("w3", inner, outer)


def _layer_mixing(specs: _Specs) -> Iterator[WeightSpec]:
    streams = specs.config.hc_mult
    # One number a stream for reading, one for writing, and a streams x streams mixing matrix.
    num_mixes = streams * (2 + streams)
    for site in ("attn", "ffn"):
        yield specs.single(f"hc_{site}_fn", num_mixes, streams * specs.config.hidden_size)
        yield specs.single(f"hc_{site}_base", num_mixes)
        yield specs.single(f"hc_{site}_scale", 3)


def _head_mixing(specs: _Specs) -> Iterator[WeightSpec]:
    streams = specs.config.hc_mult
    yield specs.single("hc_head_fn", streams, streams * specs.config.hidden_size)
    yield specs.single("hc_head_base", streams)
    yield specs.single("hc_head_scale", 1)


def _attention(specs: _Specs) -> Iterator[WeightSpec]:
    config = specs.config
    query_width, output_width = config.num_heads * config.head_dim, config.o_groups * config.o_lora_rank
    yield specs.single("attn_sink", config.num_heads)
    yield specs.quantised("wq_a", config.q_lora_rank, config.hidden_size)
    yield specs.plain("q_norm.weight", config.q_lora_rank)
    yield specs.quantised("wq_b", query_width, config.q_lora_rank)
    yield specs.quantised("wkv", config.head_dim, config.hidden_size)
    yield specs.plain("kv_norm.weight", config.head_dim)
    yield specs.quantised("wo_a", output_width, query_width // config.o_groups)
    yield specs.quantised("wo_b", config.hidden_size, output_width)


def _compressor(specs: _Specs, layer: LayerConfig, width: int) -> Iterator[WeightSpec]:
    # Overlapping windows (CSA) keep two halves per token: one for its own window, one for the next.
    rows = 2 * width if layer.kind is LayerKind.CSA else width
    yield specs.single("ape", layer.ratio, rows)
    yield specs.plain("wkv.weight", rows, specs.config.hidden_size)
    yield specs.plain("wgate.weight", rows, specs.config.hidden_size)
    yield specs.plain("norm.weight", width)


def _router(specs: _Specs, layer: LayerConfig) -> Iterator[WeightSpec]:
    config = specs.config
    yield specs.plain("weight", config.num_experts, config.hidden_size)
    if layer.hash_routed:
        yield specs.table("tid2eid", config.vocab_size, config.num_experts_per_token)
    else:
        yield specs.single("bias", config.num_experts)


def _mtp_block(config: ModelConfig, prefix: str) -> Iterator[WeightSpec]:
    """A window-only layer, the projections that join stream and token, and a head of the streams' own."""
    specs = _Specs(config=config, prefix=prefix, part=Part.MTP)
    yield specs.quantised("e_proj", config.hidden_size, config.hidden_size)
    yield specs.quantised("h_proj", config.hidden_size, config.hidden_size)
    yield specs.plain("enorm.weight", config.hidden_size)
    yield specs.plain("hnorm.weight", config.hidden_size)
    yield from _layer(config, prefix, config.mtp_layer, mtp=True)
    yield specs.plain("norm.weight", config.hidden_size)
    yield from _head_mixing(specs)


def _blocks(width: int, block: int) -> int:
    return -(-width // block)

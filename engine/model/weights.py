"""Weights as the forward pass wants them: projections that read the same input are stacked into one matrix.

Owns allocation and the map from official tensor names to views of the stacked tensors. A checkpoint is streamed into
those views (`Checkpoint.load_into`), so that never more than a segment of a source tensor lives beside what stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.model_config import LayerConfig, LayerKind, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperWeights:
    """One hyper-connection site. fn f32 [M, S*D]; base f32 [M]; scale f32 [3]; M = (2+S)*S, or S for a head."""

    fn: Tensor
    base: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressorWeights:
    """`from_x` stacks main K, main S, then for CSA indexer K, indexer S and the indexer's head weights.

    `ape` f32 [ratio, rows of K and S] is added to the projection by position mod ratio; zero in the K columns.
    """

    from_x: Tensor
    ape: Tensor
    norm: Tensor
    index_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    from_x: Tensor  # [q_lora + d, D]: wq_a, wkv
    q_norm: Tensor
    kv_norm: Tensor
    from_cq: Tensor  # [H*d (+ Hi*di), q_lora]: wq_b, indexer.wq_b
    wo_a_Gli: Tensor  # [G, o_lora, H*d/G]
    wo_b: Tensor
    sink_H: Tensor
    compressor: CompressorWeights | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """Experts stacked; the shared expert is the last one. w13 holds w1 (gate) rows, then w3 (up) rows."""

    gate: Tensor  # [E, D]
    bias: Tensor | None  # [E], learned routing
    table: Tensor | None  # i64 [V, K], hash routing
    w13: Tensor  # [E+1, 2I, D]
    w2: Tensor  # [E+1, D, I]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    hc_attn: HyperWeights
    hc_ffn: HyperWeights
    attn_norm: Tensor
    ffn_norm: Tensor
    attn: AttentionWeights
    moe: MoeWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpWeights:
    layer: LayerWeights
    e_proj: Tensor
    h_proj: Tensor
    enorm: Tensor
    hnorm: Tensor
    norm: Tensor
    hc_head: HyperWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    embed: Tensor  # [V, D]
    head: Tensor  # [V, D]
    norm: Tensor
    hc_head: HyperWeights
    layers: tuple[LayerWeights, ...]
    mtp: tuple[MtpWeights, ...]
    named: dict[str, Tensor]  # official name -> view into the tensors above

    bases: tuple[Tensor, ...]  # every tensor the forward pass reads, once: what training optimises

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.bases)

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError for values that would be used as an index and are none: compiled loops do not look."""
        for name, tensor in self.named.items():
            if tensor.dtype == torch.int64 and not (tensor.min() >= 0 and tensor.max() < config.num_experts):
                raise CheckpointError(f"{name} names experts beyond 0..{config.num_experts - 1}")


def allocate_weights(config: ModelConfig, device: torch.device | None = None) -> ModelWeights:
    """Uninitialised weights; fill every view of `named`, f32 but for the i64 `tid2eid` tables."""
    build = _Builder(config, device)
    embed = build.tensor("embed.weight", config.vocab_size, config.hidden_size)
    head = build.tensor("head.weight", config.vocab_size, config.hidden_size)
    norm = build.tensor("norm.weight", config.hidden_size)
    hc_head = build.hyper_head("hc_head")
    layers = tuple(build.layer(f"layers.{index}.", item) for index, item in enumerate(config.layers))
    mtp = tuple(build.mtp(f"mtp.{index}.") for index in range(config.num_mtp_blocks))
    return ModelWeights(
        embed=embed,
        head=head,
        norm=norm,
        hc_head=hc_head,
        layers=layers,
        mtp=mtp,
        named=build.named,
        bases=tuple(build.bases),
    )


class _Builder:
    """Allocates stacked tensors and notes which official name is which rows of them."""

    def __init__(self, config: ModelConfig, device: torch.device | None) -> None:
        self.config = config
        self.device = device
        self.named: dict[str, Tensor] = {}
        self.bases: list[Tensor] = []

    def base(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.bases.append(torch.empty(shape, dtype=dtype, device=self.device))
        return self.bases[-1]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        self.named[name] = self.base(*shape, dtype=dtype)
        return self.named[name]

    def stack(self, width: int, *parts: tuple[str, int]) -> Tensor:
        """One [sum of rows, width] matrix; each part names its rows."""
        stacked = self.base(sum(rows for _, rows in parts), width)
        first = 0
        for name, rows in parts:
            self.named[name] = stacked[first : first + rows]
            first += rows
        return stacked

    def hyper(self, prefix: str) -> HyperWeights:
        num_streams = self.config.hc_mult
        return self._hyper(prefix, (2 + num_streams) * num_streams, 3)

    def hyper_head(self, prefix: str) -> HyperWeights:
        return self._hyper(prefix, self.config.hc_mult, 1)

    def _hyper(self, prefix: str, rows: int, num_scales: int) -> HyperWeights:
        return HyperWeights(
            fn=self.tensor(f"{prefix}_fn", rows, self.config.hc_mult * self.config.hidden_size),
            base=self.tensor(f"{prefix}_base", rows),
            scale=self.tensor(f"{prefix}_scale", num_scales),
        )

    def layer(self, prefix: str, item: LayerConfig) -> LayerWeights:
        width = self.config.hidden_size
        return LayerWeights(
            hc_attn=self.hyper(f"{prefix}hc_attn"),
            hc_ffn=self.hyper(f"{prefix}hc_ffn"),
            attn_norm=self.tensor(f"{prefix}attn_norm.weight", width),
            ffn_norm=self.tensor(f"{prefix}ffn_norm.weight", width),
            attn=self.attention(f"{prefix}attn.", item),
            moe=self.moe(f"{prefix}ffn.", item),
        )

    def attention(self, prefix: str, item: LayerConfig) -> AttentionWeights:
        config = self.config
        from_cq = [(f"{prefix}wq_b.weight", config.num_heads * config.head_dim)]
        if item.kind is LayerKind.CSA:
            from_cq.append((f"{prefix}indexer.wq_b.weight", config.index_num_heads * config.index_head_dim))
        group_width = config.num_heads * config.head_dim // config.o_groups
        wo_a = self.base(config.o_groups, config.o_lora_rank, group_width)
        self.named[f"{prefix}wo_a.weight"] = wo_a.flatten(0, 1)
        return AttentionWeights(
            from_x=self.stack(
                config.hidden_size,
                (f"{prefix}wq_a.weight", config.q_lora_rank),
                (f"{prefix}wkv.weight", config.head_dim),
            ),
            q_norm=self.tensor(f"{prefix}q_norm.weight", config.q_lora_rank),
            kv_norm=self.tensor(f"{prefix}kv_norm.weight", config.head_dim),
            from_cq=self.stack(config.q_lora_rank, *from_cq),
            wo_a_Gli=wo_a,
            wo_b=self.tensor(
                f"{prefix}wo_b.weight", config.hidden_size, config.o_groups * config.o_lora_rank
            ),
            sink_H=self.tensor(f"{prefix}attn_sink", config.num_heads),
            compressor=None if item.kind is LayerKind.WINDOW else self.compressor(prefix, item),
        )

    def compressor(self, prefix: str, item: LayerConfig) -> CompressorWeights:
        config = self.config
        overlapped = item.kind is LayerKind.CSA
        halves = 2 if overlapped else 1
        main, index = f"{prefix}compressor.", f"{prefix}indexer.compressor."
        width, index_width = halves * config.head_dim, halves * config.index_head_dim
        parts = [(f"{main}wkv.weight", width), (f"{main}wgate.weight", width)]
        apes = [(f"{main}ape", width)]
        if overlapped:
            parts += [(f"{index}wkv.weight", index_width), (f"{index}wgate.weight", index_width)]
            parts += [(f"{prefix}indexer.weights_proj.weight", config.index_num_heads)]
            apes += [(f"{index}ape", index_width)]
        ape = self.base(item.ratio, 2 * sum(columns for _, columns in apes)).zero_()
        first = 0
        for name, columns in apes:
            self.named[name] = ape[:, first + columns : first + 2 * columns]
            first += 2 * columns
        return CompressorWeights(
            from_x=self.stack(config.hidden_size, *parts),
            ape=ape,
            norm=self.tensor(f"{main}norm.weight", config.head_dim),
            index_norm=self.tensor(f"{index}norm.weight", config.index_head_dim) if overlapped else None,
        )

    def moe(self, prefix: str, item: LayerConfig) -> MoeWeights:
        config = self.config
        num_experts, width, inner = config.num_experts, config.hidden_size, config.expert_hidden_size
        w13 = self.base(num_experts + 1, 2 * inner, width)
        w2 = self.base(num_experts + 1, width, inner)
        for expert in range(num_experts + 1):
            name = f"{prefix}experts.{expert}" if expert < num_experts else f"{prefix}shared_experts"
            self.named[f"{name}.w1.weight"] = w13[expert, :inner]
            self.named[f"{name}.w3.weight"] = w13[expert, inner:]
            self.named[f"{name}.w2.weight"] = w2[expert]
        table, bias = None, None
        if item.hash_routed:
            table = self.tensor(
                f"{prefix}gate.tid2eid", config.vocab_size, config.num_experts_per_token, dtype=torch.int64
            )
        else:
            bias = self.tensor(f"{prefix}gate.bias", num_experts)
        gate = self.tensor(f"{prefix}gate.weight", num_experts, width)
        return MoeWeights(gate=gate, bias=bias, table=table, w13=w13, w2=w2)

    def mtp(self, prefix: str) -> MtpWeights:
        width = self.config.hidden_size
        return MtpWeights(
            layer=self.layer(prefix, self.config.mtp_layer),
            e_proj=self.tensor(f"{prefix}e_proj.weight", width, width),
            h_proj=self.tensor(f"{prefix}h_proj.weight", width, width),
            enorm=self.tensor(f"{prefix}enorm.weight", width),
            hnorm=self.tensor(f"{prefix}hnorm.weight", width),
            norm=self.tensor(f"{prefix}norm.weight", width),
            hc_head=self.hyper_head(f"{prefix}hc_head"),
        )

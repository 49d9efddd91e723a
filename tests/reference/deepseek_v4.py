"""A slow DeepSeek-V4 that reads one token at a time, to judge the engine by.

Owns the mathematics of the whole model and of its MTP block, in float32 and with the served rounding points,
written from the published description alone: plain loops over tokens and layers, every state kept by absolute
position, nothing cached away, nothing fused. Called by tests. It may never import `engine` or `kvstore`: it
is worth something only as long as it shares no line, and so no mistake, with them.

Tensors carry their official names and are float32 (tid2eid int64), already dequantised. Letters: D hidden
width, H heads, d head width, V vocabulary, M residual streams, Hi and di the indexer's heads and head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from rorqual.model_config import LayerConfig, LayerKind, ModelConfig
from tests.reference.rounding import Rounding, Served, Unrounded
from tests.reference.weights import random_tensors, tensor_shapes

__all__ = ["LayerPicks", "MtpStep", "Picks", "ReferenceModel", "random_tensors", "rope_frequencies"]

Numerics = Literal["float32", "served"]


class LayerPicks(TypedDict, total=False):
    """The discrete choices of one layer for one token; also how they are forced on it, where a missing key or
    None leaves the choice free.

    Margins are how far the free choice was from another one (last taken minus first left out), whether or not
    it was overruled; None where nothing was left out or nothing was scored.
    """

    indexer: list[int] | None  # selected compressed rows, ascending; None when all visible rows are used
    indexer_margin: float | None
    experts: list[int]  # ascending; a hash table may name one twice
    expert_margin: float | None


Picks = Sequence[LayerPicks]
"""One entry per layer."""


class MtpStep(NamedTuple):
    logits: Tensor  # [V], for token t + 2
    streams: Tensor  # Z'_t [M, D], the streams to chain the next draft from


class ReferenceModel:
    """One sequence, from its first token on.

    `streams[t]` is X [M, D] after the last layer at position t, before the HC head; `picks[t][layer]` is what
    was chosen there, ready to be forced on another run. `mtp_picks[t]` is the same for the MTP block.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], numerics: Numerics) -> None:
        if numerics not in ("float32", "served"):
            raise ValueError(f"numerics must be 'float32' or 'served', not {numerics!r}")
        _check_tensors(config, tensors)
        self.config = config
        self.tensors = tensors
        self.rounding: Rounding = Served() if numerics == "served" else Unrounded()
        self.streams: list[Tensor] = []
        self.picks: list[list[LayerPicks]] = []
        self.mtp_picks: dict[int, LayerPicks] = {}
        self.layers = [
            Layer(config, layer, _under(f"layers.{number}", tensors), self.rounding)
            for number, layer in enumerate(config.layers)
        ]
        self.mtp: Layer | None = None
        if config.num_mtp_blocks:
            self.mtp = Layer(config, config.mtp_layer, _under("mtp.0", tensors), self.rounding)

    @property
    def num_tokens(self) -> int:
        return len(self.streams)

    @torch.no_grad()
    def step(self, token_id: int, forced: Picks | None = None) -> Tensor:
        """Read the token at the next position and return the logits [V] of the one after it.

        A model that refused forced picks half-way (ValueError) has taken part of the token in and is spent.
        """
        position = self.num_tokens
        if forced is not None and len(forced) != len(self.layers):
            raise ValueError(f"forced picks are for {len(forced)} layers, the model has {len(self.layers)}")
        streams = self._embed(token_id).expand(self.config.hc_mult, -1)
        picks: list[LayerPicks] = []
        for number, layer in enumerate(self.layers):
            streams, picked = layer.step(streams, position, token_id, forced[number] if forced else {})
            picks.append(picked)
        self.streams.append(streams)
        self.picks.append(picks)
        return self._logits(streams, hc_head="hc_head", norm="norm.weight")

    @torch.no_grad()
    def mtp_step(
        self, t: int, streams: Tensor, next_token_id: int, forced: LayerPicks | None = None
    ) -> MtpStep:
        """Run the MTP block at index t: `streams` is X_t (or Z'_{t-1} of the draft before), `next_token_id`
        the token at t + 1.

        Repeating an index replaces its window entry, so drafts that were rejected leave nothing behind.
        Indices may be left out: an index then sees those of its window that were run.
        """
        if self.mtp is None:
            raise ValueError("the model has no MTP block")
        b, a = self.rounding.bf16, self.rounding.activation
        tensors, eps = self.mtp.tensors, self.config.norm_eps
        e = b(rms_norm(self._embed(next_token_id), tensors["enorm.weight"], eps))
        h = b(rms_norm(streams, tensors["hnorm.weight"], eps))
        z = b(b(a(h) @ tensors["h_proj.weight"].T) + b(tensors["e_proj.weight"] @ a(e)))
        z, self.mtp_picks[t] = self.mtp.step(z, t, next_token_id, forced or {})
        return MtpStep(self._logits(z, hc_head="mtp.0.hc_head", norm="mtp.0.norm.weight"), z)

    def _embed(self, token_id: int) -> Tensor:
        if not 0 <= token_id < self.config.vocab_size:
            raise ValueError(f"token id {token_id} is not below the vocabulary of {self.config.vocab_size}")
        return self.rounding.bf16(self.tensors["embed.weight"][token_id])

    def _logits(self, streams: Tensor, *, hc_head: str, norm: str) -> Tensor:
        mixed = _hc_project(streams, self.tensors[f"{hc_head}_fn"], self.config.norm_eps)
        scale, base = self.tensors[f"{hc_head}_scale"], self.tensors[f"{hc_head}_base"]
        pre = torch.sigmoid(mixed * scale + base) + self.config.hc_eps
        y = self.rounding.bf16(pre @ streams)
        y = self.rounding.bf16(rms_norm(y, self.tensors[norm], self.config.norm_eps))
        return self.tensors["head.weight"] @ y


@dataclass(slots=True)
class CompressorState:
    """All a compressor has seen: one K and one S (with ape added) per token, one row per full window."""

    k: list[Tensor] = field(default_factory=list)
    s: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


class Layer:
    """One decoder layer and its state. The MTP block is one more of these, of kind WINDOW."""

    def __init__(
        self, config: ModelConfig, layer: LayerConfig, tensors: Mapping[str, Tensor], rounding: Rounding
    ) -> None:
        self.config = config
        self.layer = layer
        self.tensors = tensors
        self.rounding = rounding
        self.frequencies = rope_frequencies(config, layer.kind)
        self.window: dict[int, Tensor] = {}  # raw KV row by absolute position
        self.compressed = CompressorState()
        self.index = CompressorState()

    def step(
        self, streams: Tensor, position: int, token_id: int, forced: LayerPicks
    ) -> tuple[Tensor, LayerPicks]:
        """Streams [M, D] in, streams [M, D] out, with the choices made on the way."""
        b, eps = self.rounding.bf16, self.config.norm_eps
        picks: LayerPicks = {}

        x, post, mix = self._hc_in(streams, "hc_attn")
        x = b(rms_norm(x, self.tensors["attn_norm.weight"], eps))
        streams = b(_hc_out(streams, self._attention(x, position, forced, picks), post, mix))

        x, post, mix = self._hc_in(streams, "hc_ffn")
        x = b(rms_norm(x, self.tensors["ffn_norm.weight"], eps))
        streams = b(_hc_out(streams, self._moe(x, token_id, forced, picks), post, mix))
        return streams, picks

    def _hc_in(self, streams: Tensor, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams to x [D]; also post [M] and the mixing matrix C [M, M] for the way out."""
        count, eps = self.config.hc_mult, self.config.hc_eps
        scale, base = self.tensors[f"{site}_scale"], self.tensors[f"{site}_base"]
        mixed = _hc_project(streams, self.tensors[f"{site}_fn"], self.config.norm_eps)
        pre = torch.sigmoid(mixed[:count] * scale[0] + base[:count]) + eps
        post = 2 * torch.sigmoid(mixed[count : 2 * count] * scale[1] + base[count : 2 * count])
        mix = (mixed[2 * count :] * scale[2] + base[2 * count :]).view(count, count)
        mix = torch.softmax(mix, dim=1) + eps
        mix = mix / (mix.sum(dim=0, keepdim=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            mix = mix / (mix.sum(dim=1, keepdim=True) + eps)
            mix = mix / (mix.sum(dim=0, keepdim=True) + eps)
        return self.rounding.bf16(pre @ streams), post, mix

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """A product whose weights are stored in FP8 or FP4: its input is rounded, its output is bf16."""
        return self.rounding.bf16(self.tensors[f"{name}.weight"] @ self.rounding.activation(x))

    # --- attention ---

    def _attention(self, x: Tensor, position: int, forced: LayerPicks, picks: LayerPicks) -> Tensor:
        config, b = self.config, self.rounding.bf16
        latent = b(
            rms_norm(self._linear("attn.wq_a", x), self.tensors["attn.q_norm.weight"], config.norm_eps)
        )
        q = self._linear("attn.wq_b", latent).view(config.num_heads, config.head_dim)
        q = b(rms_norm(q, None, config.norm_eps))
        q = self._rope(q, position)
        kv = b(rms_norm(self._linear("attn.wkv", x), self.tensors["attn.kv_norm.weight"], config.norm_eps))
        self.window[position] = self._stored_row(self._rope(kv, position))

        first = max(0, position - config.sliding_window + 1)
        visible = [self.window[p] for p in range(first, position + 1) if p in self.window]
        if self.layer.kind is not LayerKind.WINDOW:
            rows = self._select_rows(x, latent, position, forced, picks)
            visible += [self.compressed.rows[row] for row in rows]
        elif forced.get("indexer") is not None:
            raise ValueError("compressed rows were forced on a layer without an indexer")
        else:
            picks["indexer"], picks["indexer_margin"] = None, None

        o = b(self._attend(q, torch.stack(visible)))
        o = self._rope(o, -position)
        # Each group of heads has its own rows of wo_a.
        o = o.reshape(config.o_groups, -1)
        wo_a = self.tensors["attn.wo_a.weight"].view(config.o_groups, config.o_lora_rank, -1)
        r = b(torch.einsum("grk,gk->gr", wo_a, o)).reshape(-1)
        return self._linear("attn.wo_b", r)

    def _attend(self, q: Tensor, keys: Tensor) -> Tensor:
        """q [H, d] over keys [n, d], which are the values too. The sink is a logit whose value is zero."""
        z = q @ keys.T * self.config.head_dim**-0.5
        sink = self.tensors["attn.attn_sink"].unsqueeze(1)
        probabilities = torch.softmax(torch.cat([z, sink], dim=1), dim=1)
        return probabilities[:, :-1] @ keys

    def _rope(self, x: Tensor, position: int) -> Tensor:
        return self.rounding.bf16(rotate(x, position, self.frequencies))

    def _stored_row(self, row: Tensor) -> Tensor:
        plain, rotated = row[: self.config.nope_head_dim], row[self.config.nope_head_dim :]
        return torch.cat([self.rounding.kv_row(plain), rotated])

    # --- compressed rows and the indexer ---

    def _select_rows(
        self, x: Tensor, latent: Tensor, position: int, forced: LayerPicks, picks: LayerPicks
    ) -> list[int]:
        """Take the token into the compressor(s), then say which rows its query attends to."""
        row = self._compress(self.compressed, "attn.compressor", x, position)
        if row is not None:
            self.compressed.rows.append(self._stored_row(row))
        num_visible = (position + 1) // self.layer.ratio
        picks["indexer"], picks["indexer_margin"] = None, None
        if self.layer.kind is LayerKind.HCA:
            if forced.get("indexer") is not None:
                raise ValueError("compressed rows were forced on a layer without an indexer")
            return list(range(num_visible))

        row = self._compress(self.index, "attn.indexer.compressor", x, position)
        if row is not None:
            self.index.rows.append(self.rounding.indexer(row))
        chosen: list[int] | None = None
        if num_visible > self.config.index_topk:
            scores = self._index_scores(x, latent, position, num_visible)
            chosen, picks["indexer_margin"] = choose_largest(scores, self.config.index_topk)
        rows = forced.get("indexer")
        if rows is not None:
            if len(set(rows)) != len(rows) or not all(0 <= row < num_visible for row in rows):
                raise ValueError(
                    f"forced rows {rows} are not distinct rows of the {num_visible} visible ones"
                )
            chosen = sorted(rows)
        picks["indexer"] = chosen
        return list(range(num_visible)) if chosen is None else chosen

    def _compress(self, state: CompressorState, name: str, x: Tensor, position: int) -> Tensor | None:
        """Take one token in; when it fills its window, return the new row, normed and rotated, unstored."""
        ratio = self.layer.ratio
        state.k.append(self.tensors[f"{name}.wkv.weight"] @ x)
        ape = self.tensors[f"{name}.ape"][position % ratio]
        state.s.append(self.tensors[f"{name}.wgate.weight"] @ x + ape)
        if (position + 1) % ratio:
            return None

        start = position + 1 - ratio
        window = range(start, position + 1)
        if self.layer.kind is LayerKind.HCA:
            k, s = [state.k[p] for p in window], [state.s[p] for p in window]
        else:
            # Windows overlap: a token's first half serves the next window, its second half its own.
            width = state.k[0].shape[0] // 2
            before = range(max(0, start - ratio), start)
            k = [state.k[p][:width] for p in before] + [state.k[p][width:] for p in window]
            s = [state.s[p][:width] for p in before] + [state.s[p][width:] for p in window]
        weights = torch.softmax(torch.stack(s), dim=0)
        pooled = self.rounding.bf16((weights * torch.stack(k)).sum(dim=0))
        normed = self.rounding.bf16(
            rms_norm(pooled, self.tensors[f"{name}.norm.weight"], self.config.norm_eps)
        )
        return self._rope(normed, start)

    def _index_scores(self, x: Tensor, latent: Tensor, position: int, num_visible: int) -> Tensor:
        heads, width, b = self.config.index_num_heads, self.config.index_head_dim, self.rounding.bf16
        q = self._linear("attn.indexer.wq_b", latent).view(heads, width)
        q = self.rounding.indexer(self._rope(q, position))
        w = b(self.tensors["attn.indexer.weights_proj.weight"] @ x)
        w = b(w * width**-0.5 * heads**-0.5)
        dots = b(q @ torch.stack(self.index.rows[:num_visible]).T)  # [Hi, rows]
        return b((w.unsqueeze(1) * torch.relu(dots)).sum(dim=0))

    # --- mixture of experts ---

    def _moe(self, x: Tensor, token_id: int, forced: LayerPicks, picks: LayerPicks) -> Tensor:
        config = self.config
        g = torch.sqrt(softplus(self.tensors["ffn.gate.weight"] @ x))
        experts, margin = self._route(g, token_id)
        given = forced.get("experts")
        if given is not None:
            if len(given) != len(experts) or not all(0 <= expert < config.num_experts for expert in given):
                raise ValueError(f"forced experts {given} are not {len(experts)} of {config.num_experts}")
            experts = sorted(given)
        picks["experts"], picks["expert_margin"] = experts, margin

        weights = g[experts] / g[experts].sum() * config.routed_scaling_factor
        y = self._expert("ffn.shared_experts", x, torch.ones(()))
        for expert, weight in zip(experts, weights, strict=True):
            y = y + self._expert(f"ffn.experts.{expert}", x, weight)
        return self.rounding.bf16(y)

    def _route(self, g: Tensor, token_id: int) -> tuple[list[int], float | None]:
        if self.layer.hash_routed:
            return sorted(self.tensors["ffn.gate.tid2eid"][token_id].tolist()), None
        return choose_largest(g + self.tensors["ffn.gate.bias"], self.config.num_experts_per_token)

    def _expert(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        gate = self._linear(f"{name}.w1", x).clamp(max=limit)
        up = self._linear(f"{name}.w3", x).clamp(-limit, limit)
        return self._linear(f"{name}.w2", self.rounding.bf16(weight * silu(gate) * up))


def rope_frequencies(config: ModelConfig, kind: LayerKind) -> Tensor:
    """Radians per position for each pair of rotated channels, float32 [rope_head_dim / 2].

    Window-only layers are plain; layers with compressed rows have another base and, by frequency, YaRN, in
    all they rotate and at every length.
    """
    width = config.rope_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    if kind is LayerKind.WINDOW:
        return config.rope_theta**-exponents
    plain = config.compress_rope_theta**-exponents
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes so many turns within the original context."""
        angle = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(angle) / (2 * math.log(config.compress_rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    # Only widths far below the real one bring the two together; the ramp is then a step.
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    slowed = ramp.clamp(0, 1)
    return plain * (1 - slowed) + plain / yarn.factor * slowed


def rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Rotate the last 2 * len(frequencies) channels of [..., width], pair by neighbouring pair."""
    rotated = 2 * len(frequencies)
    plain, pairs = x[..., :-rotated], x[..., -rotated:].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    angles = position * frequencies
    cos, sin = torch.cos(angles), torch.sin(angles)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([plain, turned.flatten(-2)], dim=-1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def choose_largest(scores: Tensor, count: int) -> tuple[list[int], float | None]:
    """The `count` largest, ascending by index, and by how much the last one taken beat the first one left
    out. Of equal scores the lowest index is taken first."""
    values, indices = torch.sort(scores, descending=True, stable=True)
    margin = float(values[count - 1] - values[count]) if len(values) > count else None
    return sorted(indices[:count].tolist()), margin


def _hc_project(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    v = streams.flatten()
    return (fn @ v) * torch.rsqrt(v.square().mean() + eps)


def _hc_out(streams: Tensor, output: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """X'_k = post_k F(x) + sum_j C[j, k] X_j: over the first index of C, which is not symmetric."""
    return post.unsqueeze(1) * output + mix.T @ streams


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _check_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name} {tuple(tensors[name].shape) if name in tensors else 'missing'}, wanted {shape}"
        for name, shape in tensor_shapes(config).items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit the config: {'; '.join(wrong)}")

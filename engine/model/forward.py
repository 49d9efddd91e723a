"""The forward pass: one entry for a ragged batch of any mix of prefill chunks and decode steps.

ids -> embed -> S streams; every layer: split, norm, sublayer, merge (attention, then MoE); head. `Model` owns weights
and constants, no state: rows go to the StateView it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.kernels.suite import Kernels
from engine.model.attention import attention, keep_window
from engine.model.batch import RaggedBatch
from engine.model.context import Observer, Pass, PickHook, rotary_frequencies
from engine.model.moe import moe
from engine.model.rounding import Rounding, rounding_of
from engine.model.state import StateView
from engine.model.weights import HyperWeights, LayerWeights, ModelWeights
from kvstore.layout import Component, Numerics
from rorqual.model_config import LayerConfig, ModelConfig


class Model:
    """A model ready to run. `exact` makes a token's results independent of the batch, bit for bit. `rounding` replaces
    that of the numerics (training's has gradients)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        numerics: Numerics,
        kernels: Kernels,
        exact: bool,
        rounding: Rounding | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.numerics = numerics
        self.kernels = kernels
        self.exact = exact
        self._rounding = rounding or rounding_of(numerics, kernels)
        self._frequencies = rotary_frequencies(config)

    def begin(
        self,
        batch: RaggedBatch,
        state: StateView,
        *,
        hook: PickHook | None = None,
        observer: Observer | None = None,
    ) -> Pass:
        frequencies = self._frequencies
        return Pass(
            config=self.config,
            kernels=self.kernels,
            rounding=self._rounding,
            exact=self.exact,
            batch=batch,
            state=state,
            frequencies=frequencies,
            plain_angles=self.kernels.rope_angles(batch.positions_T, frequencies.plain),
            compressed_angles=self.kernels.rope_angles(batch.positions_T, frequencies.compressed),
            hook=hook,
            observer=observer,
        )

    def streams(self, run: Pass) -> Tensor:
        """The S residual streams after the last layer, f32 [T, S, D]."""
        embedded = self._rounding.act(self.weights.embed[run.batch.tokens_T])
        streams = embedded.unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        for index, (item, weights) in enumerate(zip(self.config.layers, self.weights.layers, strict=True)):
            streams = self._layer(run, index, item, weights, streams, Component.WINDOW)
        return streams

    def logits(self, streams_RSD: Tensor) -> Tensor:
        """Next-token logits f32 [R, V] of any rows of `streams`."""
        return self._head(streams_RSD, self.weights.hc_head, self.weights.norm)

    def draft(self, run: Pass, block: int, streams_TSD: Tensor, next_tokens_T: Tensor) -> Tensor:
        """One MTP block over a batch: row t holds index t's streams and the token at t+1. Returns the block's streams
        [T, S, D]; `draft_logits` of them predict the token at t+2."""
        joined = self._joined(block, streams_TSD, next_tokens_T)
        weights = self.weights.mtp[block].layer
        return self._layer(run, block, self.config.mtp_layer, weights, joined, Component.DRAFT_WINDOW)

    def keep_draft_rows(self, run: Pass, block: int, streams_TSD: Tensor, next_tokens_T: Tensor) -> None:
        """Put the rows that `draft` would put, at a fraction of its price: they depend on their own index alone."""
        weights = self.weights.mtp[block].layer
        site = self._split(weights.hc_attn, self._joined(block, streams_TSD, next_tokens_T))
        x = self._norm(site.x_TD, weights.attn_norm)
        keep_window(run, block, self.config.mtp_layer, weights.attn, x, Component.DRAFT_WINDOW)

    def draft_logits(self, block: int, streams_RSD: Tensor) -> Tensor:
        weights = self.weights.mtp[block]
        return self._head(streams_RSD, weights.hc_head, weights.norm)

    def _joined(self, block: int, streams_TSD: Tensor, next_tokens_T: Tensor) -> Tensor:
        """What enters an MTP block."""
        weights = self.weights.mtp[block]
        rounding, eps = self._rounding, self.config.norm_eps
        embedded = rounding.act(self.weights.embed[next_tokens_T])
        from_token = rounding.act(self.kernels.rms_norm(embedded, weights.enorm, eps))
        from_token = rounding.act(self._linear(rounding.matmul_input(from_token), weights.e_proj))
        from_streams = rounding.act(self.kernels.rms_norm(streams_TSD, weights.hnorm, eps))
        from_streams = rounding.act(self._linear(rounding.matmul_input(from_streams), weights.h_proj))
        return rounding.act(from_streams + from_token.unsqueeze(1))

    def _layer(
        self,
        run: Pass,
        index: int,
        item: LayerConfig,
        weights: LayerWeights,
        streams: Tensor,
        window: Component,
    ) -> Tensor:
        site = self._split(weights.hc_attn, streams)
        x = self._norm(site.x_TD, weights.attn_norm)
        streams = self._merge(attention(run, index, item, weights.attn, x, window), site, streams)
        site = self._split(weights.hc_ffn, streams)
        x = self._norm(site.x_TD, weights.ffn_norm)
        return self._merge(moe(run, index, weights.moe, x), site, streams)

    def _split(self, weights: HyperWeights, streams: Tensor) -> _Site:
        config = self.config
        mix = self._linear(streams.flatten(1), weights.fn)
        x, post, comb = self.kernels.hc_split(
            mix,
            streams,
            weights.scale,
            weights.base,
            config.hc_sinkhorn_iters,
            config.hc_eps,
            config.norm_eps,
        )
        return _Site(x_TD=self._rounding.act(x), post_TS=post, comb_TSS=comb)

    def _merge(self, output: Tensor, site: _Site, streams: Tensor) -> Tensor:
        return self._rounding.act(self.kernels.hc_merge(output, site.post_TS, site.comb_TSS, streams))

    def _linear(self, x: Tensor, weight_NK: Tensor) -> Tensor:
        return self.kernels.linear(x, weight_NK, self.exact)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._rounding.act(self.kernels.rms_norm(x, weight, self.config.norm_eps))

    def _head(self, streams_RSD: Tensor, weights: HyperWeights, norm: Tensor) -> Tensor:
        mix = self._linear(streams_RSD.flatten(1), weights.fn)
        y = self.kernels.hc_collapse(
            mix, streams_RSD, weights.scale, weights.base, self.config.hc_eps, self.config.norm_eps
        )
        return self._linear(self._norm(self._rounding.act(y), norm), self.weights.head)


@dataclass(frozen=True, slots=True)
class _Site:
    """One hyper-connection site of one pass."""

    x_TD: Tensor
    post_TS: Tensor
    comb_TSS: Tensor

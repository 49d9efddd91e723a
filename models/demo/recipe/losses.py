"""What training minimises: next tokens, the MTP block's drafts, and the distance of the indexer from dense attention.

`TrainStep` runs one batch of sequences through the engine's own model and adds the losses up. It holds no weights.
Shapes: T rows (tokens of all sequences), V vocabulary, H heads, Hi index heads, P sampled queries, n compressed rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.batch import BatchSegment, RaggedBatch, build_batch
from engine.model.context import IndexQueries
from engine.model.forward import Model
from engine.model.fresh import FreshState
from kvstore.layout import Component
from rorqual.model_config import ModelConfig

INDEXER_QUERIES = 32
"""Queries of a sequence on which the indexer is compared with dense attention."""


class Sequenced(Protocol):
    """One training sequence."""

    @property
    def tokens(self) -> Tensor:
        """i64 [L]."""
        ...

    @property
    def weights(self) -> Tensor:
        """f32 [L]: how much predicting each token counts. The first is 0."""
        ...

    @property
    def answers(self) -> Tensor:
        """bool [L]: the tokens of answers to recall questions."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    draft_weight: float = 0.3
    indexer_weight: float = 0.0  # 0: the indexer is not trained, nothing is computed for it
    second_draft: bool = False  # also train the MTP block on its own streams, as it makes further drafts


@dataclass(slots=True)
class Measures:
    """Sums over rows of one or more batches, to be divided by their weights."""

    sums: dict[str, float] = field(default_factory=lambda: {})
    counts: dict[str, float] = field(default_factory=lambda: {})

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    loss: Tensor
    measures: Measures
    expert_loads: dict[int, Tensor]  # f32 [E] by layer: share of the rows' picks; -1 is the MTP block


def train_step(
    model: Model, sequences: Sequence[Sequenced], options: LossOptions, generator: torch.Generator
) -> StepResult:
    """The losses of one batch with their graph. `model` must have differentiable kernels and rounding."""
    segments = [(index, 0, sequence.tokens) for index, sequence in enumerate(sequences)]
    batch, placed = build_batch(segments, decode_together=False)
    order = sorted(range(len(sequences)), key=lambda index: placed[index].row)
    weights_T = torch.cat([sequences[index].weights for index in order])
    answers_T = torch.cat([sequences[index].answers for index in order])
    state = FreshState(model.config, batch)
    observer = _Watch(model.config, batch, state, options, generator, answers_T)
    run = model.begin(batch, state, observer=observer)
    streams = model.streams(run)
    logits = model.logits(streams)

    measures = Measures()
    following = _following(batch)
    next_T, next_weights = batch.tokens_T[following], weights_T[following] * _inside(batch, 1)
    losses = functional.cross_entropy(logits, next_T, reduction="none")
    loss = (losses * next_weights).sum() / next_weights.sum().clamp(min=1)
    _measure(measures, logits.detach(), losses.detach(), next_T, next_weights, answers_T[following])
    if model.weights.mtp:
        loss = loss + options.draft_weight * _draft_loss(
            model, batch, state, observer, streams, logits.detach(), weights_T, measures, options
        )
    if observer.divergences:
        divergence = torch.stack(observer.divergences).mean()
        loss = loss + options.indexer_weight * divergence
        measures.add("indexer", float(divergence.detach()), 1)
    return StepResult(loss=loss, measures=measures, expert_loads=observer.loads)


def _draft_loss(
    model: Model,
    batch: RaggedBatch,
    state: FreshState,
    observer: _Watch,
    streams: Tensor,
    logits: Tensor,
    weights_T: Tensor,
    measures: Measures,
    options: LossOptions,
) -> Tensor:
    """Index t has the streams of t and the token t+1. Half of its target is the token at t+2; the other half is the
    model's own distribution there, which is what drafts are judged by.

    For further drafts the block gets its own streams of index t-1 in place of the model's at t, and the same targets.
    (When serving, only the newest rows of its window are of that kind; here all are.)
    """
    following = _following(batch)
    tokens = batch.tokens_T[following]
    second = following[following]
    inside = _inside(batch, 2)
    weights = (weights_T[second] + 0.05) * inside
    prose = inside * (weights_T[second] == 1.0)
    own = logits[following]
    own_shares = own.softmax(-1)
    observer.in_mtp = True

    def judged(drafted: Tensor, name: str) -> Tensor:
        hard = functional.cross_entropy(drafted, batch.tokens_T[second], reduction="none")
        soft = -(own_shares * functional.log_softmax(drafted, dim=-1)).sum(-1)
        agree = (drafted.detach().argmax(-1) == own.argmax(-1)).float()
        measures.add(name, float((agree * prose).sum()), float(prose.sum()))
        return ((0.5 * hard + 0.5 * soft) * weights).sum() / weights.sum().clamp(min=1)

    made = model.draft(model.begin(batch, state, observer=observer), 0, streams, tokens)
    loss = judged(model.draft_logits(0, made), "draft agreement")
    if options.second_draft:
        shifted = torch.cat((streams[:1], made[:-1]))
        firsts = [segment.row for segment in batch.chunks]
        shifted = shifted.index_copy(0, torch.tensor(firsts), streams[firsts])
        again = model.draft(model.begin(batch, state, observer=observer), 0, shifted, tokens)
        loss = 0.7 * loss + 0.5 * judged(model.draft_logits(0, again), "second draft agreement")
    return loss


def _measure(
    measures: Measures, logits: Tensor, losses: Tensor, next_T: Tensor, weights_T: Tensor, answers_T: Tensor
) -> None:
    measures.add("loss", float((losses * weights_T).sum()), float(weights_T.sum()))
    prose = (weights_T == 1.0).float()
    measures.add("prose nats", float((losses * prose).sum()), float(prose.sum()))
    asked = answers_T & (weights_T > 0)
    right = (logits.argmax(-1) == next_T) & asked
    measures.add("recall", float(right.sum()), float(asked.sum()))


def _following(batch: RaggedBatch) -> Tensor:
    """The row of each row's next token; a sequence's last row points at itself."""
    rows = torch.arange(batch.tokens_T.shape[0]) + 1
    for segment in batch.chunks:
        rows[segment.row + segment.count - 1] = segment.row + segment.count - 1
    return rows


def _inside(batch: RaggedBatch, distance: int) -> Tensor:
    """f32 [T]: 1 where the token `distance` further is still of the same sequence."""
    inside = torch.ones(batch.tokens_T.shape[0])
    for segment in batch.chunks:
        inside[max(segment.row, segment.row + segment.count - distance) : segment.row + segment.count] = 0
    return inside


class _Watch:
    """The pass's observer: compares the indexer with dense attention, counts the experts' rows."""

    def __init__(
        self,
        config: ModelConfig,
        batch: RaggedBatch,
        state: FreshState,
        options: LossOptions,
        generator: torch.Generator,
        answers_T: Tensor,
    ) -> None:
        self.divergences: list[Tensor] = []
        self.loads: dict[int, Tensor] = {}
        self.in_mtp = False
        self._config = config
        self._batch = batch
        self._state = state
        self._options = options
        self._generator = generator
        self._answers = answers_T

    def routed(self, layer: int, experts_TK: Tensor) -> None:
        counts = torch.bincount(experts_TK.flatten(), minlength=self._config.num_experts).float()
        self.loads[-1 if self.in_mtp else layer] = counts / counts.sum()

    def sparse(self, layer: int, q_THd: Tensor, kv_Td: Tensor, index: IndexQueries) -> None:
        if self._options.indexer_weight == 0:
            return
        ratio = self._config.layers[layer].ratio
        for segment in self._batch.chunks:
            num_rows = segment.count // ratio
            # A query that sees no more than index_topk rows has no choice to learn.
            least = min(segment.count - 1, 16 * ratio)
            span = segment.count - least
            if num_rows < 2 or span < 1:
                continue
            positions = self._sampled(segment, least)
            entries = torch.arange(num_rows)
            rows = self._state.chunk_rows(Component.C4, layer, segment, entries)
            index_rows = self._state.chunk_rows(Component.C4_INDEX, layer, segment, entries)
            hidden = entries >= ((positions + 1) // ratio).unsqueeze(-1)
            at = segment.row + positions
            window = _window_rows(kv_Td[segment.rows].detach(), positions, self._config.sliding_window)
            teacher = _dense_shares(q_THd[at].detach(), rows.detach(), hidden, window)
            dots = torch.relu(torch.einsum("phd,nd->phn", index.q_THd[at], index_rows))
            scores = (index.weights_TH[at].unsqueeze(-1) * dots).sum(1).masked_fill(hidden, -1e9)
            student = functional.log_softmax(scores, dim=-1)
            divergence = (teacher * ((teacher + 1e-9).log() - student)).sum(-1)
            self.divergences.append(divergence.mean())

    def _sampled(self, segment: BatchSegment, least: int) -> Tensor:
        """Queries of a segment, beyond `least`: those that predict answers first, since there the choice of rows
        matters most, but for half of them any."""
        span = segment.count - least
        shuffled = least + torch.randperm(span, generator=self._generator)
        following = (segment.row + shuffled + 1).clamp(max=segment.row + segment.count - 1)
        asked = self._answers[following]
        first = shuffled[asked][: INDEXER_QUERIES // 2]
        return torch.cat((first, shuffled[: INDEXER_QUERIES - len(first)]))


def _window_rows(kv_Ld: Tensor, positions_P: Tensor, size: int) -> Tensor:
    """Raw rows that each query sees, f32 [P, size, d]. All sampled positions are at least `size - 1`."""
    return kv_Ld[positions_P.unsqueeze(-1) - torch.arange(size)]


def _dense_shares(q_PHd: Tensor, rows_nd: Tensor, hidden_Pn: Tensor, window_Pwd: Tensor) -> Tensor:
    """Each compressed row's share of the attention that dense attention gives to compressed rows, summed over heads:
    f32 [P, n]. Heads that look at the raw window count for little. (The teacher of DeepSeek-V3.2's indexer.)"""
    scale = q_PHd.shape[-1] ** -0.5
    far = torch.einsum("phd,nd->phn", q_PHd, rows_nd) * scale
    near = torch.einsum("phd,pwd->phw", q_PHd, window_Pwd) * scale
    far = far.masked_fill(hidden_Pn.unsqueeze(1), -torch.inf)
    shares = torch.cat((far, near), dim=-1).softmax(-1)[..., : rows_nd.shape[0]].sum(1)
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-9)

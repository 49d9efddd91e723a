"""The start-up self-test of exact mode: is this machine's arithmetic independent of the batch, with these weights?

Exact mode rests partly on properties of the matrix library that no document promises: in attention and indexer
products a row does not depend on how many other rows there are, from four rows up. So they are measured on the very
weights that will serve, before they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.model.forward import Model
from engine.runner import Runner, SegmentTokens
from kvstore.layout import DRAFTS_MAX
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS

PROBE_TOKENS = 300
"""Crosses a window and a page and finishes rows of every compressor."""

PROBE_TOPK = 16
"""The indexer has to choose within the probe, whatever the model's own top-k."""


class NotExact(RorqualError):
    """This machine cannot give what --exact promises."""


def check_exactness(model: Model) -> None:
    """Raise NotExact unless one sequence's logits are the same bits whole, cut up, among others, and computed a few
    single tokens at once, as drafts are."""
    config = replace(model.config, index_topk=min(model.config.index_topk, PROBE_TOPK))
    probe = Model(config, model.weights, numerics=model.numerics, kernels=model.kernels, exact=model.exact)
    num_tokens = min(PROBE_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, num_tokens), generator=generator)
    whole = _run(probe, tokens, cuts=(num_tokens,), companion=())
    for cuts, companion, decodes_max in (
        ((3, 60, 1, 1, 70, 100), (), 1),
        ((125, 1, 1, 1, 127, 1, 1), (7, 1, 1, 90, 1, 1, 1), 1),
        ((253, *[DRAFTS_MAX + 1] * 6), (9, 1, 1, 1), DRAFTS_MAX + 1),
    ):
        every_cut = _fill(cuts, num_tokens)
        cut = _run(probe, tokens, cuts=every_cut, companion=companion, decodes_max=decodes_max)
        if not torch.equal(whole, cut):
            position = int((whole != cut).any(-1).nonzero()[0])
            raise NotExact(
                f"exact mode is not possible here: logits of token {position} depend on how the prompt is cut "
                f"(segments of {', '.join(map(str, every_cut))} tokens); run without --exact"
            )


def _fill(cuts: Sequence[int], num_tokens: int) -> list[int]:
    """The cuts that fit, then the rest in one."""
    fitting: list[int] = []
    for cut in cuts:
        if sum(fitting) + cut < num_tokens:
            fitting.append(cut)
    return [*fitting, num_tokens - sum(fitting)]


def _run(
    model: Model, tokens_2N: Tensor, *, cuts: Sequence[int], companion: Sequence[int], decodes_max: int = 1
) -> Tensor:
    """Logits of every token of the first sequence, cut as told; the second runs in the same batches. Up to
    `decodes_max` tokens of the first are computed as decodes, more as a chunk."""
    num_pages = -(-PROBE_TOKENS // PAGE_TOKENS)
    runner = Runner(model, num_pages=2 * num_pages, num_slots=2)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, range(slot * num_pages, (slot + 1) * num_pages))
    logits: list[Tensor] = []
    starts = [0, 0]
    for index, count in enumerate(cuts):
        counts = [count, companion[index] if index < len(companion) else 0]
        mine, theirs = (
            _work(slot, starts[slot], tokens_2N[slot, starts[slot] :][:size], decodes_max=decodes)
            for slot, size, decodes in zip(range(2), counts, (decodes_max, 1), strict=True)
        )
        logits += runner.run([*mine, *theirs])[: len(mine)]
        starts = [start + size for start, size in zip(starts, counts, strict=True)]
    return torch.cat(logits)


def _work(slot: int, start: int, tokens_N: Tensor, *, decodes_max: int) -> list[SegmentTokens]:
    """So many single tokens, or one chunk; nothing of no tokens."""
    if len(tokens_N) == 0:
        return []
    parts = tokens_N.split(1) if len(tokens_N) <= decodes_max else (tokens_N,)
    return [
        SegmentTokens(slot=slot, start=start + index, tokens=part, all_logits=True)
        for index, part in enumerate(parts)
    ]

"""The first forward of everything, before the first request: kernels are compiled, and memory is touched, once.

Called by `engine.rank_process` while it loads, with pools of its own that are gone afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.model.forward import Model
from engine.rank_transfer import PageDigest
from engine.runner import Runner, SegmentTokens
from rorqual.model_config import PAGE_TOKENS


@torch.inference_mode()
def warm_up(model: Model, page_digest: PageDigest, *, drafts: bool) -> None:
    """Compute one chunk, then a decode beside a chunk, each followed by the drafts' block with `drafts`. With a small
    top-k, so that the indexer has to choose too."""
    config = replace(model.config, index_topk=1)
    model = Model(config, model.weights, numerics=model.numerics, kernels=model.kernels, exact=model.exact)
    runner = Runner(model, num_pages=2, num_slots=2, drafts=drafts)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, [slot])
    count = max(min(PAGE_TOKENS - 2, config.max_position_embeddings - 2), 1)
    tokens = torch.arange(count + 1) % config.vocab_size
    for work in (
        [SegmentTokens(slot=0, start=0, tokens=tokens[:count])],
        [
            SegmentTokens(slot=0, start=count, tokens=tokens[:1]),
            SegmentTokens(slot=1, start=0, tokens=tokens[:8]),
        ],
    ):
        streams, _ = runner.streams(work)
        model.logits(streams[-1:])
        if drafts:
            runner.advance_drafts(work, streams)
        runner.keep_streams(streams)
    runner.kept_streams([0], [count])
    if drafts:
        model.draft_logits(0, streams[-1:])
    page_digest(torch.zeros((1, 4), dtype=torch.uint8), torch.tensor([0]))

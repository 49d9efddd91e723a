"""The start-up self-test of exact mode: is this machine's arithmetic independent of the batch, with these weights?

Exact mode rests on properties of the matrix library that no document promises (rows of a product do not depend on how
many other rows there are, from four rows up). So they are measured on the very model that will serve, before it does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.forward import Model
from engine.runner import Runner, Work
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS

PROBE_TOKENS = 150
"""Long enough to cross a window of 128 and to finish a row of every compressor."""


class NotExact(RorqualError):
    """This machine cannot give what --exact promises."""


def check_exactness(model: Model) -> None:
    """Raise NotExact unless one sequence's logits are the same bits whole, cut up, and among others."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, PROBE_TOKENS), generator=generator)
    whole = _probe(model, tokens, cuts=(PROBE_TOKENS,), together=False)
    for cuts, together in (((3, 60, 1, 1, 70), False), ((125, 1, 1, 1), True)):
        rest = PROBE_TOKENS - sum(cuts)
        cut = _probe(model, tokens, cuts=(*cuts, rest), together=together)
        if not torch.equal(whole, cut):
            position = int((whole != cut).any(-1).nonzero()[0])
            raise NotExact(
                f"exact mode is not possible here: logits of token {position} depend on how the prompt is cut "
                f"(pieces of {', '.join(map(str, (*cuts, rest)))} tokens); run without --exact"
            )


def _probe(model: Model, tokens_2N: Tensor, *, cuts: Sequence[int], together: bool) -> Tensor:
    """Logits of every token of the first sequence; `together` runs the second one, out of step, in the same batches."""
    num_pages = -(-PROBE_TOKENS // PAGE_TOKENS)
    runner = Runner(model, num_pages=2 * num_pages, num_slots=2)
    for slot in range(2):
        runner.open(slot)
        runner.extend(slot, range(slot * num_pages, (slot + 1) * num_pages))
    logits: list[Tensor] = []
    start = 0
    for index, count in enumerate(cuts):
        work = [Work(slot=0, start=start, tokens=tokens_2N[0, start : start + count], all_logits=True)]
        if together:
            work.append(Work(slot=1, start=7 * index, tokens=tokens_2N[1, 7 * index : 7 * index + 7]))
        logits.append(runner.run(work)[0])
        start += count
    return torch.cat(logits)

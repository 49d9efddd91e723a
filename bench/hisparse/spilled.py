"""What a step costs when everybody is spilled, by the rows of a hot buffer: beside the same step with all rows there.

Workers in one process compute the same requests in turn; with an exact model they answer alike, to the token. The
trained demo model picks, since all depends on what a step picks again of the steps before; with a larger top-k than it
was trained with, so that hot buffers of one to sixteen times the picks can be told apart (a page holds 64 rows). Called
by `bench.hisparse.command`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.hisparse.resident import Work, decode_seconds, start
from bench.hisparse.worker import Sizes, Worker, layout_of
from bench.pairs import Ratio, ratio_of
from engine.checkpoint.reader import open_checkpoint
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.model.weights import allocate_weights
from engine.rank_budget import HotBudget
from engine.worker.tiers.hisparse import HiSparseCounts
from kvstore.hisparse import NEWEST_PAGES, hot_shape
from kvstore.layout import Component, Descriptor, Numerics
from rorqual.demo import TRAINED
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray
from router.prompt import PromptEncoder

TOPK = 64
WORDS = (
    *("Emma", "Elizabeth", "the captain", "her mother", "Mr. Knightley", "the whole party", "a stranger"),
    *("walked to", "spoke of", "remembered", "could not think of", "wrote about", "laughed at", "left"),
    *("the garden", "a letter from Bath", "the ball", "her sister", "the weather", "Highbury", "the sea"),
)
"""Seven each: who, what, whom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """Of one size of hot buffers."""

    num_hot: int  # rows a layer
    seconds: float  # CPU, of a decode step of all requests, all rows there
    ratio: Ratio  # of that when all are spilled
    rows_wanted: float  # that are in host memory, by a request in a layer and step
    rows_missed: float
    useful: float  # of the last picks, which a spill brings in ahead: the share that was wanted in time
    wasted: float  # evicted before

    @property
    def hit_rate(self) -> float:
        return 1 - self.rows_missed / self.rows_wanted if self.rows_wanted else 1.0


def trained_model(*, topk: int = TOPK, exact: bool = False) -> Model:
    """The demo model, served numerics."""
    checkpoint = open_checkpoint(TRAINED)
    weights = allocate_weights(checkpoint.config)
    checkpoint.load_into(weights.named.__getitem__)
    config = replace(checkpoint.config, index_topk=topk)
    return Model(config, weights, numerics=Numerics.SERVED, kernels=choose_kernels(), exact=exact)


def texts(count: int, length: int, *, seed: int = 1) -> list[TokenArray]:
    """Prompts of so many tokens, of sentences as the model has learned them."""
    encoder, draw = PromptEncoder.from_model_dir(TRAINED), random.Random(seed)
    found: list[TokenArray] = []
    for _ in range(count):
        content, ids = "", list[int]()
        while len(ids) < length:
            for _ in range(40):
                content += " ".join(draw.choice(WORDS[first : first + 7]) for first in (0, 7, 14)) + ". "
            ids = encoder.encode_chat([{"role": "user", "content": content}]).ids
        found.append(np.array(ids[:length], dtype=np.int32))
    return found


def measure_spilled(
    model: Model, work: Work, sizes_hot: Sequence[int], *, num_pairs: int, num_steps: int
) -> list[Spilled]:
    """A row for each size of hot buffers, of `num_pairs` pairs of `num_steps` decode steps each."""
    resident = Worker(model, _sizes(model, work, None))
    start(resident, work)
    spilled = [Worker(model, _sizes(model, work, num_hot)) for num_hot in sizes_hot]
    for worker in spilled:
        start_spilled(worker, work)
    everybody = [resident, *spilled]
    longest = max(len(worker.answers[0]) for worker in everybody)
    for worker in everybody:
        while len(worker.answers[0]) < longest:
            worker.step()
    before = [replace(worker.state.counts) for worker in spilled]
    seconds: list[list[float]] = [[] for _ in everybody]
    for pair in range(num_pairs):
        for turn in range(len(everybody)):  # nobody is always first
            index = (pair + turn) % len(everybody)
            seconds[index].append(decode_seconds(everybody[index], num_steps))
    num_asked = num_pairs * num_steps * len(work.prompts) * len(_c4(model).layers)
    found = [
        _row(model, worker, counts, seconds[0], times, num_asked)
        for worker, counts, times in zip(spilled, before, seconds[1:], strict=True)
    ]
    for worker in everybody:
        worker.run()
    for worker in spilled:
        if model.exact:
            assert all(worker.answers[key] == answer for key, answer in resident.answers.items()), (
                "a spilled request answers differently"
            )
    return found


def _row(
    model: Model,
    worker: Worker,
    before: HiSparseCounts,
    seconds: Sequence[float],
    times: Sequence[float],
    num_asked: int,
) -> Spilled:
    counts = worker.state.counts
    assert worker.spilled is not None
    assert worker.state.num_spilled == worker.spilled.num_buffers, "somebody has come back"
    hits, misses = counts.rows_hit - before.rows_hit, counts.rows_missed - before.rows_missed
    num_ahead = worker.spilled.num_buffers * len(_c4(model).layers) * model.config.index_topk
    return Spilled(
        num_hot=worker.spilled.num_hot_pages * _c4(model).num_rows,
        seconds=statistics.median(seconds),
        ratio=ratio_of([time / base for time, base in zip(times, seconds, strict=True)]),
        rows_wanted=(hits + misses) / num_asked,
        rows_missed=misses / num_asked,
        useful=counts.rows_useful / num_ahead,
        wasted=counts.rows_wasted / num_ahead,
    )


def start_spilled(worker: Worker, work: Work) -> None:
    """Until all decode and all are spilled: room for one more, who then does not come."""
    start(worker, work)
    extra = worker.open(work.prompts[0][::-1].copy(), 2)
    while worker.state.num_spilled < len(work.prompts):
        assert worker.step() is not None, "nobody spills any more"
    worker.cancel(extra)


def _sizes(model: Model, work: Work, num_hot: int | None) -> Sizes:
    """Of a worker with all rows there, or with pages for one resident request beside what all keep when spilled."""
    num_requests = len(work.prompts)
    longest = max(len(prompt) for prompt in work.prompts) + work.num_generated
    num_pages = longest // PAGE_TOKENS + 1
    sizes = Sizes(
        num_pages=num_requests * num_pages,
        num_slots=num_requests + 1,
        num_host_pages=(num_requests + 2) * num_pages,
        prefill_tokens_max=work.prefill_tokens_max,
        many_pages=2.0,
    )
    if num_hot is None:
        return sizes
    config = model.config
    shape = hot_shape(
        layout_of(config),
        index_topk=config.index_topk,
        num_drafts=0,
        num_tokens_max=config.max_position_embeddings,
        num_hot=num_hot,
    )
    whole = shape.num_hot_pages(_c4(model).num_rows) + NEWEST_PAGES
    hot = HotBudget(
        shape=shape,
        num_buffers=num_requests,
        num_pages=num_requests * whole + num_pages,
        num_thin=num_requests * num_pages,
    )
    return replace(sizes, num_pages=hot.num_pages, hot=hot)


def _c4(model: Model) -> Descriptor:
    item = layout_of(model.config).find(Component.C4)
    assert item is not None
    return item

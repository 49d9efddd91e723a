"""Drives the engine's model over requests: any cutting into chunks, any company in the batch, any pages and slots.

A schedule is a list of steps; a step says how many tokens of which requests are computed together, so that every
request is computed from its first token on, in order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.batch import build_batch
from engine.model.context import PickHook
from engine.model.forward import Model
from engine.model.fresh import FreshState
from engine.pager import PagedState
from engine.runner import Runner, SegmentTokens
from kvstore.pages import pages_for
from tests.harness.picks import ForcedPicks, PickRecorder, Picks, Placed

Step = Sequence[tuple[int, int]]
"""(request, tokens) of everything that one forward computes; a request at most once."""

HookMaker = Callable[[Placed], PickHook]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    logits: list[Tensor]  # of each request, [N, V]
    picks: list[Picks]  # empty unless recorded


def in_turn(cuts: Sequence[Sequence[int]]) -> list[Step]:
    """Step i computes the i-th chunk of every request that has one."""
    longest = max(len(chunks) for chunks in cuts)
    return [
        [(request, chunks[index]) for request, chunks in enumerate(cuts) if index < len(chunks)]
        for index in range(longest)
    ]


def alone(length: int) -> list[Step]:
    return [[(0, length)]]


def random_schedule(
    lengths: Sequence[int], chance: random.Random, *, chunk_max: int | None = None
) -> list[Step]:
    """Requests join, rest and leave at random; about half of their steps are single tokens."""
    done = [0] * len(lengths)
    steps: list[Step] = []
    while done != list(lengths):
        open_requests = [request for request, length in enumerate(lengths) if done[request] < length]
        chosen = chance.sample(open_requests, chance.randint(1, len(open_requests)))
        step: list[tuple[int, int]] = []
        for request in chosen:
            left = lengths[request] - done[request]
            most = min(left, chunk_max or left)
            # A few whole prompts, many short chunks; runs of single tokens come from the second loop below.
            count = chance.choice((1, chance.randint(1, min(9, most)), chance.randint(1, most)))
            done[request] += count
            step.append((request, count))
        steps.append(step)
    return steps


def run_paged(
    model: Model,
    prompts: Sequence[Tensor],
    steps: Sequence[Step],
    *,
    chance: random.Random | None = None,
    poison: bool = False,
    record: bool = False,
    forced: Sequence[Picks] | None = None,
) -> Outcome:
    """All logits of all requests, over pools. `chance` scatters pages and slots; `poison` fills the pools with NaN."""
    num_pages = sum(pages_for(len(tokens)) for tokens in prompts) + 2
    pages, slots = list(range(num_pages)), list(range(len(prompts) + 1))
    if chance is not None:
        chance.shuffle(pages)
        chance.shuffle(slots)
    runner = Runner(model, num_pages=num_pages, num_slots=len(slots))
    if poison:
        runner.pools.fill(0xFF)
    for request in range(len(prompts)):
        runner.open(slots[request])
    picks = [Picks(model.config, len(tokens)) for tokens in prompts] if record else []
    done = [0] * len(prompts)
    held = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for step in steps:
        work: list[SegmentTokens] = []
        for request, count in step:
            first, last = done[request], done[request] + count
            while held[request] < pages_for(last):
                runner.extend(slots[request], [pages.pop()])
                held[request] += 1
            tokens = prompts[request][first:last]
            work.append(SegmentTokens(slot=slots[request], start=first, tokens=tokens, all_logits=True))
            done[request] = last
        hook = _hook(model, [request for request, _ in step], work, picks, forced)
        for (request, _), part in zip(step, runner.run(work, hook=hook), strict=True):
            logits[request].append(part)
    assert done == [len(tokens) for tokens in prompts], "the schedule does not fit the prompts"
    return Outcome(logits=[torch.cat(parts).clone() for parts in logits], picks=picks)


def _hook(
    model: Model,
    requests: Sequence[int],
    work: Sequence[SegmentTokens],
    picks: Sequence[Picks],
    forced: Sequence[Picks] | None,
) -> PickHook | None:
    """Where the runner will lay the work out is a pure function of the work."""
    if not picks and forced is None:
        return None
    segments = [(item.slot, item.start, item.tokens) for item in work]
    _, places = build_batch(segments)
    placed = list(zip(requests, places, strict=True))
    return PickRecorder(model.kernels, placed, picks) if forced is None else ForcedPicks(placed, forced)


def run_fresh(model: Model, prompts: Sequence[Tensor], *, record: bool = False) -> Outcome:
    """All logits of whole prompts without any paged state, in one batch. Autograd flows if the caller lets it."""
    segments = [(request, 0, tokens) for request, tokens in enumerate(prompts)]
    batch, places = build_batch(segments, decode_together=False)
    picks = [Picks(model.config, len(tokens)) for tokens in prompts] if record else []
    hook = PickRecorder(model.kernels, list(enumerate(places)), picks) if record else None
    state = FreshState(model.config, batch)
    streams = model.streams(model.begin(batch, state, hook=hook))
    return Outcome(logits=[model.logits(streams[place.rows]) for place in places], picks=picks)


def run_drafting(
    model: Model, prompts: Sequence[Tensor], steps: Sequence[Step]
) -> list[tuple[Tensor, Tensor]]:
    """The MTP block beside the main model, batch by batch: index t reads the streams at t and the token at t+1, so
    every prompt is one token longer than its schedule. Logits [N, V] and streams [N, S, D] of each request."""
    drafting = Drafting(model, num_requests=len(prompts), tokens_max=max(len(tokens) for tokens in prompts))
    done = [0] * len(prompts)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in prompts]
    for step in steps:
        segments = [
            (request, done[request], prompts[request][done[request] :][: count + 1])
            for request, count in step
        ]
        for (request, count), part in zip(step, drafting.run(segments), strict=True):
            found[request].append(part)
            done[request] += count
    return [
        (torch.cat([logits for logits, _ in parts]), torch.cat([streams for _, streams in parts]))
        for parts in found
    ]


class Drafting:
    """A runner whose batches go on through MTP block 0. Slot and request are the same number."""

    def __init__(self, model: Model, *, num_requests: int, tokens_max: int) -> None:
        pages = pages_for(tokens_max)
        self._model = model
        self._runner = Runner(model, num_pages=num_requests * pages, num_slots=num_requests)
        self._runner.pools.fill(0xFF)
        for slot in range(num_requests):
            self._runner.open(slot)
            self._runner.extend(slot, range(slot * pages, (slot + 1) * pages))

    def run(self, segments: Sequence[tuple[int, int, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Main model and MTP block over tokens start .. of (slot, start, tokens), the last of which is only drafted
        from. Draft logits and streams of each segment."""
        work = [
            SegmentTokens(slot=slot, start=start, tokens=tokens[:-1], all_logits=True)
            for slot, start, tokens in segments
        ]
        streams, _ = self._runner.streams(work)
        return self.draft(segments, streams)

    def draft(
        self, segments: Sequence[tuple[int, int, Tensor]], streams_TSD: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """The MTP block alone, over given streams in the layout of the segments' batch."""
        model = self._model
        batch, places = build_batch([(slot, start, tokens[:-1]) for slot, start, tokens in segments])
        next_tokens = torch.zeros(len(batch.tokens_T), dtype=torch.int64)
        for (_, _, tokens), place in zip(segments, places, strict=True):
            next_tokens[place.rows] = tokens[1:]
        state = PagedState(model.config, self._runner.tables, batch, kernels=model.kernels, exact=model.exact)
        with torch.inference_mode():
            drafted = model.draft(model.begin(batch, state), 0, streams_TSD, next_tokens)
            return [(model.draft_logits(0, drafted[place.rows]), drafted[place.rows]) for place in places]

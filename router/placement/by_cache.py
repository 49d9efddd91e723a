"""Placement that knows what workers keep, for the router's dispatch: it shows a policy the fleet, and takes its word.

Called by `router.dispatch` through `Placement`. The rules of credit stay what they are in `least_wait`: a decode worker
is charged first, and it is not on the way to the first token. Which worker computes the prompt is the policy's to say
(`router.placement.cache`). Where nobody is known to keep anything, a policy has load alone to go by. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvstore.keys import PageKey
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Role
from router.placement.cache import (
    CacheDemand,
    CachePlacement,
    Decision,
    FleetPicture,
    Float64s,
    Found,
    Int32s,
)
from router.placement.least_wait import (
    Demand,
    Predicted,
    Split,
    Whole,
    WorkerView,
    busyness,
    decode_worker,
    of_role,
    seconds_until_place,
    tokens_ahead,
)
from router.placement.predictions import Predictions

WORK_KEPT = 0.999
"""Of what workers have been given, after each prompt: the last thousand count."""


class Reach(Protocol):
    """How far every worker's cache reaches into one prompt: `router.picture.Found`."""

    @property
    def pages_W(self) -> Int32s: ...

    @property
    def tail_W(self) -> Int32s: ...


class Caches(Protocol):
    """What all workers keep: `router.picture.Picture`."""

    def look_up(self, keys: Sequence[PageKey]) -> Reach: ...


class ByCache:
    """A policy with the state it needs between two prompts."""

    uses_keys = True

    def __init__(self, policy: CachePlacement, *, caches: Caches, predictions: Predictions) -> None:
        self._policy = policy
        self._caches = caches
        self._predictions = predictions
        self._work_seconds: dict[int, float] = {}  # given to each worker lately, by index
        self._next_number = 1

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> Whole | Split | None:
        found = self._look_up(demand)
        decode = decode_worker(workers, demand, held=_shares(found, demand))
        able = of_role(workers, Role.BOTH)
        if decode is not None:
            able += of_role(workers, Role.PREFILL)
        if not able:
            # Nobody computes a prompt before a decode worker has room for it: who does is chosen then.
            waiting = of_role(workers, Role.PREFILL) if of_role(workers, Role.DECODE) else []
            return Split(prefill=min(waiting, key=busyness), decode=None) if waiting else None
        decision, predicted = self._decide(able, demand, found, learn_from=workers)
        chosen = next(view for view in able if view.index == decision.prefill)
        if chosen.role is Role.BOTH:
            return Whole(worker=chosen, predicted=predicted)
        return Split(prefill=chosen, decode=decode, predicted=predicted)

    def finished(self, predicted: Predicted) -> None:
        self._policy.finished(predicted.number)

    def _decide(
        self,
        able: Sequence[WorkerView],
        demand: Demand,
        found: Found,
        *,
        learn_from: Sequence[WorkerView],
    ) -> tuple[Decision, Predicted]:
        self._predictions.learn(learn_from)
        factors = self._predictions.factors(able)
        number = self._next_number
        self._next_number += 1
        request = CacheDemand(
            number=number,
            keys=next(iter(demand.keys.values()), ()),
            num_tokens=demand.prompt_tokens,
            session=demand.session,
        )
        decision = self._policy.choose(self._picture(able, factors, found), request)
        tokens_reused = min(decision.resume * PAGE_TOKENS, demand.prompt_tokens - 1)
        factor = next(f for view, f in zip(able, factors, strict=True) if view.index == decision.prefill)
        work = self._predictions.model.work_seconds(demand.prompt_tokens - tokens_reused, tokens_reused)
        self._note_work(decision.prefill, float(work) * factor)
        return decision, Predicted(
            number=number, tokens_reused=tokens_reused, seconds=decision.predicted_seconds
        )

    def _look_up(self, demand: Demand) -> Found:
        """Of chains that begin at different roots a worker has one at most."""
        reaches = [self._caches.look_up(keys) for keys in demand.keys.values()]
        reaches = reaches or [self._caches.look_up(())]
        return Found(
            pages_W=np.maximum.reduce([item.pages_W for item in reaches]),
            tail_W=np.maximum.reduce([item.tail_W for item in reaches]),
        )

    def _picture(self, able: Sequence[WorkerView], factors: Sequence[float], found: Found) -> FleetPicture:
        count = len(found.pages_W)
        index_V = np.array([view.index for view in able])

        def ints(values: Sequence[int]) -> Int32s:
            array = np.zeros(count, np.int32)
            array[index_V] = values
            return array

        def floats(values: Sequence[float], other: float = 0.0) -> Float64s:
            array = np.full(count, other)
            array[index_V] = values
            return array

        can_prefill_W = np.zeros(count, np.bool_)
        can_prefill_W[index_V] = True
        ahead = [tokens_ahead(view) for view in able]
        token_seconds = self._predictions.token_seconds
        wait = [
            tokens * token_seconds * factor + seconds_until_place(view)
            for view, tokens, factor in zip(able, ahead, factors, strict=True)
        ]
        work = [self._work_seconds.get(view.index, 0.0) for view in able]
        return FleetPicture(
            caches=_Looked(found),
            can_prefill_W=can_prefill_W,
            can_decode_W=np.zeros(count, np.bool_),
            draining_W=np.zeros(count, np.bool_),
            wait_seconds_W=floats(wait),
            queued_tokens_W=floats(ahead),
            sequences_W=ints([view.sequences_outstanding for view in able]),
            active_pages_W=ints([view.prompt_tokens_sent // PAGE_TOKENS for view in able]),
            pages_free_W=ints([view.load.pages_free for view in able]),
            tree_pages_W=ints([view.pages_cached for view in able]),
            decode_sequences_W=np.zeros(count, np.int32),
            # Who cannot be given anything is not behind with its work.
            work_seconds_W=floats(work, other=max(work)),
            slowness_W=floats(factors, other=1.0),
            readable_W=np.zeros(count, np.bool_),
        )

    def _note_work(self, index: int, seconds: float) -> None:
        """Balances what workers do over time. One that is new begins with as much as the least busy one."""
        work = self._work_seconds
        if index not in work:
            work[index] = min(work.values(), default=0.0)
        for each in work:
            work[each] *= WORK_KEPT
        work[index] += seconds


class _Looked:
    """What was looked up already."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        return Found(pages_W=self._found.pages_W.copy(), tail_W=self._found.tail_W.copy())


def _shares(found: Found, demand: Demand) -> dict[int, float]:
    """By index: what share of the prompt's pages a worker has, and need not read."""
    num_pages = max(1, demand.prompt_tokens // PAGE_TOKENS)
    return {int(index): float(found.pages_W[index]) / num_pages for index in np.flatnonzero(found.pages_W)}

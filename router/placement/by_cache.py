"""Placement that knows what workers keep, for the router's dispatch: it shows a policy the fleet, and takes its word.

Called by `router.dispatch` through `Placement`. The rules of credit stay what they are in `least_wait`: a decode worker
is charged first, and it is not on the way to the first token. Which worker computes the prompt is the policy's to say
(`router.placement.cache`). Where nobody is known to keep anything, a policy has load alone to go by. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from kvstore.keys import PageKey
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import PeerFetch, Role
from router.placement.cache import (
    CacheDemand,
    CachePlacement,
    Decision,
    FleetPicture,
    Found,
    Int32s,
    MeasuredSpeeds,
    Source,
)
from router.placement.columns import Bools, FleetColumns, Float64s
from router.placement.least_wait import Demand, Predicted, Split, Whole, decode_worker
from router.placement.predictions import Predictions

WORK_KEPT = 0.999
"""Of what workers have been given, after each prompt: the last thousand count."""


FETCH_SECONDS_MIN, FETCH_SECONDS_MAX = 0.5, 10.0
"""Bounds on how long a prompt waits for what is read from another worker."""


class Reach(Protocol):
    """How far every worker's cache reaches into one prompt: `router.picture.Found`."""

    @property
    def pages_W(self) -> Int32s: ...

    @property
    def tail_W(self) -> Int32s: ...

    @property
    def device_pages_W(self) -> Int32s: ...

    @property
    def device_tail_W(self) -> Int32s: ...


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
        self._work_W = np.zeros(0)  # seconds given to each worker lately
        self._has_worked_W = np.zeros(0, np.bool_)
        self._next_number = 1

    def choose(self, fleet: FleetColumns, able_W: Bools, demand: Demand) -> Whole | Split | None:
        found = self._look_up(demand, num_rows=fleet.num_rows)
        held_W = found.pages_W / max(1, demand.prompt_tokens // PAGE_TOKENS)
        decode = decode_worker(fleet, able_W, demand, held_W=held_W)
        can_W = able_W & fleet.both_W
        if decode >= 0:
            can_W |= able_W & fleet.prefill_W
        if not can_W.any():
            # Nobody computes a prompt before a decode worker has room for it: who does is chosen then.
            waiting_W = able_W & fleet.prefill_W
            if not waiting_W.any() or not (able_W & fleet.decode_W).any():
                return None
            return Split(prefill=fleet.view(fleet.least_busy(waiting_W)), decode=None)
        decision, predicted = self._decide(fleet, able_W, can_W, demand, found)
        chosen = fleet.view(decision.prefill)
        if chosen.role is Role.BOTH:
            return Whole(worker=chosen, predicted=predicted)
        return Split(prefill=chosen, decode=fleet.view(decode), predicted=predicted)

    def finished(self, predicted: Predicted) -> None:
        self._policy.finished(predicted.number)

    def _decide(
        self, fleet: FleetColumns, able_W: Bools, can_W: Bools, demand: Demand, found: Found
    ) -> tuple[Decision, Predicted]:
        self._predictions.learn(fleet, able_W)
        factor_W = self._predictions.factors_W(fleet, can_W)
        number = self._next_number
        self._next_number += 1
        request = CacheDemand(
            number=number,
            keys=next(iter(demand.keys.values()), ()),
            num_tokens=demand.prompt_tokens,
            session=demand.session,
        )
        decision = self._policy.choose(self._picture(fleet, able_W, can_W, factor_W, found), request)
        assert can_W[decision.prefill], "a policy chose a worker that may not be given a prompt"
        tokens_reused = min(decision.resume * PAGE_TOKENS, demand.prompt_tokens - 1)
        work = self._predictions.model.work_seconds(demand.prompt_tokens - tokens_reused, tokens_reused)
        self._note_work(decision.prefill, float(work) * float(factor_W[decision.prefill]))
        return decision, Predicted(
            number=number,
            tokens_reused=tokens_reused,
            seconds=decision.predicted_seconds,
            fetch=self._fetch(decision, fleet),
        )

    def _fetch(self, decision: Decision, fleet: FleetColumns) -> PeerFetch | None:
        """What the chosen worker is to read, and for how long it may wait for it: several times what is predicted, and
        no longer than computing the same would take."""
        plan = decision.fetch
        peer = plan.peer
        if peer < 0:
            return None
        wants_tail = plan.tail_source is Source.PEER
        reach = max((span.first + span.count for span in plan.spans if span.source is Source.PEER), default=0)
        num_pages = max(reach, decision.resume if wants_tail else 0)
        seconds = num_pages * PAGE_TOKENS * self._predictions.token_seconds
        return PeerFetch(
            address=fleet.addresses[peer],
            num_pages=num_pages,
            wants_tail=wants_tail,
            seconds_max=min(max(seconds, FETCH_SECONDS_MIN), FETCH_SECONDS_MAX),
        )

    def _look_up(self, demand: Demand, *, num_rows: int) -> Found:
        """Of chains that begin at different roots a worker has one at most."""
        reaches = [self._caches.look_up(keys) for keys in demand.keys.values()]
        reaches = reaches or [self._caches.look_up(())]
        pages_W = np.maximum.reduce([item.pages_W for item in reaches])
        tail_W = np.maximum.reduce([item.tail_W for item in reaches])
        device_pages_W, device_tail_W = pages_W, tail_W
        if any(item.device_tail_W is not item.tail_W for item in reaches):
            device_pages_W = np.maximum.reduce([item.device_pages_W for item in reaches])
            device_tail_W = np.maximum.reduce([item.device_tail_W for item in reaches])
        stored = demand.stored
        found = Found(
            pages_W=pages_W,
            tail_W=tail_W,
            device_pages_W=device_pages_W,
            device_tail_W=device_tail_W,
            store_first=stored.first,
            store_pages=stored.pages,
            store_tail=stored.tail,
        )
        assert len(found.pages_W) == num_rows, "the picture of caches and the fleet have other workers"
        return found

    def _picture(
        self, fleet: FleetColumns, able_W: Bools, can_W: Bools, factor_W: Float64s, found: Found
    ) -> FleetPicture:
        self._grow(fleet.num_rows)
        ahead_W = fleet.tokens_ahead_W()
        nobody_W = np.zeros(fleet.num_rows, np.bool_)
        return FleetPicture(
            caches=_Looked(found),
            can_prefill_W=can_W,
            can_decode_W=nobody_W,
            draining_W=nobody_W,
            wait_seconds_W=ahead_W * self._predictions.token_seconds * factor_W
            + fleet.seconds_until_place_W(),
            queued_tokens_W=ahead_W.astype(np.float64),
            sequences_W=fleet.sequences_W.astype(np.int32),
            active_pages_W=(fleet.prompt_tokens_sent_W // PAGE_TOKENS).astype(np.int32),
            pages_free_W=fleet.pages_free_W.astype(np.int32),
            tree_pages_W=fleet.pages_cached_W.astype(np.int32),
            decode_sequences_W=np.zeros(fleet.num_rows, np.int32),
            # Who cannot be given anything is not behind with its work.
            work_seconds_W=np.where(can_W, self._work_W, self._work_W[can_W].max()),
            slowness_W=factor_W,
            readable_W=able_W & fleet.can_share_W,
            speeds={
                Source.PEER: MeasuredSpeeds(rate_W=fleet.peer_rate_W, latency_W=fleet.peer_latency_W),
                Source.HOST: MeasuredSpeeds(rate_W=fleet.host_rate_W, latency_W=fleet.host_latency_W),
                Source.STORE: MeasuredSpeeds(rate_W=fleet.store_rate_W, latency_W=fleet.store_latency_W),
            },
        )

    def _note_work(self, row: int, seconds: float) -> None:
        """Balances what workers do over time. One that is new begins with as much as the least busy one."""
        if not self._has_worked_W[row]:
            worked = self._work_W[self._has_worked_W]
            self._work_W[row] = worked.min() if len(worked) else 0.0
            self._has_worked_W[row] = True
        self._work_W *= WORK_KEPT
        self._work_W[row] += seconds

    def _grow(self, num_rows: int) -> None:
        num_more = num_rows - len(self._work_W)
        if num_more > 0:
            self._work_W = np.append(self._work_W, np.zeros(num_more))
            self._has_worked_W = np.append(self._has_worked_W, np.zeros(num_more, np.bool_))


class _Looked:
    """What was looked up already."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        found = self._found
        pages_W, tail_W = found.pages_W.copy(), found.tail_W.copy()
        device_pages_W, device_tail_W = pages_W, tail_W
        if found.has_host:
            device_pages_W, device_tail_W = (array.copy() for array in found.on_device)
        return replace(
            found,
            pages_W=pages_W,
            tail_W=tail_W,
            device_pages_W=device_pages_W,
            device_tail_W=device_tail_W,
        )

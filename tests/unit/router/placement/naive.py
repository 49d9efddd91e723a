"""Placement as it reads worker by worker: what arrays decide is compared with this, to the last bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel
from rorqual.session import Role, credit_pages
from router.placement import TOKENS_PER_SECOND_UNKNOWN, Demand, WorkerView
from router.placement.by_cache import WORK_KEPT
from router.placement.cache import (
    CacheDemand,
    CachePlacement,
    Decision,
    FleetPicture,
    Found,
    MeasuredSpeeds,
    Source,
)
from router.placement.least_wait import HELD_SHARE, WAIT_SECONDS_SAME, WAIT_SHARE_SAME
from tests.unit.router.placement.fleets import SEQUENCES_MAX
from tests.unit.router.placement.pictures import Caches

Placed = tuple[str, str] | None
"""Who computes the prompt, and who decodes: "" for one that has to be waited for, the same one when it is whole."""


def able(workers: Iterable[WorkerView], excluded: frozenset[int]) -> list[WorkerView]:
    return [
        view
        for view in workers
        if not view.draining
        and view.session_number not in excluded
        and (view.role is Role.DECODE or view.sequences_outstanding < SEQUENCES_MAX)
    ]


def least_wait(workers: Sequence[WorkerView], demand: Demand) -> Placed:
    decode = decode_worker(workers, demand, {})
    can = of_role(workers, Role.BOTH)
    if decode is not None or (not can and of_role(workers, Role.DECODE)):
        can += of_role(workers, Role.PREFILL)
    if not can:
        return None
    waits = {view.address: predicted_wait(view, demand.prompt_tokens) for view in can}
    shortest = min(waits.values())
    longest = shortest + max(WAIT_SECONDS_SAME, WAIT_SHARE_SAME * shortest)
    return _placed(min((view for view in can if waits[view.address] <= longest), key=busyness), decode)


class NaiveByCache:
    """`router.placement.by_cache.ByCache` in loops."""

    def __init__(
        self, policy: CachePlacement, *, caches: Caches, model: PerformanceModel, ratio_max: float
    ) -> None:
        self._policy = policy
        self._caches = caches
        self._model = model
        self._ratio_max = ratio_max
        self.token_seconds = float(model.prefill_seconds(model.chunk_tokens)) / model.chunk_tokens
        self._factors: dict[int, tuple[int, int, float]] = {}  # session, measurements, factor
        self._told: dict[int, tuple[int, float]] = {}
        self._work: dict[int, float] = {}
        self._next_number = 1

    def finished(self, number: int) -> None:
        self._policy.finished(number)

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> tuple[Placed, Decision | None]:
        found = self._caches.look_up(next(iter(demand.keys.values()), ()))
        num_pages = max(1, demand.prompt_tokens // PAGE_TOKENS)
        shares = {index: pages / num_pages for index, pages in enumerate(found.pages_W.tolist())}
        decode = decode_worker(workers, demand, shares)
        can = of_role(workers, Role.BOTH) + (of_role(workers, Role.PREFILL) if decode is not None else [])
        if not can:
            waiting = of_role(workers, Role.PREFILL) if of_role(workers, Role.DECODE) else []
            return (_placed(min(waiting, key=busyness), None) if waiting else None), None
        self._learn(workers)
        factors = self._factors_of(can)
        request = CacheDemand(
            number=self._next_number,
            keys=next(iter(demand.keys.values()), ()),
            num_tokens=demand.prompt_tokens,
            session=demand.session,
        )
        self._next_number += 1
        decision = self._policy.choose(self._picture(can, factors, found, workers), request)
        reused = min(decision.resume * PAGE_TOKENS, demand.prompt_tokens - 1)
        seconds = float(self._model.work_seconds(demand.prompt_tokens - reused, reused))
        self._note_work(decision.prefill, seconds * factors[decision.prefill])
        chosen = next(view for view in can if view.index == decision.prefill)
        return _placed(chosen, decode), decision

    def _learn(self, workers: Sequence[WorkerView]) -> None:
        for view in workers:
            rate = view.load.prefill_tokens_per_second
            if not rate or self._told.get(view.index) == (view.session_number, rate):
                continue
            self._told[view.index] = (view.session_number, rate)
            session, num_measured, factor = self._factors.get(view.index, (0, 0, 1.0))
            if session != view.session_number:
                num_measured, factor = 0, 1.0
            num_measured += 1
            ratio = min(max(1 / rate / self.token_seconds, 1 / self._ratio_max), self._ratio_max)
            factor += max(0.1, 1 / num_measured) * (ratio - factor)
            self._factors[view.index] = view.session_number, num_measured, factor

    def _factors_of(self, can: Sequence[WorkerView]) -> dict[int, float]:
        known = {
            view.index: self._factors[view.index][2]
            for view in can
            if self._factors.get(view.index, (0,))[0] == view.session_number
        }
        unknown = median(known.values()) if known else 1.0
        return {view.index: known.get(view.index, unknown) for view in can}

    def _picture(
        self,
        can: Sequence[WorkerView],
        factors: Mapping[int, float],
        found: Found,
        workers: Sequence[WorkerView],
    ) -> FleetPicture:
        num = len(found.pages_W)
        numbers = range(num)
        by_index = {view.index: view for view in can}
        most_work = max(self._work.get(index, 0.0) for index in by_index)

        def ints(of: Mapping[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
            return np.array([of.get(index, 0) for index in numbers], np.int32)

        ahead = {index: tokens_ahead(view) for index, view in by_index.items()}
        wait = {
            index: ahead[index] * self.token_seconds * factors[index] + seconds_until_place(view)
            for index, view in by_index.items()
        }
        work = [self._work.get(index, 0.0) if index in by_index else most_work for index in numbers]
        sent = {index: view.prompt_tokens_sent // PAGE_TOKENS for index, view in by_index.items()}
        return FleetPicture(
            caches=self._caches,
            can_prefill_W=np.array([index in by_index for index in numbers]),
            can_decode_W=np.zeros(num, np.bool_),
            draining_W=np.zeros(num, np.bool_),
            wait_seconds_W=np.array([wait.get(index, 0.0) for index in numbers]),
            queued_tokens_W=np.array([float(ahead.get(index, 0)) for index in numbers]),
            sequences_W=ints({index: view.sequences_outstanding for index, view in by_index.items()}),
            active_pages_W=ints(sent),
            pages_free_W=ints({index: view.load.pages_free for index, view in by_index.items()}),
            tree_pages_W=ints({index: view.pages_cached for index, view in by_index.items()}),
            decode_sequences_W=np.zeros(num, np.int32),
            work_seconds_W=np.array(work),
            slowness_W=np.array([factors.get(index, 1.0) for index in numbers]),
            readable_W=np.isin(numbers, [view.index for view in workers if view.can_share]),
            speeds={
                source: MeasuredSpeeds(
                    rate_W=said(by_index, numbers, f"{source.value}_bytes_per_second"),
                    latency_W=said(by_index, numbers, f"{source.value}_latency_seconds"),
                )
                for source in (Source.PEER, Source.HOST, Source.STORE)
            },
        )

    def _note_work(self, index: int, seconds: float) -> None:
        if index not in self._work:
            self._work[index] = min(self._work.values(), default=0.0)
        for each in self._work:
            self._work[each] *= WORK_KEPT
        self._work[index] += seconds


def decode_worker(
    workers: Sequence[WorkerView], demand: Demand, shares: Mapping[int, float]
) -> WorkerView | None:
    decoders = of_role(workers, Role.DECODE)
    if demand.charged:
        return next((view for view in decoders if view.address == demand.charged), None)
    if demand.is_queueing:
        return None
    pages = credit_pages(demand.prompt_tokens)
    costs = {
        view.address: view.credit.fullness_with(pages) - HELD_SHARE * shares.get(view.index, 0.0)
        for view in decoders
        if view.credit is not None and view.credit.fits(pages)
    }
    able = [view for view in decoders if view.address in costs]
    return min(able, key=lambda view: (costs[view.address], view.address), default=None)


def predicted_wait(view: WorkerView, prompt_tokens: int) -> float:
    rate = view.load.prefill_tokens_per_second or TOKENS_PER_SECOND_UNKNOWN
    return (tokens_ahead(view) + prompt_tokens) / rate + seconds_until_place(view)


def tokens_ahead(view: WorkerView) -> int:
    own = max(view.prompt_tokens_sent, view.prompt_tokens_outstanding)
    return view.prompt_tokens_outstanding + max(0, view.load.tokens_waiting - own)


def seconds_until_place(view: WorkerView) -> float:
    num_queued = view.sequences_outstanding + 1 - view.sequences_max
    if view.role is not Role.BOTH or num_queued <= 0:
        return 0.0
    steps_each = (view.tokens_outstanding - view.prompt_tokens_outstanding) / max(
        view.sequences_outstanding, 1
    )
    return num_queued * steps_each / max(view.sequences_max, 1) * view.load.step_ms / 1000


def of_role(workers: Iterable[WorkerView], role: Role) -> list[WorkerView]:
    return [view for view in workers if view.role is role]


def busyness(view: WorkerView) -> tuple[int, int, str]:
    return view.tokens_outstanding, view.sequences_outstanding, view.address


def _placed(chosen: WorkerView, decode: WorkerView | None) -> Placed:
    if chosen.role is Role.BOTH:
        return chosen.address, chosen.address
    return chosen.address, decode.address if decode is not None else ""


def said(by_index: Mapping[int, WorkerView], numbers: Iterable[int], name: str) -> Any:
    """A figure of each worker's load."""
    return np.array([getattr(by_index[index].load, name) if index in by_index else 0.0 for index in numbers])

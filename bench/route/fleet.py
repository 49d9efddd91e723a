"""One policy over one trace: simulated workers and the policy under test on one virtual clock. No real time passes.

Called by `bench.route`. Events: a prompt arrives, a read from a peer or from the store has ended, a write to the store
has ended, a step has ended. Those of one moment are taken in the order they were made, so that a run repeats itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.route.picture import ExactPicture
from bench.route.store import SharedStore, StoreItem, StoreLink
from bench.route.trace import Request
from bench.route.worker import Job, Worker, WorkerConfig
from kvstore.shadow_radix import Pin
from router.placement.cache import CacheDemand, CachePlacement, Decision, FleetPicture, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one prompt. Pages are full ones."""

    number: int
    worker: int
    num_pages: int
    num_reused: int  # not computed on the worker
    num_present: int  # there when it began, resumable or not
    num_fetched: int  # read from a peer
    num_stored: int  # read from the store
    ttft_seconds: float
    predicted_seconds: float


@dataclass(frozen=True, slots=True)
class _Arrival:
    request: Request


@dataclass(frozen=True, slots=True)
class _Fetched:
    worker: Worker
    job: Job
    peer: Worker
    pin: Pin  # on the peer
    depth: int
    tail_depth: int


@dataclass(frozen=True, slots=True)
class _ReadFromStore:
    worker: Worker
    job: Job


@dataclass(frozen=True, slots=True)
class _Written:
    worker: Worker
    items: list[StoreItem]


@dataclass(frozen=True, slots=True)
class _StepEnd:
    worker: Worker


_Event = _Arrival | _Fetched | _ReadFromStore | _Written | _StepEnd


class Simulation:
    """`timer` is read around each decision and nowhere else."""

    def __init__(
        self,
        *,
        config: WorkerConfig,
        num_workers: int,
        policy: CachePlacement,
        timer: Callable[[], float],
    ) -> None:
        self.store: SharedStore | None = None
        if config.store is not None:
            self.store = SharedStore(budget_bytes=config.store.budget_bytes, costs=config.costs)
        self.workers = [Worker(number, config, self._link(config)) for number in range(num_workers)]
        self.picture = ExactPicture(num_workers, self.store)
        self.policy = policy
        self.decision_seconds = 0.0
        self.outcomes: list[Outcome] = []
        self._config = config
        self._timer = timer
        self._events: list[tuple[float, int, _Event]] = []
        self._num_events = 0
        self._predicted: dict[int, float] = {}
        self._num_fetched: dict[int, int] = {}

    def run(self, requests: Sequence[Request]) -> Iterator[int]:
        """Yields the number of requests placed, now and then, for a display of progress."""
        for request in requests:
            self._at(request.seconds, _Arrival(request))
        num_placed = 0
        while self._events:
            now, _, event = heapq.heappop(self._events)
            match event:
                case _Arrival(request=request):
                    self._place(now, request)
                    num_placed += 1
                    if num_placed % 256 == 0:
                        yield num_placed
                case _Fetched():
                    self._fetched(now, event)
                case _ReadFromStore(worker=worker, job=job):
                    worker.receive_from_store(job)
                    self._tell(now, worker)
                    self._wake(now, worker)
                case _Written(worker=worker, items=items):
                    assert self.store is not None
                    assert worker.link is not None
                    self.store.put(items)
                    worker.link.written(items)
                case _StepEnd(worker=worker):
                    self._step_ended(now, worker)
        assert len(self.outcomes) == len(requests), "every prompt is computed"
        yield num_placed

    def _link(self, config: WorkerConfig) -> StoreLink | None:
        if self.store is None or config.store is None:
            return None
        return StoreLink(self.store, config.store, config.model)

    def _at(self, seconds: float, event: _Event) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (seconds, self._num_events, event))

    def _place(self, now: float, request: Request) -> None:
        demand = CacheDemand(
            number=request.number, keys=request.keys, num_tokens=request.num_tokens, session=request.session
        )
        picture = self._fleet(now)
        began = self._timer()
        decision = self.policy.choose(picture, demand)
        self.decision_seconds += self._timer() - began
        self._predicted[request.number] = decision.predicted_seconds
        worker = self.workers[decision.prefill]
        job = Job(request=request, arrived=now, ready=now)
        if decision.fetch.peer >= 0:
            self._fetch(now, worker, job, decision)
        worker.enqueue(job, now)
        if job.read is not None:
            self._at(job.ready, _ReadFromStore(worker, job))
        self._wake(now, worker)

    def _fetch(self, now: float, worker: Worker, job: Job, decision: Decision) -> None:
        """Begin to read what the peer still has of the plan; it stays pinned there meanwhile."""
        peer, plan, keys = self.workers[decision.fetch.peer], decision.fetch, job.request.keys
        wanted = max(
            (span.first + span.count for span in plan.spans if span.source is Source.PEER), default=0
        )
        wanted = max(wanted, decision.resume if plan.tail_source is Source.PEER else 0)
        match = peer.radix.match(keys[:wanted])
        num_missing = max(match.num_pages - worker.radix.match(keys).num_pages, 0)
        tail_depth = match.resumable if plan.tail_source is Source.PEER else 0
        if not num_missing and not tail_depth:
            return
        pin = peer.radix.pin(keys, num_pages=match.num_pages, tail_depth=tail_depth)
        costs = self._config.costs
        num_bytes = num_missing * costs.page_bytes + (costs.tail_bytes if tail_depth else 0)
        job.ready = now + float(self._config.model.fetch_seconds(num_bytes))
        self._num_fetched[job.request.number] = num_missing
        self._at(job.ready, _Fetched(worker, job, peer, pin, match.num_pages, tail_depth))

    def _fetched(self, now: float, event: _Fetched) -> None:
        event.worker.receive(event.job, depth=event.depth, tail_depth=event.tail_depth)
        event.peer.radix.release(event.pin)
        self._tell(now, event.worker)
        self._wake(now, event.worker)

    def _wake(self, now: float, worker: Worker) -> None:
        if not worker.step and (seconds := worker.begin_step(now)) > 0:
            self._at(now + seconds, _StepEnd(worker))

    def _step_ended(self, now: float, worker: Worker) -> None:
        for job in worker.end_step():
            request, start, read = job.request, job.start, job.read
            assert start is not None
            self.policy.finished(request.number)
            self.outcomes.append(
                Outcome(
                    number=request.number,
                    worker=worker.number,
                    num_pages=request.num_pages,
                    num_reused=start.from_depth,
                    num_present=job.num_matched,
                    num_fetched=self._num_fetched.pop(request.number, 0),
                    num_stored=read.depth - read.first if read is not None else 0,
                    ttft_seconds=now - job.arrived,
                    predicted_seconds=self._predicted.pop(request.number),
                )
            )
        self._tell(now, worker)
        self._wake(now, worker)

    def _tell(self, now: float, worker: Worker) -> None:
        """The router of what has changed in the cache, and the store of what is to be written."""
        self.picture.apply(worker.number, worker.take_changes())
        if (writes := worker.begin_writes(now)) is not None:
            done, items = writes
            self._at(done, _Written(worker, items))

    def _fleet(self, now: float) -> FleetPicture:
        workers = self.workers
        count = len(workers)
        page_bytes = self._config.costs.page_bytes
        return FleetPicture(
            caches=self.picture,
            can_prefill_W=np.ones(count, np.bool_),
            can_decode_W=np.zeros(count, np.bool_),
            draining_W=np.zeros(count, np.bool_),
            wait_seconds_W=np.array([worker.wait_seconds(now) for worker in workers]),
            queued_tokens_W=np.array([worker.queued_tokens for worker in workers], np.float64),
            sequences_W=np.array([len(worker.queue) for worker in workers], np.int32),
            active_pages_W=np.array([worker.active_pages for worker in workers], np.int32),
            pages_free_W=np.array(
                [(self._config.budget_bytes - worker.radix.num_bytes) // page_bytes for worker in workers],
                np.int32,
            ),
            tree_pages_W=np.array([worker.radix.num_pages for worker in workers], np.int32),
            decode_sequences_W=np.zeros(count, np.int32),
            work_seconds_W=np.array([worker.work_seconds for worker in workers]),
        )

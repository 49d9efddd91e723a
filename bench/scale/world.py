"""A simulated fleet of prefill and decode workers on virtual time: replicas are ordered, start, drain, fail and go.

Called by `bench.scale.race`. What happens between two looks is `bench.scale.steps`; here is who is in the fleet, what
one look shows, and what replicas have cost. All rules meet the same requests, speeds and start-up delay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaler.observation import Observation, PoolState, PromptSample, StreamSample, Traffic, WorkerState
from bench.scale import steps
from bench.scale.steps import DRAINING, NOBODY, NOT_THERE, READY, State
from bench.scale.workloads import Workload
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel
from rorqual.session import Load, Role

CONTEXT_MAX = 262_144.0
SAMPLES_MAX = 512  # of prompts, and of streams, in one look: a fair part where there were more
TAIL_SECONDS_MAX = 3600.0  # after the last arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """What does not depend on the rule. The two factors are hidden from all rules: true seconds over the model's."""

    model: PerformanceModel
    slots: int = 256  # sequences of a decode worker
    pages: int = 400_000  # of its memory
    start_seconds: float = 180.0
    failures_per_hour: float = 0.02  # of each worker
    patience_seconds: float = 60.0  # a request that no worker was given for so long is lost
    replicas_max: int = 32
    prefill_factor: float = 1.0
    decode_factor: float = 1.0
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Replica:
    number: int
    ordered: float
    ready_at: float
    dies_at: float = math.inf
    place: int = NOBODY  # in the arrays of workers, once it is ready
    drains_at: float = math.inf

    @property
    def drains(self) -> bool:
        return self.drains_at < math.inf


class Pool:
    def __init__(self, role: Role) -> None:
        self.role = role
        self.wanted = 0
        self.replicas: list[Replica] = []  # that are not gone
        self.past: list[tuple[float, float]] = []  # ordered and gone
        self.num_made = 0

    @property
    def counted(self) -> list[Replica]:
        """Those that are wanted: ready or starting."""
        return [item for item in self.replicas if not item.drains]

    def replica_seconds(self, until: float) -> float:
        """Of all replicas, from their order to their going."""
        spans = self.past + [(item.ordered, until) for item in self.replicas]
        return sum(max(min(gone, until) - ordered, 0.0) for ordered, gone in spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Exact sums over one interval: what a rule that reads counters of a metrics server gets."""

    num_arrived: int
    num_prompts: int
    prompt_tokens: float
    cached_tokens: float
    ttft_seconds: float
    num_streams: int
    output_tokens: float
    itl_seconds: float
    num_itl: int
    prefill_busy: float  # share of the ready workers' time
    prefill_queued: int  # at workers, not begun, and at routers
    decode_used: float  # the larger share of slots and pages, over ready workers
    num_retried: int


class World:
    def __init__(self, workload: Workload, config: WorldConfig) -> None:
        self.workload = workload
        self.config = config
        self.now = 0.0
        self.pools = {"prefill": Pool(Role.PREFILL), "decode": Pool(Role.DECODE)}
        self.num_retried = 0
        self.num_died = 0
        self.state = _state(workload, config)
        self._looked_at = 0.0
        self._seen = np.zeros(3, np.int64)  # first tokens, ends, arrivals at the last look
        self._seen_lost = 0
        self._random = np.random.default_rng((config.seed, 1))

    @property
    def is_done(self) -> bool:
        counts = self.state.counts
        return int(counts[steps.NUM_ENDED] + counts[steps.NUM_LOST]) == len(self.workload)

    @property
    def num_waiting(self) -> int:
        counts = self.state.counts
        fresh = counts[steps.ARRIVED] - counts[steps.ROUTER_HEAD]
        return int(fresh + counts[steps.RETRY_TAIL] - counts[steps.RETRY_HEAD])

    @property
    def num_queued(self) -> int:
        """At prefill workers, with those being computed."""
        return int(self.state.p_queued_W.sum())

    def begin(self, replicas: dict[str, int]) -> None:
        """So many are ready at once."""
        for name, count in replicas.items():
            pool = self.pools[name]
            pool.wanted = count
            for _ in range(count):
                self._order(pool, name, start_seconds=0.0)
        self._make_ready(0.0)

    def set_replicas(self, name: str, count: int) -> None:
        """As a Deployment does it: too many are taken from those that are not ready, then from the youngest."""
        pool = self.pools[name]
        pool.wanted = count
        for _ in range(count - len(pool.counted)):
            self._order(pool, name, start_seconds=self.config.start_seconds)
        surplus = len(pool.counted) - count
        for item in sorted(
            pool.counted, key=lambda item: (item.place != NOBODY, -item.ready_at, -item.number)
        ):
            if surplus <= 0:
                break
            surplus -= 1
            self._drain(pool, item)

    def advance(self, until: float) -> None:
        """To `until`, stopping where somebody joins or leaves the fleet."""
        while self.now < until:
            at = min(until, self._next_change())
            if at > self.now:
                steps.advance(self.state, self.now, at)
                self.now = at
            self._collect()
            self._die(at)
            self._make_ready(at)

    def look(self) -> tuple[Observation, Sums]:
        """What came since the last look."""
        interval = self.now - self._looked_at
        s, (first, end, arrived) = self.state, self._seen
        prompts = s.firsts_N[first : s.counts[steps.NUM_FIRST]]
        streams = s.ends_N[end : s.counts[steps.NUM_ENDED]]
        observation = Observation(
            seconds=self.now,
            interval_seconds=interval,
            pools={name: self._pool_state(name) for name in self.pools},
            traffic=self._traffic(prompts, streams),
        )
        sums = self._sums(prompts, streams, int(s.counts[steps.ARRIVED] - arrived), interval)
        self._seen[:] = (s.counts[steps.NUM_FIRST], s.counts[steps.NUM_ENDED], s.counts[steps.ARRIVED])
        self._seen_lost = int(s.counts[steps.NUM_LOST])
        for array in (s.p_busy_W, s.p_tokens_W, s.d_busy_W, s.d_tokens_W):
            array[:] = 0.0
        s.p_steps_W[:] = 0
        self._looked_at = self.now
        return observation, sums

    # the fleet ---------------------------------------------------------------------------------------------------

    def _order(self, pool: Pool, name: str, *, start_seconds: float) -> None:
        config = self.config
        number = pool.num_made
        pool.num_made += 1
        item = Replica(number=number, ordered=self.now, ready_at=self.now + start_seconds)
        if config.failures_per_hour > 0:
            draw = np.random.default_rng((config.seed, name == "prefill", number)).exponential()
            item.dies_at = item.ready_at + float(draw) * 3600 / config.failures_per_hour
        pool.replicas.append(item)

    def _next_change(self) -> float:
        found = math.inf
        for pool in self.pools.values():
            for item in pool.replicas:
                found = min(found, item.ready_at if item.place == NOBODY else item.dies_at)
        return found

    def _make_ready(self, now: float) -> None:
        s = self.state
        for name, pool in self.pools.items():
            states = s.p_state_W if name == "prefill" else s.d_state_W
            for item in pool.replicas:
                if item.place == NOBODY and item.ready_at <= now:
                    item.place = int(np.flatnonzero(states == NOT_THERE)[0])
                    states[item.place] = READY
                    if name == "prefill":
                        s.p_empty_W[item.place] = now
                    else:
                        s.d_at_W[item.place] = s.d_empty_W[item.place] = now
            high = np.flatnonzero(states)
            s.counts[steps.P_HIGH if name == "prefill" else steps.D_HIGH] = high[-1] + 1 if len(high) else 0

    def _drain(self, pool: Pool, item: Replica) -> None:
        if item.place == NOBODY:
            self._forget(pool, item, self.now)
            return
        item.drains_at = self.now
        states = self.state.p_state_W if pool.role is Role.PREFILL else self.state.d_state_W
        states[item.place] = DRAINING
        self._collect()

    def _collect(self) -> None:
        """Draining workers that have nothing left are gone since then."""
        s = self.state
        for name, pool in self.pools.items():
            busy, empty = (s.p_queued_W, s.p_empty_W) if name == "prefill" else (s.d_charged_W, s.d_empty_W)
            states = s.p_state_W if name == "prefill" else s.d_state_W
            for item in [item for item in pool.replicas if item.drains]:
                if busy[item.place] == 0:
                    states[item.place] = NOT_THERE
                    self._forget(pool, item, max(float(empty[item.place]), item.drains_at))

    def _forget(self, pool: Pool, item: Replica, gone: float) -> None:
        pool.past.append((item.ordered, gone))
        pool.replicas.remove(item)

    def _die(self, now: float) -> None:
        for name, pool in self.pools.items():
            for item in [item for item in pool.replicas if item.place != NOBODY and item.dies_at <= now]:
                self.num_died += 1
                if name == "prefill":
                    self._lose_prefill(item.place)
                else:
                    self._lose_decode(item.place)
                self._forget(pool, item, now)
                if not item.drains:  # the Deployment puts another one there
                    self._order(pool, name, start_seconds=self.config.start_seconds)

    def _lose_prefill(self, place: int) -> None:
        s = self.state
        request = int(s.p_head_W[place])
        while request != NOBODY:
            following = int(s.next_N[request])
            steps.release(s, request, self.now)
            self._retry(request)
            request = following
        s.p_state_W[place] = NOT_THERE
        s.p_head_W[place] = s.p_tail_W[place] = NOBODY
        s.p_queued_W[place] = 0
        s.p_seconds_W[place] = 0.0
        s.p_step_end_W[place] = np.inf

    def _lose_decode(self, place: int) -> None:
        """Its streams are computed again with what they had generated; prompts on their way to it are bound anew."""
        s = self.state
        steps.read_clock(s, place, self.now)
        running = int(s.d_running_W[place])
        streams = [(int(s.heap_ids_WS[place, i]), float(s.heap_WS[place, i])) for i in range(running)]
        clock = float(s.d_clock_W[place])
        for request, end in sorted(streams):
            left = min(max(math.ceil(end - clock), 1), int(s.out_N[request]))
            s.prompt_N[request] += s.out_N[request] - left
            s.out_N[request] = left
            s.decode_N[request] = NOBODY
            self._retry(request)
        s.d_state_W[place] = NOT_THERE
        for request in np.flatnonzero(s.decode_N == place):  # in a prefill queue
            self._bind_anew(int(request))
        for array in (s.d_charged_W, s.d_pages_W, s.d_running_W):
            array[place] = 0
        s.d_context_W[place] = s.d_clock_W[place] = 0.0
        s.d_next_W[place] = np.inf

    def _bind_anew(self, request: int) -> None:
        s = self.state
        ready = np.flatnonzero(s.d_state_W == READY)
        if not len(ready):
            s.decode_N[request] = NOBODY
            return
        place = int(ready[np.argmin(s.d_charged_W[ready])])
        s.decode_N[request] = place
        s.d_charged_W[place] += 1
        s.d_pages_W[place] += s.pages_N[request]

    def _retry(self, request: int) -> None:
        s = self.state
        self.num_retried += 1
        cached = float(self.workload.cached_N[request])
        s.left_N[request] = s.prompt_N[request] - cached
        steps.start_again(s, request)

    # looks -------------------------------------------------------------------------------------------------------

    def _pool_state(self, name: str) -> PoolState:
        pool = self.pools[name]
        make = self._prefill_load if name == "prefill" else self._decode_load
        workers = tuple(
            WorkerState(address=f"{name}-{item.number}", load=make(item.place), is_draining=item.drains)
            for item in pool.replicas
            if item.place != NOBODY
        )
        starting = tuple(self.now - item.ordered for item in pool.replicas if item.place == NOBODY)
        return PoolState(
            role=pool.role, replicas_wanted=pool.wanted, workers=workers, starting_seconds=starting
        )

    def _prefill_load(self, place: int) -> Load:
        s, config = self.state, self.config
        queued, busy = int(s.p_queued_W[place]), float(s.p_busy_W[place])
        tokens, head = 0.0, int(s.p_head_W[place])
        while head != NOBODY:
            tokens += s.left_N[head]
            head = int(s.next_N[head])
        num_steps = int(s.p_steps_W[place])
        return Load(
            sequences_running=min(queued, 1),
            sequences_waiting=max(queued - 1, 0),
            tokens_waiting=int(tokens),
            pages_free=config.pages,
            pages_total=config.pages,
            slots_free=max(config.slots - queued, 0),
            slots_total=config.slots,
            step_ms=1000 * busy / num_steps if num_steps else 0.0,
            prefill_tokens_per_second=float(s.p_tokens_W[place]) / busy if busy > 0 else 0.0,
        )

    def _decode_load(self, place: int) -> Load:
        s, config = self.state, self.config
        running = int(s.d_running_W[place])
        pages = int(s.d_pages_W[place])
        return Load(
            sequences_running=running,
            sequences_waiting=0,
            tokens_waiting=0,
            pages_free=max(config.pages - pages, 0),
            pages_total=config.pages,
            slots_free=max(config.slots - running, 0),
            slots_total=config.slots,
            step_ms=1000 * float(s.d_step_W[place]) if running else 0.0,
        )

    def _traffic(self, prompts: NDArray[np.int64], streams: NDArray[np.int64]) -> Traffic:
        load, s = self.workload, self.state
        some = self._some(prompts)
        ended = self._some(streams)
        ttft = s.first_N[some] - load.arrive_N[some]
        itl = self._itl(ended)
        return Traffic(
            num_prompts=len(prompts),
            prompts=tuple(
                PromptSample(prompt_tokens=int(a), computed_tokens=int(a - b), ttft_seconds=c)
                for a, b, c in zip(
                    load.prompt_N[some].tolist(), load.cached_N[some].tolist(), ttft.tolist(), strict=True
                )
            ),
            num_streams=len(streams),
            streams=tuple(
                StreamSample(
                    context_tokens=int(a + b),
                    generated_tokens=int(b),
                    itl_seconds=None if math.isnan(c) else c,
                )
                for a, b, c in zip(
                    load.prompt_N[ended].tolist(), load.output_N[ended].tolist(), itl.tolist(), strict=True
                )
            ),
            num_waiting=self.num_waiting,
            num_unserved=int(s.counts[steps.NUM_LOST]) - self._seen_lost,
        )

    def _some(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(numbers) <= SAMPLES_MAX:
            return numbers
        return self._random.choice(numbers, SAMPLES_MAX, replace=False)

    def _itl(self, ended: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean seconds between two tokens; nan for streams of one."""
        s, output = self.state, self.workload.output_N[ended]
        gaps = np.where(output > 1, output - 1, np.nan)
        return (s.end_N[ended] - s.first_N[ended]) / gaps

    def _sums(
        self, prompts: NDArray[np.int64], streams: NDArray[np.int64], num_arrived: int, interval: float
    ) -> Sums:
        load, s, config = self.workload, self.state, self.config
        itl = self._itl(streams)
        num_itl = int(np.count_nonzero(~np.isnan(itl)))
        ready_p = s.p_state_W == READY
        ready_d = s.d_state_W == READY
        num_p, num_d = int(ready_p.sum()), int(ready_d.sum())
        busy = float(s.p_busy_W[ready_p].sum()) / max(num_p * interval, 1e-9)
        slots = float(s.d_running_W[ready_d].sum()) / max(num_d * config.slots, 1)
        pages = float(s.d_pages_W[ready_d].sum()) / max(num_d * config.pages, 1)
        computing = int(np.count_nonzero(s.p_queued_W))
        return Sums(
            num_arrived=num_arrived,
            num_prompts=len(prompts),
            prompt_tokens=float(load.prompt_N[prompts].sum()),
            cached_tokens=float(load.cached_N[prompts].sum()),
            ttft_seconds=float((s.first_N[prompts] - load.arrive_N[prompts]).sum()),
            num_streams=len(streams),
            output_tokens=float(load.output_N[streams].sum()),
            itl_seconds=float(np.nansum(itl)),
            num_itl=num_itl,
            prefill_busy=min(busy, 1.0),
            prefill_queued=self.num_queued - computing + self.num_waiting,
            decode_used=max(slots, pages),
            num_retried=self.num_retried,
        )


def _state(workload: Workload, config: WorldConfig) -> State:
    """Nobody is there, nothing has arrived."""
    count, width, model = len(workload), 3 * config.replicas_max, config.model
    computed = workload.prompt_N - workload.cached_N
    counts = np.zeros(10, np.int64)
    counts[steps.CHUNK] = model.chunk_tokens
    table = _decode_steps(config)
    requests: dict[str, Any] = {
        "arrive_N": workload.arrive_N,
        "prompt_N": workload.prompt_N.copy(),
        "left_N": computed.copy(),
        "rate_N": model.arithmetic_seconds(workload.cached_N, workload.prompt_N) / computed,
        "out_N": workload.output_N.copy(),
        "first_N": np.full(count, np.nan),
        "end_N": np.full(count, np.nan),
    }
    pages = -(-(workload.prompt_N + workload.output_N) // PAGE_TOKENS)
    requests_ints: dict[str, Any] = {"pages_N": pages.astype(np.int64), "counts": counts} | {
        name: np.full(count + 1, NOBODY, np.int64)
        for name in ("decode_N", "next_N", "retry_N", "firsts_N", "ends_N")
    }
    workers: dict[str, Any] = {name: np.zeros(width) for name in _WORKER_FLOATS} | {
        "p_step_end_W": np.full(width, np.inf),
        "d_next_W": np.full(width, np.inf),
        "d_step_W": np.full(width, table[0, 0]),
        "heap_WS": np.zeros((width, 4 * config.slots)),
    }
    workers_ints: dict[str, Any] = {name: np.zeros(width, np.int64) for name in _WORKER_INTS} | {
        "p_head_W": np.full(width, NOBODY, np.int64),
        "p_tail_W": np.full(width, NOBODY, np.int64),
        "heap_ids_WS": np.zeros((width, 4 * config.slots), np.int64),
    }
    return State(
        **requests,
        **requests_ints,
        **workers,
        **workers_ints,
        decode_step_SC=table,
        settings=_settings(config),
    )


_WORKER_FLOATS = (
    *("p_seconds_W", "p_step_part_W", "p_busy_W", "p_tokens_W", "p_empty_W", "d_clock_W", "d_at_W"),
    *("d_context_W", "d_busy_W", "d_tokens_W", "d_empty_W"),
)
_WORKER_INTS = (
    *("p_state_W", "p_queued_W", "p_step_done_W", "p_steps_W"),
    *("d_state_W", "d_charged_W", "d_pages_W", "d_running_W"),
)


def _decode_steps(config: WorldConfig) -> NDArray[np.float64]:
    """True seconds of a step, by streams and by context in steps of CONTEXT_STEP."""
    contexts = np.arange(0.0, CONTEXT_MAX + 1, steps.CONTEXT_STEP)
    batches = np.arange(0.0, 2 * config.slots + 1)
    seconds = config.model.decode_step_seconds(batches[:, None], contexts[None, :])
    return np.ascontiguousarray(seconds * config.decode_factor)


def _settings(config: WorldConfig) -> NDArray[np.float64]:
    model = config.model
    base, all_experts = (float(model.weights_seconds(tokens)) for tokens in (0.0, 1e9))
    missed = 1 - model.costs.num_experts_per_token / model.costs.num_experts
    found = (
        *(config.slots, config.pages, config.patience_seconds, base, all_experts - base, missed),
        *(model.efficiency.step_seconds, config.prefill_factor),
    )
    return np.array(found, np.float64)

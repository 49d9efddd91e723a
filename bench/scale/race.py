"""One rule over one workload: the loop of looks and decisions, and the figures of the run. Called by `bench.scale`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.scale import steps
from bench.scale.rules import ENTRANTS, POOLS, Rule, RuleConfig
from bench.scale.workloads import Workload
from bench.scale.world import TAIL_SECONDS_MAX, World, WorldConfig
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel

STEP_SECONDS = 5.0  # a divisor of all rules' intervals
FLAP_SECONDS = 600.0
FLAP_LOAD = 0.15
FACTOR_MAX = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What a run looked like, every 60 s."""

    seconds: list[float]
    load: list[float]  # prefill workers' work that arrives, by the model
    replicas: dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    attainment: float  # share of all requests with both objectives met; lost ones have not
    gpu_hours: float
    flaps: int
    ttft_p90: float
    itl_p90: float
    backlog_max: int
    num_requests: int
    num_lost: int
    num_retried: int
    num_changes: int
    prefill_mean: float
    decode_mean: float
    series: Series


@dataclass(frozen=True, slots=True)
class Order:
    """A change of what is wanted, with the work that arrived lately."""

    seconds: float
    change: int
    load: float


def hidden_factors(seed: int) -> tuple[float, float]:
    """True seconds over the model's, of prefill and of decode: between 0.8 and 1.25."""
    random = np.random.default_rng((seed, 5))
    low = math.log(1 / FACTOR_MAX)
    prefill, decode = np.exp(random.uniform(low, -low, 2))
    return float(prefill), float(decode)


def count_flaps(orders: list[Order]) -> int:
    """Reversals of direction within FLAP_SECONDS, unless the load was then another by more than FLAP_LOAD."""
    found = 0
    for before, after in itertools.pairwise(orders):
        reverses = before.change * after.change < 0
        is_soon = after.seconds - before.seconds <= FLAP_SECONDS
        moved = abs(after.load - before.load) > FLAP_LOAD * max(before.load, 1e-9)
        found += reverses and is_soon and not moved
    return found


def work_by_step(workload: Workload, model: PerformanceModel) -> NDArray[np.float64]:
    """Prefill workers that arriving work would keep busy, in steps of STEP_SECONDS."""
    work = model.work_seconds(workload.prompt_N - workload.cached_N, workload.cached_N)
    bins = np.zeros(int(workload.seconds // STEP_SECONDS) + 2)
    np.add.at(bins, np.minimum((workload.arrive_N // STEP_SECONDS).astype(np.int64), len(bins) - 1), work)
    return bins / STEP_SECONDS


def first_sizes(workload: Workload, config: WorldConfig) -> dict[str, int]:
    """For the first five minutes at seven tenths, by the model: what every rule begins with."""
    prefill, decode = needed(workload, config, 0.0, 300.0)
    return {
        "prefill": min(math.ceil(prefill / 0.7), config.replicas_max),
        "decode": min(math.ceil(decode / 0.7), config.replicas_max),
    }


def needed(workload: Workload, config: WorldConfig, begin: float, end: float) -> tuple[float, float]:
    """Workers of each pool that the load of a span would keep wholly busy, by the model."""
    within = (workload.arrive_N >= begin) & (workload.arrive_N < end)
    prompt, cached = workload.prompt_N[within], workload.cached_N[within]
    output = workload.output_N[within]
    if not len(prompt):
        return 0.1, 0.1
    model, seconds = config.model, min(end, workload.seconds) - begin
    step = float(model.decode_step_seconds(config.slots, float(prompt.mean())))
    slots = float(output.sum()) * step / seconds / config.slots
    pages = float((output * (prompt + output) / PAGE_TOKENS).sum()) * step / seconds / config.pages
    return float(model.work_seconds(prompt - cached, cached).sum()) / seconds, max(slots, pages)


def run(
    rule: Rule, workload: Workload, config: WorldConfig, rules: RuleConfig, begin: dict[str, int]
) -> Figures:
    world = World(workload, config)
    world.begin(begin)
    load = work_by_step(workload, config.model)
    orders: dict[str, list[Order]] = {name: [] for name in POOLS}
    series = Series(seconds=[], load=[], replicas={name: [] for name in POOLS})
    backlog, step = 0, 0
    every = round(rule.interval_seconds / STEP_SECONDS)
    while not world.is_done and world.now < workload.seconds + TAIL_SECONDS_MAX:
        step += 1
        world.advance(step * STEP_SECONDS)
        backlog = max(backlog, world.num_waiting + world.num_queued)
        if step % every == 0:
            lately = float(load[max(step - 24, 0) : step].mean()) if step <= len(load) else 0.0
            _decide(rule, world, orders, lately)
        if step % 12 == 0 and world.now <= workload.seconds:
            series.seconds.append(world.now)
            series.load.append(float(load[step - 12 : step].mean()))
            for name in POOLS:
                series.replicas[name].append(world.pools[name].wanted)
    return _figures(world, rules, orders, series, backlog)


def _decide(rule: Rule, world: World, orders: dict[str, list[Order]], load: float) -> None:
    observation, sums = world.look()
    decided = rule.decide(observation, sums)
    for name in POOLS:
        before, after = world.pools[name].wanted, decided[name]
        if before != after and world.now <= world.workload.seconds:
            orders[name].append(Order(world.now, after - before, load))
            world.set_replicas(name, after)


def _figures(
    world: World, rules: RuleConfig, orders: dict[str, list[Order]], series: Series, backlog: int
) -> Figures:
    s, workload = world.state, world.workload
    ttft = s.first_N - workload.arrive_N
    itl = (s.end_N - s.first_N) / np.maximum(workload.output_N - 1, 1)
    ended = ~np.isnan(s.end_N)
    met = ended & (ttft <= rules.ttft_seconds) & ((itl <= rules.itl_seconds) | (workload.output_N <= 1))
    replica_seconds = {name: world.pools[name].replica_seconds(workload.seconds) for name in POOLS}
    lost = int(s.counts[steps.NUM_LOST])
    waits = np.where(ended, ttft, np.inf)
    return Figures(
        attainment=float(met.mean()),
        gpu_hours=sum(replica_seconds.values()) / 3600 * rules.model.num_devices,
        flaps=sum(count_flaps(items) for items in orders.values()),
        ttft_p90=float(np.percentile(waits, 90, method="lower")),
        itl_p90=float(np.percentile(itl[ended], 90)) if ended.any() else math.inf,
        backlog_max=backlog,
        num_requests=len(workload),
        num_lost=lost,
        num_retried=world.num_retried,
        num_changes=sum(len(items) for items in orders.values()),
        prefill_mean=replica_seconds["prefill"] / workload.seconds,
        decode_mean=replica_seconds["decode"] / workload.seconds,
        series=series,
    )


def race(name: str, workload: Workload, config: WorldConfig, rules: RuleConfig) -> Figures:
    """The entrant `name` over one workload."""
    rule = ENTRANTS[name].make(rules)
    if name == "static":
        return best_static(workload, config, rules)
    return run(rule, workload, config, rules, first_sizes(workload, config))


def best_static(
    workload: Workload, config: WorldConfig, rules: RuleConfig, *, attainment_min: float = 0.99
) -> Figures:
    """The smallest prefill pool, then the smallest decode pool, with which so many requests are in time."""
    rule = ENTRANTS["static"].make(rules)
    peaks = [
        needed(workload, config, begin, begin + 300) for begin in np.arange(0.0, workload.seconds, 300.0)
    ]
    factors = (config.prefill_factor, config.decode_factor)
    sizes = {
        name: min(math.ceil(1.5 * factor * max(peak[place] for peak in peaks)) + 1, config.replicas_max)
        for place, (name, factor) in enumerate(zip(POOLS, factors, strict=True))
    }
    best = run(rule, workload, config, rules, sizes)
    for name in POOLS:
        low, high = 1, sizes[name]
        while low < high:
            middle = (low + high) // 2
            found = run(rule, workload, config, rules, sizes | {name: middle})
            if found.attainment >= min(attainment_min, best.attainment):
                high, best = middle, found
            else:
                low = middle + 1
        sizes[name] = high
    return best

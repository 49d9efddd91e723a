"""How many workers an expected load needs: a queue for prefill, continuous batches for decode. Pure.

Called by `autoscaler.planner`. Prefill is M/G/c: Erlang's C for the chance of waiting, the mean wait by the
approximation of Allen and Cunneen ("Probability, Statistics, and Queueing Theory", 1990, section 5.2), an exponential
conditional wait, and each sample's own time upon it. Decode is Little's law with a step time that depends on the batch
(Little, "A Proof for the Queuing Formula L = lambda W", 1961). Everything is monotone: a higher rate or slower workers
never need fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SERVICE_POINTS = 128  # quantiles that stand for the samples of service time
REPLICAS_MAX = 4096
UNREACHABLE_RATIO = 1.25
"""Where prompts alone take longer than the objective, no number of workers meets it: the objective is then taken to be
so many times what they take without any wait, and the planner says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLoad:
    """`service_S` are seconds that single prompts take, `busy_seconds` the mean that one adds to a busy worker."""

    rate: float  # prompts a second
    service_S: Floats  # sorted
    busy_seconds: float
    objective_seconds: float
    percentile: float

    @property
    def offered(self) -> float:
        """Workers that are busy on average."""
        return self.rate * self.busy_seconds

    @property
    def bound_seconds(self) -> float:
        alone = float(np.percentile(self.service_S, self.percentile))
        return max(self.objective_seconds, UNREACHABLE_RATIO * alone)


def service_quantiles(seconds: Floats) -> Floats:
    """At most SERVICE_POINTS sorted values that stand for these."""
    ordered = np.sort(seconds)
    if len(ordered) <= SERVICE_POINTS:
        return ordered
    places = (np.arange(SERVICE_POINTS) + 0.5) / SERVICE_POINTS
    return ordered[(places * len(ordered)).astype(np.int64)]


def erlang_c(num_servers: int, offered: float) -> float:
    """The chance that an arrival waits."""
    if offered >= num_servers:
        return 1.0
    blocked = 1.0
    for servers in range(1, num_servers + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    share = offered / num_servers
    return blocked / (1 - share + share * blocked)


def ttft_percentile(load: PrefillLoad, num_workers: int) -> float:
    """Seconds within which `load.percentile` of prompts have their first token. Infinite for an unstable queue."""
    low, high = 0.0, 1.0
    while _late_share(load, num_workers, high) > 1 - load.percentile / 100:
        low, high = high, 2 * high
        if high > 1e6:
            return math.inf
    for _ in range(30):
        middle = (low + high) / 2
        if _late_share(load, num_workers, middle) > 1 - load.percentile / 100:
            low = middle
        else:
            high = middle
    return high


def prefill_workers(load: PrefillLoad) -> int:
    """The fewest whose percentile is within the bound; 0 for no load."""
    if load.rate <= 0 or load.busy_seconds <= 0:
        return 0
    late = 1 - load.percentile / 100
    bound = load.bound_seconds
    return _smallest(
        max(math.floor(load.offered), 1), lambda workers: _late_share(load, workers, bound) <= late + 1e-12
    )


def prefill_workers_keeping_up(load: PrefillLoad) -> int:
    """The fewest whose queue does not grow for ever, however long prompts wait in it; 0 for no load."""
    if load.rate <= 0 or load.busy_seconds <= 0:
        return 0
    return math.floor(load.offered) + 1


def _late_share(load: PrefillLoad, num_workers: int, seconds: float) -> float:
    """Of prompts whose wait and own time together are above `seconds`."""
    offered = load.offered
    if offered >= num_workers:
        return 1.0
    mean = load.busy_seconds
    alone = load.service_S
    squared = float(np.dot(alone, alone)) * len(alone) / max(float(alone.sum()) ** 2, 1e-30)  # 1 + cv^2
    decay = 2 * (num_workers - offered) / (mean * max(squared, 1.0))  # 1 / mean wait of those that wait
    left = seconds - alone
    waits = erlang_c(num_workers, offered) * np.exp(-np.maximum(left, 0.0) * decay)
    return float(np.where(left <= 0, 1.0, waits).sum()) / len(alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLoad:
    """`itl_B` is seconds of a step of 1, 2, ... sequences, as users see them; it does not fall with the batch."""

    rate: float  # sequences a second
    generated: float  # mean tokens of one
    itl_B: Floats
    objective_seconds: float
    percentile: float
    slots: float  # sequences that one worker can hold: slots, or what its pages are enough for
    slot_seconds: float  # that a sequence may wait for its place
    held_seconds: float  # in which a sequence has its place and does not decode yet: its prompt is computed

    @property
    def token_rate(self) -> float:
        return self.rate * self.generated


def decode_batch_max(load: DecodeLoad) -> float:
    """Sequences that a worker may decode at once."""
    return max(min(_batch_in_time(load), load.slots), 1.0)


def _batch_in_time(load: DecodeLoad) -> float:
    """The largest whose step is within the objective, or within UNREACHABLE_RATIO of a single sequence's."""
    bound = max(load.objective_seconds, UNREACHABLE_RATIO * float(load.itl_B[0]))
    return float(np.searchsorted(load.itl_B, bound, side="right"))


def decode_batch(load: DecodeLoad, num_workers: int) -> float:
    """The mean batch that gives what arrives; infinite if none does."""
    batches = np.arange(1, len(load.itl_B) + 1)
    rates = np.maximum.accumulate(batches / load.itl_B)
    wanted = load.token_rate / num_workers
    place = int(np.searchsorted(rates, wanted))
    if place >= len(rates):
        return math.inf
    low = 0.0 if place == 0 else float(rates[place - 1])
    return place + (wanted - low) / max(float(rates[place]) - low, 1e-30)


def decode_workers(load: DecodeLoad) -> int:
    """The fewest with which a batch at the percentile of its Poisson spread meets the objective, and with which no more
    wait for a slot, for longer than `slot_seconds`, than may be late."""
    if load.rate <= 0:
        return 0
    batch_max = _batch_in_time(load)
    sigmas = max(_normal_quantile(load.percentile / 100), 0.0)
    late = 1 - load.percentile / 100

    def fits(workers: int) -> bool:
        running = decode_batch(load, workers) * workers
        if not math.isfinite(running) or running + sigmas * math.sqrt(running) > batch_max * workers:
            return False
        return slot_wait_share(load, running, workers) <= late

    return _smallest(1, fits)


def decode_workers_keeping_up(load: DecodeLoad) -> int:
    """The fewest that have slots for the mean of what runs, and whose mean batch meets the objective."""
    if load.rate <= 0:
        return 0
    batch_max = _batch_in_time(load)

    def fits(workers: int) -> bool:
        running = decode_batch(load, workers) * workers
        taken = running + load.rate * load.held_seconds
        return running <= batch_max * workers and taken <= load.slots * workers

    return _smallest(1, fits)


def slot_wait_share(load: DecodeLoad, running: float, num_workers: int) -> float:
    """The share of sequences that wait for a slot for longer than `slot_seconds`: M/M/S over the slots of all workers,
    the chance of waiting by the approximation of Halfin and Whitt ("Heavy-Traffic Limits for Queues with Many
    Exponential Servers", 1981)."""
    taken = running + load.rate * load.held_seconds
    slots = load.slots * num_workers
    if not math.isfinite(slots):
        return 0.0
    free = slots - taken
    if free <= 0:
        return 1.0
    beta = free / math.sqrt(slots)
    density = math.exp(-beta * beta / 2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + math.erf(beta / math.sqrt(2)))
    waits = 0.0 if density <= 0 else 1 / (1 + beta * below / density)
    return waits * math.exp(-free * load.rate * load.slot_seconds / taken)


def itl_percentile(load: DecodeLoad, num_workers: int) -> float:
    running = decode_batch(load, num_workers) * num_workers
    if not math.isfinite(running):
        return math.inf
    spread = max(_normal_quantile(load.percentile / 100), 0.0) * math.sqrt(running)
    place = math.ceil((running + spread) / num_workers)
    return float(load.itl_B[place - 1]) if place <= len(load.itl_B) else math.inf


def _smallest(low: int, fits: Callable[[int], bool]) -> int:
    """By doubling and halving: `fits` is monotone."""
    if fits(low):
        return low
    high = low + 1
    while high < REPLICAS_MAX and not fits(high):
        low, high = high, high + 2 * (high - low) + 1
    high = min(high, REPLICAS_MAX)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _normal_quantile(share: float) -> float:
    """Of the standard normal, by halving its distribution function."""
    low, high = -6.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < share:
            low = middle
        else:
            high = middle
    return high

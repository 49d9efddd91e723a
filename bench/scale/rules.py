"""Who races: rules that other systems publish, a constant fleet, and ours. Called by `bench.scale.race`.

Each rule is asked every `interval_seconds` with one look at the fleet, and answers with replicas for both pools. All
are held to the same limits; none sees the hidden speeds or the future, but `Static`, which is told its sizes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autoscaler.observation import Observation
from bench.scale.world import Sums
from rorqual.performance import PerformanceModel

Replicas = dict[str, int]
POOLS = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """What every rule is told: the objectives, the model without hidden factors, and the limits of both pools."""

    model: PerformanceModel
    hardware: str
    model_name: str
    slots: int
    ttft_seconds: float = 2.0
    itl_seconds: float = 0.05
    percentile: float = 90.0
    start_seconds: float = 180.0
    replicas_max: int = 32
    cost_per_hour: float = 1.0


class Rule(Protocol):
    interval_seconds: float

    def decide(self, look: Observation, sums: Sums) -> Mapping[str, int]: ...


class Static:
    """Never changes anything. An oracle: its sizes come from a search over the very load that is raced."""

    interval_seconds = 60.0

    def decide(self, look: Observation, sums: Sums) -> Replicas:
        return _wanted(look)


class HorizontalPodAutoscaler:
    """Kubernetes' autoscaling/v2: desired = ceil(current x metric / target), no change within a tolerance of 0.1, asked
    every 15 s. Scale-down: the largest desired number of the last 300 s. Scale-up: without stabilisation, at most the
    larger of 100 % and 4 pods in 15 s. Those are the defaults. Pods that are not ready count as using nothing when
    scaling up, and an answer that would then turn to the other direction changes nothing.
    https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details

    Metrics: the share of time that prefill workers compute, the share of slots or pages that decode workers use.
    """

    interval_seconds = 15.0
    tolerance = 0.1
    down_seconds = 300.0
    up_share = 1.0
    up_pods = 4

    def __init__(self, target: float, config: RuleConfig) -> None:
        self.target = target
        self.config = config
        self._desired: dict[str, deque[tuple[float, int]]] = {name: deque() for name in POOLS}

    def decide(self, look: Observation, sums: Sums) -> Replicas:
        metric = {"prefill": sums.prefill_busy, "decode": sums.decode_used}
        return {name: self._pool(name, look, metric[name]) for name in POOLS}

    def _pool(self, name: str, look: Observation, metric: float) -> int:
        pool = look.pools[name]
        current = pool.replicas_wanted
        ready = sum(not item.is_draining for item in pool.workers)
        desired = _limited(self.desired(current, ready, metric), self.config)
        history = self._desired[name]
        history.append((look.seconds, desired))
        while history[0][0] < look.seconds - self.down_seconds:
            history.popleft()
        if desired < current:
            return min(current, max(value for _, value in history))
        return min(desired, max(math.ceil(current * (1 + self.up_share)), current + self.up_pods))

    def desired(self, current: int, ready: int, metric: float) -> int:
        """`metric` is the mean over `ready` pods of `current`."""
        if ready == 0:
            return current
        ratio = metric / self.target
        if abs(ratio - 1) <= self.tolerance:
            return current
        missing = max(current - ready, 0)
        if missing and ratio > 1:
            again = ratio * ready / (ready + missing)
            if again <= 1 + self.tolerance:
                return current
            return math.ceil(again * current)
        return max(math.ceil(ratio * ready), 0) if missing == 0 else min(current, math.ceil(ratio * ready))


class DynamoSla:
    """NVIDIA Dynamo's SLA planner: each interval, replicas for the predicted load from a profile, corrected by what is
    seen.
      p = TTFT seen / TTFT of the profile at the mean prompt, d = ITL seen / ITL of the profile at the mean batch
      prefill = ceil(requests x prompt / interval x min(1, p) / tokens a second and GPU at that prompt / GPUs)
      decode = ceil(requests x output / interval / best tokens a second and GPU with ITL <= objective / d / GPUs),
      at a context of prompt + output / 2
    https://github.com/ai-dynamo/dynamo/blob/main/docs/planner/sla_planner.md

    Its profile is our model without hidden factors. Readings that favour it: requests are counted as they arrive, not
    as they end, so that what waits is not hidden; of prompts, what is cached is left out, as its throughput means it.
    `window`: 1 predicts the last interval again (its constant predictor), more extrapolates a line through so many.
    Not published, and stronger: `headroom` on the requests, and `corrects_throughput`, which divides the best tokens a
    second by d as well, since a slower worker makes fewer of them whatever the objective.
    """

    def __init__(
        self,
        config: RuleConfig,
        *,
        interval_seconds: float = 180.0,
        window: int = 1,
        headroom: float = 1.0,
        corrects_throughput: bool = False,
    ) -> None:
        self.interval_seconds = interval_seconds
        self.config = config
        self.headroom = headroom
        self.corrects_throughput = corrects_throughput
        self._seen: deque[tuple[float, float, float, float]] = deque(maxlen=window)

    def decide(self, look: Observation, sums: Sums) -> Replicas:
        if not sums.num_prompts or not sums.num_streams or not sums.num_itl:
            return _wanted(look)
        prompt = sums.prompt_tokens / sums.num_prompts
        cached = sums.cached_tokens / sums.num_prompts
        output = sums.output_tokens / sums.num_streams
        self._seen.append((float(sums.num_arrived), prompt, cached, output))
        ready = sum(not item.is_draining for item in look.pools["decode"].workers)
        running = sum(item.load.sequences_running for item in look.pools["decode"].workers)
        ttft, itl = sums.ttft_seconds / sums.num_prompts, sums.itl_seconds / sums.num_itl
        model = self.config.model
        p = ttft / float(model.prefill_seconds(prompt - cached, cached))
        batch = max(running / max(ready, 1), 1.0)
        d = itl / float(model.decode_step_seconds(batch, prompt + output / 2))
        count, prompt, cached, output = self._predicted()
        found = self.replicas(count * self.headroom, prompt=prompt, cached=cached, output=output, p=p, d=d)
        return {name: _limited(value, self.config) for name, value in found.items()}

    def replicas(
        self, count: float, *, prompt: float, cached: float, output: float, p: float, d: float
    ) -> Replicas:
        """For `count` requests an interval."""
        model, seconds = self.config.model, self.interval_seconds
        computed = prompt - cached
        tokens_per_second = computed / float(
            model.prefill_seconds(computed, cached)
        )  # of all GPUs of a worker
        prefill = math.ceil(count * computed / seconds * min(1.0, p) / tokens_per_second)
        context = prompt + output / 2
        batches = np.arange(1.0, self.config.slots + 1)
        steps = model.decode_step_seconds(batches, np.full_like(batches, context))
        meets = steps <= self.config.itl_seconds / d
        best = float((batches / steps)[meets].max()) if meets.any() else float(1 / steps[0])
        if self.corrects_throughput:
            best /= d
        return {"prefill": prefill, "decode": math.ceil(count * output / seconds / best)}

    def _predicted(self) -> tuple[float, float, float, float]:
        """Requests of the next interval, by a line through those seen where there are three; means of the rest."""
        seen = np.array(self._seen)
        mean = [float(value) for value in seen.mean(axis=0)]
        if len(seen) < 3:
            return float(seen[-1, 0]), mean[1], mean[2], mean[3]
        slope, start = np.polyfit(np.arange(len(seen)), seen[:, 0], 1)
        return max(float(start + slope * len(seen)), 0.0), mean[1], mean[2], mean[3]


class DynamoLoad:
    """NVIDIA Dynamo's load planner: one worker more when prefill queues are above 0.5 prompts a worker or decode uses
    over 0.9 of its state, one fewer below 0.2 and 0.5; looked at every 10 s, decided every `adjust_seconds` on the
    means, one at a time, not while a start is under way; a decode worker that has just come is left for a grace period
    of three adjustments. https://github.com/ai-dynamo/dynamo/blob/main/docs/planner/load_planner.md"""

    interval_seconds = 10.0
    grace_adjustments = 3

    def __init__(self, config: RuleConfig, *, adjust_seconds: float = 10.0) -> None:
        self.config = config
        self.adjust_seconds = adjust_seconds
        self._queues: list[float] = []
        self._uses: list[float] = []
        self._decided = 0.0
        self._grace = 0

    def decide(self, look: Observation, sums: Sums) -> Replicas:
        wanted = _wanted(look)
        ready = sum(not item.is_draining for item in look.pools["prefill"].workers)
        self._queues.append(sums.prefill_queued / max(ready, 1))
        self._uses.append(sums.decode_used)
        if look.seconds - self._decided < self.adjust_seconds:
            return wanted
        queue, use = float(np.mean(self._queues)), float(np.mean(self._uses))
        self._queues.clear()
        self._uses.clear()
        self._decided = look.seconds
        if any(pool.starting_seconds for pool in look.pools.values()):
            return wanted
        self._grace = max(self._grace - 1, 0)
        if queue > 0.5:
            wanted["prefill"] += 1
        elif queue < 0.2:
            wanted["prefill"] -= 1
        if use > 0.9:
            wanted["decode"] += 1
            self._grace = self.grace_adjustments
        elif use < 0.5 and not self._grace:
            wanted["decode"] -= 1
        return {name: _limited(value, self.config) for name, value in wanted.items()}


def _wanted(look: Observation) -> Replicas:
    return {name: look.pools[name].replicas_wanted for name in POOLS}


def _limited(value: int, config: RuleConfig) -> int:
    return min(max(value, 1), config.replicas_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    name: str
    summary: str
    make: Callable[[RuleConfig], Rule]


def _hpa(target: float) -> Callable[[RuleConfig], Rule]:
    return lambda config: HorizontalPodAutoscaler(target, config)


def _rorqual(survive_losses: int) -> Callable[[RuleConfig], Rule]:
    def make(config: RuleConfig) -> Rule:
        from bench.scale.ours import Ours  # it needs what is above

        return Ours(config, survive_losses=survive_losses)

    return make


ENTRANTS = {
    item.name: item
    for item in (
        Entrant(name="rorqual", summary="ours, as its policy is by default", make=_rorqual(1)),
        Entrant(
            name="rorqual-no-spare",
            summary="ours with survive_losses 0: as all others, nothing in hand for a lost worker",
            make=_rorqual(0),
        ),
        Entrant(name="hpa-50", summary="autoscaling/v2 on utilisation, target 0.5", make=_hpa(0.5)),
        Entrant(name="hpa-65", summary="the same, target 0.65", make=_hpa(0.65)),
        Entrant(name="hpa-80", summary="the same, target 0.8", make=_hpa(0.8)),
        Entrant(name="dynamo-sla", summary="Dynamo's SLA planner, 180 s, constant predictor", make=DynamoSla),
        Entrant(
            name="dynamo-sla-60",
            summary="the same every 60 s",
            make=lambda config: DynamoSla(config, interval_seconds=60.0),
        ),
        Entrant(
            name="dynamo-sla-trend",
            summary="the same every 60 s, a line through five intervals extrapolated",
            make=lambda config: DynamoSla(config, interval_seconds=60.0, window=5),
        ),
        Entrant(
            name="dynamo-sla-plus",
            summary="that with 25 % more requests and its throughput corrected, too: stronger than published",
            make=lambda config: DynamoSla(
                config, interval_seconds=60.0, window=5, headroom=1.25, corrects_throughput=True
            ),
        ),
        Entrant(name="dynamo-load", summary="Dynamo's load planner, every 10 s", make=DynamoLoad),
        Entrant(
            name="static",
            summary="the smallest constant fleet with 99 % in time, found by search: an oracle, and slow",
            make=lambda _: Static(),
        ),
    )
}

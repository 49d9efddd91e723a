"""The planner of `rorqual autoscaler`: a look at the fleet in, replicas of each pool out, with the arithmetic of it.

Called by the shell and by `rorqual bench scale`, once a look. Pure and deterministic: its clock is the looks' own, it
does no I/O. The story of a look: `expected_load` says what is coming when replicas ordered now are there, `speeds` how
fast workers are, `capacity` how many that needs, `sharing` which pools are cheapest for it, and `stabilising` what of
it is done now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autoscaler import capacity, sharing
from autoscaler.capacity import DecodeLoad, PrefillLoad
from autoscaler.expected_load import Expected, ExpectedLoad, Shape
from autoscaler.observation import Change, Decision, Hold, Observation, PoolState
from autoscaler.policy import Policy, PoolPolicy
from autoscaler.sharing import PoolOption
from autoscaler.speeds import Speeds, pages_per_sequence
from autoscaler.stabilising import PoolMemory
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import HARDWARE, PRESETS, ModelCosts, PerformanceModel, model_costs
from rorqual.session import Role

MARGIN_PERCENTILE = 85.0
"""Of how much loads have grown in `start_seconds`: so much is added to the present one. Chosen in `rorqual bench scale`
on seed 1 of its loads."""

CLEAR_SECONDS = 60.0
"""Requests that wait longer than the objective are to be served within so long, besides those that come."""

OVERDUE_RATIO, OVERDUE_SECONDS = 3.0, 300.0
"""A replica that has been starting for three times its `start_seconds`, and 300 s more, is not expected any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What all pools are decided by."""

    seconds: float
    expected: Expected
    shape: Shape
    margin: float  # of forecasts and of few samples
    backlog: float  # requests that wait for longer than they should
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Need:
    """Of one pool, if it had all the load of its role."""

    up: int  # with every margin
    expected: int  # that keep up with what comes: what is left after losses must be as many
    look: _Look
    prefill: PrefillLoad | None = None
    decode: DecodeLoad | None = None

    @property
    def text(self) -> str:
        return _arithmetic(self)


class Planner:
    def __init__(self, policy: Policy, *, costs: ModelCosts | None = None) -> None:
        """`costs` of the model where the policy names a directory, which its reader reads; without them such a policy
        goes by measurements."""
        self.policy = policy
        self._costs = costs
        self._load = ExpectedLoad(percentile=MARGIN_PERCENTILE)
        self._memories: dict[str, PoolMemory] = {}
        self._speeds: dict[str, Speeds] = {}
        self.replace_policy(policy, costs=costs)

    def replace_policy(self, policy: Policy, *, costs: ModelCosts | None = None) -> None:
        """What was learned of the load stays, and of every pool whose hardware is the same."""
        before = self.policy
        costs = costs if costs is not None else _preset(policy)
        same_model = costs == self._costs
        self.policy, self._costs = policy, costs
        self._memories = {name: self._memories.get(name, PoolMemory()) for name in policy.pools}
        speeds = dict(self._speeds)
        for name, pool in policy.pools.items():
            old = before.pools.get(name)
            known = old is not None and (old.hardware, old.devices) == (pool.hardware, pool.devices)
            if name not in speeds or not known or not same_model:
                speeds[name] = Speeds(_model(pool, costs))
        self._speeds = {name: speeds[name] for name in policy.pools}

    def holds(self) -> dict[str, Hold]:
        """What people hold, for the planner that comes after this one."""
        found = {name: memory.hold() for name, memory in self._memories.items()}
        return {name: hold for name, hold in found.items() if hold is not None}

    def resume(self, holds: Mapping[str, Hold]) -> None:
        """Of a planner before this one, by the same clock, before the first look."""
        for name in holds.keys() & self._memories.keys():
            self._memories[name].resume(holds[name])

    def decide(self, observation: Observation) -> Decision:
        notes: list[str] = []
        look = self._look(observation, notes)
        needs = {
            name: self._need(name, observation.pools[name], look)
            for name in self.policy.pools
            if name in observation.pools
        }
        self._remember(observation, look, needs, notes)
        replicas, changes = self._changes(observation, look, needs, notes)
        return Decision(
            replicas=replicas,
            changes=tuple(changes),
            notes=tuple(notes),
            figures=self._figures(look, needs),
        )

    # looking -----------------------------------------------------------------------------------------------------

    def _look(self, observation: Observation, notes: list[str]) -> _Look:
        pools = {name: pool for name, pool in observation.pools.items() if name in self.policy.pools}
        missing = {name: _num_missing(pool) for name, pool in pools.items() if _num_missing(pool) > 0}
        for name, count in missing.items():
            notes.append(f"{name}: {count} replicas cannot be reached: no pool is made smaller")
        queued = self._count_arrivals(observation, pools, whole=not missing)
        shape = self._load.shape(observation.seconds)
        for name, pool in pools.items():
            self._speeds[name].observe(
                pool.workers,
                shape,
                prefills=pool.role is not Role.DECODE,
                decodes=pool.role is not Role.PREFILL,
            )
        ahead = max((item.start_seconds for item in self.policy.pools.values()), default=0.0)
        expected = self._load.expect(observation.seconds, ahead + observation.interval_seconds)
        in_time = expected.rate_now * self.policy.objectives.ttft.seconds
        return _Look(
            seconds=observation.seconds,
            expected=expected,
            shape=shape,
            margin=math.hypot(expected.margin, _few_samples_margin(shape)),
            backlog=max(queued - in_time, 0.0),
            whole=not missing,
        )

    def _count_arrivals(
        self, observation: Observation, pools: Mapping[str, PoolState], *, whole: bool
    ) -> float:
        """Requests that have no first token yet, wherever they wait. Where the policy has decode workers alone, nobody
        tells of prompts: requests are then counted as they end, and those under way as not yet counted."""
        traffic = observation.traffic
        queued = float(max(traffic.num_waiting, 0))
        for pool in pools.values():
            if pool.role is not Role.DECODE:
                queued += _num_queued(pool)
        uncounted = queued
        if all(pool.role is Role.DECODE for pool in pools.values()):
            traffic = replace(traffic, num_prompts=traffic.num_streams)
            uncounted += sum(
                max(worker.load.sequences_running + worker.load.sequences_waiting, 0)
                for pool in pools.values()
                for worker in pool.workers
            )
        self._load.observe(
            observation.seconds,
            observation.interval_seconds,
            traffic,
            num_queued=uncounted,
            whole=whole,
        )
        return queued

    # needs -------------------------------------------------------------------------------------------------------

    def _need(self, name: str, pool: PoolState, look: _Look) -> _Need | None:
        """None: nothing is known to decide by."""
        expected = look.expected
        if expected.num_looks == 0:
            return None
        rate = expected.rate_now
        # The larger, not the sum: the margin is what loads have grown by in so long, which trends were a part of.
        with_margin = max(rate * (1 + look.margin), expected.rate_ahead) + look.backlog / CLEAR_SECONDS
        if with_margin <= 0:
            return _Need(up=0, expected=0, look=look)
        speeds, role = self._speeds[name], pool.role
        if role is not Role.DECODE and not (look.shape.has_prompts and speeds.knows_prefill):
            return None
        if role is not Role.PREFILL and not (look.shape.has_streams and speeds.knows_decode):
            return None
        prefill = self._prefill_load(name, with_margin, look.shape) if role is not Role.DECODE else None
        decode = self._decode_load(name, with_margin, look.shape) if role is not Role.PREFILL else None
        up = _workers(prefill, decode)
        # What a loss may leave need not meet the objectives until it is replaced, but no queue may grow for ever.
        sustained = expected.rate_sustained
        plain_prefill = replace(prefill, rate=sustained) if prefill is not None else None
        plain_decode = replace(decode, rate=sustained) if decode is not None else None
        expected_need = min(_workers_keeping_up(plain_prefill, plain_decode), up) if sustained > 0 else 0
        return _Need(up=up, expected=expected_need, look=look, prefill=prefill, decode=decode)

    def _prefill_load(self, name: str, rate: float, shape: Shape) -> PrefillLoad:
        objective = self.policy.objectives.ttft
        alone, busy = self._speeds[name].prefill_seconds(shape)
        return PrefillLoad(
            rate=rate,
            service_S=capacity.service_quantiles(alone),
            busy_seconds=busy,
            objective_seconds=objective.seconds,
            percentile=objective.percentile,
        )

    def _decode_load(self, name: str, rate: float, shape: Shape) -> DecodeLoad:
        objective, speeds = self.policy.objectives.itl, self._speeds[name]
        slots = speeds.slots or math.inf
        if speeds.pages:
            slots = min(slots, speeds.pages / max(pages_per_sequence(shape, PAGE_TOKENS), 1.0))
        return DecodeLoad(
            rate=rate,
            generated=float(shape.generated.mean()),
            itl_B=speeds.itl_by_batch(shape),
            objective_seconds=objective.seconds,
            percentile=objective.percentile,
            slots=max(slots, 1.0),
            slot_seconds=self.policy.objectives.ttft.seconds / 2,
            held_seconds=min(self._load.ttft_seconds(), self.policy.objectives.ttft.seconds),
        )

    # deciding ----------------------------------------------------------------------------------------------------

    def _remember(
        self, observation: Observation, look: _Look, needs: Mapping[str, _Need | None], notes: list[str]
    ) -> None:
        """Each pool's share of its role's need, as of this look."""
        for name, pool in observation.pools.items():
            if name in self._memories and self._memories[name].observe(
                look.seconds, pool.replicas_wanted, self.policy.manual_hold_seconds
            ):
                notes.append(
                    f"{name}: somebody set {pool.replicas_wanted} replicas: it is left so for"
                    f" {self.policy.manual_hold_seconds:g} s"
                )
        for role in Role:
            options: list[PoolOption] = []
            for name, policy in self.policy.pools.items():
                need = needs.get(name)
                if policy.role is role and need is not None:
                    options.append(self._option(name, policy, observation.pools[name], need, look, notes))
            up = sharing.shares(options, survive_losses=0)
            down = sharing.shares(options, survive_losses=self.policy.survive_losses)
            for option in options:
                name = option.name
                if option.fixed is not None:
                    # Never more than is asked for already; fewer, when even alone it needs fewer.
                    wanted = observation.pools[name].replicas_wanted
                    up[name] = min(option.need, wanted)
                    down[name] = min(
                        max(option.need, option.need_expected + self.policy.survive_losses), wanted
                    )
                self._memories[name].ask(look.seconds, up=up[name], down=down[name])

    def _option(
        self, name: str, policy: PoolPolicy, pool: PoolState, need: _Need, look: _Look, notes: list[str]
    ) -> PoolOption:
        ready = sum(not item.is_draining for item in pool.workers)
        fixed: int | None = None
        if self._memories[name].is_held(look.seconds):
            fixed = pool.replicas_wanted
        else:
            problem = pool.problem or _overdue(policy, pool)
            if problem:
                notes.append(f"{name}: replicas cannot start, so no more are asked for: {problem}")
                fixed = min(ready, pool.replicas_wanted)
        return PoolOption(
            name=name,
            need=need.up,
            need_expected=need.expected,
            low=policy.replicas.min,
            high=policy.replicas.max,
            cost=policy.cost_per_hour,
            fixed=fixed,
        )

    def _changes(
        self,
        observation: Observation,
        look: _Look,
        needs: Mapping[str, _Need | None],
        notes: list[str],
    ) -> tuple[dict[str, int], list[Change]]:
        replicas = {name: pool.replicas_wanted for name, pool in observation.pools.items()}
        changes: list[Change] = []
        for name, policy in self.policy.pools.items():
            if name not in observation.pools:
                notes.append(f"{name}: nothing is known of this pool")
                continue
            pool, memory, need = observation.pools[name], self._memories[name], needs.get(name)
            before = pool.replicas_wanted
            after = self._after(name, policy, observation, look, needs, notes)
            if after != before:
                is_within = policy.replicas.min <= before <= policy.replicas.max
                kind = need.text if need is not None and is_within else "the limits of the policy"
                changes.append(
                    Change(
                        pool=name, before=before, after=after, reason=f"{name} {before} -> {after}: {kind}"
                    )
                )
            memory.decide(look.seconds, before=before, after=after)
            replicas[name] = after
        return replicas, changes

    def _after(
        self,
        name: str,
        policy: PoolPolicy,
        observation: Observation,
        look: _Look,
        needs: Mapping[str, _Need | None],
        notes: list[str],
    ) -> int:
        pool, memory, need = observation.pools[name], self._memories[name], needs.get(name)
        before, limits = pool.replicas_wanted, policy.replicas
        is_within = limits.min <= before <= limits.max
        if memory.is_held(look.seconds):
            left = memory.hold_until - look.seconds
            outside = "" if is_within else f", outside {limits.min}..{limits.max}"
            notes.append(f"{name}: held at {before} by hand for {left:.0f} s more{outside}")
            return before
        after = memory.target(look.seconds, before, policy)
        if need is None and is_within:
            notes.append(f"{name}: kept at {before}: not enough has been seen to decide by")
            return before
        if after > before and limits.min <= before and (pool.problem or _overdue(policy, pool)):
            return before
        if after < before and not look.whole:
            return before
        if after < before and is_within and not self._may_shrink(name, after, observation, look, needs):
            return before
        if need is not None and need.up > limits.max:
            notes.append(f"{name}: {need.up} would be needed, {limits.max} is the most: {need.text}")
        return after

    def _may_shrink(
        self,
        name: str,
        after: int,
        observation: Observation,
        look: _Look,
        needs: Mapping[str, _Need | None],
    ) -> bool:
        if needs.get(name) is None:
            return False
        role = self.policy.pools[name].role
        options: list[PoolOption] = []
        replicas: dict[str, int] = {}
        for item, policy in self.policy.pools.items():
            need = needs.get(item)
            if policy.role is role and need is not None:
                pool = observation.pools[item]
                options.append(self._option(item, policy, pool, need, look, notes=[]))
                # Of several pools those that are to take over must be there already.
                ready = sum(not worker.is_draining for worker in pool.workers)
                replicas[item] = min(ready, after) if item == name else ready
        if len(options) == 1:
            return True  # what was asked for has losses in hand
        return sharing.carries(options, replicas, survive_losses=self.policy.survive_losses)

    def _figures(self, look: _Look, needs: Mapping[str, _Need | None]) -> dict[str, float]:
        expected, shape = look.expected, look.shape
        found = {
            "arrivals_per_second": expected.rate_now,
            "arrivals_ahead_per_second": expected.rate_ahead,
            "margin_ratio": look.margin,
            "backlog_requests": look.backlog,
        }
        if shape.has_prompts:
            found["prompt_tokens_mean"] = float(shape.prompt.mean())
            found["computed_tokens_mean"] = float(shape.computed.mean())
            found["computed_tokens_p90"] = float(np.percentile(shape.computed, 90))
        if shape.has_streams:
            found["generated_tokens_mean"] = float(shape.generated.mean())
            found["context_tokens_mean"] = float(shape.context.mean())
        for name, need in needs.items():
            if need is not None:
                found[f"{name}_needed_replicas"] = float(need.up)
            found[f"{name}_prefill_correction_ratio"] = self._speeds[name].prefill_factor
            found[f"{name}_decode_correction_ratio"] = self._speeds[name].decode_factor
        return found


def _workers(prefill: PrefillLoad | None, decode: DecodeLoad | None) -> int:
    """As many as meet the objectives."""
    return _both(
        prefill,
        decode,
        0 if prefill is None else capacity.prefill_workers(prefill),
        0 if decode is None else capacity.decode_workers(decode),
    )


def _workers_keeping_up(prefill: PrefillLoad | None, decode: DecodeLoad | None) -> int:
    """As few as can be without a queue that grows for ever: of losses, what is left until they are replaced."""
    return _both(
        prefill,
        decode,
        0 if prefill is None else capacity.prefill_workers_keeping_up(prefill),
        0 if decode is None else capacity.decode_workers_keeping_up(decode),
    )


def _both(prefill: PrefillLoad | None, decode: DecodeLoad | None, prefilling: int, decoding: int) -> int:
    """Workers that do both need the time of the one beside that of the other."""
    alone = max(prefilling, decoding)
    if prefill is None or decode is None:
        return alone
    best = capacity.decode_batch_max(decode)
    busy = decode.token_rate * float(decode.itl_B[min(int(best), len(decode.itl_B)) - 1]) / best
    return max(alone, math.ceil(prefill.offered + busy - 1e-9))


def _arithmetic(need: _Need) -> str:
    look, prefill, decode, count = need.look, need.prefill, need.decode, max(need.up, 1)
    shape, expected = look.shape, look.expected
    if prefill is None and decode is None:
        return "nothing arrives"
    text = (
        f"{expected.rate_now:.3g} requests/s now, {expected.rate_ahead:.3g} ahead, +{look.margin:.0%} margin"
    )
    if look.backlog > 0:
        text += f", {look.backlog:.0f} waiting"
    if prefill is not None:
        mean, high = float(shape.computed.mean()), float(np.percentile(shape.computed, 90))
        ttft = _seconds(capacity.ttft_percentile(prefill, count))
        text += f"; prefill {mean / 1000:.1f}k uncached tokens (p90 {high / 1000:.1f}k)"
        text += f", {prefill.busy_seconds:.3g} s each: {prefill.offered:.1f} busy"
        text += f", TTFT p{prefill.percentile:g} {ttft} with {count}"
        if count > 1:
            text += f", {_seconds(capacity.ttft_percentile(prefill, count - 1))} with {count - 1}"
        if prefill.bound_seconds > prefill.objective_seconds:
            text += f" (prompts alone take too long for {prefill.objective_seconds:g} s)"
    if decode is not None:
        batch = capacity.decode_batch(decode, count)
        itl = capacity.itl_percentile(decode, count)
        text += (
            f"; decode {decode.generated:.0f} tokens each: batches of {batch:.0f} of at most"
            f" {capacity.decode_batch_max(decode):.0f}, ITL p{decode.percentile:g} {1000 * itl:.1f} ms with {count}"
        )
    return text


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if math.isfinite(value) else "without bound"


def _few_samples_margin(shape: Shape) -> float:
    """The standard error of the mean work, as a share."""
    if not shape.has_prompts:
        return 0.0
    mean = float(shape.computed.mean())
    if mean <= 0 or len(shape.computed) < 2:
        return 0.0
    return min(float(shape.computed.std()) / mean / math.sqrt(len(shape.computed)), 0.5)


def _num_queued(pool: PoolState) -> int:
    """At workers, without a first token, as near as their load tells."""
    waiting = sum(max(item.load.sequences_waiting, 0) for item in pool.workers)
    if pool.role is Role.PREFILL:
        waiting += sum(max(item.load.sequences_running, 0) for item in pool.workers)
    return waiting


def _num_missing(pool: PoolState) -> int:
    ready = sum(not item.is_draining for item in pool.workers)
    return max(pool.replicas_wanted - ready - len(pool.starting_seconds), 0)


def _overdue(policy: PoolPolicy, pool: PoolState) -> str:
    after = OVERDUE_RATIO * policy.start_seconds + OVERDUE_SECONDS
    late = [age for age in pool.starting_seconds if age > after]
    return f"{len(late)} have been starting for {max(late):.0f} s" if late else ""


def _preset(policy: Policy) -> ModelCosts | None:
    return model_costs(PRESETS[policy.model]) if policy.model in PRESETS else None


def _model(pool: PoolPolicy, costs: ModelCosts | None) -> PerformanceModel | None:
    if costs is None or pool.hardware is None:
        return None
    return PerformanceModel(hardware=HARDWARE[pool.hardware], costs=costs, num_devices=pool.devices)

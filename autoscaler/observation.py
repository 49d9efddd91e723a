"""What one look at the workers saw, and what was decided: the values between the shell, the planner and simulations.

Made by the shell of `rorqual autoscaler` and by `bench.scale`, read by `autoscaler.planner`. Values only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rorqual.session import Load, Role
from rorqual.usage import PromptSample as PromptSample
from rorqual.usage import StreamSample as StreamSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What came and went since the last look, over all workers. Samples are all of them, or a fair part when there
    were too many: their number is in the counts."""

    num_prompts: int = 0
    prompts: tuple[PromptSample, ...] = ()
    num_streams: int = 0
    streams: tuple[StreamSample, ...] = ()
    num_waiting: int = 0  # now, at routers: requests that no worker has been given yet
    num_unserved: int = 0  # that routers refused or gave up for want of workers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """A worker that can be reached and has its model loaded."""

    address: str
    load: Load
    is_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """One pool. What is wanted may have been set by anybody."""

    role: Role
    replicas_wanted: int
    workers: tuple[WorkerState, ...]  # connected; those that drain, too
    starting_seconds: tuple[
        float, ...
    ] = ()  # of each replica that is wanted and not there: for how long it has been
    problem: str = (
        ""  # why replicas cannot start, as the target tells it; empty: nothing is known to be wrong
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look. `seconds` is the injected clock's, monotonic; `interval_seconds` since the last look (0: the first)."""

    seconds: float
    interval_seconds: float
    pools: Mapping[str, PoolState]
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Replicas that somebody else has set, and until when, by the observations' clock, they are theirs."""

    replicas: int
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A pool's replicas are to be set. `reason` is one line with its arithmetic, for a person."""

    pool: str
    before: int
    after: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of one look. `figures` are the numbers it went by, by name with unit, for metrics and logs."""

    replicas: Mapping[str, int]  # of every pool, changed or not
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()  # for a person though nothing changes: a hold, a limit that binds, a problem
    figures: Mapping[str, float] = field(default_factory=dict[str, float])

"""How fast this worker reads kept state from each source, and how fast it computes. Pure; owned by the scheduler.

`engine.worker.tiers.restoring` and `engine.worker.tiers.filling` ask it whether something is worth reading; the host
tells it every plan and result, `engine.worker.tiers.store_tier` and `engine.worker.sharing.peer_reading` tell it what
they have read. The rule is that of `rorqual.performance.sources`. Routers are told the speeds of all sources, since
they place prompts by them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine.plan import StepPlan, StepResult
from engine.worker.prefill_rate import PrefillRate
from rorqual.performance.sources import (
    TOKENS_PER_SECOND_UNKNOWN,
    MeasuredSpeed,
    SourceSpeed,
    break_even_tokens,
    is_worth_reading,
)

HOST_ASSUMED = SourceSpeed(bytes_per_second=10e9)
PEER_ASSUMED = SourceSpeed(bytes_per_second=1e9, latency_seconds=0.002)
STORE_ASSUMED = SourceSpeed(bytes_per_second=1e9, latency_seconds=0.002)
"""Rather too fast than too slow: what is tried is measured."""

HOST, PEER, STORE = "host", "peer", "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedsConfig:
    """Assumed until it is measured."""

    host: SourceSpeed = HOST_ASSUMED
    peer: SourceSpeed = PEER_ASSUMED
    store: SourceSpeed = STORE_ASSUMED
    tokens_per_second: float = TOKENS_PER_SECOND_UNKNOWN


class Speeds:
    """The worker's clock is told by `turned`; without it nothing is ever tried anew."""

    def __init__(self, config: SpeedsConfig) -> None:
        self._config = config
        self._prefill = PrefillRate()
        self._now = 0.0
        self._copies: deque[int] = deque()  # bytes of plans in flight
        self.host = MeasuredSpeed(config.host)
        self.peer = MeasuredSpeed(config.peer)
        self.store = MeasuredSpeed(config.store)

    @property
    def prefill_tokens_per_second(self) -> float:
        """As measured; 0: not yet."""
        return self._prefill.tokens_per_second

    def told(self, source: MeasuredSpeed) -> SourceSpeed | None:
        """For routers. None: nothing was measured, or too long ago: it should be tried."""
        return source.speed if source.is_measured and not source.is_stale(self._now) else None

    def ways(self) -> Iterator[tuple[str, tuple[MeasuredSpeed, ...]]]:
        """By name, what bytes pass from there to the device."""
        yield HOST, (self.host,)
        yield PEER, (self.peer,)
        yield STORE, (self.store, self.host)

    def turned(self, now: float) -> None:
        """Seconds on a clock that begins at 0 or later and never goes back."""
        self._now = now

    def planned(self, plan: StepPlan, *, page_bytes: int) -> None:
        self._prefill.planned(sum(item.count for item in plan.segments if item.count > 1))
        self._copies.append(_bytes_copied(plan, page_bytes))

    def landed(self, result: StepResult) -> None:
        """Results come in the order of plans."""
        copy_seconds = result.copy_ms / 1000
        self._prefill.landed(result.step_ms / 1000 - copy_seconds)
        self.observe(self.host, self._copies.popleft(), copy_seconds)

    def observe(self, source: MeasuredSpeed, num_bytes: float, seconds: float) -> None:
        """A read from it is done."""
        source.observe(num_bytes, seconds, now=self._now)

    def compute_seconds(self, num_tokens: float) -> float:
        return num_tokens * self._seconds_per_token

    def is_worth(self, num_bytes: float, num_tokens: float, *way: MeasuredSpeed) -> bool:
        """Whether so many bytes come from these sources, one after the other, before so many tokens are computed."""
        speeds = [source.speed for source in way]
        return is_worth_reading(
            num_bytes, speeds, num_tokens=num_tokens, seconds_per_token=self._seconds_per_token
        )

    def probes(self, source: MeasuredSpeed) -> bool:
        """It is not worth its time: whether it should be read from all the same, which is so now and then."""
        return source.probe(now=self._now)

    def break_even_tokens(
        self, way: tuple[MeasuredSpeed, ...], *, tail_bytes: float, bytes_per_token: float
    ) -> float:
        """From which length on a prefix is read; inf: none is."""
        return break_even_tokens(
            [source.speed for source in way],
            bytes_fixed=tail_bytes,
            bytes_per_token=bytes_per_token,
            seconds_per_token=self._seconds_per_token,
        )

    @property
    def _seconds_per_token(self) -> float:
        return 1 / (self._prefill.tokens_per_second or self._config.tokens_per_second)


def _bytes_copied(plan: StepPlan, page_bytes: int) -> int:
    """Either way, by a plan that brings something back, and 0 by any other: by these the speed of copies is measured.
    Not run on a GPU yet: there `copy_ms` must be the time of the copies' own events."""
    if not plan.promote:
        return 0
    pages = len(plan.promote.pages) + len(plan.demote.pages)
    records = (*plan.promote.records, *plan.demote.records)
    return pages * page_bytes + sum(item.num_bytes for item in records)

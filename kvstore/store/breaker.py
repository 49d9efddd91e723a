"""Whether a server is worth asking: a circuit breaker, as a plain state machine.

`kvstore.store.health` owns one for reads and one for writes of each server. Performs no I/O and reads no clock: `now`
is in seconds and never goes back. Closed, work is let through. After `failures_max` failures in a row, with nothing
done in between, it opens: nothing is let through until a probe, which may begin when the back-off has passed, has ended
well. The back-off doubles with every probe that fails, and also when real work fails again before any has been done: a
server that answers probes and nothing else is asked ever less often.

What fails together failed once: work that began before the last failure counted, or before something else was done, is
not another failure. So a hundred reads that end at the same moment do not open it.
"""

from __future__ import annotations

import enum


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"  # a probe is on its way


class Breaker:
    def __init__(self, *, failures_max: int, backoff_seconds: float, backoff_seconds_max: float) -> None:
        assert failures_max >= 1
        assert 0 < backoff_seconds <= backoff_seconds_max
        self.state = BreakerState.CLOSED
        self.probe_at = float("inf")
        """When a probe may begin; only while open."""
        self._failures_max = failures_max
        self._backoff_first = backoff_seconds
        self._backoff_max = backoff_seconds_max
        self._backoff = backoff_seconds
        self._num_failures = 0
        self._noted_at = float("-inf")  # the last failure that counted, or the last thing done

    @property
    def is_closed(self) -> bool:
        return self.state is BreakerState.CLOSED

    def worked(self, now: float) -> None:
        """Something was done. While open this changes nothing: it may have begun before, and the probe will tell."""
        self._noted_at = max(self._noted_at, now)
        if self.is_closed:
            self._num_failures = 0
            self._backoff = self._backoff_first

    def failed(self, began: float, now: float) -> bool:
        """Work that began at `began` failed. True when this opened the breaker."""
        if not self.is_closed or began < self._noted_at:
            return False
        self._noted_at = now
        self._num_failures += 1
        if self._num_failures < self._failures_max:
            return False
        self._open(now)
        return True

    def begin_probe(self, now: float) -> None:
        assert self.state is BreakerState.OPEN, f"a probe while {self.state.value}"
        assert now >= self.probe_at, "a probe before its time"
        self.state = BreakerState.HALF_OPEN
        self.probe_at = float("inf")

    def probe_ended(self, now: float, *, is_well: bool) -> None:
        assert self.state is BreakerState.HALF_OPEN, f"the end of a probe while {self.state.value}"
        if is_well:
            self.state = BreakerState.CLOSED
            # One failure opens it again until something was done: it was lost a moment ago.
            self._num_failures = self._failures_max - 1
            self._noted_at = now
        else:
            self._open(now)

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self.probe_at = now + self._backoff
        self._backoff = min(2 * self._backoff, self._backoff_max)
        self._num_failures = 0

"""What a pool remembers between looks: what was decided, who else set it, and what it would have been asked for.

Called by `autoscaler.planner`. Pure. A need becomes a change here: within the limits and steps of the policy, up at
once, down only when every look of the stabilisation would have it so.
"""

from __future__ import annotations

from collections import deque

from autoscaler.observation import Hold
from autoscaler.policy import PoolPolicy

HISTORY_MAX = 100_000
"""Looks of a day, at one a second; stabilisation is a day at most."""


class PoolMemory:
    def __init__(self) -> None:
        self.decided: int | None = None
        self.hold_until = float("-inf")
        self._resumed: Hold | None = None  # of a planner before this one
        self._before = 0  # what there was when `decided` was
        self._is_applied = True  # `decided` has been seen
        self._needs: deque[tuple[float, int, int]] = deque(maxlen=HISTORY_MAX)  # seconds, for up and for down
        self._looked_since: float | None = None
        self._grew_at = self._shrank_at = float("-inf")

    def observe(self, seconds: float, wanted: int, hold_seconds: float) -> bool:
        """Whether somebody else has just set the pool: then it is theirs for `hold_seconds`. A decision that was never
        seen is one that could not be carried out: it is made again."""
        if self._looked_since is None:
            self._looked_since = seconds
        if self.decided is None and self._resumed is not None and wanted == self._resumed.replicas:
            self.hold_until = self._resumed.until
        if self.decided is None or wanted == self.decided:
            self.decided, self._is_applied = wanted, True
            return False
        if not self._is_applied and wanted == self._before:
            return False
        self.decided, self._is_applied = wanted, True
        self.hold_until = seconds + hold_seconds
        self._needs.clear()
        return True

    def hold(self) -> Hold | None:
        """For `resume` of another memory of the same pool."""
        if self.decided is None:
            return self._resumed
        return Hold(replicas=self.decided, until=self.hold_until)

    def resume(self, hold: Hold) -> None:
        """What was held before anything is observed goes on being held, if it is still what there is."""
        self._resumed = hold

    def is_held(self, seconds: float) -> bool:
        return seconds < self.hold_until

    def ask(self, seconds: float, *, up: int, down: int) -> None:
        """One look needs `up` at least. `down`, which is no less, has losses in hand; it is of more than this look, so
        that the latest counts."""
        self._needs.append((seconds, up, max(up, down)))

    def target(self, seconds: float, current: int, policy: PoolPolicy) -> int:
        """What the needs of the windows of the policy make of `current`, one step of it, and within its limits."""
        stable = policy.stabilisation
        keep = max(stable.up_seconds, stable.down_seconds)
        while self._needs and self._needs[0][0] < seconds - keep:
            self._needs.popleft()
        limits = policy.replicas
        if current < limits.min:
            return limits.min
        if current > limits.max:
            return max(limits.max, current - policy.step.down)
        up = min((up for at, up, _ in self._needs if at >= seconds - stable.up_seconds), default=current)
        down = max((up for at, up, _ in self._needs if at >= seconds - stable.down_seconds), default=current)
        if self._needs:
            down = max(down, self._needs[-1][2])
        up, down = min(up, limits.max), max(down, limits.min)
        if up > current and seconds - self._shrank_at >= stable.up_seconds:
            return min(up, current + policy.step.up)
        since = seconds - (self._looked_since if self._looked_since is not None else seconds)
        calm = min(since, seconds - self._grew_at) >= stable.down_seconds
        if down < current and calm and since > 0:
            return max(down, current - policy.step.down)
        return current

    def decide(self, seconds: float, *, before: int, after: int) -> None:
        if after > before:
            self._grew_at = seconds
        elif after < before:
            self._shrank_at = seconds
        self._before = before
        self._is_applied = after == before
        self.decided = after

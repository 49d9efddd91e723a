"""How often people are told what: Kubernetes Events of a target, with a bound on their rate. Pure.

Used by `autoscaler.targets.kubernetes`. What is said again is counted on the same Event; what is new is let through
while there is room, so that a pool that flaps cannot fill etcd.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

BURST = 10
SECONDS_EACH = 30.0
REPEAT_SECONDS = 60.0
"""The same is said again at most so often."""

TEXT_MAX = 1000  # of a message Kubernetes takes 1024
COMPONENT = "rorqual-autoscaler"


@dataclass(slots=True)
class Told:
    name: str
    reason: str
    text: str
    count: int
    at: float


class EventBook:
    """`now` is of a monotonic clock."""

    def __init__(self) -> None:
        self.num_left_out = 0
        self._last: dict[str, Told] = {}  # by pool
        self._room = float(BURST)
        self._refilled_at = 0.0

    def again(self, pool: str, *, reason: str, text: str) -> Told | None:
        """The Event that says this already; None: it has to be a new one, see `may_tell`."""
        last = self._last.get(pool)
        if last is None or (last.reason, last.text) != (reason, text):
            return None
        return last

    def is_due(self, told: Told, *, now: float) -> bool:
        """Whether it may be said again."""
        return now - told.at >= REPEAT_SECONDS and self.may_tell(now=now)

    def may_tell(self, *, now: float) -> bool:
        """Takes the room for one call."""
        self._room = min(BURST, self._room + max(0.0, now - self._refilled_at) / SECONDS_EACH)
        self._refilled_at = now
        if self._room < 1:
            self.num_left_out += 1
            return False
        self._room -= 1
        return True

    def note(self, pool: str, told: Told) -> None:
        self._last[pool] = told

    def forget(self, pool: str) -> None:
        self._last.pop(pool, None)


def make_event(
    name: str,
    *,
    namespace: str,
    involved: dict[str, Any],
    reason: str,
    text: str,
    is_warning: bool,
    wall: float,
    instance: str,
) -> dict[str, Any]:
    """core/v1."""
    stamp = timestamp(wall)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": involved,
        "reason": reason,
        "message": cut(text),
        "type": "Warning" if is_warning else "Normal",
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": instance,
    }


def cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 3] + "..."


def timestamp(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

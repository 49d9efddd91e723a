"""What was decided and is not yet so: between the planner, which takes its word for done, and a target that may fail.

Pure; used by `autoscaler.loop`. The planner takes replicas that are not what it decided last for somebody's edit. A
write that failed is none: until it succeeds, or somebody really sets another number, the planner is shown its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from autoscaler.targets.contract import PoolReading


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    pool: str
    before: int
    after: int


class Intentions:
    def __init__(self) -> None:
        self._pending: dict[str, Write] = {}
        self._actual: dict[str, int] = {}
        self._set: dict[str, int] = {}  # what was last set by us, or found

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def seen(self, readings: Mapping[str, PoolReading]) -> tuple[dict[str, PoolReading], tuple[str, ...]]:
        """The readings as the planner is to see them, and the pools that somebody else has set."""
        shown: dict[str, PoolReading] = {}
        edited: list[str] = []
        for pool, reading in readings.items():
            self._actual[pool] = actual = reading.replicas
            write = self._pending.get(pool)
            if write is not None and actual == write.before:
                shown[pool] = _as_if(reading, write)
                continue
            shown[pool] = reading
            if write is not None:
                del self._pending[pool]
                if actual == write.after:
                    self._set[pool] = actual  # the answer was lost, the write was not
            if actual != self._set.setdefault(pool, actual):
                edited.append(pool)
                self._set[pool] = actual
        return shown, tuple(edited)

    def decided(self, replicas: Mapping[str, int], *, changed: Collection[str]) -> list[Write]:
        """What is to be written now: changes, and what could not be written before."""
        writes: list[Write] = []
        for pool, after in replicas.items():
            before = self._actual[pool]
            if pool not in changed and pool not in self._pending:
                continue
            self._pending.pop(pool, None)
            if after != before:
                write = Write(pool=pool, before=before, after=after)
                self._pending[pool] = write
                writes.append(write)
        return writes

    def written(self, write: Write) -> None:
        self._pending.pop(write.pool, None)
        self._set[write.pool] = write.after

    def overtaken(self, write: Write) -> None:
        """Somebody else has set the pool: that is for the planner to see."""
        self._pending.pop(write.pool, None)


def _as_if(reading: PoolReading, write: Write) -> PoolReading:
    return replace(
        reading,
        replicas=write.after,
        starting_seconds=reading.starting_seconds + (0.0,) * max(0, write.after - write.before),
    )

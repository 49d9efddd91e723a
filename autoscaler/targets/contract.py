"""What a target is. Implemented by `local` and `kubernetes`, used by `autoscaler.loop`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rorqual.errors import RorqualError


class TargetUnreachable(RorqualError):
    """It cannot be known now how many replicas there are, or be said how many there are to be."""


class SetBySomebodyElse(RorqualError):
    """The pool's replicas are no longer what they were when it was decided: they are left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReading:
    """A pool as its target tells it. What is wanted may have been set by anybody."""

    replicas: int
    starting_seconds: tuple[float, ...] = ()  # of each that is wanted and does not serve: for how long
    problem: str = ""  # why replicas cannot start; empty: nothing is known to be wrong


class Target(Protocol):
    async def read(self) -> Mapping[str, PoolReading]:
        """Every pool of the policy. Raises TargetUnreachable."""
        ...

    async def set_replicas(self, pool: str, *, before: int, after: int) -> None:
        """Only if there are still `before`. Raises SetBySomebodyElse, TargetUnreachable."""
        ...

    async def tell(self, pool: str, *, reason: str, text: str, is_warning: bool = False) -> None:
        """Where people look who look at the pool. Never raises for want of somebody to tell, and may leave out what
        was told too often. `reason` is one word such as ScaledUp; an empty pool: all of them."""
        ...

    async def close(self) -> None: ...

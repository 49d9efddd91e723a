"""What the shell must know of a policy: whom to look at, and what to scale. Values only.

Read from a policy by `autoscaler.policy_file`; used by `autoscaler.looking` and `autoscaler.targets`, which know
nothing of objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.discovery import SourceSpec
from rorqual.session import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSetup:
    name: str
    role: Role
    workers: SourceSpec | None  # None: where the target says
    kind: str = ""  # "Deployment" or "LeaderWorkerSet"; empty with a local target
    target_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    interval_seconds: float
    pools: tuple[PoolSetup, ...]
    routers: tuple[SourceSpec, ...] = ()  # of their HTTP doors

    def is_of_the_same(self, other: Setup) -> bool:
        """Whether it looks at the same workers and routers, and sets the same pools, though perhaps more often."""
        return (self.pools, self.routers) == (other.pools, other.routers)

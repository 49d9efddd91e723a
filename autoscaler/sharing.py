"""How a role's load is shared among its pools: the cheapest replicas that carry it, within each pool's limits. Pure.

Called by `autoscaler.planner`. A pool that would need M replicas for all of the load carries n / M of it with n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOption:
    name: str
    need: int  # replicas for all of the role's load, with margins; 0: there is none
    need_expected: int  # as many keep up with the expected load, no more
    low: int
    high: int
    cost: float  # of a replica
    fixed: int | None = None  # so many are there and no more will be, or somebody else set it


def shares(options: Sequence[PoolOption], *, survive_losses: int) -> dict[str, int]:
    """Replicas of each pool. With `survive_losses`, so many of the strongest workers may be missing from what carries
    the expected load. A pool whose replicas are fixed is given its least: its workers count, and no more are asked."""
    found = {item.name: item.low if item.fixed is None else item.fixed for item in options}
    cheapest = sorted(
        (item for item in options if item.fixed is None), key=lambda item: (item.cost * item.need, item.name)
    )
    for item in cheapest:
        missing = _missing(options, found, survive_losses)
        if missing <= 0:
            break
        found[item.name] = min(found[item.name] + math.ceil(missing * item.need - 1e-9), item.high)
        while found[item.name] < item.high and _missing(options, found, survive_losses) > 0:
            found[item.name] += 1
    for item in sorted(cheapest, key=lambda item: -item.cost):
        while found[item.name] > item.low:
            found[item.name] -= 1
            if _missing(options, found, survive_losses) > 0:
                found[item.name] += 1
                break
    return found


def carries(options: Sequence[PoolOption], replicas: Mapping[str, int], *, survive_losses: int) -> bool:
    """Whether so many replicas of each pool carry the load, and what is left of them after losses the expected one."""
    return _missing(options, replicas, survive_losses) <= 0


def _missing(options: Sequence[PoolOption], replicas: Mapping[str, int], survive_losses: int) -> float:
    """The share of the load that is not carried."""
    if any(item.need == 0 for item in options):
        return 0.0
    carried = sum(replicas[item.name] / item.need for item in options)
    missing = 1 - carried
    if survive_losses and all(item.need_expected > 0 for item in options):
        each = [(1 / item.need_expected, replicas[item.name]) for item in options]
        left, losses = sum(share * count for share, count in each), survive_losses
        for share, count in sorted(each, reverse=True):
            lost = min(count, losses)
            left -= share * lost
            losses -= lost
        missing = max(missing, 1 - left)
    return missing if missing > 1e-9 else 0.0

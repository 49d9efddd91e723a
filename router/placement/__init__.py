"""Which workers get a sequence: pure functions of what the router knows.

`least_wait` is what `router.dispatch` calls today: it knows load and credit. `cache` is the interface of policies that
also know what every worker keeps, `soonest` our own, `simple`, `cache_aware` and `overlap_cost` the ones it is
measured against in `rorqual bench route`. Policies see a picture of the fleet and never the fleet; no clock, no I/O.
"""

from router.placement.least_wait import (
    TOKENS_PER_SECOND_UNKNOWN,
    Demand,
    LeastPredictedWait,
    Placement,
    Split,
    Whole,
    WorkerView,
    candidates,
    missing_roles,
    predicted_wait,
)

__all__ = [
    "TOKENS_PER_SECOND_UNKNOWN",
    "Demand",
    "LeastPredictedWait",
    "Placement",
    "Split",
    "Whole",
    "WorkerView",
    "candidates",
    "missing_roles",
    "predicted_wait",
]

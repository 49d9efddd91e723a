"""Which workers get a sequence: pure functions of what the router knows.

`least_wait` has what `router.dispatch` asks, and a policy that knows load and credit alone. `by_cache` answers it by a
policy that also knows what every worker keeps: `cache` is their interface, `soonest` our own, `simple`, `cache_aware`
and `overlap_cost` the ones it is measured against in `rorqual bench route`; `policies` makes them by name. Policies see
the fleet in `columns` and never the fleet; no clock, no I/O.
"""

from router.placement.columns import FleetColumns, FleetTable, WorkerView
from router.placement.least_wait import (
    TOKENS_PER_SECOND_UNKNOWN,
    Demand,
    LeastPredictedWait,
    Placement,
    Predicted,
    Split,
    Whole,
    missing_roles,
    predicted_wait_W,
)

__all__ = [
    "TOKENS_PER_SECOND_UNKNOWN",
    "Demand",
    "FleetColumns",
    "FleetTable",
    "LeastPredictedWait",
    "Placement",
    "Predicted",
    "Split",
    "Whole",
    "WorkerView",
    "missing_roles",
    "predicted_wait_W",
]

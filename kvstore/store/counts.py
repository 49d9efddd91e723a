"""What a store counts about itself, for whoever exports it. Pure, no torch.

The store adds; the caller reads, as often as it is scraped. Nothing here is exact across threads. What Redis evicts by
itself is not known here: it shows as misses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.store.breaker import BreakerState
from kvstore.store.connections import NodeName
from kvstore.store.contract import Drop, Kind, Miss


@dataclass(slots=True, kw_only=True)
class StoreCounts:
    """So far, by kind or by reason. Bytes are of payloads."""

    values_read: Counter[Kind] = field(default_factory=Counter[Kind])
    bytes_read: Counter[Kind] = field(default_factory=Counter[Kind])
    values_missed: Counter[Miss] = field(default_factory=Counter[Miss])
    values_shared: int = 0  # asked for while another read of the same key was on its way
    values_written: Counter[Kind] = field(default_factory=Counter[Kind])
    bytes_written: Counter[Kind] = field(default_factory=Counter[Kind])
    values_present: Counter[Kind] = field(default_factory=Counter[Kind])  # written by somebody else before
    values_dropped: Counter[Drop] = field(default_factory=Counter[Drop])
    values_deleted: int = 0
    deletions_dropped: int = 0
    servers_lost: Counter[str] = field(default_factory=Counter[str])  # exchanges that failed, by code
    error_replies: Counter[str] = field(default_factory=Counter[str])  # by the server's own word
    reads_overdue: int = 0  # that ended with their budget
    breakers_opened: int = 0
    write_pauses: int = 0  # begun because a server was full
    accounts_corrected: int = 0  # values that a tenant's account had, and no server


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreState:
    """Now."""

    breakers: dict[NodeName, BreakerState]
    bytes_in_flight: int  # room taken for values on their way here
    bytes_queued: int  # of values that wait to be written
    connections: int
    redirected: int  # replies so far that pointed to another server


Observe = Callable[[float], None]
"""Given the seconds that one read took: for a histogram."""

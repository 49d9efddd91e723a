"""What a store of kept state is: the `Store` protocol and what passes through it. Pure, no torch.

A store keeps pages and tails outside of all workers, by their page keys. It is a cache and never a promise: whatever it
cannot give in time, or at all, is a miss, and what it cannot take is dropped. Nothing it does raises to its caller.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

from kvstore.keys import PageKey

Payload = bytes | bytearray | memoryview

TenantLabel = NewType("TenantLabel", str)
"""16 hex digits that stand for a salt where people and servers can see them."""

NO_TENANT = TenantLabel("")
"""Nobody has said whose it is."""


class Kind(enum.Enum):
    PAGE = "page"  # of a page key, its rows in all paged components: `StateLayout.page_bytes` wire bytes
    TAIL = "tail"  # the hand-over record at the end of that page


class WritePolicy(enum.Enum):
    """When a worker writes what it keeps; the worker applies it, a store takes what it is given."""

    ON_EVICTION = (
        "on-eviction"  # as it leaves the worker's memory: each page once, and none that is still in use
    )
    AT_TURN_END = "at-turn-end"  # as a sequence ends: other workers can go on at once, for more bytes written
    NEVER = "never"  # reads only


class Miss(enum.Enum):
    """Why a value was not given."""

    ABSENT = "absent"  # the store has none
    OVERDUE = "overdue"  # not within the budget
    DOWN = "down"  # its server is known to be lost, or no server is known
    FAILED = "failed"  # the connection broke, or the server answered with an error
    FOREIGN = "foreign"  # there is one, of another model, another form, another key, or not of ours at all
    VERSION = "version"  # there is one, written by another version of this code
    TRUNCATED = "truncated"  # there is one, and its end is not there
    CORRUPT = "corrupt"  # there is one, and its digest is wrong


class Drop(enum.Enum):
    """Why a value was not written."""

    QUEUE_FULL = "queue_full"  # more was given than the servers took
    DOWN = "down"  # its server is known to be lost
    FAILED = "failed"  # the connection broke, it took too long, or the server answered with an error
    OUT_OF_MEMORY = "out_of_memory"  # the server is full, or was a moment ago
    QUOTA = "quota"  # the tenant has its share


@dataclass(frozen=True, slots=True)
class StoreKey:
    """A page or tail of a tenant. The page key alone names its bytes; the tenant is whose share it counts to."""

    kind: Kind
    tenant: TenantLabel
    page: PageKey


class Store(Protocol):
    """Every call belongs to one event loop. None raises, but for cancellation."""

    async def read(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[memoryview | None]:
        """Payloads in the order of `keys`, None for a miss, after `budget_seconds` at most: then what has come is
        given. They are read-only and the caller's to keep. A cancelled read gives back all it held."""
        ...

    async def contains(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[bool]:
        """Whether each is there; False also for what is not known within the budget. No payload is moved."""
        ...

    def write(self, key: StoreKey, payload: Payload) -> bool:
        """Copy the payload, whose memory is the caller's again on return, and write it some time later, if it is not
        there yet. False when it was dropped at once, since too much waits already."""
        ...

    def delete(self, keys: Sequence[StoreKey]) -> None:
        """Some time later, if the servers can be reached by then."""
        ...


def tenant_label(salt: str) -> TenantLabel:
    """Of a cache salt. The salt cannot be found from it."""
    return TenantLabel(hashlib.sha256(b"rorqual tenant\0" + salt.encode()).hexdigest()[:16])

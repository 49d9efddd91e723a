"""Policies that every router has: in turn, least loaded, by session, and to the longest prefix. Pure.

They are what ours is measured against in `rorqual bench route`; each chooses a worker and plans no reads from peers.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from router.placement.cache import (
    Bools,
    CacheDemand,
    Decision,
    FleetPicture,
    Float64s,
    Int32s,
    plain_decision,
)

SESSIONS_MAX = 1_000_000
"""Remembered at once; the one that was quiet for longest is forgotten."""


class RoundRobin:
    """Workers in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        able = np.flatnonzero(fleet.prefill_W)
        worker = int(able[self._next % len(able)])
        self._next += 1
        return plain_decision(fleet, request, worker=worker, found=None)

    def finished(self, number: int) -> None:
        """Nothing is remembered of a request."""


class LeastLoaded:
    """The least tokens still to be computed."""

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        worker = least(fleet.queued_tokens_W, fleet.prefill_W)
        return plain_decision(fleet, request, worker=worker, found=None)

    def finished(self, number: int) -> None:
        """Nothing is remembered of a request."""


class SessionAffinity:
    """A session stays where its first request went, which is the least loaded worker; without a session, by the hash of
    the first page."""

    def __init__(self, *, sessions_max: int = SESSIONS_MAX) -> None:
        self._sessions_max = sessions_max
        self._workers: OrderedDict[str, int] = OrderedDict()

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        able = fleet.prefill_W
        if not request.session:
            key = request.keys[0] if request.keys else b""
            choices = np.flatnonzero(able)
            digest = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
            return plain_decision(fleet, request, worker=int(choices[digest % len(choices)]), found=None)
        worker = self._workers.get(request.session, -1)
        if worker < 0 or worker >= fleet.num_workers or not able[worker]:
            worker = least(fleet.queued_tokens_W, able)
        self._workers[request.session] = worker
        self._workers.move_to_end(request.session)
        if len(self._workers) > self._sessions_max:
            self._workers.popitem(last=False)
        return plain_decision(fleet, request, worker=worker, found=None)

    def finished(self, number: int) -> None:
        """Nothing is remembered of a request."""


class LongestPrefix:
    """The most leading pages; of equals the least tokens to be computed. Load does not count otherwise."""

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        found = fleet.caches.look_up(request.keys)
        able = fleet.prefill_W
        longest = able & (found.pages_W == found.pages_W[able].max())
        return plain_decision(fleet, request, worker=least(fleet.queued_tokens_W, longest), found=found)

    def finished(self, number: int) -> None:
        """Nothing is remembered of a request."""


def least(values_W: Float64s | Int32s, able_W: Bools) -> int:
    """The index of the least value among the able, the first of equals."""
    return int(np.where(able_W, values_W.astype(np.float64), np.inf).argmin())

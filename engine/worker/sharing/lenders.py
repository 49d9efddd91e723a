"""What a worker that reads asks of those that lend: the `Lenders` protocol, and how asking can fail.

`engine.worker.sharing.lending_client` speaks gRPC; tests answer in the same process.
"""

from __future__ import annotations

from typing import Protocol

from engine.worker.wire import LeaseKeysRequest
from kvstore.transfer.contract import Endpoint
from rorqual.errors import RorqualError
from rorqual.session import Offer, Source


class LendingFailed(RorqualError):
    """A call to the owner failed: it is gone, stopped or broken. `is_overdue`: it did not answer in time."""

    def __init__(self, text: str, *, is_overdue: bool = False) -> None:
        super().__init__(text)
        self.is_overdue = is_overdue


class LendingRefused(LendingFailed):
    """The owner is another incarnation, or its state has another form: asking again cannot help."""


class LeaseEnded(LendingRefused):
    """The owner says that the lease is over, and with it every right to read."""


class Lenders(Protocol):
    """Calls that raise LendingFailed; none is retried and none takes longer than its `seconds_max`."""

    async def attach(self, source: Source, *, seconds_max: float) -> Endpoint: ...

    async def renew(self, source: Source, *, seconds_max: float) -> float | None:
        """Seconds of the lease that remain, counted by the owner; None when it has ended."""
        ...

    async def release(self, source: Source, *, seconds_max: float) -> bool:
        """False when the lease had ended before."""
        ...


class KeyLenders(Lenders, Protocol):
    """Also lends what nobody has handed over: prefixes, by their keys."""

    async def lease_keys(
        self, address: str, request: LeaseKeysRequest, *, seconds_max: float
    ) -> Offer | None:
        """What of it may be read, under a lease of its own; None when that is nothing, or not now. A record in the
        offer is a tail: its `num_tokens` says behind which page."""
        ...

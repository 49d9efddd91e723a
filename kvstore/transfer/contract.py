"""What an engine of one-sided reads is: the `Transfer` protocol and what passes through it. Pure, no torch.

An owner exports regions, once, and hands its `Endpoint` to readers over a control connection of its own; a reader
connects to the endpoint and reads runs of bytes out of the owner's regions into its own. Nobody ever writes into
another's memory. An engine is used by one thread only.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from rorqual.errors import RorqualError

ByteArray = npt.NDArray[np.uint8]

PeerId = NewType("PeerId", int)
ReadId = NewType("ReadId", int)


class TransferError(RorqualError):
    """A peer cannot be connected to, or a read has failed. One line for a person."""


class Region(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Units of equal size, one behind the other: the pages of a component, or records."""

    name: str
    address: int  # of unit 0, in the owner's own address space (nixl) or within its segment (shm)
    unit_bytes: int
    num_units: int


class Endpoint(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a reader must know of an owner. `agent` is fresh for each incarnation."""

    backend: str  # "nixl" | "shm"
    agent: str
    metadata: bytes
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`num_bytes` bytes, from a peer's region to the same region here, at byte offsets."""

    region: str
    source: int
    target: int
    num_bytes: int


class ReadState(enum.Enum):
    PENDING = "pending"
    DONE = "done"


class Transfer(Protocol):
    """One engine with the memory it exports."""

    @property
    def endpoint(self) -> Endpoint:
        """Stays the same for the life of the engine."""
        ...

    def connect(self, peer: PeerId, endpoint: Endpoint) -> None:
        """Make a peer known. Raises TransferError: another backend, other regions, broken metadata."""
        ...

    def forget(self, peer: PeerId) -> None:
        """No read from the peer is open. Never raises; unknown peers are passed over."""
        ...

    def post(self, peer: PeerId, runs: Sequence[Run]) -> ReadId:
        """Start one read of several runs. The targets belong to the engine until `poll` says DONE or raises. May block
        for as long as the copy takes. Raises TransferError when nothing was started."""
        ...

    def poll(self, read: ReadId) -> ReadState:
        """Raises TransferError when the read has failed; then, as after DONE, it is over: nothing is written into the
        targets any more, and `read` is not used again."""
        ...

    def progress(self) -> None:
        """Let peers read from this memory, where that needs the owner's hand; cheap when there is nothing to do."""
        ...

    def close(self) -> None:
        """Give everything back. Never raises."""
        ...

"""Choosing an engine of one-sided reads: the rank's door to `kvstore.transfer`.

builder = open_transfer("auto", agent="prefill-0#3f2a")
memory = builder.allocate("c4", unit_bytes, num_pages)  # for every region
engine = builder.start()
"""

from __future__ import annotations

from typing import Protocol

from kvstore.transfer.contract import ByteArray, Transfer
from kvstore.transfer.nixl import NixlBuilder
from kvstore.transfer.shm import ShmBuilder
from rorqual.errors import ConfigError

KINDS = ("auto", "nixl", "shm")


class TransferBuilder(Protocol):
    """An engine that has not been started: its memory is still being laid out."""

    @property
    def kind(self) -> str:
        """ "nixl" or "shm"."""
        ...

    @property
    def reason(self) -> str:
        """One line for people: why it is this kind."""
        ...

    def allocate(self, name: str, unit_bytes: int, num_units: int) -> ByteArray:
        """Memory of a new region: u8 [num_units * unit_bytes], zeroed, aligned to 4096 bytes. It stays valid as long
        as it is referenced, whatever becomes of the engine. Raises MemoryError or OSError when there is none."""
        ...

    def start(self) -> Transfer:
        """The engine that exports what has been allocated. Called once, last. Raises ConfigError."""
        ...


def open_transfer(kind: str, *, agent: str) -> TransferBuilder:
    """`agent` names this owner among all others and must be fresh for each incarnation: "prefill-0#3f2a".

    "auto" is nixl where it loads and can open its UCX backend, which takes half a second to know, and shm elsewhere.
    Raises ConfigError for an unknown kind, and for "nixl" where it does not load.
    """
    if kind == "shm":
        return ShmBuilder(agent, reason="shm, as configured")
    if kind == "nixl":
        return NixlBuilder(agent, reason="nixl, as configured")
    if kind != "auto":
        raise ConfigError(f"transfer must be one of {', '.join(KINDS)}, not {kind!r}")
    try:
        return NixlBuilder(agent, reason="nixl, since it loads and has opened its UCX backend")
    except ConfigError as error:
        return ShmBuilder(agent, reason=f"shm, since {error}")

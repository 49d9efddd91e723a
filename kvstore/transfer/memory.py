"""Memory that can be exported: plain for engines that read across address spaces, shared segments for `shm`.

Made by the builders of the engines and handed to the rank's pools as arrays; readers map an owner's segments through
`map_segments`, for reading only. A segment leaves nothing behind: on Linux it is an anonymous file that lives as long
as somebody maps it, elsewhere a named one that is unlinked when its owner ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import mmap
import os
import sys
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Protocol

import msgspec
import numpy as np

from kvstore.transfer.contract import ByteArray, TransferError

if sys.platform == "linux":
    import fcntl

ALIGNMENT = 4096


class FileSegments(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Where a reader on the same host finds anonymous files: open descriptors of their owner."""

    pid: int
    fds: tuple[int, ...]


class NamedSegments(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Where a reader finds POSIX shared memory."""

    names: tuple[str, ...]


class Segments(Protocol):
    """Shared memory of one owner."""

    def allocate(self, num_bytes: int) -> ByteArray:
        """A new segment, zeroed and page-aligned. The array is valid as long as it is referenced."""
        ...

    @property
    def metadata(self) -> bytes:
        """For `map_segments` in another process."""
        ...

    def close(self) -> None:
        """No further reader can map the segments. Arrays, here and at readers, stay valid. Never raises."""
        ...


def zeroed(num_bytes: int) -> ByteArray:
    """Plain memory, aligned to 4096 bytes. The system gives pages of it when they are first touched."""
    raw_B = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
    start = -raw_B.ctypes.data % ALIGNMENT
    return raw_B[start : start + num_bytes]


def make_segments(agent: str, *, named: bool = sys.platform != "linux") -> Segments:
    """`agent` is fresh for each incarnation; `named` asks for what systems other than Linux have."""
    return _NamedOwner() if named else _FileOwner(agent)


def map_segments(
    metadata: bytes, *, agent: str, sizes: Sequence[int], writable: bool = False
) -> list[ByteArray]:
    """Arrays over the segments of owner `agent`, which can be written to only if the two have agreed who writes where.
    They outlive the owner.

    Raises TransferError: broken metadata, an owner on another host or gone, segments shorter than `sizes`.
    """
    try:
        found = _decoder.decode(metadata)
    except msgspec.DecodeError as error:
        raise TransferError(f"metadata of {agent} cannot be read: {error}") from None
    count = len(found.fds) if isinstance(found, FileSegments) else len(found.names)
    if count != len(sizes):
        raise TransferError(f"{agent} has {count} segments for {len(sizes)} regions")
    try:
        if isinstance(found, NamedSegments):
            return [
                _map_named(name, size, writable=writable)
                for name, size in zip(found.names, sizes, strict=True)
            ]
        return [
            _map_file(f"/proc/{found.pid}/fd/{fd}", _file_name(agent, index), size, writable=writable)
            for index, (fd, size) in enumerate(zip(found.fds, sizes, strict=True))
        ]
    except (OSError, ValueError) as error:
        raise TransferError(f"memory of {agent} cannot be mapped: {error}") from None


_decoder = msgspec.msgpack.Decoder(FileSegments | NamedSegments)


class _FileOwner:
    """Anonymous files of Linux. They cannot shrink, so that no reader is killed by a missing page."""

    def __init__(self, agent: str) -> None:
        self._agent = agent
        self._fds: list[int] = []

    def allocate(self, num_bytes: int) -> ByteArray:
        if sys.platform != "linux":
            raise AssertionError("anonymous files are Linux's")
        name = _file_name(self._agent, len(self._fds))
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._fds.append(fd)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8)

    @property
    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(FileSegments(pid=os.getpid(), fds=tuple(self._fds)))

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _file_name(agent: str, index: int) -> str:
    """The same for owner and reader. A process that got the owner's number after it has no file of this name."""
    return f"rorqual-{hashlib.sha256(agent.encode()).hexdigest()[:32]}-{index}"


def _map_file(path: str, name: str, size: int, *, writable: bool) -> ByteArray:
    if sys.platform != "linux":
        raise OSError("anonymous files are Linux's")
    # The owner may be gone, and its number and descriptor be somebody else's, even a pipe that would keep us waiting.
    wanted = f"/memfd:{name} (deleted)"
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != wanted:
            raise OSError(f"{path} is not {name}: the owner is gone, or on another host")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise OSError(f"{path} could shrink")
        if os.fstat(fd).st_size < size:
            raise OSError(f"{path} has {os.fstat(fd).st_size} bytes, not {size}")
        return _mapped(fd, size, writable=writable)
    finally:
        os.close(fd)


class _Mapping(SharedMemory):
    """A mapping that arrays may outlive: it is given back with the last of them."""

    def __del__(self) -> None:
        with contextlib.suppress(OSError, BufferError):
            self.close()


class _NamedOwner:
    """POSIX shared memory. If the owner is killed, Python's resource tracker unlinks it."""

    def __init__(self) -> None:
        self._mappings: list[_Mapping] = []

    def allocate(self, num_bytes: int) -> ByteArray:
        mapping = _Mapping(create=True, size=num_bytes)
        self._mappings.append(mapping)
        assert mapping.buf is not None
        return np.frombuffer(mapping.buf, dtype=np.uint8)[:num_bytes]

    @property
    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(
            NamedSegments(names=tuple(item.name.removeprefix("/") for item in self._mappings))
        )

    def close(self) -> None:
        for item in self._mappings:
            with contextlib.suppress(FileNotFoundError):
                item.unlink()
        self._mappings.clear()


def _map_named(name: str, size: int, *, writable: bool) -> ByteArray:
    # What SharedMemory itself is made of: that would map it for writing and, up to Python 3.12, unlink it when this
    # reader ends.
    fd: int = importlib.import_module("_posixshmem").shm_open(
        f"/{name}", os.O_RDWR if writable else os.O_RDONLY, mode=0
    )
    try:
        if os.fstat(fd).st_size < size:
            raise OSError(f"{name} has {os.fstat(fd).st_size} bytes, not {size}")
        return _mapped(fd, size, writable=writable)
    finally:
        os.close(fd)


def _mapped(fd: int, size: int, *, writable: bool) -> ByteArray:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return np.frombuffer(mmap.mmap(fd, size, prot=access), dtype=np.uint8)

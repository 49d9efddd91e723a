"""What fake ranks that run as programs read of one another: their pages and records, over loopback, and without a word
to the rank that owns them, as it would be with memory that is read one-sidedly.

Used by `fake_rank` when it is a program; in one process fake ranks reach each other directly. An owner's endpoint
carries its port. Only a reader is hurt when the other side is gone: by a ConnectionError.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from engine.plan import Fetch, Fetched, FromTransfer, PeerOpen, ToTransfer

if TYPE_CHECKING:
    from fake_rank import FakeRank

REQUEST, LENGTH = struct.Struct("<B3xi"), struct.Struct("<I")
SECONDS_MAX = 5.0


def serve_memory(*memories: Sequence[Any]) -> bytes:
    """Let everybody read items of these lists while the process lives; what an endpoint says of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, memories), daemon=True).start()
    return str(listener.getsockname()[1]).encode()


def _accept(listener: socket.socket, memories: Sequence[Sequence[Any]]) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, memories), daemon=True).start()


def _answer(connection: socket.socket, memories: Sequence[Sequence[Any]]) -> None:
    with connection, contextlib.suppress(ConnectionError):
        while True:
            number, index = REQUEST.unpack(_read(connection, REQUEST.size))
            data = msgspec.msgpack.encode(memories[number][index])
            connection.sendall(LENGTH.pack(len(data)) + data)


class RemoteOwner:
    """Another rank's memory, read item by item. Raises ConnectionError once that rank is gone."""

    def __init__(self, metadata: bytes) -> None:
        try:
            self._connection = socket.create_connection(("127.0.0.1", int(metadata)), timeout=SECONDS_MAX)
        except OSError as error:
            raise ConnectionError(error) from error
        self.memory = _Items(self._connection, 0)
        self.records = _Items(self._connection, 1)


class _Items:
    def __init__(self, connection: socket.socket, number: int) -> None:
        self._connection = connection
        self._number = number

    def __getitem__(self, index: int) -> Any:
        self._connection.sendall(REQUEST.pack(self._number, index))
        (length,) = LENGTH.unpack(_read(self._connection, LENGTH.size))
        item = msgspec.msgpack.decode(_read(self._connection, length))
        return tuple(item) if isinstance(item, list) else item


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except TimeoutError as error:
            raise ConnectionError("nobody answers") from error
        if not part:
            raise ConnectionResetError("the other side is gone")
        data += part
    return bytes(data)


class Owners:
    """The other ranks, as a program reaches them."""

    def __init__(self, rank: FakeRank) -> None:
        self._rank = rank
        self._owners: dict[str, Any] = {}  # by agent; what `FakeRank` reads of another rank
        if rank.num_records:
            rank.metadata = serve_memory(rank.memory, rank.records)

    def carry_out(self, message: ToTransfer) -> FromTransfer | None:
        try:
            if isinstance(message, PeerOpen):
                self._owners[message.endpoint.agent] = RemoteOwner(message.endpoint.metadata)
            answered = self._rank.transfer(message, self._owners)
        except ConnectionError:
            if isinstance(message, PeerOpen):
                return self._rank.transfer(message, {})
            assert isinstance(message, Fetch)
            gone = "the peer is gone"
            return Fetched(fetch=message.fetch, error=gone, num_bytes=0, transfer_ms=1.0, verify_ms=0.0)
        return answered

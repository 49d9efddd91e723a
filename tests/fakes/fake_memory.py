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
from typing import Any

import msgspec

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

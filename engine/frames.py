"""Frames between a worker's host and its rank: a length in four bytes, then one msgpack message of
`engine.plan`.

Both ends use this module: `engine.worker.rank_link` on the host, with asyncio, and `engine.rank_process` in the other
process, with blocking calls. It never imports torch, and it never interprets a message.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading

import msgspec

from engine.plan import FromRank, ToRank
from rorqual.errors import RorqualError
from rorqual.processes import die_with_parent

FRAME_BYTES_MAX = 256 * 1024 * 1024
"""Bound on one frame. The largest are plans that open several slots with prompts of a million tokens (4 MB
each); a length beyond this is a broken peer, and is refused before anything is allocated for it."""

HEADER = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_from_rank = msgspec.msgpack.Decoder(FromRank)


class FrameError(RorqualError):
    """The peer sent something that is not a frame of ours."""


def join_host(fd: int) -> socket.socket:
    """Called first thing by the rank: takes over the inherited socket and arranges to die with the host.

    On Linux the kernel kills the rank when the host dies, even in the middle of a long step; elsewhere the
    rank finds the socket closed when it next reads.
    """
    # A terminal or a service manager signals the whole group: the host alone answers, by draining, and then
    # tells the rank to shut down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(os.getppid())
    # A host that died before the call above can send no signal any more: its end of the socket tells.
    if _is_closed(fd):
        raise SystemExit(1)
    connection = socket.socket(fileno=fd)
    connection.setblocking(True)
    return connection


def read_frame(connection: socket.socket) -> ToRank | None:
    """The next message from the host; None when the host is gone. Blocks. Raises FrameError."""
    header = _read_exactly(connection, HEADER.size)
    if header is None:
        return None
    payload = _read_exactly(connection, payload_bytes(header))
    return None if payload is None else decode_to_rank(payload)


def write_frame(connection: socket.socket, message: FromRank) -> None:
    """Send one message to the host. Blocks. Raises OSError (BrokenPipeError) when the host is gone."""
    connection.sendall(encode_frame(message))


class FrameWriter:
    """`write_frame` for several threads: their frames do not mix."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def write(self, message: FromRank) -> None:
        frame = encode_frame(message)
        with self._lock:
            self._connection.sendall(frame)


def encode_frame(message: ToRank | FromRank) -> bytes:
    frame = bytearray(HEADER.size)
    _encoder.encode_into(message, frame, HEADER.size)
    size = len(frame) - HEADER.size
    assert size <= FRAME_BYTES_MAX, f"frame of {size} bytes exceeds {FRAME_BYTES_MAX}"
    HEADER.pack_into(frame, 0, size)
    return bytes(frame)


def payload_bytes(header: bytes) -> int:
    """Bytes that follow a header. Raises FrameError when it is beyond the bound."""
    size: int = HEADER.unpack(header)[0]
    if size > FRAME_BYTES_MAX:
        raise FrameError(f"frame of {size} bytes exceeds the bound of {FRAME_BYTES_MAX}")
    return size


def decode_to_rank(payload: bytes) -> ToRank:
    try:
        return _to_rank.decode(payload)
    except msgspec.DecodeError as error:
        raise FrameError(f"host sent a frame that does not decode: {error}") from None


def decode_from_rank(payload: bytes) -> FromRank:
    try:
        return _from_rank.decode(payload)
    except msgspec.DecodeError as error:
        raise FrameError(f"rank sent a frame that does not decode: {error}") from None


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    """`size` bytes, or None when the stream ends before them: a host that dies mid-frame is only gone."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    done = 0
    while done < size:
        try:
            received = connection.recv_into(view[done:])
        except ConnectionResetError:
            return None
        if received == 0:
            return None
        done += received
    return bytes(buffer)


def _is_closed(fd: int) -> bool:
    probe = socket.socket(fileno=os.dup(fd))
    try:
        probe.setblocking(False)
        return probe.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        probe.close()

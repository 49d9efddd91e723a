"""The host's end of its rank: starts the process, sends plans, receives results, sees it end.

`engine.worker.process` starts one and `engine.worker.host` talks through it, behind the host's own `RankLink` protocol.
Frames are those of `engine.frames` over a socket pair that the rank inherits, so nobody else can connect
and either side sees the other's death as the end of the stream. It never looks into a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections import deque
from collections.abc import Sequence
from typing import cast

from engine.frames import HEADER, FrameError, decode_from_rank, encode_frame, payload_bytes
from engine.plan import FromRank, RankSettings, Shutdown, ToRank
from rorqual.errors import RorqualError
from rorqual.processes import describe_exit

RANK_COMMAND = (sys.executable, "-m", "engine.rank_process")

EXIT_SECONDS_MAX = 5.0
"""How long a rank whose socket has closed may take to exit before it is killed."""


class RankLost(RorqualError):
    """The rank ended, hung or broke the protocol. The worker cannot go on."""


class RankProcess:
    """A running rank. `stop` must be called at the end, whatever happened."""

    def __init__(self, process: asyncio.subprocess.Process, frames: _Frames) -> None:
        self._process = process
        self._frames = frames

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToRank) -> None:
        """Queue a message. Bounded by the caller: at most a few plans are ever unanswered. A rank that is gone is
        noticed by `receive`."""
        self._frames.write(encode_frame(message))

    async def receive(self) -> FromRank:
        """The next message. Raises RankLost when there will be none, FrameError when it is not one."""
        payload = await self._frames.read()
        if payload is None:
            status = await self._exit_status()
            raise RankLost(f"the rank process {self.pid} ended: {describe_exit(status)}")
        return decode_from_rank(payload)

    async def stop(self, *, seconds_max: float) -> None:
        """Ask it to finish, and kill it if it has not within the deadline. Never raises for a rank already gone."""
        self.send(Shutdown())
        self._frames.close()
        await self._exit_status(seconds_max=seconds_max)

    async def _exit_status(self, *, seconds_max: float = EXIT_SECONDS_MAX) -> int:
        try:
            async with asyncio.timeout(seconds_max):
                return await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            return await self._process.wait()


async def start_rank(settings: RankSettings, *, command: Sequence[str] = RANK_COMMAND) -> RankProcess:
    """Start the rank and send its settings; it answers with RankProgress while loading, then RankReady.

    Call it from the main thread: on Linux the rank dies with the thread that started it.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process: asyncio.subprocess.Process | None = None
    frames: _Frames | None = None
    try:
        with theirs:
            process = await _spawn(settings, command, theirs)
        frames = _Frames(last_words=ours.dup())
        await asyncio.get_running_loop().create_connection(lambda: frames, sock=ours)
    except BaseException:
        # A cancel too must leave neither a process nor a socket.
        ours.close()
        if frames is not None:
            frames.abandon()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        raise
    link = RankProcess(process, frames)
    link.send(settings)
    return link


async def _spawn(
    settings: RankSettings, command: Sequence[str], theirs: socket.socket
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            "--fd",
            str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            # OpenMP sizes its pool when torch is imported, before the rank has read its settings.
            env=os.environ | {"OMP_NUM_THREADS": str(settings.threads)},
        )
    except OSError as error:
        raise RankLost(f"the rank process cannot be started: {error}") from None


class _Frames(asyncio.Protocol):
    """Cuts the rank's bytes into frames, to the very last.

    A rank that fails says why and exits, often with a plan unread: the next write or read here then fails, and asyncio
    (StreamReader too) would throw away what had come before that. So a second handle on the socket is kept, from which
    the rank's last words are read when the connection is lost.
    """

    def __init__(self, *, last_words: socket.socket) -> None:
        self._last_words = last_words
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._payloads: deque[bytes] = deque()  # bounded by the plans in flight
        self._news = asyncio.Event()
        self._error: FrameError | None = None
        self._is_lost = False

    def write(self, frame: bytes) -> None:
        assert self._transport is not None
        if not self._is_lost:
            self._transport.write(frame)

    async def read(self) -> bytes | None:
        """The next payload, None when there will be none. Raises FrameError for what is no frame."""
        while not self._payloads:
            if self._error is not None:
                raise self._error
            if self._is_lost:
                return None
            self._news.clear()
            await self._news.wait()
        return self._payloads.popleft()

    def close(self) -> None:
        """What has been written still goes out."""
        assert self._transport is not None
        self._transport.close()

    def abandon(self) -> None:
        """Instead of `close`, where no connection was made."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._last_words.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return  # where the next frame would begin is unknown: nothing more is kept of a broken rank
        self._buffer += data
        try:
            self._cut()
        except FrameError as error:
            self._error = error
            self._buffer.clear()
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        with self._last_words, contextlib.suppress(OSError):
            while data := self._last_words.recv(65536):
                self.data_received(data)
        self._is_lost = True
        self._news.set()

    def _cut(self) -> None:
        while len(self._buffer) >= HEADER.size:
            end = HEADER.size + payload_bytes(bytes(self._buffer[: HEADER.size]))
            if len(self._buffer) < end:
                return
            self._payloads.append(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]

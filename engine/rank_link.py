"""The host's end of its rank: starts the process, sends plans, receives results, sees it end.

`engine.worker` starts one and `engine.host` talks through it, behind the host's own `RankLink` protocol.
Frames are those of `engine.frames` over a socket pair that the rank inherits, so nobody else can connect
and either side sees the other's death as the end of the stream. It never looks into a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence

from engine.frames import HEADER, decode_from_rank, encode_frame, payload_bytes
from engine.plan import FromRank, RankSettings, Shutdown, ToRank
from rorqual.errors import RorqualError
from rorqual.processes import describe_exit

RANK_COMMAND = (sys.executable, "-m", "engine.rank")

EXIT_SECONDS_MAX = 5.0
"""How long a rank whose socket has closed may take to exit before it is killed."""


class RankLost(RorqualError):
    """The rank ended, hung or broke the protocol. The worker cannot go on."""


class RankProcess:
    """A running rank. `stop` must be called at the end, whatever happened."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToRank) -> None:
        """Queue a message. Bounded by the caller: at most a few plans are ever unanswered. A rank that is
        gone is noticed by `receive`.
        """
        self._writer.write(encode_frame(message))

    async def receive(self) -> FromRank:
        """The next message. Raises RankLost when there will be none, FrameError when it is not one."""
        try:
            header = await self._reader.readexactly(HEADER.size)
            payload = await self._reader.readexactly(payload_bytes(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await self._exit_status()
            raise RankLost(f"the rank process {self.pid} ended: {describe_exit(status)}") from None
        return decode_from_rank(payload)

    async def stop(self, *, seconds_max: float) -> None:
        """Ask it to finish, and kill it if it has not within the deadline. Never raises for a rank already
        gone.
        """
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.send(Shutdown())
        self._writer.close()
        await self._exit_status(seconds_max=seconds_max)
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

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
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                # OpenMP sizes its pool when torch is imported, before the rank has read its settings.
                env=os.environ | {"OMP_NUM_THREADS": str(settings.threads)},
            )
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
    except OSError as error:
        ours.close()
        raise RankLost(f"the rank process cannot be started: {error}") from None
    link = RankProcess(process, reader, writer)
    link.send(settings)
    return link

"""A TCP proxy on loopback that harms what passes: slow, silent, nonsense, or cut off after so many bytes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from types import TracebackType
from typing import Self


class FakeProxy:
    """A context manager. What is set holds for replies from the target, from the moment it is set."""

    def __init__(self, target_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """With `tls`, clients must speak TLS; the target is spoken to in the clear."""
        self.cut_after: int | None = None  # bytes of replies on one connection, then it is reset
        self.stall_on: bytes | None = None  # in what clients send: then nothing more of it is read
        self.delay_seconds = 0.0  # of each piece
        self.bytes_per_second: float | None = None
        self.is_silent = False  # passes nothing on
        self.nonsense: bytes | None = None  # instead of every piece
        self.cut_on: bytes | None = (
            None  # in what clients send: then the connection is reset, and that is not sent on
        )
        self.num_accepted = 0
        self.port = 0
        self.target_port = target_port  # for connections from now on
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def num_open(self) -> int:
        """Connections from clients."""
        return len(self._writers)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.reset_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def reset_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.num_accepted += 1
        target: asyncio.StreamWriter | None = None
        try:
            replies, target = await asyncio.open_connection("127.0.0.1", self.target_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(reader, target))
                both.create_task(self._pass_replies(replies, writer))
        except* (OSError, asyncio.CancelledError, _Cut):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            for side in (writer, target):
                if side is not None:
                    side.transport.abort()
                    with contextlib.suppress(OSError, asyncio.CancelledError):
                        await side.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.cut_on is not None and self.cut_on in data:
                raise _Cut
            if self.stall_on is not None and self.stall_on in data:
                while self.stall_on is not None:
                    await asyncio.sleep(0.005)
            writer.write(data)
            await writer.drain()
        raise _Cut

    async def _pass_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while data := await reader.read(65536):
            while self.is_silent:
                await asyncio.sleep(0.005)
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            if self.bytes_per_second is not None:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            if self.nonsense is not None:
                data = self.nonsense
            if self.cut_after is not None and passed + len(data) > self.cut_after:
                writer.write(data[: max(0, self.cut_after - passed)])
                await writer.drain()
                raise _Cut
            passed += len(data)
            writer.write(data)
            await writer.drain()
        raise _Cut


class _Cut(Exception):
    """Ends both directions."""

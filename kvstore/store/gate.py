"""A semaphore that counts bytes, for what may be on its way at once; first come, first served. Pure, no torch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class ByteGate:
    """`capacity` bytes. Who asks for more than is free waits behind those who asked before."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self.num_bytes = 0
        """Taken now."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, num_bytes: int) -> AsyncGenerator[None]:
        """Hold so many bytes, at most the capacity. Cancelled while it waits, it holds none."""
        await self._take(num_bytes)
        try:
            yield
        finally:
            self._give_back(num_bytes)

    async def _take(self, num_bytes: int) -> None:
        assert 0 < num_bytes <= self.capacity, f"{num_bytes} bytes through a gate of {self.capacity}"
        if not self._waiting and self.num_bytes + num_bytes <= self.capacity:
            self.num_bytes += num_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._let_in()  # it may have been the one that those behind it waited for
            else:
                self._give_back(num_bytes)  # the turn had come in the same moment
            raise

    def _give_back(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        assert self.num_bytes >= 0
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            num_bytes, turn = self._waiting[0]
            if not turn.cancelled():
                if self.num_bytes + num_bytes > self.capacity:
                    return
                self.num_bytes += num_bytes
                turn.set_result(None)
            self._waiting.popleft()

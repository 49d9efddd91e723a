"""A store in the process, shared by as many workers as there are, which is slow, frozen, full or forgetful when a test
says so. Behind the `Store` protocol of `kvstore.store.contract`; its time is the running loop's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.store.contract import Kind, Payload, StoreKey


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[StoreKey, bytes] = {}
        self.seconds = 0.001  # of an answer
        self.read_seconds: float | None = None  # of one with values; None: as the others
        self.is_frozen = False  # answers nothing
        self.is_full = False  # takes nothing
        self.asked: list[tuple[StoreKey, ...]] = []  # for values
        self.num_asking = 0

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def flush(self, *, seconds_max: float) -> bool:
        return True

    async def read(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[memoryview | None]:
        self.asked.append(tuple(keys))
        if not await self._answers(budget_seconds, self.read_seconds or self.seconds):
            return [None] * len(keys)
        return [memoryview(self.values[key]) if key in self.values else None for key in keys]

    async def contains(self, keys: Sequence[StoreKey], *, budget_seconds: float) -> list[bool]:
        if not await self._answers(budget_seconds, self.seconds):
            return [False] * len(keys)
        return [key in self.values for key in keys]

    def write(self, key: StoreKey, payload: Payload) -> bool:
        if self.is_full:
            return False
        copied = bytes(payload)
        # Why a tail was taken, its last byte, need not be the same for two writers: the first one says.
        end = len(copied) - (key.kind is Kind.TAIL)
        assert self.values.setdefault(key, copied)[:end] == copied[:end], "one key stands for two values"
        return True

    def delete(self, keys: Sequence[StoreKey]) -> None:
        for key in keys:
            self.values.pop(key, None)

    async def _answers(self, budget_seconds: float, seconds: float) -> bool:
        assert budget_seconds > 0
        self.num_asking += 1
        try:
            is_late = self.is_frozen or seconds > budget_seconds
            await asyncio.sleep(budget_seconds if is_late else seconds)
            return not is_late and not self.is_frozen
        finally:
            self.num_asking -= 1

"""A rank link without a process: the fake rank behind the host's own `RankLink` protocol."""

from __future__ import annotations

import asyncio

from fake_rank import FakeRank

from engine.plan import FromRank, RankFailed, StepPlan, ToRank
from engine.worker.rank_link import RankLost


class FakeLink:
    """Answers each plan when received, in order. `gate` cleared: holds answers back; `fail` makes it die."""

    def __init__(self, rank: FakeRank) -> None:
        self.rank = rank
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: FromRank | None = None
        self.is_gone = False
        self.num_inflight_max = 0
        self._messages: asyncio.Queue[ToRank | FromRank | None] = asyncio.Queue()

    def send(self, message: ToRank) -> None:
        self._messages.put_nowait(message)
        self.num_inflight_max = max(self.num_inflight_max, self._messages.qsize())

    def fail(self, message: str) -> None:
        self.failure = RankFailed(message=message)
        self._messages.put_nowait(None)

    def vanish(self) -> None:
        self.is_gone = True
        self._messages.put_nowait(None)

    async def receive(self) -> FromRank:
        return await self.answer(await self._messages.get())

    async def answer(self, message: ToRank | None) -> FromRank:
        await self.gate.wait()
        if self.is_gone:
            raise RankLost("the rank process 1 ended: exit status 3")
        if self.failure is not None:
            return self.failure
        assert isinstance(message, StepPlan)
        # A real rank answers from another process: never within the same pass of the loop.
        await asyncio.sleep(0)
        return self.rank.step(message)

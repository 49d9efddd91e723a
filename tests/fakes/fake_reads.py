"""A rank link without a process whose rank also reads from other fake ranks, and what can go wrong with that.

Like a real one it takes messages strictly in order, and ends a fetch outside that order, whenever it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from fake_link import FakeLink
from fake_rank import FakeRank

from engine.plan import (
    Expose,
    Fetch,
    Fetched,
    FetchOverdue,
    FromRank,
    FromTransfer,
    PeerClose,
    PeerOpen,
    PeerOpened,
    StepPlan,
    ToRank,
)


class ReadingLink(FakeLink):
    """`owners` are the ranks that can be reached, by their agents' names. A fetch takes `read_seconds()`, on the loop's
    clock, or ends by `end_reads` alone while `holds_reads` is set."""

    def __init__(
        self,
        rank: FakeRank,
        owners: Mapping[str, FakeRank],
        *,
        step_seconds: Callable[[], float] = lambda: 0.0,
        read_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        super().__init__(rank)
        self.sent: list[PeerOpen | PeerClose | Fetch | Expose] = []
        self.holds_reads = False
        self.read_error = ""  # of every fetch that ends from now on
        self.peer_error = ""  # of every peer that is opened from now on
        self.answers_peers = True
        self._owners = owners
        self._step_seconds = step_seconds
        self._read_seconds = read_seconds
        self._answers: list[FromTransfer] = []
        self._arrived: asyncio.Queue[ToRank | None] = self._messages

    def of_kind(self, kind: type) -> list[object]:
        return [message for message in self.sent if isinstance(message, kind)]

    def send(self, message: ToRank) -> None:
        if isinstance(message, PeerOpen | PeerClose | Fetch | Expose):
            self.sent.append(message)
        super().send(message)

    def end_reads(self) -> None:
        """Those that were held are done."""
        for fetch in list(self.rank.fetches):
            self._end(fetch)

    async def receive(self) -> FromRank:
        while not self._answers:
            message = await self._messages.get()
            if isinstance(message, StepPlan) or self.is_gone or self.failure is not None:
                self._messages.put_nowait(message)
                return await super().receive()
            if message is not None:
                self._carry_out(message)
        return self._answers.pop(0)

    def _carry_out(self, message: ToRank) -> None:
        match message:
            case PeerOpen():
                answer = self.rank.transfer(message, self._owners)
                assert isinstance(answer, PeerOpened)
                if self.answers_peers:
                    self._answers.append(PeerOpened(peer=message.peer, error=self.peer_error or answer.error))
            case PeerClose() | Expose():
                self.rank.transfer(message, self._owners)
            case Fetch():
                self.rank.begin_fetch(message)
                loop = asyncio.get_running_loop()
                loop.call_later(message.seconds, self._note_overdue, message.fetch)
                if not self.holds_reads:
                    loop.call_later(self._read_seconds(), self._end, message.fetch)
            case _:
                raise AssertionError(f"a rank was sent {message}")

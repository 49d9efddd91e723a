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
    PeerClose,
    PeerOpen,
    PeerOpened,
    StepPlan,
    ToRank,
)


class ReadingLink(FakeLink):
    """`owners` are the ranks that can be reached, by their agents' names. A step and a fetch take so many seconds on
    the loop's clock; while `holds_reads` is set, a fetch that begins ends by `end_reads` alone."""

    def __init__(
        self,
        rank: FakeRank,
        owners: Mapping[str, FakeRank],
        *,
        step_seconds: Callable[[], float] = lambda: 0.0,
        read_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        super().__init__(rank)
        self.plans: list[StepPlan] = []  # sent, as the next four
        self.opens: list[PeerOpen] = []
        self.closes: list[PeerClose] = []
        self.fetches: list[Fetch] = []
        self.exposed: list[bool] = []
        self.holds_reads = False
        self.read_error = ""  # of fetches that end from now on
        self.peer_error = ""  # of peers that are opened from now on
        self.answers_peers = True
        self._owners = owners
        self._step_seconds = step_seconds
        self._read_seconds = read_seconds

    def send(self, message: ToRank) -> None:
        match message:
            case StepPlan():
                self.plans.append(message)
            case PeerOpen():
                self.opens.append(message)
            case PeerClose():
                self.closes.append(message)
            case Fetch():
                self.fetches.append(message)
            case Expose():
                if not self.exposed or self.exposed[-1] != message.active:  # it may be said again
                    self.exposed.append(message.active)
            case _:
                raise AssertionError(f"a rank was sent {message}")
        super().send(message)

    def end_reads(self) -> None:
        """Those that have begun are done."""
        for fetch in list(self.rank.fetches):
            self.end_read(fetch)

    def end_read(self, fetch: int) -> None:
        if fetch not in self.rank.fetches:
            return
        owner = self._owners.get(self.rank.peers[self.rank.fetches[fetch].peer])
        fetched = self.rank.end_fetch(fetch, owner)
        if self.read_error:
            fetched = Fetched(fetch=fetch, error=self.read_error, num_bytes=0, transfer_ms=1.0, verify_ms=0.0)
        self._messages.put_nowait(fetched)

    async def receive(self) -> FromRank:
        while True:
            message = await self._messages.get()
            match message:
                case PeerOpened() | FetchOverdue() | Fetched():
                    return message
                case PeerOpen() | PeerClose() | Expose():
                    await self.gate.wait()
                    self._carry_out(message)
                case Fetch():
                    await self.gate.wait()
                    self._begin(message)
                case _:
                    await asyncio.sleep(self._step_seconds())
                    return await self.answer(message)

    def _carry_out(self, message: PeerOpen | PeerClose | Expose) -> None:
        answer = self.rank.transfer(message, self._owners)
        if isinstance(answer, PeerOpened) and self.answers_peers:
            self._messages.put_nowait(PeerOpened(peer=answer.peer, error=self.peer_error or answer.error))

    def _begin(self, message: Fetch) -> None:
        loop = asyncio.get_running_loop()
        self.rank.begin_fetch(message)
        loop.call_later(message.seconds, self._note_overdue, message.fetch)
        if not self.holds_reads:
            loop.call_later(self._read_seconds(), self.end_read, message.fetch)

    def _note_overdue(self, fetch: int) -> None:
        if fetch in self.rank.fetches:
            self._messages.put_nowait(FetchOverdue(fetch=fetch))

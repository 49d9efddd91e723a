"""Things kept running for each address that sources tell of: started as it appears, ended as it goes.

Used for workers of a pool and for routers. A source that fails tells nothing, so what was known goes on. An address
that is named no more may be a worker whose pod is not ready, and that serves: it is kept while its session stands, as
routers do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from rorqual.discovery import AddressSource
from rorqual.service import end_task


class Running(Protocol):
    async def run(self) -> None: ...

    def leave(self) -> bool:
        """No source names it any more. True: it goes on for now, and `run` returns once that is over."""
        ...

    def stay(self) -> None:
        """It is named again, after all."""
        ...


T = TypeVar("T", bound=Running)


class Members(Generic[T]):
    """`run` goes on until cancelled, and ends all that it started."""

    def __init__(self, sources: Sequence[AddressSource], *, make: Callable[[str], T]) -> None:
        self._sources = sources
        self._make = make
        self._told: dict[int, frozenset[str]] = {}
        self._changed = asyncio.Event()
        self._members: dict[str, T] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[str] = set()

    def __iter__(self) -> Iterator[T]:
        return iter([self._members[address] for address in sorted(self._members)])

    @property
    def errors(self) -> list[str]:
        """Why what is known may be stale, of each source that says so."""
        return [f"{source.text}: {source.last_error}" for source in self._sources if source.last_error]

    async def run(self) -> None:
        looking = [
            asyncio.create_task(source.run(lambda found, n=number: self._take(n, found)))
            for number, source in enumerate(self._sources)
        ]
        try:
            while True:
                changing = asyncio.create_task(self._changed.wait())
                try:
                    await asyncio.wait(
                        {changing, *looking, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    changing.cancel()  # not awaited: a cancellation of ours meanwhile would be taken for its
                self._take_out_ended()
                for task in (*looking, *self._tasks.values()):
                    if task.done():
                        task.result()  # they run until cancelled: this is a bug, and is not hidden
                self._changed.clear()
                await self._follow()
        finally:
            for task in (*looking, *self._tasks.values()):
                await end_task(task)
            self._tasks.clear()
            self._members.clear()

    def _take(self, number: int, found: frozenset[str]) -> None:
        self._told[number] = found
        self._changed.set()

    def _take_out_ended(self) -> None:
        for address in [address for address in self._leaving if self._tasks[address].done()]:
            self._tasks.pop(address).result()
            del self._members[address]
            self._leaving.discard(address)

    async def _follow(self) -> None:
        wanted = frozenset[str]().union(*self._told.values())
        for address in sorted(wanted - self._members.keys()):
            member = self._make(address)
            self._members[address] = member
            self._tasks[address] = asyncio.create_task(member.run())
        for address in sorted(wanted & self._leaving):
            self._members[address].stay()
            self._leaving.discard(address)
        for address in sorted(self._members.keys() - wanted - self._leaving):
            if self._members[address].leave():
                self._leaving.add(address)
                continue
            del self._members[address]
            await end_task(self._tasks.pop(address))

"""What workers with a transfer engine do for each other beside their roles: lend kept prefixes, and read them.

A `RoleHandler` around that of a single role, made by its command. It adds the owner's side
(`engine.worker.sharing.key_lending`) and, on a worker that computes prompts, the reader's
(`engine.worker.sharing.peer_reading`); the rest it passes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from engine.plan import FromTransfer
from engine.worker.events import LentEvent, PagesEvent, SequenceKey
from engine.worker.role import HandlerHost, RoleHandler
from engine.worker.sharing.key_lending import KeyLender
from engine.worker.sharing.peer_reading import PeerReader
from rorqual.session import Credit, Offer, Open, Role, Take


class SharingHandler:
    """Without a `reader` nothing is read, and all news of reads is the inner handler's."""

    def __init__(self, inner: RoleHandler, *, keys: KeyLender, reader: PeerReader | None = None) -> None:
        self._inner = inner
        self._keys = keys
        self._reader = reader

    @property
    def role(self) -> Role:
        return self._inner.role

    @property
    def is_idle(self) -> bool:
        return self._inner.is_idle and self._keys.is_idle and (self._reader is None or self._reader.is_idle)

    def attach(self, host: HandlerHost) -> None:
        self._inner.attach(host)
        self._keys.attach(host)
        if self._reader is not None:
            self._reader.attach(host)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._reader is not None:
                tasks.create_task(self._reader.run())
            tasks.create_task(self._keys.run())
            tasks.create_task(self._inner.run())

    async def finish(self) -> None:
        await self._inner.finish()

    def credit(self, *, num_sessions: int, keys: Collection[SequenceKey]) -> Credit | None:
        return self._inner.credit(num_sessions=num_sessions, keys=keys)

    def check(self, command: Open) -> None:
        self._inner.check(command)

    def fetches(self, command: Open) -> bool:
        return self._reader is not None and self._reader.wants(command)

    def opened(self, key: SequenceKey, command: Open, *, fetching: bool) -> None:
        self._inner.opened(key, command, fetching=fetching)
        if fetching:
            assert self._reader is not None
            self._reader.opened(key, command)

    def ended(self, key: SequenceKey) -> None:
        self._inner.ended(key)

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        return self._inner.lend(event)

    def landed(self, key: SequenceKey) -> None:
        self._inner.landed(key)

    def renew(self, key: SequenceKey) -> None:
        self._inner.renew(key)

    def take(self, key: SequenceKey, command: Take) -> None:
        self._inner.take(key, command)

    def turned(self) -> None:
        self._inner.turned()
        if self._reader is not None:
            self._reader.turned()

    def take_from_rank(self, message: FromTransfer) -> None:
        if self._reader is not None:
            self._reader.take_from_rank(message)
        else:
            self._inner.take_from_rank(message)

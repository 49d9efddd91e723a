"""What a worker does with sequences beyond computing them: its role, as the host sees it.

The host (`engine.worker.host`) calls a `RoleHandler` at fixed points, in its own task: `prefill_worker` lends state,
`decode_worker` borrows it, and a worker of both roles has nothing to add (`BothRole`). What happens to a handler beside
that (timers, calls to and from other workers) changes the scheduler only through `HandlerHost.enqueue`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Protocol

from engine.plan import FromTransfer, ToTransfer
from engine.worker.events import LentEvent, PagesEvent, SequenceKey
from engine.worker.scheduler import Scheduler
from rorqual.errors import InvalidRequest
from rorqual.session import Credit, ErrorCode, Offer, Open, Role, Take


class HandlerHost(Protocol):
    """What a handler may do with its host."""

    @property
    def scheduler(self) -> Scheduler: ...

    def send(self, message: ToTransfer) -> None:
        """To the rank; never blocks."""
        ...

    def enqueue(self, effect: Callable[[], None]) -> None:
        """Carry `effect` out in the host's own task, soon, and keep the rank fed after it."""
        ...

    def tell_bound(self, key: SequenceKey) -> None:
        """Report that an open sequence has room here and renews its lease itself."""
        ...

    def hand_over(self, key: SequenceKey) -> None:
        """End a lent sequence well: its reader goes on with it."""
        ...

    def fail(self, key: SequenceKey, code: ErrorCode, text: str) -> None:
        """End an open sequence with an error; the scheduler and the handler's `ended` are told."""
        ...


class RoleHandler(Protocol):
    @property
    def role(self) -> Role: ...

    @property
    def is_idle(self) -> bool:
        """Nothing lent, being read or kept back."""
        ...

    def attach(self, host: HandlerHost) -> None:
        """Called once, before everything else."""
        ...

    async def run(self) -> None:
        """What happens beside the host; ends only by raising or by being cancelled."""
        ...

    async def finish(self) -> None:
        """Nothing is open any more and the worker is about to end: what it still owes others."""
        ...

    def credit(self, *, num_sessions: int, keys: Collection[SequenceKey]) -> Credit | None:
        """What a session with these open sequences may have, promised and open together."""
        ...

    def check(self, command: Open) -> None:
        """Raises InvalidRequest for a sequence that is not for this role."""
        ...

    def opened(self, key: SequenceKey, command: Open) -> None:
        """The scheduler has queued it."""
        ...

    def ended(self, key: SequenceKey) -> None:
        """It was open and is not any more, for whatever reason. The scheduler knows."""
        ...

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        """State of an open sequence has become readable. None when nobody may read it any more."""
        ...

    def landed(self, key: SequenceKey) -> None:
        """A token of an open sequence has landed."""
        ...

    def renew(self, key: SequenceKey) -> None:
        """The router still wants what an open sequence lends."""
        ...

    def take(self, key: SequenceKey, command: Take) -> None:
        """State that may be read for an open sequence. Raises InvalidRequest for what cannot be meant."""
        ...

    def turned(self) -> None:
        """Commands were carried out, or a step's result was taken in: see what the scheduler gives."""
        ...

    def take_from_rank(self, message: FromTransfer) -> None: ...


class BothRole:
    """Whole sequences: nothing is lent and nothing borrowed."""

    role = Role.BOTH
    is_idle = True

    def attach(self, host: HandlerHost) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def finish(self) -> None:
        pass

    def credit(self, *, num_sessions: int, keys: Collection[SequenceKey]) -> Credit | None:
        return None

    def check(self, command: Open) -> None:
        if command.source is not None:
            raise InvalidRequest("this worker computes prompts itself and reads no state", field="source")

    def opened(self, key: SequenceKey, command: Open) -> None:
        pass

    def ended(self, key: SequenceKey) -> None:
        pass

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        raise AssertionError("a sequence of a worker of both roles was lent")

    def landed(self, key: SequenceKey) -> None:
        pass

    def renew(self, key: SequenceKey) -> None:
        pass

    def take(self, key: SequenceKey, command: Take) -> None:
        raise InvalidRequest("this worker reads no state", field="offer")

    def turned(self) -> None:
        pass

    def take_from_rank(self, message: FromTransfer) -> None:
        raise AssertionError("a rank without a transfer engine sent news of one")

"""Whether somebody may be reading this worker's memory: said to its rank, which then looks more often.

Shared by those on a worker that lend, each under a name of its own: only when nobody has a lease out is it over.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.plan import Expose, ToTransfer


class Exposure:
    def __init__(self) -> None:
        self._who: set[str] = set()

    def set(self, who: str, *, active: bool, send: Callable[[ToTransfer], None]) -> None:
        was_active = bool(self._who)
        if active:
            self._who.add(who)
        else:
            self._who.discard(who)
        if was_active != bool(self._who):
            send(Expose(active=not was_active))

"""When time moves a ledger of leases: a task that sleeps until the next deadline, whenever that changes.

Used by whoever owns a ledger and a host: `prefill_worker.lending` for what is handed over,
`engine.worker.sharing.key_lending` for what is read by its keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from engine.worker.role import HandlerHost
from kvstore.leases import LeaseLedger
from rorqual.clock import Clock


async def keep_deadlines(
    ledger: LeaseLedger,
    *,
    clock: Clock,
    host: HandlerHost,
    changed: asyncio.Event,
    advance: Callable[[], None],
) -> None:
    """For ever: `advance` in the host's own task at every deadline. `changed` is set whenever the next one may be
    another."""
    while True:
        changed.clear()
        due = ledger.next_deadline
        wait = None if due is None else max(0.0, due - clock.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await changed.wait()
                continue
        done = asyncio.Event()

        def take_turn(done: asyncio.Event = done) -> None:
            advance()
            done.set()

        host.enqueue(take_turn)
        await done.wait()

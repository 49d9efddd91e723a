"""Which of some names a store has, in one round trip to each server and within a budget. No torch.

Used by `kvstore.store.reading` for workers and by `kvstore.store.finder` for routers. No value is moved. A server that
has not answered by then has its exchange broken off, and counts as one that failed (`kvstore.store.health`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.store.connections import Command, NodeName, Reply, ServerLost
from kvstore.store.counts import StoreCounts
from kvstore.store.health import Health
from kvstore.store.servers import Servers
from rorqual.clock import Clock


async def ask_presence(
    names: Sequence[bytes],
    *,
    servers: Servers,
    health: Health,
    clock: Clock,
    counts: StoreCounts,
    budget_seconds: float,
) -> dict[bytes, bool]:
    """Those names of which it is known within `budget_seconds`, and whether they are there. Servers that are thought to
    be lost are not asked."""
    known: dict[bytes, bool] = {}
    asked: dict[NodeName, float] = {}  # and have not answered
    groups: dict[NodeName, list[bytes]] = {}
    for name in dict.fromkeys(names):
        node = servers.node_of(name)
        if node is not None and health.is_up(node):
            groups.setdefault(node, []).append(name)

    async def ask(node: NodeName, group: list[bytes]) -> None:
        def receive(number: int, reply: Reply) -> None:
            health.worked(node)
            if reply in (0, 1):
                known[group[number]] = reply == 1

        async with servers.turns(node):
            asked[node] = clock.monotonic()
            try:
                commands: list[Command] = [("EXISTS", name) for name in group]
                await servers.exchange(node, commands, receive)
            except ServerLost as error:
                health.failed(node, asked[node], error)
            del asked[node]

    try:
        async with asyncio.timeout(budget_seconds), asyncio.TaskGroup() as tasks:
            for node, group in groups.items():
                tasks.create_task(ask(node, group))
    except TimeoutError:
        counts.reads_overdue += 1
        for node, began in asked.items():
            health.overdue(node, began)
    return known

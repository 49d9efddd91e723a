"""The servers behind a store's URL: which of them has a key, and exchanges with it. One server, or a Cluster. No torch.

Used by everything in `kvstore.store` that talks to Redis. In a Cluster, which server has which slots is learnt by
`refresh` and from every MOVED; a reply that points elsewhere is followed once, MOVED or ASK, within the same call.
redis-py's own Cluster client is not used: its way with a lost server is to close the connections to all of them and to
learn the map of slots anew while the caller waits; and what bounds its waits can swallow a cancellation before Python
3.12 (`asyncio.wait_for`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError

from kvstore.store.address import Address
from kvstore.store.connections import (
    WINDOW_COMMANDS,
    Command,
    ErrorReply,
    NodeName,
    Pool,
    Receive,
    Reply,
    ServerLost,
    connection_options,
)

REFRESH_NODES = 2
"""Servers that one refresh asks, one after the other, before it asks the one of the URL."""

_ASKING: Command = ("ASKING",)


class Servers(Protocol):
    """All calls belong to one event loop."""

    @property
    def nodes(self) -> tuple[NodeName, ...]:
        """All that are known and have keys; none before the first `refresh` of a Cluster."""
        ...

    @property
    def num_connections(self) -> int: ...

    @property
    def num_redirected(self) -> int:
        """Replies so far that pointed to another server."""
        ...

    def node_of(self, name: bytes) -> NodeName | None:
        """Who has the key of this name, as far as is known."""
        ...

    def turns(self, node: NodeName) -> asyncio.Semaphore:
        """To be held around `exchange`: as many as there may be connections."""
        ...

    async def exchange(
        self, node: NodeName, commands: Sequence[Command], receive: Receive, *, window: int = WINDOW_COMMANDS
    ) -> None:
        """`window` commands are ahead of their replies at most. Raises ServerLost. No bound in time: the caller sets
        one."""
        ...

    async def ping(self, node: NodeName) -> None:
        """Raises ServerLost. No bound in time."""
        ...

    async def refresh(self) -> None:
        """Learn which servers there are. Raises ServerLost. Bounded by a few times the server's longest silence."""
        ...

    async def aclose(self) -> None: ...


def make_servers(address: Address, *, connections_max: int, seconds_max: float) -> Servers:
    """Connects to nobody yet. `connections_max` for each server; `seconds_max` bounds connecting to one."""
    kind = ClusterServers if address.is_cluster else OneServer
    return kind(address, connections_max=connections_max, seconds_max=seconds_max)


class OneServer:
    def __init__(self, address: Address, *, connections_max: int, seconds_max: float) -> None:
        options = connection_options(address, seconds_max=seconds_max)
        name = NodeName(options.get("path") or f"{options['host']}:{options['port']}")
        self._pool = Pool(name, address.transport, options, connections_max=connections_max)
        self._seconds_max = seconds_max
        self.nodes = (name,)
        self.num_redirected = 0

    @property
    def num_connections(self) -> int:
        return self._pool.num_connections

    def node_of(self, name: bytes) -> NodeName | None:
        return self._pool.name

    def turns(self, node: NodeName) -> asyncio.Semaphore:
        return self._pool.turns

    async def exchange(
        self, node: NodeName, commands: Sequence[Command], receive: Receive, *, window: int = WINDOW_COMMANDS
    ) -> None:
        await self._pool.exchange(commands, receive, window=window)

    async def ping(self, node: NodeName) -> None:
        await _ping(self._pool)

    async def refresh(self) -> None:
        try:
            async with asyncio.timeout(self._seconds_max):
                await _ping(self._pool)
        except TimeoutError:
            raise ServerLost(f"{self._pool.name} does not answer", code="timeout") from None

    async def aclose(self) -> None:
        self._pool.close()


class ClusterServers:
    def __init__(self, address: Address, *, connections_max: int, seconds_max: float) -> None:
        self._shown = address.shown
        self._seconds_max = seconds_max
        self._connections_max = connections_max
        self._transport = address.transport
        self._options = connection_options(address, seconds_max=seconds_max)
        # The URL's own: any of them, or a name that stands for any of them.
        self._first = NodeName(f"{self._options['host']}:{self._options['port']}")
        self._pools: dict[NodeName, Pool] = {}
        self._slots: list[NodeName | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._num_refreshed = 0
        self._num_asked = 0
        self._is_refreshing = asyncio.Lock()
        self.nodes: tuple[NodeName, ...] = ()
        self.num_redirected = 0

    @property
    def num_connections(self) -> int:
        return sum(pool.num_connections for pool in self._pools.values())

    def node_of(self, name: bytes) -> NodeName | None:
        return self._slots[key_slot(name)]

    def turns(self, node: NodeName) -> asyncio.Semaphore:
        return self._pool(node).turns

    async def exchange(
        self, node: NodeName, commands: Sequence[Command], receive: Receive, *, window: int = WINDOW_COMMANDS
    ) -> None:
        elsewhere: dict[int, tuple[NodeName, AskError]] = {}

        def receive_here(number: int, reply: Reply) -> None:
            if isinstance(reply, ErrorReply) and isinstance(
                reply.error, AskError
            ):  # a MovedError is one, too
                # A server that does not know its own name leaves it out.
                host = reply.error.host or node.rpartition(":")[0]
                elsewhere[number] = NodeName(f"{host}:{reply.error.port}"), reply.error
            else:
                receive(number, reply)

        await self._pool(node).exchange(commands, receive_here, window=window)
        if elsewhere:
            self.num_redirected += len(elsewhere)
            await self._follow(commands, elsewhere, receive, window=window)

    async def ping(self, node: NodeName) -> None:
        await _ping(self._pool(node))

    async def refresh(self) -> None:
        num_refreshed = self._num_refreshed
        async with self._is_refreshing:
            if self._num_refreshed != num_refreshed:
                return  # somebody else's has just succeeded
            slots = await self._asked_for_slots()
            self._num_refreshed += 1
        self._slots = slots
        self.nodes = tuple(dict.fromkeys(node for node in slots if node is not None))
        for name in [name for name in self._pools if name not in self.nodes and name != self._first]:
            self._pools.pop(name).close()

    async def aclose(self) -> None:
        for pool in self._pools.values():
            pool.close()

    async def _asked_for_slots(self) -> list[NodeName | None]:
        """The first answer of a few servers; others of them each time, should these be lost."""
        start = self._num_asked % max(1, len(self.nodes))
        self._num_asked += REFRESH_NODES
        some = (*self.nodes[start:], *self.nodes[:start])[:REFRESH_NODES]
        failure = ServerLost(f"{self._shown}: nobody was asked", code="connection")
        for node in dict.fromkeys((*some, self._first)):
            replies: list[Reply] = []
            try:
                async with asyncio.timeout(self._seconds_max):
                    command: Command = ("CLUSTER", "SLOTS")
                    await self._pool(node).exchange(
                        [command], lambda _, reply, replies=replies: replies.append(reply), window=1
                    )
                return _parse_slots(node, replies[0])
            except TimeoutError:
                failure = ServerLost(f"{node} does not tell who has which keys", code="timeout")
            except ServerLost as error:
                failure = error
        raise failure

    async def _follow(
        self,
        commands: Sequence[Command],
        elsewhere: dict[int, tuple[NodeName, AskError]],
        receive: Receive,
        *,
        window: int,
    ) -> None:
        """Once: who is sent on again gets the error."""
        by_node: dict[NodeName, list[int]] = {}
        for number, (node, error) in elsewhere.items():
            if isinstance(error, MovedError) and 0 <= error.slot_id < len(self._slots):
                self._slots[error.slot_id] = node
                if node not in self.nodes:
                    self.nodes = (*self.nodes, node)
            by_node.setdefault(node, []).append(number)
        for node, numbers in by_node.items():
            # Every command after an ASKING of its own: for slots that have moved for good it does no harm.
            asked: list[Command] = [part for number in numbers for part in (_ASKING, commands[number])]

            def receive_there(position: int, reply: Reply, numbers: list[int] = numbers) -> None:
                if position % 2:
                    receive(numbers[position // 2], reply)

            # No turn is waited for while one is held: two reads could wait for each other's. These few connections
            # come on top.
            await self._pool(node).exchange(asked, receive_there, window=2 * window)

    def _pool(self, node: NodeName) -> Pool:
        pool = self._pools.get(node)
        if pool is None:
            host, _, port = node.rpartition(":")
            options = self._options | {"host": host, "port": int(port)}
            pool = Pool(node, self._transport, options, connections_max=self._connections_max)
            self._pools[node] = pool
        return pool


def _parse_slots(asked: NodeName, reply: Reply) -> list[NodeName | None]:
    """Of CLUSTER SLOTS: ranges, each with its first and last slot, its master's host, port and more, and replicas."""
    slots: list[NodeName | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    if isinstance(reply, ErrorReply):
        raise ServerLost(f"{asked} is no server of a Cluster: {reply.error}", code=reply.code)
    try:
        ranges: Any = reply
        for first, last, (host, port, *_), *_ in ranges:
            # A server that does not know its own name leaves it out.
            name = host.decode() if host else asked.rpartition(":")[0]
            node = NodeName(f"{name}:{int(port)}")
            if not 0 <= first <= last < len(slots):
                raise ValueError(f"slots {first} to {last}")
            slots[first : last + 1] = [node] * (last + 1 - first)
    except (TypeError, ValueError, AttributeError) as error:
        raise ServerLost(f"{asked} tells no sense of who has which keys: {error}", code="other") from None
    if not any(slots):
        raise ServerLost(f"{asked} knows of no slots: the Cluster is not set up", code="other")
    return slots


async def _ping(pool: Pool) -> None:
    replies: list[Reply] = []
    await pool.exchange([("PING",)], lambda _, reply: replies.append(reply), window=1)
    if isinstance(replies[0], ErrorReply):
        raise ServerLost(f"{pool.name}: {replies[0].error}", code=replies[0].code)

"""The servers behind a store's URL: which of them has a key, and exchanges with it. One server, or a Cluster. No torch.

Used by everything in `kvstore.store` that talks to Redis. In a Cluster, which server has which slots is learnt by
`refresh` and from every MOVED; a reply that points elsewhere is followed once, MOVED or ASK, within the same call.
redis-py's `NodesManager` holds the map of slots; its own clients are not used, since their way with a lost server is to
close the connections to all servers and to learn the map anew, while the caller waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError

from kvstore.store.address import Address
from kvstore.store.connections import (
    LOST,
    Command,
    ErrorReply,
    NodeName,
    Pool,
    Receive,
    Reply,
    ServerLost,
    connection_options,
)

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

    async def exchange(self, node: NodeName, commands: Sequence[Command], receive: Receive) -> None:
        """One round trip. Raises ServerLost. No bound in time: the caller sets one."""
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

    async def exchange(self, node: NodeName, commands: Sequence[Command], receive: Receive) -> None:
        await self._pool.exchange(commands, receive)

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
        self._pools: dict[NodeName, Pool] = {}
        self.num_redirected = 0
        # The map's own connections, one to each server it asks: silent servers are passed over after `seconds_max`.
        options: dict[str, Any] = self._options | {
            "socket_timeout": seconds_max,
            "connection_class": address.transport,
        }
        host, port = options.pop("host"), options.pop("port")
        first = ClusterNode(host, port, **options)
        # Without full coverage a lost server costs its own slots only.
        self._map = NodesManager([first], False, options)

    @property
    def nodes(self) -> tuple[NodeName, ...]:
        return tuple({_name(nodes[0]): None for nodes in _slots(self._map).values()})

    @property
    def num_connections(self) -> int:
        return sum(pool.num_connections for pool in self._pools.values())

    def node_of(self, name: bytes) -> NodeName | None:
        nodes = _slots(self._map).get(key_slot(name))
        return _name(nodes[0]) if nodes else None

    def turns(self, node: NodeName) -> asyncio.Semaphore:
        return self._pool(node).turns

    async def exchange(self, node: NodeName, commands: Sequence[Command], receive: Receive) -> None:
        elsewhere: dict[int, MovedError | AskError] = {}

        def receive_here(number: int, reply: Reply) -> None:
            if isinstance(reply, ErrorReply) and isinstance(reply.error, MovedError | AskError):
                # A server that does not know its own name leaves it out.
                reply.error.host = reply.error.host or node.rpartition(":")[0]
                elsewhere[number] = reply.error
            else:
                receive(number, reply)

        await self._pool(node).exchange(commands, receive_here)
        if elsewhere:
            self.num_redirected += len(elsewhere)
            await self._follow(commands, elsewhere, receive)

    async def ping(self, node: NodeName) -> None:
        await _ping(self._pool(node))

    async def refresh(self) -> None:
        try:
            # Every server that is asked in vain takes a moment; three of them, then this is given up.
            async with asyncio.timeout(3 * self._seconds_max):
                await self._map.initialize()
        except TimeoutError:
            raise ServerLost(f"{self._shown}: no server tells who has which keys", code="timeout") from None
        except LOST as error:
            raise ServerLost(f"{self._shown}: {error}", code="connection") from None
        known = set(self.nodes)
        for name in [name for name in self._pools if name not in known]:
            self._pools.pop(name).close()

    async def aclose(self) -> None:
        for pool in self._pools.values():
            pool.close()
        for nodes in (self._map.nodes_cache, self._map.startup_nodes):
            for node in nodes.values():
                await node.disconnect()

    async def _follow(
        self, commands: Sequence[Command], elsewhere: dict[int, MovedError | AskError], receive: Receive
    ) -> None:
        """Once: who is sent on again gets the error."""
        by_node: dict[NodeName, list[int]] = {}
        for number, error in elsewhere.items():
            if isinstance(error, MovedError):  # a kind of AskError, too
                with contextlib.suppress(LookupError):  # a slot that nobody had; the next refresh tells of it
                    await self._map.move_slot(error)
            by_node.setdefault(NodeName(f"{error.host}:{error.port}"), []).append(number)
        for node, numbers in by_node.items():
            # Every command after an ASKING of its own: for slots that have moved for good it does no harm.
            asked: list[Command] = [part for number in numbers for part in (_ASKING, commands[number])]

            def receive_there(position: int, reply: Reply, numbers: list[int] = numbers) -> None:
                if position % 2:
                    receive(numbers[position // 2], reply)

            # No turn is waited for while one is held: two reads could wait for each other's. These few connections
            # come on top.
            await self._pool(node).exchange(asked, receive_there)

    def _pool(self, node: NodeName) -> Pool:
        pool = self._pools.get(node)
        if pool is None:
            host, _, port = node.rpartition(":")
            options = self._options | {"host": host, "port": int(port)}
            pool = Pool(node, self._transport, options, connections_max=self._connections_max)
            self._pools[node] = pool
        return pool


def _slots(nodes_manager: NodesManager) -> dict[int, list[ClusterNode]]:
    return cast("dict[int, list[ClusterNode]]", cast("Any", nodes_manager).slots_cache)


def _name(node: ClusterNode) -> NodeName:
    return NodeName(f"{node.host}:{node.port}")


async def _ping(pool: Pool) -> None:
    replies: list[Reply] = []
    await pool.exchange([("PING",)], lambda _, reply: replies.append(reply))
    if isinstance(replies[0], ErrorReply):
        raise ServerLost(f"{pool.name}: {replies[0].error}", code=replies[0].code)

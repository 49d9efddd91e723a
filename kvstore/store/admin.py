"""What an operator may want to know of a store, and do to it: count, list, verify, flush a tenant. No torch.

Used by `kvstore.store.cli` and by tests. It goes through the names of a store with SCAN, a page of names at a time, and
holds no more than one page of them, so that a store of millions of values can be looked at while it serves. What it
finds is a picture taken over a while: values come and go meanwhile. Raises ServerLost; nothing is tried twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvstore.store.address import parse_address
from kvstore.store.connections import Command, ErrorReply, NodeName, Reply, ServerLost
from kvstore.store.contract import Kind, Miss, TenantLabel
from kvstore.store.names import ValueName, account_name, parse_name, value_pattern
from kvstore.store.servers import Servers, make_servers
from kvstore.store.value import HEADER_BYTES, Flaw, check_value

SCAN_COUNT = 500
"""Names that a server looks at for one step of a scan."""

_CONNECTIONS = 2
_INFO_FIELDS = (
    "used_memory",
    "maxmemory",
    "maxmemory_policy",
    "evicted_keys",
    "server_name",
    "redis_version",
)

Progress = Callable[[int], None]
"""Told how many values have been gone through so far."""


@dataclass(slots=True, kw_only=True)
class Share:
    """Values of one wire id, kind and tenant. Bytes are of payloads."""

    num_values: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStat:
    """A server, as it describes itself; what it does not say is missing."""

    node: NodeName
    info: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Stat:
    nodes: list[NodeStat] = field(default_factory=list[NodeStat])
    shares: dict[tuple[str, Kind, TenantLabel], Share] = field(
        default_factory=dict[tuple[str, Kind, TenantLabel], Share]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    name: ValueName
    num_bytes: int  # of the payload
    idle_seconds: int | None  # since it was last used; None where the server does not say
    expires_seconds: float | None  # from now; None: never


@dataclass(slots=True, kw_only=True)
class Verified:
    num_values: int = 0
    num_bytes: int = 0  # of sound payloads
    flaws: list[tuple[bytes, Miss]] = field(default_factory=list[tuple[bytes, Miss]])


class Admin:
    """Of an open store: see `opened`."""

    def __init__(self, servers: Servers, *, seconds_max: float) -> None:
        self._servers = servers
        self._seconds_max = seconds_max

    async def stat(self, progress: Progress = lambda _: None) -> Stat:
        """Counts and bytes of everything, by wire id, kind and tenant."""
        stat = Stat()
        for node in self._servers.nodes:
            stat.nodes.append(await self._describe(node))
        num_values = 0
        async for node, names in self._values(None):
            lengths = await self._ask(node, [("STRLEN", raw) for raw, _ in names])
            for (_, name), length in zip(names, lengths, strict=True):
                if not isinstance(length, int) or length == 0:
                    continue  # gone meanwhile
                key = (name.wire_id, name.key.kind, name.key.tenant)
                share = stat.shares.setdefault(key, Share())
                share.num_values += 1
                share.num_bytes += max(0, length - HEADER_BYTES)
            num_values += len(names)
            progress(num_values)
        return stat

    async def ls(self, *, limit: int, tenant: TenantLabel | None = None) -> list[Listed]:
        """The first `limit` values that a scan comes across, in no order."""
        listed: list[Listed] = []
        async for node, names in self._values(tenant):
            names = names[: limit - len(listed)]
            questions: list[Command] = []
            for raw, _ in names:
                questions += [("STRLEN", raw), ("OBJECT", "IDLETIME", raw), ("PTTL", raw)]
            answers = await self._ask(node, questions)
            for number, (_, name) in enumerate(names):
                length, idle, left = answers[3 * number : 3 * number + 3]
                if not isinstance(length, int) or not isinstance(left, int) or left == -2:
                    continue  # gone meanwhile
                listed.append(
                    Listed(
                        name=name,
                        num_bytes=max(0, length - HEADER_BYTES),
                        idle_seconds=idle if isinstance(idle, int) else None,
                        expires_seconds=left / 1000 if left >= 0 else None,
                    )
                )
            if len(listed) >= limit:
                break
        return listed

    async def verify(self, *, limit: int, progress: Progress = lambda _: None) -> Verified:
        """Read the first `limit` values that a scan comes across, and check their digests and names. Reading counts as
        use: what is verified is evicted later."""
        verified = Verified()
        async for node, names in self._values(None):
            for raw, name in names[: limit - verified.num_values]:
                (value,) = await self._ask(node, [("GET", raw)])
                if value is None:
                    continue  # gone meanwhile
                flaw, num_bytes = _judged(name, value)
                verified.num_values += 1
                verified.num_bytes += num_bytes
                if flaw is not None:
                    verified.flaws.append((raw, flaw))
                progress(verified.num_values)
            if verified.num_values >= limit:
                break
        return verified

    async def flush(self, tenant: TenantLabel, progress: Progress = lambda _: None) -> int:
        """Delete all values of a tenant, and its account; how many there were. What workers write meanwhile may
        stay."""
        num_deleted = 0
        async for node, names in self._values(tenant):
            replies = await self._ask(node, [("UNLINK", raw) for raw, _ in names])
            num_deleted += replies.count(1)
            progress(num_deleted)
        account = account_name(tenant)
        node = self._servers.node_of(account)
        if node is not None:
            await self._ask(node, [("UNLINK", account)])
        return num_deleted

    async def _describe(self, node: NodeName) -> NodeStat:
        (text,) = await self._ask(node, [("INFO",)])
        lines = text.decode(errors="replace").splitlines() if isinstance(text, bytes) else []
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        return NodeStat(node=node, info={name: found[name] for name in _INFO_FIELDS if name in found})

    async def _values(
        self, tenant: TenantLabel | None
    ) -> AsyncGenerator[tuple[NodeName, list[tuple[bytes, ValueName]]], None]:
        """Names of values, some at a time, with their server. A name may come twice, as with every scan."""
        for node in self._servers.nodes:
            cursor: object = b"0"
            while True:
                assert isinstance(cursor, bytes)
                pattern = value_pattern(tenant=tenant)
                (reply,) = await self._ask(node, [("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)])
                if not isinstance(reply, list) or len(reply) != 2:
                    why = reply.error if isinstance(reply, ErrorReply) else "an answer that makes no sense"
                    raise ServerLost(f"{node} lists no names: {why}", code="other")
                cursor, raw_names = reply
                parsed = [(raw, parse_name(raw)) for raw in raw_names]
                names = [(raw, name) for raw, name in parsed if name is not None]
                if names:
                    yield node, names
                if cursor == b"0":
                    break

    async def _ask(self, node: NodeName, commands: Sequence[Command]) -> list[Reply]:
        replies: list[Reply] = [None] * len(commands)
        try:
            async with asyncio.timeout(self._seconds_max):
                await self._servers.exchange(node, commands, replies.__setitem__)
        except TimeoutError:
            raise ServerLost(f"{node} did not answer for {self._seconds_max:g} s", code="timeout") from None
        return replies


@asynccontextmanager
async def opened(url: str, *, seconds_max: float = 5.0) -> AsyncGenerator[Admin]:
    """The store at `url`. `seconds_max` bounds every single answer. Raises ConfigError, ServerLost."""
    servers = make_servers(parse_address(url), connections_max=_CONNECTIONS, seconds_max=seconds_max)
    try:
        await servers.refresh()
        yield Admin(servers, seconds_max=seconds_max)
    finally:
        await servers.aclose()


def _judged(name: ValueName, value: Reply) -> tuple[Miss | None, int]:
    """What is wrong with a value, if anything; and the bytes of its payload, if nothing is."""
    if not isinstance(value, bytes):
        return Miss.FOREIGN, 0
    header = check_value(value)
    if isinstance(header, Flaw):
        return header.value, 0
    if (header.wire_id, header.kind, header.page) != (name.wire_id, name.key.kind, name.key.page):
        return Miss.FOREIGN, 0
    return None, header.payload_bytes

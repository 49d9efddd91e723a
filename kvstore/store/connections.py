"""Connections to one server of a store: a small pool, and one exchange of commands for replies. No torch.

Used by `kvstore.store.servers`. redis-py speaks the protocol; the pool is our own, since a read is given up in the
middle every day here: such a connection is aborted, with all that was not sent yet, and never used again. (redis-py's
pools close it gently, which waits for a frozen server to take what is left.)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NewType, TypeVar, cast

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import AuthenticationError, RedisClusterException, RedisError, ResponseError

from kvstore.store.address import Address
from rorqual.errors import RorqualError

NodeName = NewType("NodeName", str)
"""A server, `host:port` or the path of its socket."""

Command = tuple[bytes | str | int, ...]

_CODES = frozenset(
    "ASK BUSY CLUSTERDOWN LOADING MASTERDOWN MISCONF MOVED NOPERM NOREPLICAS OOM READONLY TRYAGAIN WRONGTYPE".split()  # noqa: SIM905
)

_Result = TypeVar("_Result")

WINDOW_BYTES = 2 << 20
"""Of values asked for, or sent, ahead of their replies: it bounds what collects in a server's memory and in ours for
one connection. Pages of 0.9 MB, two ahead, are read as fast as with all of a batch ahead, and written 1.3 times as
fast; and 2 MB hide a round trip of 2 ms at 1 GB/s."""

WINDOW_COMMANDS = 512
"""The same for commands whose replies are short."""

_STREAM_BYTES = 1 << 20  # that wait to be parsed before the socket is left alone

# What redis-py is known to raise when the other side is gone, refuses us or speaks no sense: its own two trees, the
# system's, what parsing nonsense gives (arrays within arrays without end among it), and what asyncio's transports give
# when written to as they close (redis-py issue 4287).
_LOST = (
    *(RedisError, RedisClusterException),
    *(OSError, ValueError, LookupError, EOFError, RecursionError, TypeError, AttributeError),
)


class ServerLost(RorqualError):
    """The server cannot be reached, refuses us, or broke off. `code` is one word for counters."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """The server's answer to one command was an error. `code` is its first word, as in `_CODES`, or `other`."""

    code: str
    error: ResponseError


Reply = bytes | int | None | list[Any] | ErrorReply
Receive = Callable[[int, Reply], None]
"""Given the number of a command, and its reply, as it comes."""


class _Abortable:
    """Beside a connection class of redis-py: remembers the transport, so that it can be cut off at once."""

    _transport: asyncio.Transport | None = None

    async def _connect(self) -> None:
        await super()._connect()  # type: ignore[misc]
        self._transport = cast("Any", self)._writer.transport

    def abort(self) -> None:
        connection = cast("Any", self)
        connection._parser.on_disconnect()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        connection._reader = connection._writer = None


class _Remote(_Abortable):
    """Over TCP, where redis-py lets arguments of asyncio's through."""

    def _connection_arguments(self) -> dict[str, Any]:
        return {**super()._connection_arguments(), "limit": _STREAM_BYTES}  # type: ignore[misc]


class _Plain(_Remote, Connection): ...


class _Encrypted(_Remote, SSLConnection): ...


class _Local(_Abortable, UnixDomainSocketConnection): ...


_Pooled = _Plain | _Encrypted | _Local
_CLASSES: dict[type, type[_Pooled]] = {
    Connection: _Plain,
    SSLConnection: _Encrypted,
    UnixDomainSocketConnection: _Local,
}


def connection_options(address: Address, *, seconds_max: float) -> dict[str, Any]:
    """For a connection class of redis-py. `seconds_max` bounds connecting; replies, whoever waits."""
    return address.options | {
        "socket_connect_timeout": seconds_max,
        "socket_timeout": None,
        "protocol": 2,
        "driver_info": None,  # two round trips less to connect
    }


def window_for(value_bytes: int) -> int:
    """How many values of at most this size to have on their way at once."""
    return max(2, min(WINDOW_COMMANDS, WINDOW_BYTES // value_bytes))


class Pool:
    """At most `connections_max` connections to one server; who wants another waits for its turn, in order."""

    def __init__(
        self, name: NodeName, transport: type, options: dict[str, Any], *, connections_max: int
    ) -> None:
        self.name = name
        self.turns = asyncio.Semaphore(connections_max)
        """Held by callers around `exchange`."""
        self._class = _CLASSES[transport]
        self._options = options
        self._idle: list[_Pooled] = []
        self._num_busy = 0
        self._is_closed = False

    @property
    def num_connections(self) -> int:
        return self._num_busy + len(self._idle)

    async def exchange(self, commands: Sequence[Command], receive: Receive, *, window: int) -> None:
        """Send the commands, at most `window` of them ahead of their replies, and give each reply to `receive` as it
        comes, in order. Raises ServerLost; replies given by then stand. Cancelled, the connection is cut off: what has
        not been sent is not sent any more."""
        assert window >= 1
        connection = await self._checked_out()
        is_sound = False
        num_sent = 0
        try:
            for number in range(len(commands)):
                if num_sent <= number + window // 2:  # not for each reply anew
                    ahead = commands[num_sent : number + window]
                    num_sent += len(ahead)
                    if ahead:
                        await self._guarded(connection.send_packed_command(connection.pack_commands(ahead)))
                receive(number, await self._guarded(_reply(connection)))
            is_sound = True
        finally:
            self._num_busy -= 1
            if is_sound and not self._is_closed:
                self._idle.append(connection)
            else:
                connection.abort()

    def close(self) -> None:
        """Cut off all connections; one in use when its exchange ends."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()

    async def _guarded(self, step: Coroutine[Any, Any, _Result]) -> _Result:
        """One step of redis-py's. What goes wrong in it is the server's doing."""
        try:
            return await step
        except _LOST as error:
            raise _lost(self.name, error) from error

    async def _checked_out(self) -> _Pooled:
        """A connection that nothing has come in on since it was put back; perhaps not connected yet."""
        self._num_busy += 1
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(*_LOST):
                if connection.is_connected and not await connection.can_read():
                    return connection
            connection.abort()  # the server closed it meanwhile
        return self._class(**self._options)


async def _reply(connection: _Pooled) -> Reply:
    try:
        return cast("Reply", await connection.read_response())
    except ResponseError as error:
        return ErrorReply(code=_code(error), error=error)


def _code(error: ResponseError) -> str:
    """One of a few words, whatever the server says: they become labels of a metric."""
    words = str(getattr(error, "status_code", None) or error).split(maxsplit=1)
    return words[0] if words and words[0] in _CODES else "other"


def _lost(name: NodeName, error: BaseException) -> ServerLost:
    if isinstance(error, AuthenticationError):
        return ServerLost(f"{name} refuses the user or password: {error}", code="authentication")
    if isinstance(error, ConnectionResetError | EOFError):
        return ServerLost(f"{name} broke off: {error}", code="connection")
    return ServerLost(f"{name}: {error}", code="connection")

"""An HTTP/1.1 server on asyncio and llhttp: sockets in, whole requests and a reply writer out.

Owns listening, connections, request framing, every bound and deadline of a socket, the bytes of all bodies,
and stopping gracefully. Called by `router.gateway.server`, which gives it a look at each head and one handler;
it knows nothing of routes, JSON or models, and never waits for a client without a deadline.

It exists because of what `bench/http_servers.py` measured. A token stream needs one socket write for all
events that became ready in one turn of the loop, its handler cancelled the moment the client goes, and a
client that stops reading cut off at a deadline. granian takes everything a client does not read into memory
and never ends that stream; uvicorn keeps such a client's socket open forever and tells of a disconnect only
in a second task beside each stream. CPU, as multiples of ours over three runs: uvicorn 1.5-1.9 an event and
1.5-2.1 a request, granian 1.4-1.8 and 1.4-2.0, aiohttp (which does end streams and sockets) 1.7-2.1 and
1.8-4.0. Parsing, the dangerous half of HTTP, is llhttp's here too.
"""

from __future__ import annotations

import asyncio
import http
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import cast
from urllib.parse import unquote

import httptools

from rorqual.clock import Clock
from rorqual.tls import HANDSHAKE_SECONDS_MAX
from router.gateway.sockets import keep_probing

KIB = 1024
FLUSH_BYTES = 16 * KIB
"""Written parts are joined until the loop's next turn, or until there are this many bytes."""

HIGH_WATER_BYTES = 64 * KIB
PROGRESS_BYTES = 8 * KIB
"""A client must take this much within `write_seconds_max`, or everything there is: a drip is no reading."""

PIPELINED_BYTES_MAX = 64 * KIB
PIPELINED_REQUESTS_MAX = 64
"""What one read brings is parsed at once; more requests than this are refused."""

LINGER_SECONDS = 2.0
CANCEL_SECONDS = 5.0
LAST_WORDS_SECONDS = 0.5
"""When stopping: for what was written to leave, before connections are aborted."""

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    body_bytes_max: int = 16 * 1024 * KIB
    body_bytes_inflight_max: int = 512 * 1024 * KIB  # of all connections, until handlers take their bodies
    head_bytes_max: int = 64 * KIB
    connections_max: int = 4096
    read_seconds_max: float = 60.0  # from a request's first byte to its last
    idle_seconds_max: float = 75.0  # between requests
    write_seconds_max: float = 30.0  # without PROGRESS_BYTES taken by the client


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request is not served. It must be answered all the same."""

    status: int
    message: str
    code: str | None = None


@dataclass(slots=True, kw_only=True)
class HttpRequest:
    """`unread`: it was refused before its end, and the connection closes after the answer."""

    method: str
    path: str
    headers: dict[bytes, bytes]  # names in lower case; of a repeated header the last one
    body: bytes = b""
    keep_alive: bool
    chunks_allowed: bool  # HTTP/1.1: the reply may be chunked
    refusal: Refusal | None = None
    unread: bool = False
    give_back: Callable[[int], None] = lambda num_bytes: None

    def take_body(self) -> bytes:
        """The body, to be had once. From then on its bytes are the handler's to bound, not the server's."""
        body, self.body = self.body, b""
        self.give_back(len(body))
        return body


Handler = Callable[[HttpRequest, "HttpReply"], Awaitable[None]]
"""Answers one request by exactly one `send`, or `start`, `write`..., `finish`. It is cancelled when the client
goes (`reply.client_is_gone`) or the server stops, and raises nothing but CancelledError."""

OnHead = Callable[[HttpRequest], Refusal | None]
"""Looks at a request whose body has not been read. What it refuses goes to the handler without a body."""

CutOff = Callable[[str], None]
"""Told why a client was cut off: "write_deadline", "read_deadline", "connections", "body_bytes" or
"pipelined_requests"."""


class HttpServer:
    def __init__(
        self,
        handler: Handler,
        *,
        limits: HttpLimits,
        clock: Clock,
        cut_off: CutOff,
        on_head: OnHead = lambda request: None,
    ) -> None:
        self.handler = handler
        self.on_head = on_head
        self.limits = limits
        self.cut_off = cut_off
        self.stopping = False
        self.body_bytes_inflight = 0
        self.connections: set[_Connection] = set()
        self.conversations: set[asyncio.Task[None]] = set()
        self._clock = clock
        self._date = (-1, b"")
        self._listener: asyncio.Server | None = None

    async def start(self, *, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen and return the bound port. Raises OSError when the address cannot be had."""
        assert self._listener is None
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: _Connection(self),
            host,
            port,
            backlog=1024,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_SECONDS_MAX,
        )
        return int(self._listener.sockets[0].getsockname()[1])

    async def stop(self, *, drain_seconds: float) -> None:
        """Take no more, let running replies finish for `drain_seconds`, then cancel their handlers, which
        may still say why."""
        self.stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self.connections):
            connection.close_if_idle()
        if self.conversations:
            await asyncio.wait(self.conversations, timeout=drain_seconds)
        for conversation in tuple(self.conversations):
            conversation.cancel()
        if self.conversations:
            await asyncio.wait(self.conversations, timeout=CANCEL_SECONDS)
        if self.connections:
            await asyncio.wait([each.closed for each in self.connections], timeout=LAST_WORDS_SECONDS)
        for connection in tuple(self.connections):
            connection.abort()
        # One turn, so that transports report their end before the loop may be closed.
        await asyncio.sleep(0)

    def date(self) -> bytes:
        now = int(self._clock.wall())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1]


class HttpReply:
    """Writes one response. `write` never waits; `drain` after it lets a slow client slow its own stream."""

    def __init__(self, connection: _Connection, request: HttpRequest) -> None:
        self.status = 0
        self.finished = False
        self._connection = connection
        self._without_body = request.method == "HEAD"
        self._chunked = request.chunks_allowed
        self._keep_alive = request.keep_alive
        self._unsent_head = b""
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._flush_scheduled = False

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def client_is_gone(self) -> bool:
        return self._connection.is_closing

    @property
    def keep_alive(self) -> bool:
        return self._keep_alive and not self._connection.server.stopping

    def send(self, status: int, body: bytes, *, content_type: bytes, headers: Headers = ()) -> None:
        """The whole response at once."""
        head = self._head(status, content_type, headers, b"content-length: %d\r\n\r\n" % len(body))
        self._connection.write(head if self._without_body else head + body)
        self.finished = True

    def start(self, status: int, *, content_type: bytes, headers: Headers = ()) -> None:
        """The head of a response of unknown length; it leaves together with what is written first."""
        if self._chunked:
            framing = b"transfer-encoding: chunked\r\n\r\n"
        else:
            self._keep_alive = False
            framing = b"\r\n"
        self._unsent_head = self._head(status, content_type, headers, framing)

    def write(self, data: bytes) -> None:
        self._parts.append(data)
        self._num_bytes += len(data)
        if self._num_bytes >= FLUSH_BYTES:
            self._flush()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    async def drain(self) -> None:
        """Wait while the client is HIGH_WATER_BYTES behind; one that stays so is ended by the write
        deadline."""
        resumed = self._connection.resumed
        if resumed is not None:
            await resumed

    def finish(self) -> None:
        self._flush(last=True)
        self.finished = True

    def _head(self, status: int, content_type: bytes, headers: Headers, framing: bytes) -> bytes:
        assert not self.started
        self.status = status
        lines = [
            _STATUS_LINES[status],
            b"date: ",
            self._connection.server.date(),
            b"\r\ncontent-type: ",
            content_type,
        ]
        for name, value in headers:
            lines += (b"\r\n", name, b": ", value)
        lines.append(b"\r\n" if self.keep_alive else b"\r\nconnection: close\r\n")
        lines.append(framing)
        return b"".join(lines)

    def _flush(self, *, last: bool = False) -> None:
        self._flush_scheduled = False
        if self.finished:
            return
        body = b"" if self._without_body else b"".join(self._parts)
        self._parts.clear()
        self._num_bytes = 0
        if self._chunked and not self._without_body:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk + b"0\r\n\r\n" if last else chunk
        if self._unsent_head or body:
            self._connection.write(self._unsent_head + body)
            self._unsent_head = b""


class _Connection(asyncio.Protocol):
    """One socket. Parser callbacks fill `_arrived`; one task, the conversation, answers in order."""

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.resumed: asyncio.Future[None] | None = None  # set while the client is behind
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._body_bytes = 0  # of what `server.body_bytes_inflight` counts
        self._transport: asyncio.Transport | None = None
        self._conversation: asyncio.Task[None] | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._arrived: deque[HttpRequest] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._answering = False
        self._discarding = False  # after a refusal nothing more is parsed
        self._ended = False  # only what was written is still to be sent
        self._held: list[bytes] = []  # pipelined bytes that came while a reply was being written
        self._held_bytes = 0
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0
        self._begin_message()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's class is not derived from it.
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        keep_probing(transport.get_extra_info("socket"))
        self.server.connections.add(self)
        self._wait_for_request()
        self._conversation = self._loop.create_task(self._converse())
        self.server.conversations.add(self._conversation)
        self._conversation.add_done_callback(self.server.conversations.discard)
        if len(self.server.connections) > self.server.limits.connections_max:
            self.server.cut_off("connections")
            self._refuse(503, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.closed.set_result(None)
        self._give_back(self._body_bytes)
        self._body = bytearray()
        _cancel_timer(self._read_timer)
        _cancel_timer(self._write_timer)
        if self._conversation is not None:
            self._conversation.cancel()

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if self._answering or self._arrived:
            self._hold(data)
        else:
            self._parse(data)

    def eof_received(self) -> None:
        # A half-closed client cannot be told from one that is gone; both are taken as gone (None closes).
        return None

    def pause_writing(self) -> None:
        self.resumed = self._loop.create_future()
        self._expect_progress()

    def resume_writing(self) -> None:
        _cancel_timer(self._write_timer)
        if self.resumed is not None and not self.resumed.done():
            self.resumed.set_result(None)
        self.resumed = None
        if self._ended:
            self._expect_progress()

    # --- what the server and the reply call

    def write(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(data)

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def close_if_idle(self) -> None:
        if not self._answering and not self._arrived and self._conversation is not None:
            self._conversation.cancel()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- the conversation

    async def _converse(self) -> None:
        try:
            while True:
                request = await self._next_request()
                reply = HttpReply(self, request)
                try:
                    await self.server.handler(request, reply)
                    assert reply.finished, "the handler left a reply unfinished"
                finally:
                    request.take_body()
                    self._answering = not reply.finished
                if request.unread:
                    await self._linger()
                if not reply.keep_alive:
                    break
                self._wait_for_request()
                self._parse_held()
        finally:
            self._end()

    async def _next_request(self) -> HttpRequest:
        if not self._arrived:
            self._arrival = self._loop.create_future()
            await self._arrival
            self._arrival = None
        _cancel_timer(self._read_timer)
        self._answering = True
        return self._arrived.popleft()

    async def _linger(self) -> None:
        """Closing a socket with unread bytes resets it, and the client might never see why it was refused:
        say that nothing more comes, drop what arrives, and let the client close (which cancels this wait)."""
        assert self._transport is not None
        if not self._transport.is_closing():
            if self._transport.can_write_eof():  # TLS cannot
                self._transport.write_eof()
            await asyncio.sleep(LINGER_SECONDS)

    def _end(self) -> None:
        """Close once what was written is sent, or at the write deadline."""
        assert self._transport is not None
        self._ended = True
        self._discarding = True
        if self._answering:
            self._transport.abort()
        elif not self._transport.is_closing():
            self._transport.close()
            self._expect_progress()

    # --- parsing

    def _begin_message(self) -> None:
        self._head: HttpRequest | None = None
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._head_complete = False
        self._bytes_without_body = 0
        self._body_grew = False

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request itself has arrived whole: answered as plain HTTP/1.1; what follows it is dropped.
            self._discarding = True
        except httptools.HttpParserError:
            self._refuse(400, "the request is not HTTP/1.1")
            return
        # llhttp keeps an unfinished header or trailer, however long it grows: count what brings no body.
        self._bytes_without_body = 0 if self._body_grew else self._bytes_without_body + len(data)
        self._body_grew = False
        if not self._arrived and self._bytes_without_body > self.server.limits.head_bytes_max:
            self._refuse(431, f"the request's head is over {self.server.limits.head_bytes_max} bytes")

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > PIPELINED_BYTES_MAX:
            assert self._transport is not None
            # Until the reply is written this client's going is only seen by a failing write.
            self._transport.pause_reading()

    def _parse_held(self) -> None:
        if not self._held or self._arrived:
            return
        data = b"".join(self._held)
        if self._held_bytes > PIPELINED_BYTES_MAX:
            assert self._transport is not None
            self._transport.resume_reading()
        self._held.clear()
        self._held_bytes = 0
        if not self._discarding:
            self._parse(data)

    def on_message_begin(self) -> None:
        self._begin_message()
        _cancel_timer(self._read_timer)
        self._read_timer = self._loop.call_later(self.server.limits.read_seconds_max, self._on_read_deadline)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_complete:  # trailers are not part of the request
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._head_complete = True
        if self._discarding:
            return
        head = self._head = self._read_head()
        if head is None:
            self._refuse(400, "the request's target is not a path")
            return
        head.refusal = self.server.on_head(head)
        length = self._headers.get(b"content-length", b"0")
        limit = self.server.limits.body_bytes_max
        if head.refusal is not None:
            if length != b"0" or b"transfer-encoding" in self._headers:
                self._turn_away(head)  # a body is not worth reading, nor keeping
        elif length.isdigit() and int(length) > limit:
            self._refuse(413, f"the body has {int(length)} bytes; at most {limit} are taken")
        elif self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_head(self) -> HttpRequest | None:
        try:
            path = unquote((httptools.parse_url(self._url).path or b"/").decode("ascii"))
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            return None
        version = self._parser.get_http_version()
        return HttpRequest(
            method=self._parser.get_method().decode("ascii"),
            path=path,
            headers=self._headers,
            keep_alive=version == "1.1"
            and self._parser.should_keep_alive()
            and not self._parser.should_upgrade(),
            chunks_allowed=version == "1.1",
            give_back=self._give_back,
        )

    def on_body(self, body: bytes) -> None:
        if self._discarding:
            return
        self._body_grew = True
        self._body += body
        self._body_bytes += len(body)
        self.server.body_bytes_inflight += len(body)
        limits = self.server.limits
        if len(self._body) > limits.body_bytes_max:
            self._refuse(413, f"the body is over {limits.body_bytes_max} bytes")
        elif self.server.body_bytes_inflight > limits.body_bytes_inflight_max:
            self.server.cut_off("body_bytes")
            self._refuse(503, "too many bytes of requests are being received; try again later")

    def on_message_complete(self) -> None:
        head = self._head
        if self._discarding or head is None:
            return
        if len(self._arrived) >= PIPELINED_REQUESTS_MAX:
            self.server.cut_off("pipelined_requests")
            self._refuse(429, f"more than {PIPELINED_REQUESTS_MAX} requests were sent without waiting")
            return
        head.body, self._body = bytes(self._body), bytearray()
        self._head = None
        self._arrive(head)

    def _refuse(self, status: int, message: str) -> None:
        """End reading with a request that the handler is to answer like this."""
        head = self._head
        if head is None:
            head = HttpRequest(method="GET", path="", headers={}, keep_alive=False, chunks_allowed=True)
        head.refusal = Refusal(status=status, message=message)
        self._turn_away(head)

    def _turn_away(self, head: HttpRequest) -> None:
        self._discarding, self._head = True, None
        self._give_back(len(self._body))
        self._body = bytearray()
        head.keep_alive, head.unread = False, True
        self._arrive(head)

    def _give_back(self, num_bytes: int) -> None:
        # A connection that was lost has given everything back already.
        num_bytes = min(num_bytes, self._body_bytes)
        self._body_bytes -= num_bytes
        self.server.body_bytes_inflight -= num_bytes

    def _arrive(self, request: HttpRequest) -> None:
        self._arrived.append(request)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    # --- deadlines

    def _wait_for_request(self) -> None:
        self._read_timer = self._loop.call_later(self.server.limits.idle_seconds_max, self._on_idle_deadline)

    def _on_idle_deadline(self) -> None:
        if self._conversation is not None:
            self._conversation.cancel()

    def _on_read_deadline(self) -> None:
        self.server.cut_off("read_deadline")
        self._refuse(408, f"the request did not arrive within {self.server.limits.read_seconds_max:g} s")

    def _expect_progress(self) -> None:
        assert self._transport is not None
        _cancel_timer(self._write_timer)
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self._write_timer = self._loop.call_later(
            self.server.limits.write_seconds_max, self._on_write_deadline
        )

    def _on_write_deadline(self) -> None:
        assert self._transport is not None
        unsent_bytes = self._transport.get_write_buffer_size()
        if 0 < unsent_bytes <= self._unsent_bytes - PROGRESS_BYTES:
            self._expect_progress()
        elif unsent_bytes > 0:
            self.server.cut_off("write_deadline")
            self._transport.abort()


def _cancel_timer(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\nserver: rorqual\r\n" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
}

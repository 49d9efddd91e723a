"""The HTTP server on raw sockets: framing, order, bounds, deadlines, clients that vanish or stop reading."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from rorqual.clock import ManualClock
from router.gateway.http1 import HttpLimits, HttpReply, HttpRequest, HttpServer, Refusal

JSON = b"application/json"


class Site:
    """A server with one handler that tests steer by path, and what happened to it."""

    def __init__(self, **limits: float) -> None:
        self.cut_off: list[str] = []
        self.requests: list[HttpRequest] = []
        self.cancelled: list[str] = []
        self.num_written = 0
        self.go_on = asyncio.Event()
        self.server = HttpServer(
            self.handle,
            limits=HttpLimits(**limits),
            clock=ManualClock(0),
            cut_off=self.cut_off.append,
            on_head=lambda request: (
                Refusal(status=401, message="no entry") if request.path == "/closed" else None
            ),
        )
        self.port = 0

    async def handle(self, request: HttpRequest, reply: HttpReply) -> None:
        self.requests.append(request)
        try:
            if request.refusal is not None:
                reply.send(
                    request.refusal.status, request.refusal.message.encode(), content_type=b"text/plain"
                )
            elif request.path == "/wait":
                await self.go_on.wait()
                reply.send(200, b"waited", content_type=b"text/plain")
            elif request.path == "/stream":
                reply.start(200, content_type=b"text/plain")
                for part in (b"a", b"b", b"c"):
                    reply.write(part)
                    await reply.drain()
                reply.finish()
            elif request.path == "/flood":
                reply.start(200, content_type=b"text/plain")
                while True:
                    reply.write(b"x" * 16_000)
                    self.num_written += 16_000
                    await reply.drain()
                    await asyncio.sleep(0)
            elif request.path == "/last-words":
                reply.start(200, content_type=b"text/plain")
                reply.write(b"begun ")
                try:
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    reply.write(b"and ended" if not reply.client_is_gone else b"")
                    reply.finish()
                    raise
            elif request.path == "/large":
                reply.send(200, b"x" * 30_000_000, content_type=b"text/plain")
            else:
                reply.send(200, request.body or b"hello", content_type=b"text/plain")
        except asyncio.CancelledError:
            self.cancelled.append(request.path)
            raise


@pytest.fixture
async def site() -> AsyncIterator[Callable]:
    async with AsyncExitStack() as stack:

        async def start(**limits: float) -> Site:
            site = Site(**limits)
            site.port = await site.server.start(host="127.0.0.1", port=0)
            stack.push_async_callback(site.server.stop, drain_seconds=0.1)
            return site

        yield start


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def talk(site: Site, data: bytes) -> bytes:
    """Everything the server says to `data` until it closes."""
    async with connected(site) as (reader, writer):
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, "waited in vain"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


CLOSE = b"connection: close\r\n"


async def test_a_reply_says_its_length_date_and_that_the_connection_closes(site):
    answer = await talk(await site(), b"GET / HTTP/1.1\r\nhost: a\r\n" + CLOSE + b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"HTTP/1.1 200 OK"
    assert b"content-length: 5" in head
    assert b"connection: close" in head
    assert b"date: Thu, 01 Jan 1970 00:00:00 GMT" in head
    assert body == b"hello"


async def test_pipelined_requests_are_answered_in_order_on_one_connection(site):
    bodies = [b"one", b"two", b"three"]
    requests = [b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body) for body in bodies]
    answer = await talk(await site(), b"".join(requests) + b"GET /end HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert [part.rsplit(b"\r\n", 1)[-1] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == [
        *bodies,
        b"hello",
    ]


async def test_requests_that_arrive_during_a_reply_wait_for_it(site):
    started = await site()
    async with connected(started) as (reader, writer):
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        await until(lambda: len(started.requests) == 1)
        for _ in range(3):
            writer.write(b"POST / HTTP/1.1\r\ncontent-length: 100000\r\n\r\n" + b"y" * 100_000)
            await asyncio.sleep(0.02)
        assert len(started.requests) == 1
        started.go_on.set()
        for length in (6, 100_000, 100_000, 100_000):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert b"content-length: %d" % length in head
            await reader.readexactly(length)


async def test_a_request_may_arrive_byte_by_byte_and_in_chunks(site):
    data = (
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n" + CLOSE + b"\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
    )
    async with connected(await site()) as (reader, writer):
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"\r\n\r\nabc")


async def test_parts_written_in_one_turn_of_the_loop_leave_as_one_chunk_with_the_head(site):
    answer = await talk(await site(), b"GET /stream HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.split(b"\r\n\r\n", 1)[1] == b"3\r\nabc\r\n0\r\n\r\n"


async def test_an_old_client_gets_a_stream_without_chunks_that_ends_with_the_connection(site):
    answer = await talk(await site(), b"GET /stream HTTP/1.0\r\n\r\n")
    assert answer.split(b"\r\n\r\n", 1)[1] == b"abc"
    assert b"chunked" not in answer


async def test_head_is_answered_without_a_body(site):
    answer = await talk(await site(), b"HEAD / HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert b"content-length: 5" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_a_client_that_waits_for_continue_is_told_to(site):
    async with connected(await site()) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n" + CLOSE + b"\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"ok")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"rubbish\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbad header\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /" + b"a" * 5000, 431),
        (b"GET / HTTP/1.1\r\nh: " + b"a" * 5000, 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 5000\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + b"fff\r\n%b\r\n" % (b"a" * 4095), 413),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nt: " + b"a" * 5000, 431),
        (b"GET http://[::1 HTTP/1.1\r\n\r\n", 400),
    ],
)
async def test_what_is_not_a_request_or_too_large_is_refused_once_and_the_connection_closed(
    site, data, status
):
    started = await site(head_bytes_max=2000, body_bytes_max=3000)
    answer = await _talk_slowly(started, data)
    assert status_of(answer) == status
    assert answer.count(b"HTTP/1.1 ") == 1


async def _talk_slowly(site: Site, data: bytes) -> bytes:
    async with connected(site) as (reader, writer):
        for start in range(0, len(data), 1500):
            writer.write(data[start : start + 1500])
            await asyncio.sleep(0.005)
        return await asyncio.wait_for(reader.read(), 10)


async def test_an_upgrade_is_answered_as_plain_http_and_the_connection_closed(site):
    data = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nraw bytes"
    answer = await talk(await site(), data)
    assert status_of(answer) == 200
    assert b"connection: close" in answer


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc"])
async def test_a_client_that_does_not_send_is_not_waited_for(site, sent):
    started = await site(read_seconds_max=0.2, idle_seconds_max=0.2)
    answer = await talk(started, sent)
    assert (status_of(answer) == 408) if sent else (answer == b"")
    await until(lambda: not started.server.connections)
    assert started.cut_off == (["read_deadline"] if sent else [])


async def test_an_idle_connection_is_closed_after_its_last_reply(site):
    started = await site(idle_seconds_max=0.2)
    answer = await talk(started, b"GET / HTTP/1.1\r\n\r\n")
    assert status_of(answer) == 200
    assert b"connection: close" not in answer


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("path", [b"/wait", b"/flood"])
async def test_the_handler_of_a_client_that_vanishes_is_cancelled_at_once(site, path, reset):
    started = await site()
    sock = socket.create_connection(("127.0.0.1", started.port))
    sock.sendall(b"GET %b HTTP/1.1\r\n\r\n" % path)
    await until(lambda: len(started.requests) == 1)
    await asyncio.sleep(0.05)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    assert await until(lambda: started.cancelled == [path.decode()]) < 1.0
    assert not started.server.connections


@pytest.mark.parametrize("path", [b"/flood", b"/large"])
async def test_a_client_that_stops_reading_holds_little_and_is_cut_off(site, path):
    started = await site(write_seconds_max=0.4)
    with socket.create_connection(("127.0.0.1", started.port)) as sock:
        sock.sendall(b"GET %b HTTP/1.1\r\n%b\r\n" % (path, CLOSE))
        await until(lambda: len(started.requests) == 1)
        start = time.monotonic()
        while not started.cut_off:
            begun = time.monotonic()
            assert status_of(await talk(started, b"GET / HTTP/1.1\r\n" + CLOSE + b"\r\n")) == 200
            assert time.monotonic() - begun < 0.3  # nobody else waits for it
            assert time.monotonic() - start < 5
            await asyncio.sleep(0.01)
        # What the kernel holds for both ends of the socket, and our own high-water mark.
        assert started.num_written < 12_000_000
    assert started.cut_off == ["write_deadline"]
    await until(lambda: not started.server.connections)
    if path == b"/flood":
        await until(lambda: started.cancelled == ["/flood"])


async def test_a_slow_client_that_keeps_reading_is_not_cut_off(site):
    started = await site(write_seconds_max=0.3)
    async with connected(started) as (reader, writer):
        writer.write(b"GET /large HTTP/1.1\r\n" + CLOSE + b"\r\n")
        num_read = 0
        for _ in range(8):
            num_read += len(await reader.readexactly(1_000_000))
            await asyncio.sleep(0.1)
        while data := await asyncio.wait_for(reader.read(1 << 20), 5):
            num_read += len(data)
    assert num_read > 30_000_000
    assert started.cut_off == []


async def test_connections_beyond_the_bound_are_refused(site):
    started = await site(connections_max=1)
    async with connected(started):
        await until(lambda: len(started.server.connections) == 1)
        assert status_of(await talk(started, b"")) == 503
    assert started.cut_off == ["connections"]


async def test_stopping_finishes_running_replies_and_closes_idle_connections(site):
    started = await site()
    async with connected(started) as (idle, _), connected(started) as (reader, writer):
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        await until(lambda: len(started.requests) == 1)
        stop = asyncio.create_task(started.server.stop(drain_seconds=5))
        assert await asyncio.wait_for(idle.read(), 5) == b""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", started.port)
        assert not stop.done()
        started.go_on.set()
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.endswith(b"waited")
        assert b"connection: close" in answer
        await asyncio.wait_for(stop, 5)


async def test_stopping_cancels_what_does_not_finish_in_time(site):
    started = await site()
    async with connected(started) as (reader, writer):
        writer.write(b"GET /wait HTTP/1.1\r\n\r\n")
        await until(lambda: len(started.requests) == 1)
        await asyncio.wait_for(started.server.stop(drain_seconds=0.1), 5)
        assert started.cancelled == ["/wait"]
        assert await asyncio.wait_for(reader.read(), 5) == b""
    assert not started.server.connections


async def test_stopping_lets_a_cancelled_handler_say_why(site):
    started = await site()
    async with connected(started) as (reader, writer):
        writer.write(b"GET /last-words HTTP/1.1\r\n\r\n")
        await until(lambda: len(started.requests) == 1)
        stop_started = time.monotonic()
        await asyncio.wait_for(started.server.stop(drain_seconds=0.1), 5)
        assert time.monotonic() - stop_started < 0.6
        answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.endswith(b"6\r\nbegun \r\n9\r\nand ended\r\n0\r\n\r\n")


async def test_a_client_that_does_not_read_its_last_words_does_not_hold_up_stopping(site):
    started = await site()
    with socket.create_connection(("127.0.0.1", started.port)) as sock:
        sock.sendall(b"GET /flood HTTP/1.1\r\n\r\n")
        await until(lambda: started.num_written > 100_000)
        await asyncio.wait_for(started.server.stop(drain_seconds=0.05), 2)
    assert not started.server.connections


async def test_what_the_head_rules_out_is_answered_without_waiting_for_its_body(site):
    started = await site()
    data = b"POST /closed HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 9000000\r\n\r\n"
    answer = await talk(started, data)
    assert status_of(answer) == 401
    assert answer.endswith(b"no entry")
    assert started.requests[0].headers[b"content-length"] == b"9000000"
    chunked = b"POST /closed HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
    assert status_of(await talk(started, chunked)) == 401
    assert [request.body for request in started.requests] == [b"", b""]
    assert started.server.body_bytes_inflight == 0


async def test_what_the_head_rules_out_keeps_its_connection_where_there_is_no_body(site):
    data = b"GET /closed HTTP/1.1\r\n\r\nGET /open HTTP/1.1\r\n" + CLOSE + b"\r\n"
    answer = await talk(await site(), data)
    assert answer.count(b"HTTP/1.1 401") == answer.count(b"HTTP/1.1 200") == 1


async def test_bodies_of_all_connections_together_are_bounded(site):
    started = await site(body_bytes_inflight_max=250_000)
    head = b"POST /wait HTTP/1.1\r\ncontent-length: 100000\r\n\r\n"
    async with AsyncExitStack() as stack:
        for _ in range(2):
            _, writer = await stack.enter_async_context(connected(started))
            writer.write(head + b"x" * 99_999)
        await until(lambda: started.server.body_bytes_inflight == 2 * 99_999)
        answer = await talk(started, head + b"x" * 99_999)
        assert status_of(answer) == 503
        assert started.cut_off == ["body_bytes"]
        assert started.server.body_bytes_inflight == 2 * 99_999
        small = b"POST / HTTP/1.1\r\ncontent-length: 5\r\n" + CLOSE + b"\r\nhello"
        assert status_of(await talk(started, small)) == 200
    await until(lambda: not started.server.connections)
    assert started.server.body_bytes_inflight == 0


async def test_a_body_counts_until_it_is_taken_or_answered_or_its_client_is_gone(site):
    started = await site()
    head = b"POST /wait HTTP/1.1\r\ncontent-length: 1000\r\n\r\n"
    async with connected(started) as (reader, writer), connected(started) as (_, other):
        for each in (writer, other):
            each.write(head + b"x" * 1000)
        await until(lambda: len(started.requests) == 2)
        assert started.server.body_bytes_inflight == 2000
        assert len(started.requests[0].take_body()) == 1000
        assert started.requests[0].take_body() == b""
        assert started.server.body_bytes_inflight == 1000
        other.close()
        await until(lambda: started.server.body_bytes_inflight == 0)
        started.go_on.set()
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 3\r\n" + CLOSE + b"\r\nabc")
        assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"abc")
    assert started.server.body_bytes_inflight == 0


async def test_more_pipelined_requests_than_the_bound_are_refused_after_those_within_it(site):
    started = await site()
    answer = await talk(started, b"GET / HTTP/1.1\r\n\r\n" * 1000)
    assert answer.count(b"HTTP/1.1 200") == 64
    assert answer.count(b"HTTP/1.1 429") == 1
    assert len(started.requests) == 65
    assert started.cut_off == ["pipelined_requests"]


async def test_rubbish_behind_a_request_does_not_spoil_its_answer(site):
    answer = await talk(await site(), b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcrubbish\r\n\r\n")
    first, second = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    assert first.endswith(b"abc")
    assert second.startswith(b"400")


async def test_empty_lines_without_end_are_refused_and_not_taken_for_the_request_before_them(site):
    started = await site(head_bytes_max=2000)
    async with connected(started) as (reader, writer):
        writer.write(b"GET /first HTTP/1.1\r\n\r\n")
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"hello"), 5)
        writer.write(b"\r\n" * 1500)
        assert status_of(await asyncio.wait_for(reader.read(), 5)) == 431
    assert [request.path for request in started.requests] == ["/first", ""]
    assert started.requests[0].refusal is None


async def test_a_port_in_use_is_an_error(site):
    started = await site()
    with pytest.raises(OSError, match="in use"):
        await Site().server.start(host="127.0.0.1", port=started.port)

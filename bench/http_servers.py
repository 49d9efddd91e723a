"""Chooses the HTTP server of the router by measurement: `python -m bench.http_servers` (under a minute).

Owns one small application, written for each candidate in its own dialect, and the load: short requests, token
streams paced like decode steps, a client that stops reading, clients that vanish. Run by people; nothing
imports it. Every candidate runs in a process of its own with uvloop; CPU is that process's own, all threads
counted. Only ratios inside one run mean anything. A candidate that is not installed is left out and named.

Every application ends a stream that its client does not read for WRITE_SECONDS_MAX, as well as its server
allows, and sees a client vanish by whatever its server offers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from rorqual.clock import SystemClock
from router.gateway.http1 import HttpLimits, HttpReply, HttpRequest, HttpServer

NUM_STREAMS = 32
STEP_SECONDS = 0.005
NUM_STREAM_EVENTS = 400
NUM_JSON_CONNECTIONS = 32
JSON_SECONDS = 2.0
WRITE_SECONDS_MAX = 1.0
NUM_VANISHING = 8

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef","object":"chat.completion.chunk","created":1,"model":"demo",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
FLOOD_EVENT = b"data: " + b"x" * 16_000 + b"\n\n"
ANSWER = json.dumps({"object": "list", "data": [{"id": "demo", "object": "model"}]}).encode()


class Source:
    """What stands behind the server: steps that wake every stream at once, and counts of what streams did."""

    def __init__(self) -> None:
        self.num_open = 0
        self._step: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run_steps(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            step, self._step = self._step, asyncio.get_running_loop().create_future()
            step.set_result(None)

    async def events(self, path: str) -> AsyncGenerator[bytes, None]:
        self.num_open += 1
        try:
            if path == "/flood":
                while True:
                    await asyncio.sleep(0)
                    yield FLOOD_EVENT
            if path == "/quiet":
                yield EVENT
                await asyncio.sleep(3600)
            for _ in range(NUM_STREAM_EVENTS):
                await self._step
                yield EVENT
        finally:
            self.num_open -= 1

    def stats(self) -> bytes:
        status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
        rss = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
        num_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        return json.dumps(
            {"cpu_s": time.process_time(), "rss_kib": rss, "open": self.num_open, "files": num_files}
        ).encode()

    def answer(self, path: str) -> bytes:
        return self.stats() if path == "/stats" else ANSWER


STREAMS = ("/stream", "/flood", "/quiet")


# --- the candidates: each serves `source` on a port, announces it, and runs until cancelled


async def serve_rorqual(source: Source, announce: Callable[[int], None]) -> None:
    async def handle(request: HttpRequest, reply: HttpReply) -> None:
        if request.path not in STREAMS:
            reply.send(200, source.answer(request.path), content_type=b"application/json")
            return
        reply.start(200, content_type=b"text/event-stream")
        async with contextlib.aclosing(source.events(request.path)) as events:
            async for event in events:
                reply.write(event)
                await reply.drain()
        reply.finish()

    limits = HttpLimits(write_seconds_max=WRITE_SECONDS_MAX)
    server = HttpServer(handle, limits=limits, clock=SystemClock(), cut_off=lambda reason: None)
    announce(await server.start(host="127.0.0.1", port=0))
    await asyncio.Event().wait()


async def serve_uvicorn(source: Source, announce: Callable[[int], None]) -> None:
    import uvicorn

    async def stream(path: str, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        async with contextlib.aclosing(source.events(path)) as events:
            async for event in events:
                async with asyncio.timeout(WRITE_SECONDS_MAX):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] in STREAMS:
            await _until_gone(stream(scope["path"], send), _uvicorn_gone(receive))
            return
        body = source.answer(scope["path"])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110, it sets no event
        await asyncio.sleep(0.01)
    announce(server.servers[0].sockets[0].getsockname()[1])
    await task


async def _uvicorn_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def serve_granian(source: Source, announce: Callable[[int], None]) -> None:
    from granian.constants import Interfaces  # pyright: ignore[reportMissingImports]
    from granian.server.embed import Server  # pyright: ignore[reportMissingImports]

    async def stream(path: str, protocol: Any) -> None:
        transport = protocol.response_stream(200, [("content-type", "text/event-stream")])
        async with contextlib.aclosing(source.events(path)) as events:
            async for event in events:
                async with asyncio.timeout(WRITE_SECONDS_MAX):
                    await transport.send_bytes(event)

    async def app(scope: Any, protocol: Any) -> None:
        if scope.path in STREAMS:
            await _until_gone(stream(scope.path, protocol), _granian_gone(protocol))
        else:
            protocol.response_bytes(200, [("content-type", "application/json")], source.answer(scope.path))

    with socket.create_server(("127.0.0.1", 0)) as probe:  # it cannot tell the port it bound
        port = probe.getsockname()[1]
    server = Server(
        app, address="127.0.0.1", port=port, interface=Interfaces.RSGI, log_enabled=False, websockets=False
    )
    task = asyncio.create_task(server.serve())
    await asyncio.sleep(0.5)
    announce(port)
    await task


async def _granian_gone(protocol: Any) -> None:
    await protocol.client_disconnect()  # its own kind of future: asyncio.wait and gather cannot hold it


async def serve_aiohttp(source: Source, announce: Callable[[int], None]) -> None:
    from aiohttp import web  # pyright: ignore[reportMissingImports]

    async def handle(request: Any) -> Any:
        if request.path not in STREAMS:
            return web.Response(body=source.answer(request.path), content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        async with contextlib.aclosing(source.events(request.path)) as events:
            async for event in events:
                try:
                    async with asyncio.timeout(WRITE_SECONDS_MAX):
                        await response.write(event)
                except TimeoutError:
                    request.transport.abort()
                    raise
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    announce(runner.addresses[0][1])
    await asyncio.Event().wait()


async def _until_gone(stream: Awaitable[None], gone: Awaitable[Any]) -> None:
    """What a server that only reports a disconnect costs: a second task beside each stream."""
    tasks = {asyncio.ensure_future(stream), asyncio.ensure_future(gone)}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


CANDIDATES: dict[str, tuple[str, Callable[[Source, Callable[[int], None]], Awaitable[None]]]] = {
    "rorqual": ("httptools", serve_rorqual),
    "uvicorn": ("uvicorn", serve_uvicorn),
    "granian": ("granian", serve_granian),
    "aiohttp": ("aiohttp", serve_aiohttp),
}


async def serve(name: str) -> None:
    logging.disable()  # some servers log every client that goes
    source = Source()
    steps = asyncio.create_task(source.run_steps())
    parent = asyncio.create_task(_end_with_parent())
    await CANDIDATES[name][1](source, lambda port: print(port, flush=True))
    steps.cancel()
    parent.cancel()


async def _end_with_parent() -> None:
    """Standard input ends when the parent is done with us, however it ended."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)


# --- the load


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    requests_per_s: float
    us_per_request: float
    us_per_event: float
    slow_rss_mib: float  # growth while one client does not read
    slow_open: int  # streams still open a second after the write deadline
    slow_files: int  # sockets still open then
    slow_other_ms: float  # a short request's worst time meanwhile
    vanish_ms: float  # until the last generation is cancelled; inf: not within 3 s
    vanish_reset_ms: float


async def measure(port: int) -> Result:
    before = await _stats(port)
    num_requests = sum(
        await asyncio.gather(*(_request_for(port, JSON_SECONDS) for _ in range(NUM_JSON_CONNECTIONS)))
    )
    between = await _stats(port)
    await asyncio.gather(*(_read_stream(port) for _ in range(NUM_STREAMS)))
    after = await _stats(port)
    slow = await _stop_reading(port)
    return Result(
        requests_per_s=num_requests / JSON_SECONDS,
        us_per_request=1e6 * (between["cpu_s"] - before["cpu_s"]) / num_requests,
        us_per_event=1e6 * (after["cpu_s"] - between["cpu_s"]) / (NUM_STREAMS * NUM_STREAM_EVENTS),
        vanish_ms=await _vanish(port, reset=False),
        vanish_reset_ms=await _vanish(port, reset=True),
        **slow,
    )


async def _request_for(port: int, seconds: float) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        await _exchange(reader, writer, "/json")
        count += 1
    writer.close()
    return count


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> bytes:
    writer.write(_head(path))
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return await reader.readexactly(int(lengths[0].split(b":")[1]))


async def _stats(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = await _exchange(reader, writer, "/stats")
    writer.close()
    return json.loads(body)


async def _read_stream(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_head("/stream"))
    tail = b""
    while b"\r\n0\r\n\r\n" not in tail:
        data = await reader.read(65536)
        if not data:
            raise ConnectionError("the stream was cut")
        tail = (tail + data)[-64:]
    writer.close()


async def _stop_reading(port: int) -> dict[str, Any]:
    await asyncio.sleep(0.2)
    before = await _stats(port)
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(_head("/flood"))
    worst = 0.0
    rss_kib = before["rss_kib"]
    end = time.monotonic() + WRITE_SECONDS_MAX + 1.0
    while time.monotonic() < end:
        start = time.monotonic()
        now = await _stats(port)
        worst = max(worst, time.monotonic() - start)
        rss_kib = max(rss_kib, now["rss_kib"])
        await asyncio.sleep(0.02)
    now = await _stats(port)
    sock.close()
    await asyncio.sleep(0.3)
    return {
        "slow_rss_mib": (rss_kib - before["rss_kib"]) / 1024,
        "slow_open": now["open"],
        "slow_files": max(0, now["files"] - before["files"]),
        "slow_other_ms": 1e3 * worst,
    }


async def _vanish(port: int, *, reset: bool) -> float:
    before = await _stats(port)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(NUM_VANISHING)]
    for sock in socks:
        sock.sendall(_head("/quiet"))
    while (await _stats(port))["open"] < before["open"] + NUM_VANISHING:  # noqa: ASYNC110, another process
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    for sock in socks:
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    start = time.monotonic()
    while time.monotonic() < start + 3:
        if (await _stats(port))["open"] <= before["open"]:
            return 1e3 * (time.monotonic() - start)
        await asyncio.sleep(0.002)
    return float("inf")


def _head(path: str) -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: bench\r\n\r\n" % path.encode()


async def run_candidate(name: str) -> Result:
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.http_servers", "--serve", name, stdin=pipe, stdout=pipe
    )
    assert child.stdout is not None
    try:
        async with asyncio.timeout(30):
            port = int(await child.stdout.readline())
            return await measure(port)
    finally:
        child.kill()
        await child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare HTTP servers for the router.")
    parser.add_argument("--serve", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", choices=CANDIDATES, help="measure this one (repeatable)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON instead of a table")
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve))
        return
    results: dict[str, Result] = {}
    for name in options.only or CANDIDATES:
        if importlib.util.find_spec(CANDIDATES[name][0]) is None:
            print(f"{name}: left out, {CANDIDATES[name][0]} is not installed", file=sys.stderr)
            continue
        results[name] = uvloop.run(run_candidate(name))
    if options.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}))
    else:
        print_table(results)


def print_table(results: dict[str, Result]) -> None:
    name, base = next(iter(results.items()))
    titles = ("requests", "cpu/req", "cpu/event", "slow MiB", "still open", "others ms", "FIN ms", "RST ms")
    print(f"{'':10}" + "".join(f"{title:>12}" for title in titles))
    for label, result in results.items():
        cells = (
            f"{result.requests_per_s / base.requests_per_s:.2f}x",
            f"{result.us_per_request / base.us_per_request:.2f}x",
            f"{result.us_per_event / base.us_per_event:.2f}x",
            f"{result.slow_rss_mib:.1f}",
            f"{result.slow_open}/{result.slow_files}",
            f"{result.slow_other_ms:.1f}",
            f"{result.vanish_ms:.0f}",
            f"{result.vanish_reset_ms:.0f}",
        )
        print(f"{label:10}" + "".join(f"{cell:>12}" for cell in cells))
    print(
        f"\n{name}: {base.requests_per_s:.0f} requests/s, {base.us_per_request:.1f} us CPU a request, "
        f"{base.us_per_event:.1f} us CPU an event at {NUM_STREAMS} streams.\n"
        "slow MiB: growth while one client does not read. still open: its streams/sockets one second after\n"
        "the write deadline. others ms: a short request's worst time meanwhile. FIN, RST: until the\n"
        "generations of vanished clients ended."
    )


if __name__ == "__main__":
    main()

"""A tiny HTTP server for a process whose only HTTP is its metrics and probes: GET /metrics, /health and /ready.

Run by `engine.worker.process`. /health answers as long as the process lives, /ready says 503 and why while it takes no
work. It holds a few connections for a few seconds at most, so a scraper that hangs costs
nothing. It knows no metric: whoever makes one gives it their registry.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest

from rorqual.errors import ConfigError
from rorqual.service import format_address

REQUEST_BYTES_MAX = 8192
REQUEST_SECONDS_MAX = 5.0
CONNECTIONS_MAX = 16


class MetricsEndpoint:
    """GET /metrics, /health and /ready on a port of its own. `missing`: why the process takes no work; empty: it does.
    Its owner may put another one in place."""

    def __init__(self, registry: CollectorRegistry, *, missing: Callable[[], str] = lambda: "") -> None:
        self.missing = missing
        self._registry = registry
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def start(self, *, host: str, port: int) -> str:
        """Bind (0: any port) and return the URL. Raises ConfigError when the port is taken."""
        try:
            self._server = await asyncio.start_server(self._answer, host, port, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            wanted = format_address(host, port)
            raise ConfigError(f"--metrics-port: cannot listen on {wanted}: {error.strerror}") from None
        bound = self._server.sockets[0].getsockname()[1]
        return f"http://{format_address(host, bound)}/metrics"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            if self._num_connections <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_SECONDS_MAX):
                    writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._num_connections -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _response(self, request: bytes) -> bytes:
        line = request.split(b"\r\n", 1)[0].split(b" ")
        is_get = len(line) == 3 and line[0] == b"GET"
        kind = "text/plain"
        match line[1].split(b"?")[0] if is_get else b"":
            case b"/metrics":
                status, body, kind = "200 OK", generate_latest(self._registry), "text/plain; version=0.0.4"
            case b"/health":
                status, body = "200 OK", b"ok\n"
            case b"/ready":
                missing = self.missing()
                status = "503 Service Unavailable" if missing else "200 OK"
                body = f"{missing or 'ready'}\n".encode()
            case _:
                status, body = "404 Not Found", b"only GET /metrics, /health and /ready are here\n"
        head = (
            f"HTTP/1.1 {status}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

"""What a worker tells Prometheus, and the tiny HTTP endpoint that tells it.

Made by `engine.worker`, counted into by `engine.host`. The endpoint answers GET /metrics and nothing else;
it holds a few connections for a few seconds at most, so a scraper that hangs costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rorqual.errors import ConfigError
from rorqual.service import format_address
from rorqual.session import Load

REQUEST_BYTES_MAX = 8192
REQUEST_SECONDS_MAX = 5.0
CONNECTIONS_MAX = 16

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class WorkerMetrics:
    """Counters of one worker, in a registry of its own: no globals, so tests run many workers in one
    process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.sequences_opened = Counter(
            "rorqual_worker_sequences_opened", "Sequences accepted.", registry=registry
        )
        self.sequences_ended = Counter(
            "rorqual_worker_sequences_ended", "Sequences ended, by reason.", ["reason"], registry=registry
        )
        self.sequences_refused = Counter(
            "rorqual_worker_sequences_refused", "Opens refused, by code.", ["code"], registry=registry
        )
        self.tokens_generated = Counter(
            "rorqual_worker_tokens_generated", "Tokens sampled for live sequences.", registry=registry
        )
        self.tokens_computed = Counter(
            "rorqual_worker_tokens_computed",
            "Tokens run through the model, by phase.",
            ["phase"],
            registry=registry,
        )
        self.step_seconds = Histogram(
            "rorqual_worker_step_seconds",
            "A step, measured on the rank.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.steps_overdue = Counter(
            "rorqual_worker_steps_overdue", "Steps that outlived their deadline.", registry=registry
        )
        self.sessions = Gauge("rorqual_worker_sessions", "Sessions connected.", registry=registry)
        self.sessions_slow = Counter(
            "rorqual_worker_sessions_slow",
            "Sessions closed because the router did not read.",
            registry=registry,
        )
        self.draining = Gauge("rorqual_worker_draining_bool", "1 while draining.", registry=registry)

    def watch(self, *, load: Callable[[], Load], num_preemptions: Callable[[], int]) -> None:
        """Export the scheduler's own counts, read when scraped."""
        for name, text, field in (
            ("sequences_running", "Sequences that hold a slot.", "sequences_running"),
            ("sequences_waiting", "Sequences in the queue.", "sequences_waiting"),
            ("tokens_waiting", "Known tokens not yet computed.", "tokens_waiting"),
            ("pages_free", "Pages free.", "pages_free"),
            ("pages_total", "Pages in the pools.", "pages_total"),
            ("slots_free", "Slots free.", "slots_free"),
            ("slots_total", "Slots.", "slots_total"),
        ):
            gauge = Gauge(f"rorqual_worker_{name}", text, registry=self.registry)
            gauge.set_function(lambda field=field: float(getattr(load(), field)))
        preemptions = Gauge(
            "rorqual_worker_preemptions", "Preemptions by recompute so far.", registry=self.registry
        )
        preemptions.set_function(lambda: float(num_preemptions()))


class MetricsEndpoint:
    """GET /metrics on a port of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
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
        if len(line) == 3 and line[0] == b"GET" and line[1].split(b"?")[0] == b"/metrics":
            status, body, kind = "200 OK", generate_latest(self._registry), "text/plain; version=0.0.4"
        else:
            status, body, kind = "404 Not Found", b"only GET /metrics is here\n", "text/plain"
        head = (
            f"HTTP/1.1 {status}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

"""The worker's gRPC door: the session stream, standard health, and reflection.

`engine.worker.process` starts it before the rank is ready, so that a port in use is noticed at once and a health
probe gets an answer while weights load; sessions are taken from `attach` on. It turns bytes into commands
and reports into bytes and decides nothing: rules are in `engine.worker.host`, the messages in `rorqual.wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from engine.worker.host import Host
from engine.worker.session import Session, SessionRefused
from rorqual import __version__
from rorqual.errors import ConfigError
from rorqual.grpc_health import HealthService
from rorqual.service import format_address
from rorqual.session import PROTOCOL, Hello, StepReport, Welcome
from rorqual.telemetry import fields
from rorqual.tls import SERVER_OPTIONS, TlsFiles, TlsKeeper
from rorqual.wire import MESSAGE_BYTES_MAX, SERVICE, SESSION_METHOD, WireError, decode_command, encode_report

log = logging.getLogger(__name__)

HELLO_SECONDS_MAX = 10.0
WRITE_SECONDS_MAX = 30.0
"""One report is a few kilobytes: a router that cannot take one for so long is gone or stuck."""

CALLS_MAX = 256
"""Of every kind, health checks too; beyond it gRPC answers RESOURCE_EXHAUSTED. Sessions have their own bound
in the host; this one holds for whoever connects and says nothing."""

ABORT_SECONDS_MAX = 2.0
STOP_SECONDS_MAX = 1.0
"""For calls to end by themselves once told to: gRPC writes a traceback for those that it has to cancel."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # two workers on one port must be an error, not a lottery
    # A router whose host vanished leaves no FIN: pings find it within about 15 s and free its sequences.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the deadline of a keepalive ping in current gRPC
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    *SERVER_OPTIONS,
)

ServicerContext = grpc.aio.ServicerContext[bytes, bytes]


class SessionServer:
    def __init__(
        self,
        *,
        write_seconds_max: float = WRITE_SECONDS_MAX,
        services: Sequence[grpc.GenericRpcHandler[Any, Any]] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        """`services` are what the worker's role answers beside the session. Raises ConfigError about `tls`."""
        self._tls = None if tls is None else TlsKeeper(tls, serves=True)
        self._write_seconds_max = write_seconds_max
        self._host: Host | None = None
        self._stopping = asyncio.Event()
        self._server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
        self._health = HealthService(SERVICE)
        handler = grpc.stream_stream_rpc_method_handler(self._serve_session)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {SESSION_METHOD: handler}),)
        )
        self._server.add_generic_rpc_handlers(tuple(services))
        self._health.add_to(self._server)

    async def start(self, *, host: str, port: int) -> str:
        """Bind (0: any port), answer health with NOT_SERVING, return "host:port". Raises ConfigError."""
        wanted = format_address(host, port)
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(wanted)
            else:
                bound = self._server.add_secure_port(wanted, self._tls.server_credentials())
        except RuntimeError:
            raise ConfigError(
                f"--listen: cannot listen on {wanted}: in use, or not an address of this machine"
            ) from None
        await self._health.set_serving(False)
        await self._server.start()
        return format_address(host, bound)

    async def attach(self, host: Host) -> None:
        """The rank is ready: take sessions and say SERVING."""
        self._host = host
        await self._health.set_serving(True)

    async def refuse_probes(self) -> None:
        """Draining: sessions go on, probes hear NOT_SERVING."""
        await self._health.set_serving(False)

    async def stop(self) -> None:
        """End every call now: sessions live as long as their routers, so they are told, not waited for."""
        self._stopping.set()
        await self._server.stop(STOP_SECONDS_MAX)

    async def _serve_session(self, _requests: AsyncIterator[bytes], context: ServicerContext) -> None:
        """One session, from Hello to whatever ends it; gRPC cancels this when the router goes away."""
        # First of all, whatever comes of it: to a router whose Hello is still on its way the end of the call is not the
        # one that it is told, but an internal error of its gRPC.
        hello = await self._read_hello(context)
        if self._host is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "worker is loading")
        try:
            session = self._host.connect(hello.router_id, observes=hello.observes, version=hello.version)
        except SessionRefused as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        try:
            # Alone, or an abort before the first message is out would have to send it again, and fail.
            await context.send_initial_metadata(())
            welcome = replace(self._host.welcome(), version=__version__)
            await self._run(session, context, welcome=welcome)
        finally:
            session.close()

    async def _read_hello(self, context: ServicerContext) -> Hello:
        try:
            async with asyncio.timeout(HELLO_SECONDS_MAX):
                data: Any = await context.read()
            command = decode_command(data) if isinstance(data, bytes) else None
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello came")
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if not isinstance(command, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first command must be Hello")
        if command.protocol != PROTOCOL:
            text = f"router speaks protocol {command.protocol}; this worker speaks {PROTOCOL}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        return command

    async def _run(self, session: Session, context: ServicerContext, *, welcome: Welcome) -> None:
        """Read and write until one of them ends, the host closes the session or the server stops; the first
        end decides.
        """
        reading = asyncio.create_task(self._read_commands(session, context))
        writing = asyncio.create_task(self._write_reports(session, context, welcome))
        closing = asyncio.create_task(session.closed.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        tasks: set[asyncio.Task[Any]] = {reading, writing, closing, stopping}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        error = next((task.exception() for task in done if task.exception() is not None), None)
        if isinstance(error, WireError | SessionRefused):
            await self._abort(session, context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        elif isinstance(error, TimeoutError):
            text = f"router did not take a report within {self._write_seconds_max:g} s"
            await self._abort(session, context, grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        elif error is not None:
            raise error
        elif session.closed_because:
            await self._abort(session, context, grpc.StatusCode.RESOURCE_EXHAUSTED, session.closed_because)
        elif self._stopping.is_set():
            await self._abort(session, context, grpc.StatusCode.UNAVAILABLE, "worker has stopped")

    async def _read_commands(self, session: Session, context: ServicerContext) -> None:
        while True:
            data: Any = await context.read()
            if not isinstance(data, bytes):
                return  # grpc.aio.EOF: the router has closed its side
            command = decode_command(data)
            if isinstance(command, Hello):
                raise SessionRefused("Hello came twice")
            session.submit(command)

    async def _write_reports(self, session: Session, context: ServicerContext, welcome: Welcome) -> None:
        report: Welcome | StepReport = welcome
        while True:
            data = encode_report(report)
            async with asyncio.timeout(self._write_seconds_max):
                await context.write(data)
            report = await session.next_report()

    async def _abort(
        self, session: Session, context: ServicerContext, code: grpc.StatusCode, text: str
    ) -> None:
        # Its pages are free before the router hears of it.
        session.close()
        log.warning("aborted a session %s", fields(router=session.router_id, error=text))
        # The status goes out behind what the router has not read: one that never reads is not waited for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS_MAX):
                await context.abort(code, text)

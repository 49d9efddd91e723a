"""A session that observes one worker: its load, whether it drains, and what came and went on it.

Kept up by `autoscaler.looking.looker` for each worker that is known of. A worker without a session is missing, which
is something else than idle: its load is forgotten at once, what it told of before is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Any, Protocol

import grpc
import grpc.aio

from rorqual import __version__
from rorqual.errors import RorqualError, WireError
from rorqual.session import PROTOCOL, Hello, Load, Role, StepReport, Welcome
from rorqual.telemetry import fields
from rorqual.tls import TlsFiles, TlsKeeper, explain_unreachable
from rorqual.usage import Usage
from rorqual.wire import MESSAGE_BYTES_MAX, SESSION_PATH, decode_report, encode_command

log = logging.getLogger(__name__)

CONNECT_SECONDS_MAX = 10.0
SILENCE_SECONDS_MAX = 8.0
"""A worker reports every second."""

BACKOFF_SECONDS_MIN = 0.5
BACKOFF_SECONDS_MAX = 10.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # Each attempt makes a channel of its own: a shared one would put gRPC's backoff on top of ours.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


class SessionLost(RorqualError):
    """The session with a worker is over, or never came about."""


class UsageSink(Protocol):
    def __call__(self, usage: Usage) -> None: ...


class WorkerChannels:
    """Connections to workers: plain ones, or by TLS with the files as they are when each begins."""

    def __init__(self, tls: TlsFiles | None = None) -> None:
        """Raises ConfigError."""
        self._keeper = None if tls is None else TlsKeeper(tls, serves=False)

    def open(self, address: str) -> Any:
        """A channel of gRPC to "host:port", which nobody else has."""
        if self._keeper is None:
            return grpc.aio.insecure_channel(address, options=_OPTIONS)
        options = (*_OPTIONS, *self._keeper.client_options())
        return grpc.aio.secure_channel(address, self._keeper.client_credentials(), options=options)

    def explain(self, details: str) -> str:
        """Of a connection that failed: one line, which names TLS where that is the cause."""
        return explain_unreachable(details, is_tls=self._keeper is not None)


class WorkerSession:
    """One worker. `run` goes on until cancelled, or left without a session. `load` is None while there is none."""

    def __init__(
        self,
        address: str,
        *,
        role: Role,
        observer_id: str,
        channels: WorkerChannels,
        randomness: random.Random,
        on_usage: UsageSink,
    ) -> None:
        """`role` is the pool's: a worker of another one is none of it."""
        self.address = address
        self.load: Load | None = None
        self.is_draining = False
        self.failure = ""  # why there is no session, the address first
        self._role = role
        self._observer_id = observer_id
        self._channels = channels
        self._randomness = randomness
        self._on_usage = on_usage
        self._has_told_usage = False
        self._is_left = False

    def leave(self) -> bool:
        self._is_left = True
        return self.load is not None

    def stay(self) -> None:
        self._is_left = False

    async def run(self) -> None:
        num_failures, told = 0, ""
        while True:
            was_connected = False
            try:
                await self._run_session()
            except SessionLost as error:
                was_connected, self.failure = self.load is not None, str(error)
            finally:
                self.load = None
            num_failures = 1 if was_connected else num_failures + 1
            if was_connected or self.failure != told:
                log.warning("lost sight of a worker %s", fields(worker=self.address, error=self.failure))
                told = self.failure
            if self._is_left:
                return
            await asyncio.sleep(self._backoff_seconds(num_failures))

    async def _run_session(self) -> None:
        """Raises SessionLost, always."""
        channel = self._channels.open(self.address)
        call: Any = channel.stream_stream(SESSION_PATH, None, None)()
        try:
            welcome = await self._greet(call)
            self.load, self.is_draining, self.failure = welcome.load, False, ""
            log.info("began to observe a worker %s", fields(worker=self.address, role=welcome.role.value))
            while True:
                report = await self._receive(call, seconds_max=SILENCE_SECONDS_MAX)
                if not isinstance(report, StepReport):
                    raise SessionLost(f"{self.address} sent a second welcome")
                self.load, self.is_draining = report.load, report.draining
                self._take(report)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise SessionLost(f"{self.address}: {await self._why(call, error)}") from None
        finally:
            call.cancel()
            with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
                await channel.close(None)

    async def _greet(self, call: Any) -> Welcome:
        hello = Hello(protocol=PROTOCOL, router_id=self._observer_id, observes=True, version=__version__)
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                await call.write(encode_command(hello))
        except TimeoutError:
            raise SessionLost(f"{self.address} did not answer within {CONNECT_SECONDS_MAX:g} s") from None
        welcome = await self._receive(call, seconds_max=CONNECT_SECONDS_MAX)
        if not isinstance(welcome, Welcome):
            raise SessionLost(f"{self.address} sent a report before its welcome")
        if welcome.role is not self._role:
            raise SessionLost(f"{self.address} is a {welcome.role.value} worker in a {self._role.value} pool")
        return welcome

    async def _receive(self, call: Any, *, seconds_max: float) -> Welcome | StepReport:
        try:
            async with asyncio.timeout(seconds_max):
                data = await call.read()
        except TimeoutError:
            raise SessionLost(f"{self.address} said nothing for {seconds_max:g} s") from None
        if not isinstance(data, bytes):
            raise SessionLost(f"{self.address}: {await self._why(call, None)}")
        try:
            return decode_report(data)
        except WireError as error:
            raise SessionLost(f"{self.address}: {error}") from None

    def _take(self, report: StepReport) -> None:
        if report.usage is not None:
            self._on_usage(report.usage)
        elif not self._has_told_usage:
            log.warning("observes a worker of before, which tells no usage %s", fields(worker=self.address))
        self._has_told_usage = True

    def _backoff_seconds(self, num_failures: int) -> float:
        ceiling = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(num_failures - 1, 20))
        return ceiling * (0.5 + 0.5 * self._randomness.random())

    async def _why(self, call: Any, error: Exception | None) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            code, details = error.code(), error.details()
        else:
            # The stream has ended: its status is there, or about to be.
            code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.UNAVAILABLE and details:
            details = self._channels.explain(details)
        return f"the session ended with {code.name}" + (f": {details}" if details else "")

"""Sessions over gRPC: the production `Transport` of `router.fleet`.

Carries bytes and turns gRPC's failures into SessionLost with one clear line; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from rorqual.session import Command, Hello, StepReport, Welcome
from rorqual.tls import TlsFiles, TlsKeeper, explain_unreachable
from rorqual.wire import MESSAGE_BYTES_MAX, SESSION_PATH, WireError, decode_report, encode_command
from router.worker_link import SessionLost

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Each attempt makes a channel of its own: a shared one would put gRPC's backoff on top of the fleet's.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
)


class GrpcTransport:
    def __init__(self, *, silence_seconds_max: float, tls: TlsFiles | None = None) -> None:
        """A worker whose host vanished, or that stands still, answers no ping: the connection is given up then, but
        not before the fleet gives up a session without reports. Workers take offence at more pings than these."""
        self._tls = None if tls is None else TlsKeeper(tls, serves=False)
        third_ms = max(5_000, int(silence_seconds_max * 1e3 / 3))
        self._options = (
            *_OPTIONS,
            ("grpc.keepalive_time_ms", 2 * third_ms),
            ("grpc.keepalive_timeout_ms", third_ms),
            ("grpc.http2.ping_timeout_ms", third_ms),  # the deadline of a keepalive ping in current gRPC
        )

    async def connect(self, address: str) -> GrpcChannel:
        return GrpcChannel(address, options=self._options, tls=self._tls)


class GrpcChannel:
    """One session stream on a connection of its own."""

    def __init__(
        self, address: str, *, options: Sequence[tuple[str, int]], tls: TlsKeeper | None = None
    ) -> None:
        self._address = address
        # Any: the stubs of grpc do not know that a stream can be used by read and write.
        self._channel: Any
        self._is_tls = tls is not None
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(
                address, tls.client_credentials(), options=(*options, *tls.client_options())
            )
        self._call: Any = self._channel.stream_stream(SESSION_PATH, None, None)()

    async def send(self, command: Hello | Command) -> None:
        try:
            await self._call.write(encode_command(command))
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            raise await self._lost(error) from None

    async def receive(self) -> Welcome | StepReport:
        try:
            data = await self._call.read()
            if isinstance(data, bytes):
                return decode_report(data)
        except grpc.aio.AioRpcError as error:
            raise await self._lost(error) from None
        except WireError as error:
            raise SessionLost(f"{self._address}: {error}") from None
        raise await self._lost(None)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close(None)

    async def _lost(self, error: Exception | None) -> SessionLost:
        if isinstance(error, grpc.aio.AioRpcError):
            code, details = error.code(), error.details()
        else:
            # The stream has ended: its status is there, or about to be.
            code, details = await self._call.code(), await self._call.details()
        if code is grpc.StatusCode.UNAVAILABLE and details:
            details = explain_unreachable(details, is_tls=self._is_tls)
        said = f": {details}" if details else ""
        return SessionLost(f"{self._address}: the session ended with {code.name}{said}")

"""Calls to the Lending service of other workers, over gRPC: the production `engine.worker.lenders.KeyLenders`.

One channel an address, made when first needed. It turns gRPC's failures into LendingFailed with one line; it retries
nothing and decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import grpc
import grpc.aio

from engine.worker.sharing.lenders import LendingFailed, LendingRefused
from engine.worker.wire import (
    ATTACH_PATH,
    LEASE_KEYS_PATH,
    LENDING_BYTES_MAX,
    RELEASE_PATH,
    RENEW_PATH,
    AttachRequest,
    LeaseKeysRequest,
    LeaseReply,
    decode_attach_reply,
    decode_lease_keys_reply,
    decode_lease_reply,
    encode_attach_request,
    encode_lease_keys_request,
    encode_lease_request,
)
from kvstore.transfer.contract import Endpoint
from rorqual.ids import LeaseName
from rorqual.session import Offer, Source
from rorqual.tls import TlsFiles, TlsKeeper, explain_unreachable
from rorqual.wire import WireError

CHANNELS_MAX = 256
"""Channels to prefill workers kept open; beyond it the one used longest ago is closed."""

_OPTIONS = (
    ("grpc.max_receive_message_length", LENDING_BYTES_MAX),
    # A worker that came back is found within the time that a lease can wait.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class GrpcLenders:
    def __init__(self, *, tls: TlsFiles | None = None) -> None:
        """Raises ConfigError about `tls`."""
        self._tls = None if tls is None else TlsKeeper(tls, serves=True)
        self._channels: OrderedDict[str, _Channel] = OrderedDict()

    async def attach(self, source: Source, *, seconds_max: float) -> Endpoint:
        request = AttachRequest(incarnation=source.lease.incarnation, wire_id=source.wire_id)
        data = await self._call(source.address, ATTACH_PATH, encode_attach_request(request), seconds_max)
        try:
            return decode_attach_reply(data)
        except WireError as error:
            raise LendingFailed(f"{source.address}: {error}") from None

    async def renew(self, source: Source, *, seconds_max: float) -> float | None:
        reply = await self._lease_call(source.address, RENEW_PATH, source.lease, seconds_max)
        return reply.remaining_seconds if reply.live else None

    async def release(self, source: Source, *, seconds_max: float) -> bool:
        return (await self._lease_call(source.address, RELEASE_PATH, source.lease, seconds_max)).live

    async def lease_keys(
        self, address: str, request: LeaseKeysRequest, *, seconds_max: float
    ) -> Offer | None:
        # An owner that is gone has nothing any more, and one that has come back nothing yet: the prompt is better
        # computed than held up until the deadline.
        data = await self._call(
            address, LEASE_KEYS_PATH, encode_lease_keys_request(request), seconds_max, waits=False
        )
        try:
            return decode_lease_keys_reply(data)
        except WireError as error:
            raise LendingFailed(f"{address}: {error}") from None

    async def close(self) -> None:
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.stub.close(None)

    async def _lease_call(self, address: str, path: str, lease: LeaseName, seconds_max: float) -> LeaseReply:
        data = await self._call(address, path, encode_lease_request(lease), seconds_max)
        try:
            return decode_lease_reply(data)
        except WireError as error:
            raise LendingFailed(f"{address}: {error}") from None

    async def _call(
        self, address: str, path: str, data: bytes, seconds_max: float, *, waits: bool = True
    ) -> bytes:
        """With `waits` for a connection, within its deadline: an owner that can be reached again is not given up."""
        channel = await self._channel(address)
        try:
            call = channel.stub.unary_unary(path, None, None)
            return await call(data, timeout=seconds_max, wait_for_ready=waits)
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            if code is grpc.StatusCode.UNAVAILABLE:
                details = explain_unreachable(details, is_tls=self._tls is not None)
            said = f": {details.splitlines()[0]}" if details else ""
            text = f"{path.rsplit('/', 1)[1]} at {address} failed with {code.name}{said}"
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise LendingRefused(text) from None
            raise LendingFailed(text, is_overdue=code is grpc.StatusCode.DEADLINE_EXCEEDED) from None
        finally:
            channel.num_users -= 1
            if channel.is_stale and channel.num_users == 0:
                await channel.stub.close(None)

    async def _channel(self, address: str) -> _Channel:
        """Moved behind all others, with one more user."""
        if self._tls is not None:
            self._tls.look()
        channel = self._channels.pop(address, None)
        if channel is not None and self._tls is not None and channel.tls_version != self._tls.version:
            # Calls under way end on it; the last one closes it.
            channel.is_stale = True
            if channel.num_users == 0:
                await channel.stub.close(None)
            channel = self._channels.pop(address, None)  # somebody else may have made one meanwhile
        channel = channel or _Channel(address, self._tls)
        self._channels[address] = channel
        channel.num_users += 1
        idle = [item for item in self._channels.values() if item.num_users == 0]
        for old in idle[: max(0, len(self._channels) - CHANNELS_MAX)]:
            del self._channels[old.address]
            await old.stub.close(None)
        return channel


class _Channel:
    def __init__(self, address: str, tls: TlsKeeper | None) -> None:
        self.address = address
        self.is_stale = False  # of an older certificate
        self.num_users = 0  # calls under way
        self.stub: Any
        if tls is None:
            self.tls_version = 0
            self.stub = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            credentials = tls.client_credentials()
            self.tls_version = tls.version
            options = (*_OPTIONS, *tls.client_options())
            self.stub = grpc.aio.secure_channel(address, credentials, options=options)

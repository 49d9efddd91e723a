"""The Lending service: readers ask an owner for its endpoint and for pages by key, renew and release leases.

Added to the worker's gRPC door by the commands of workers with a transfer engine. It turns bytes into questions to
those that lend and decides nothing. No state passes through here: it is read from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import grpc
import grpc.aio
from prometheus_client import Counter

from engine.worker.sharing.key_lending import KeyLender
from engine.worker.wire import (
    ATTACH_METHOD,
    LEASE_KEYS_METHOD,
    LENDING_SERVICE,
    RELEASE_METHOD,
    RENEW_METHOD,
    LeaseReply,
    decode_attach_request,
    decode_lease_keys_request,
    decode_lease_request,
    encode_attach_reply,
    encode_lease_keys_reply,
    encode_lease_reply,
)
from kvstore.transfer.contract import Endpoint
from rorqual.ids import LeaseName
from rorqual.wire import WireError

ServicerContext = grpc.aio.ServicerContext[bytes, bytes]


class LeaseOwner(Protocol):
    """Whose leases readers renew and release. No two of one worker name a lease alike."""

    def renew_for_reader(self, name: LeaseName) -> float | None:
        """Seconds that remain; None when it is none of its leases, or has ended."""
        ...

    def release_for_reader(self, name: LeaseName) -> bool:
        """False when it is none of its leases, or had ended: what was read since is worth nothing."""
        ...


class LendingServer:
    """Answers UNAVAILABLE until those that lend are attached: their rank is still loading."""

    def __init__(self) -> None:
        self._owners: Sequence[LeaseOwner] = ()
        self._keys: KeyLender | None = None
        self._endpoint: Endpoint | None = None
        self._endpoints_sent: Counter | None = None

    def attach(
        self,
        keys: KeyLender,
        *,
        others: Sequence[LeaseOwner] = (),
        endpoint: Endpoint,
        endpoints_sent: Counter,
    ) -> None:
        self._owners, self._keys, self._endpoint = (*others, keys), keys, endpoint
        self._endpoints_sent = endpoints_sent

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        unary = grpc.unary_unary_rpc_method_handler
        methods = {
            ATTACH_METHOD: unary(self._attach),
            RENEW_METHOD: unary(self._renew),
            RELEASE_METHOD: unary(self._release),
            LEASE_KEYS_METHOD: unary(self._lease_keys),
        }
        return grpc.method_handlers_generic_handler(LENDING_SERVICE, methods)

    async def _attach(self, data: bytes, context: ServicerContext) -> bytes:
        config = (await self._ready(context)).config
        assert self._endpoint is not None
        assert self._endpoints_sent is not None
        try:
            request = decode_attach_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if request.incarnation != config.incarnation:
            text = f"this is incarnation {config.incarnation:x}, not {request.incarnation:x}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        await self._check_wire_id(request.wire_id, context)
        self._endpoints_sent.inc()
        return encode_attach_reply(self._endpoint)

    async def _renew(self, data: bytes, context: ServicerContext) -> bytes:
        await self._ready(context)
        try:
            name = decode_lease_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answers = (owner.renew_for_reader(name) for owner in self._owners)
        remaining = next((seconds for seconds in answers if seconds is not None), None)
        return encode_lease_reply(LeaseReply(live=remaining is not None, remaining_seconds=remaining or 0.0))

    async def _release(self, data: bytes, context: ServicerContext) -> bytes:
        await self._ready(context)
        try:
            name = decode_lease_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        was_live = any(owner.release_for_reader(name) for owner in self._owners)
        return encode_lease_reply(LeaseReply(live=was_live))

    async def _lease_keys(self, data: bytes, context: ServicerContext) -> bytes:
        lender = await self._ready(context)
        try:
            request = decode_lease_keys_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        await self._check_wire_id(request.wire_id, context)
        return encode_lease_keys_reply(await lender.lease(request))

    async def _check_wire_id(self, wire_id: str, context: ServicerContext) -> None:
        own = (await self._ready(context)).config.wire_id
        if wire_id != own:
            text = f"state here has wire id {own}, not {wire_id} (model, numerics, or --drafts 0 on one side only)"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)

    async def _ready(self, context: ServicerContext) -> KeyLender:
        if self._keys is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "worker is loading")
        return self._keys

"""The Lending service: readers ask a prefill worker for its endpoint, renew and release leases.

Added to the worker's gRPC door by `prefill_worker.process`. It turns bytes into questions to the `Lender` and decides
nothing. No state passes through here: it is read from memory.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from engine.worker.wire import (
    ATTACH_METHOD,
    LENDING_SERVICE,
    RELEASE_METHOD,
    RENEW_METHOD,
    LeaseReply,
    decode_attach_request,
    decode_lease_request,
    encode_attach_reply,
    encode_lease_reply,
)
from kvstore.transfer.contract import Endpoint
from prefill_worker.lending import Lender
from prefill_worker.metrics import LendingMetrics
from rorqual.wire import WireError

ServicerContext = grpc.aio.ServicerContext[bytes, bytes]


class LendingServer:
    """Answers UNAVAILABLE until a lender is attached: its rank is still loading."""

    def __init__(self) -> None:
        self._lender: Lender | None = None
        self._endpoint: Endpoint | None = None
        self._metrics: LendingMetrics | None = None

    def attach(self, lender: Lender, *, endpoint: Endpoint, metrics: LendingMetrics) -> None:
        self._lender, self._endpoint, self._metrics = lender, endpoint, metrics

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        unary = grpc.unary_unary_rpc_method_handler
        methods = {
            ATTACH_METHOD: unary(self._attach),
            RENEW_METHOD: unary(self._renew),
            RELEASE_METHOD: unary(self._release),
        }
        return grpc.method_handlers_generic_handler(LENDING_SERVICE, methods)

    async def _attach(self, data: bytes, context: ServicerContext) -> bytes:
        lender = await self._ready(context)
        assert self._endpoint is not None
        assert self._metrics is not None
        try:
            request = decode_attach_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        config = lender.config
        if request.incarnation != config.incarnation:
            text = f"this is incarnation {config.incarnation:x}, not {request.incarnation:x}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        if request.wire_id != config.wire_id:
            text = (
                f"state here has wire id {config.wire_id}, not {request.wire_id}"
                " (model, numerics, or --drafts 0 on one side only)"
            )
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self._metrics.endpoints_sent.inc()
        return encode_attach_reply(self._endpoint)

    async def _renew(self, data: bytes, context: ServicerContext) -> bytes:
        lender = await self._ready(context)
        try:
            name = decode_lease_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        remaining = lender.renew_for_reader(name)
        return encode_lease_reply(LeaseReply(live=remaining is not None, remaining_seconds=remaining or 0.0))

    async def _release(self, data: bytes, context: ServicerContext) -> bytes:
        lender = await self._ready(context)
        try:
            name = decode_lease_request(data)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return encode_lease_reply(LeaseReply(live=lender.release_for_reader(name)))

    async def _ready(self, context: ServicerContext) -> Lender:
        if self._lender is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "worker is loading")
        return self._lender

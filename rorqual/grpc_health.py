"""Standard health and reflection for our gRPC servers: how probes and `grpcurl` see a process.

Made by the worker's session server and the router's gRPC gateway, which tell it whether they serve; it
decides nothing.
"""

from __future__ import annotations

from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


class HealthService:
    """Health of one service, and of the server as a whole, which is the same. NOT_SERVING until told
    otherwise by `set_serving`, which is to be called once before the server starts."""

    def __init__(self, service: str) -> None:
        self._service = service
        # Any: the stubs of grpc_health do not know its asyncio half.
        self._servicer: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    def add_to(self, server: grpc.aio.Server) -> None:
        """Answer health checks, and list this service, health and reflection to whoever asks."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        names = (self._service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    async def set_serving(self, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for service in ("", self._service):
            await self._servicer.set(service, status)

    async def shut_down(self) -> None:
        """NOT_SERVING for good, whatever is set later."""
        await self._servicer.enter_graceful_shutdown()

"""Probes as the kubelet asks them, a little more often: a test does not wait ten seconds for each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

Object = dict[str, Any]
PERIOD_SECONDS_MAX = 0.5


def probe_period(probe: Object) -> float:
    return min(PERIOD_SECONDS_MAX, float(probe.get("periodSeconds", 10)))


class Prober:
    def __init__(
        self, container: Object, *, address: str, run: Callable[[list[str]], Awaitable[bool]]
    ) -> None:
        self._container, self._address, self._run = container, address, run

    async def ask(self, probe: Object) -> bool:
        seconds = max(5.0, float(probe.get("timeoutSeconds", 1)))  # a busy machine of two cores
        try:
            async with asyncio.timeout(seconds):
                return await self._ask(probe)
        except (TimeoutError, OSError, aiohttp.ClientError, grpc.aio.AioRpcError):
            return False

    async def _ask(self, probe: Object) -> bool:
        if "httpGet" in probe:
            get = probe["httpGet"]
            scheme, path = get.get("scheme", "HTTP").lower(), get.get("path", "/")
            url = f"{scheme}://{self._address}:{self._port(get['port'])}{path}"
            async with aiohttp.ClientSession() as session, session.get(url, ssl=False) as response:
                return 200 <= response.status < 400
        if "tcpSocket" in probe:
            _, writer = await asyncio.open_connection(self._address, self._port(probe["tcpSocket"]["port"]))
            writer.close()
            return True
        if "grpc" in probe:
            async with grpc.aio.insecure_channel(f"{self._address}:{probe['grpc']['port']}") as channel:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                return answer.status == health_pb2.HealthCheckResponse.SERVING
        return await self._run(probe["exec"]["command"])

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        return next(item["containerPort"] for item in self._container["ports"] if item.get("name") == port)

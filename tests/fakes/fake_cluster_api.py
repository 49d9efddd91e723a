"""An API server of EndpointSlices alone, for its faults on the wire: what it refuses, cuts off, or never says.

tests/cluster has a stand-in that knows all kinds; this one knows how to be wrong.
"""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any, Self

import yaml
from aiohttp import web

PATH = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
PAGE = 2  # objects of one page of a list, whatever limit is asked for

Slice = dict[str, Any]


def a_slice(
    name: str,
    *endpoints: dict[str, Any] | str,
    port: int | None = 9000,
    port_name: str = "session",
    **fields: Any,
) -> Slice:
    """Endpoints are addresses, which are ready, or whole."""
    return {
        "metadata": {"name": name, "namespace": "here"},
        "addressType": "IPv4",
        "ports": [{"name": "metrics", "port": 9090}, {"name": port_name, "port": port}],
        "endpoints": [
            {"addresses": [item], "conditions": {"ready": True}} if isinstance(item, str) else item
            for item in endpoints
        ],
        **fields,
    }


class FakeClusterApi:
    """Within its `async with` block. What it is told to do wrong it does until told otherwise."""

    def __init__(self) -> None:
        self.list_refusals: list[tuple[int, dict[str, str]]] = []  # status and headers, of the next lists
        self.list_status = 200  # of all lists after these
        self.watch_status = 200
        self.message = ""  # that refusals carry
        self.watches_end = (
            ""  # "at once", "gone" (410 as an event), "cut" (within a line), "garbled", "long", or ""
        )
        self.is_silent = False  # watches say nothing of what happens
        self.list_body: Any = None  # instead of the list
        self.num_lists = 0
        self.num_watches = 0
        self.queries: list[dict[str, str]] = []
        self.tokens: list[str] = []
        self._slices: dict[str, Slice] = {}
        self._version = 1
        self._watchers: list[asyncio.Queue[dict[str, Any] | None]] = []
        self._runner: web.AppRunner | None = None
        self._port = 0

    def put(self, item: Slice) -> None:
        name = item["metadata"]["name"]
        kind = "MODIFIED" if name in self._slices else "ADDED"
        self._version += 1
        self._slices[name] = copy.deepcopy(item)
        self._slices[name]["metadata"]["resourceVersion"] = str(self._version)
        self._announce({"type": kind, "object": self._slices[name]})

    def delete(self, name: str) -> None:
        self._version += 1
        self._announce({"type": "DELETED", "object": self._slices.pop(name)})

    def end_watches(self) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(None)

    @property
    def num_watching(self) -> int:
        return len(self._watchers)

    async def start(self) -> None:
        """Again on the same port after `stop`."""
        app = web.Application()
        app.router.add_get(PATH, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self.end_watches()
        assert self._runner is not None
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def write_kubeconfig(self, path: Path) -> Path:
        name = "fake"
        content = {
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": f"http://127.0.0.1:{self._port}"}}],
            "users": [{"name": name, "user": {"token": "a-token"}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "here"}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def _announce(self, event: dict[str, Any]) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(copy.deepcopy(event))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.queries.append(dict(request.query))
        self.tokens.append(request.headers.get("Authorization", ""))
        if request.query.get("watch") == "true":
            return await self._watch(request)
        self.num_lists += 1
        status, headers = self.list_refusals.pop(0) if self.list_refusals else (self.list_status, {})
        if status != 200:
            return self._refuse(status, headers)
        if self.list_body is not None:
            return web.json_response(self.list_body)
        start = int(request.query.get("continue", "0"))
        items = [item for _, item in sorted(self._slices.items())]
        more = {"continue": str(start + PAGE)} if start + PAGE < len(items) else {}
        return web.json_response(
            {
                "metadata": {"resourceVersion": str(self._version), **more},
                "items": items[start : start + PAGE],
            }
        )

    def _refuse(self, status: int, headers: dict[str, str]) -> web.Response:
        body = {"kind": "Status", "status": "Failure", "reason": "Because", "message": self.message}
        return web.json_response(body, status=status, headers=headers)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.num_watches += 1
        if self.watch_status != 200:
            return self._refuse(self.watch_status, {})
        response = web.StreamResponse()
        await response.prepare(request)
        if self.watches_end == "at once":
            return response
        if self.watches_end == "gone":
            status = {"kind": "Status", "code": 410, "reason": "Expired"}
            await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            return response
        if self.watches_end == "cut":
            await response.write(b'{"type": "MODIFIED", "object": {"metad')
            assert request.transport is not None
            request.transport.abort()
            return response
        if self.watches_end == "garbled":
            # What a proxy says in the middle of a body that comes in chunks.
            await response.write(b'{"type": "MODIFIED", "object": {"metad')
            assert request.transport is not None
            request.transport.write(b"HTTP/1.1 504 Gateway Timeout\r\n\r\n")
        if self.watches_end == "long":
            for _ in range(6):
                await response.write(b"x" * 2**20)
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        if not self.is_silent:
            self._watchers.append(queue)
        try:
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        finally:
            if queue in self._watchers:
                self._watchers.remove(queue)
        return response

"""Services reached by their clusterIP: TCP connections go to a ready endpoint, in turn. Established ones stay."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.cluster.stand_in.controllers import SERVICE, SLICE
from tests.cluster.stand_in.objects import Object, Objects

LOOK_SECONDS = 0.1


class ToyProxy:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._servers: dict[tuple[str, str, int], asyncio.Server] = {}
        self._next = 0
        self._pumps: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while True:
                await self._look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for server in self._servers.values():
                server.close()
            for task in self._pumps:
                task.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _look(self) -> None:
        wanted: dict[tuple[str, str, int], Object] = {}
        for service in self._objects.all(SERVICE):
            address = service["spec"].get("clusterIP", "None")
            if address != "None":
                for port in service["spec"].get("ports") or []:
                    wanted[service["metadata"]["uid"], address, port["port"]] = service
        for key in set(self._servers) - set(wanted):
            self._servers.pop(key).close()
        for key in set(wanted) - set(self._servers):
            _, address, port = key
            name = wanted[key]["metadata"]["name"], wanted[key]["metadata"]["namespace"]

            async def serve(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                name: tuple[str, str] = name,
                port: int = port,
            ) -> None:
                task = asyncio.current_task()
                assert task is not None
                self._pumps.add(task)
                try:
                    # Cancelled with the proxy: what asyncio would tell of it is noise.
                    with contextlib.suppress(asyncio.CancelledError):
                        await self._connect(name, port, reader, writer)
                finally:
                    self._pumps.discard(task)

            self._servers[key] = await asyncio.start_server(serve, address, port)

    async def _connect(
        self, name: tuple[str, str], port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        targets = self._targets(name, port)
        self._next += 1
        try:
            if not targets:
                return
            host, target_port = targets[self._next % len(targets)]
            try:
                other_reader, other_writer = await asyncio.open_connection(host, target_port)
            except OSError:
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_pump(reader, other_writer))
                    tasks.create_task(_pump(other_reader, writer))
            finally:
                other_writer.close()
        finally:
            writer.close()

    def _targets(self, name: tuple[str, str], port: int) -> list[tuple[str, int]]:
        service = self._objects.find(SERVICE, name[1], name[0])
        item = self._objects.find(SLICE, name[1], f"{name[0]}-slice")
        if service is None or item is None:
            return []
        port_name = next((one.get("name", "") for one in service["spec"]["ports"] if one["port"] == port), "")
        target = next((one["port"] for one in item["ports"] if one.get("name", "") == port_name), None)
        ready: list[Any] = [one for one in item["endpoints"] if one["conditions"]["ready"]]
        return [(one["addresses"][0], target) for one in ready if target]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

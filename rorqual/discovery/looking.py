"""Sources that look by themselves: a list, DNS, a file. Made by `rorqual.discovery.make_source`."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any, cast

from rorqual.discovery.sources import OnChange, SourceSpec
from rorqual.discovery.standing import Standing
from rorqual.errors import ConfigError
from rorqual.service import format_address, parse_address

DNS_SECONDS = 5.0
DNS_SECONDS_MAX = 5.0
FILE_SECONDS = 0.5
ADDRESSES_MAX = 10_000


class StaticSource(Standing):
    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self._addresses = frozenset(spec.addresses)

    async def run(self, on_change: OnChange) -> None:
        self.succeeded()
        self.took(self._addresses, on_change)
        await asyncio.Event().wait()


class _Asking(Standing):
    """A source that asks again and again. `_ask` returns all addresses, or raises _Unknown."""

    def __init__(self, spec: SourceSpec, *, seconds: float) -> None:
        super().__init__(spec)
        self._seconds = seconds

    async def run(self, on_change: OnChange) -> None:
        while True:
            try:
                addresses = await self._ask()
            except _Unknown as error:
                self.failed(str(error))
            else:
                self.succeeded()
                self.took(addresses, on_change)
            await asyncio.sleep(self._seconds)

    async def _ask(self) -> frozenset[str]:
        raise NotImplementedError


class _Unknown(Exception):
    """It could not be found out who is there."""


class DnsSource(_Asking):
    """A name without addresses is a failure too: resolvers say so when they are in trouble, and a fleet that is gone
    is found out by its sessions. A look-up that does not end holds one of the few threads in which the whole process
    asks for names: no second one is begun beside it."""

    def __init__(
        self, spec: SourceSpec, *, seconds: float = DNS_SECONDS, seconds_max: float = DNS_SECONDS_MAX
    ) -> None:
        super().__init__(spec, seconds=seconds)
        self._name, self._port = spec.name, spec.port
        self._seconds_max = seconds_max
        self._lookup: asyncio.Future[list[Any]] | None = None

    async def run(self, on_change: OnChange) -> None:
        try:
            await super().run(on_change)
        finally:
            if self._lookup is not None:
                self._lookup.cancel()

    async def _ask(self) -> frozenset[str]:
        lookup = self._lookup
        if lookup is None:
            asking = asyncio.get_running_loop().getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
            lookup = self._lookup = asyncio.ensure_future(asking)
        await asyncio.wait({lookup}, timeout=self._seconds_max)
        if not lookup.done():
            raise _Unknown(f"no answer about {self._name} within {self._seconds_max:g} s")
        self._lookup = None
        try:
            found = lookup.result()
        except (OSError, UnicodeError) as error:
            raise _Unknown(f"{self._name}: {error}") from None
        if not found:
            raise _Unknown(f"{self._name} has no address")
        return frozenset(format_address(str(item[4][0]), self._port) for item in found[:ADDRESSES_MAX])


class FileSource(_Asking):
    """Its writer replaces the file as a whole. One that is not there yet is not known, not empty."""

    def __init__(self, spec: SourceSpec, *, seconds: float = FILE_SECONDS) -> None:
        super().__init__(spec, seconds=seconds)
        self._path, self._pool = spec.path, spec.pool
        self._seen: tuple[int, int, int] | None = None

    async def _ask(self) -> frozenset[str]:
        try:
            now = self._path.stat()
            seen = now.st_mtime_ns, now.st_ino, now.st_size
            if seen == self._seen and self._known is not None:
                return self._known
            addresses = _addresses(self._path, self._pool)
        except OSError as error:
            raise _Unknown(f"{self._path}: {error.strerror or error}") from None
        self._seen = seen
        return addresses


def _addresses(path: Path, pool: str) -> frozenset[str]:
    try:
        content: Any = json.loads(path.read_bytes())
        workers = cast("list[dict[str, Any]]", content["workers"])
        chosen = [item for item in workers if not pool or item.get("pool") == pool]
        found = [format_address(*parse_address(item["address"], option=str(path))) for item in chosen]
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError):
        raise _Unknown(f'{path} is not {{"workers": [{{"address": "HOST:PORT"}}, ...]}}') from None
    if len(found) > ADDRESSES_MAX:
        raise _Unknown(f"{path} names more than {ADDRESSES_MAX} workers")
    return frozenset(found)

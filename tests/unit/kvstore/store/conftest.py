"""One real server for most tests of this folder, emptied for each; and servers of their own for those that do harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from kvstore.store.embedded import EmbeddedServer

Start = Callable[..., EmbeddedServer]


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(memory_bytes=64 << 20) as server:
        yield server


@pytest.fixture
def server(_shared_server: EmbeddedServer) -> EmbeddedServer:
    with redis.Redis.from_url(_shared_server.url) as connection:
        connection.flushall()
    return _shared_server


@pytest.fixture
def start_server() -> Iterator[Start]:
    servers: list[EmbeddedServer] = []

    def start(**options: Any) -> EmbeddedServer:
        servers.append(EmbeddedServer(**{"memory_bytes": 64 << 20} | options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()

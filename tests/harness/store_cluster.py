"""A Redis Cluster of three masters on this machine, made of embedded servers, for tests."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Iterator

from redis import Redis
from redis.crc import key_slot

from kvstore.store.embedded import EmbeddedServer

NUM_SLOTS = 16384
NUM_NODES = 3


class StoreCluster:
    def __init__(self, servers: list[EmbeddedServer]) -> None:
        self.servers = servers
        self.clients = [Redis.from_url(server.url) for server in servers]
        self.url = servers[0].url.replace("redis://", "redis+cluster://")

    def connect(self) -> None:
        """Give every server its slots, and wait until all know all."""
        for number, client in enumerate(self.clients):
            first, last = number * NUM_SLOTS // NUM_NODES, (number + 1) * NUM_SLOTS // NUM_NODES - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            self.clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
        deadline = time.monotonic() + 30
        while not all(self._is_whole(client) for client in self.clients):
            assert time.monotonic() < deadline, "the Cluster did not form"
            time.sleep(0.05)

    def owner(self, name: bytes) -> int:
        """Who was given the slot at the start."""
        return next(
            number for number in range(NUM_NODES) if key_slot(name) < (number + 1) * NUM_SLOTS // NUM_NODES
        )

    def node_id(self, number: int) -> str:
        return _text(self.clients[number].execute_command("CLUSTER", "MYID"))

    def begin_move(self, name: bytes, *, source: int, target: int) -> None:
        """Of the name's slot: from now on the source sends those who ask for what it has not got on, by ASK."""
        slot = key_slot(name)
        self.clients[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.node_id(source))
        self.clients[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.node_id(target))

    def move_value(self, name: bytes, *, source: int, target: int) -> None:
        """As MIGRATE does it."""
        dump, left = self.clients[source].dump(name), self.clients[source].pttl(name)
        with self.clients[target].pipeline(transaction=False) as pipeline:
            pipeline.execute_command("ASKING")
            pipeline.execute_command("RESTORE", name, left, dump)
            pipeline.execute()
        self.clients[source].unlink(name)

    def end_move(self, name: bytes, *, target: int) -> None:
        for client in (self.clients[target], *self.clients):
            client.execute_command("CLUSTER", "SETSLOT", key_slot(name), "NODE", self.node_id(target))

    def flush(self) -> None:
        for client in self.clients:
            client.flushall()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for server in self.servers:
            server.stop()

    @staticmethod
    def _is_whole(client: Redis) -> bool:
        info = client.execute_command("CLUSTER", "INFO")
        known = info if isinstance(info, dict) else dict(_pairs(_text(info)))
        return known["cluster_state"] == "ok" and int(known["cluster_known_nodes"]) == NUM_NODES


@contextlib.contextmanager
def started_cluster() -> Iterator[StoreCluster]:
    servers: list[EmbeddedServer] = []
    with contextlib.ExitStack() as stack:
        for number in range(NUM_NODES):
            settings = {
                "cluster-enabled": "yes",
                "cluster-config-file": f"nodes-{number}.conf",
                "cluster-node-timeout": "2000",
                "cluster-require-full-coverage": "no",
            }
            # All have one password, as a URL has.
            server = EmbeddedServer(
                memory_bytes=64 << 20, settings=settings, password="of-all", port=_free_port()
            )
            servers.append(stack.enter_context(server))
        cluster = StoreCluster(servers)
        cluster.connect()
        stack.callback(cluster.close)
        yield cluster


def _free_port() -> int:
    """One that a Cluster can have: the port 10,000 above is the server's too."""
    for _ in range(200):
        port = random.randrange(20_000, 30_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port
    raise AssertionError("no free ports")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name, value

"""A process with an engine of one-sided reads and the thread that owns it, remote-controlled by a test.

The test holds a `Peer`; the process runs `main` below and answers one frame with one frame over a socket.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvstore.transfer.contract import ByteArray, Endpoint, PeerId, Run
from kvstore.transfer.opening import open_transfer
from kvstore.transfer.owner import (
    Command,
    Connect,
    Connected,
    Disconnect,
    Event,
    Expose,
    Fetch,
    Fetched,
    Overdue,
    TransferOwner,
)
from rorqual.clock import SystemClock

ROOT = Path(__file__).resolve().parents[2]
HEADER = struct.Struct("<I")
SECONDS_MAX = 30.0
"""Bound on every answer: generous, since the machine is shared."""

EVENTS = {item.__name__: item for item in (Connected, Overdue, Fetched)}

RegionSizes = Sequence[tuple[str, int, int]]
"""Name, unit_bytes, num_units."""

NUM_PAGES = 24
REGIONS: RegionSizes = (("c4", 5_000, NUM_PAGES), ("c4_index", 1_364, NUM_PAGES), ("records", 70_004, 3))
OWNER_SEED, READER_SEED = 1, 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An engine, and for nixl the transports it may use."""

    kind: str
    tls: str = ""
    needs_owner: str = (
        "never"  # that the owner polls, for a read to go on: "never", "first" of its reads, "always"
    )
    sees_death: bool = True  # a read from an owner that has died fails

    @property
    def env(self) -> dict[str, str]:
        return {"UCX_TLS": self.tls} if self.tls else {}


def pattern(seed: int, count: int) -> ByteArray:
    """The bytes a peer filled with `seed` holds in a region: alike nowhere, computable everywhere."""
    words = np.arange(count, dtype=np.uint32)
    words *= np.uint32(0x9E3779B1)
    words ^= np.uint32(seed * 0x85EBCA6B % 2**32)
    words *= np.uint32(0xC2B2AE35)
    return (words >> np.uint32(24)).astype(np.uint8)


def read_into(target: dict[str, ByteArray], source: dict[str, ByteArray], runs: Iterable[Run]) -> None:
    """What a read is, between two models of memory by region."""
    for run in runs:
        found_B = source[run.region][run.source : run.source + run.num_bytes]
        target[run.region][run.target : run.target + run.num_bytes] = found_B


def filled(seed: int, regions: RegionSizes = REGIONS) -> dict[str, ByteArray]:
    """The memory of a peer filled with `seed`, by region."""
    return {
        name: pattern(seed + index, unit_bytes * num_units)
        for index, (name, unit_bytes, num_units) in enumerate(regions)
    }


class Peer:
    """The test's end of one process."""

    def __init__(self, kind: str, agent: str, regions: RegionSizes, *, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(SECONDS_MAX)
        self._socket = ours
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.harness.transfer"),
                *(str(theirs.fileno()), kind, agent, msgspec.json.encode(regions).decode()),
            ],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=os.environ | {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "fatal"} | env,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._endpoint: Endpoint | None = None
        self.num_fetches = 0
        self._num_peers = 0

    @property
    def endpoint(self) -> Endpoint:
        """Waits until the process has started."""
        if self._endpoint is None:
            self._endpoint = msgspec.msgpack.decode(receive(self._socket), type=Endpoint)
        return self._endpoint

    def connect(self, endpoint: Endpoint) -> tuple[PeerId, str]:
        """Connects to a new peer: its number, and the error or ""."""
        self._num_peers += 1
        peer = PeerId(self._num_peers)
        self._call("connect", peer, msgspec.msgpack.encode(endpoint))
        event = self.next_event()
        assert isinstance(event, Connected), event
        assert event.peer == peer
        return peer, event.error

    def disconnect(self, peer: PeerId) -> None:
        self._call("disconnect", peer)

    def expose(self, active: bool) -> None:
        self._call("expose", active)

    def fetch(self, peer: PeerId, runs: Sequence[Run], *, seconds: float = SECONDS_MAX) -> int:
        """Starts a fetch: its number."""
        self.num_fetches += 1
        flat = [(run.region, run.source, run.target, run.num_bytes) for run in runs]
        self._call("fetch", self.num_fetches, peer, flat, seconds)
        return self.num_fetches

    def next_event(self, *, seconds: float = SECONDS_MAX) -> Event:
        answer = self._call("event", seconds)
        assert answer is not None, "no event came"
        name, values = answer
        return EVENTS[name](**values)

    def has_event(self, *, seconds: float) -> bool:
        """Whether one comes within `seconds`; it is then lost."""
        return self._call("event", seconds) is not None

    def read(self, peer: PeerId, runs: Sequence[Run]) -> Fetched:
        """A fetch that settles before its deadline."""
        fetch = self.fetch(peer, runs)
        event = self.next_event()
        assert isinstance(event, Fetched), event
        assert event.fetch == fetch
        return event

    def fill(self, seed: int) -> None:
        """As `filled` says."""
        self._call("fill", seed)

    def memory(self, region: str) -> ByteArray:
        return np.frombuffer(self._call("memory", region), dtype=np.uint8)

    def holds(self, memory: dict[str, ByteArray]) -> bool:
        return all(np.array_equal(self.memory(name), wanted_B) for name, wanted_B in memory.items())

    def cpu_share(self, *, seconds: float) -> float:
        """CPU seconds a second of a process that nobody calls."""
        return self._call("cpu", seconds)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(timeout=SECONDS_MAX)

    def stop(self) -> int:
        """In good order: the exit status."""
        self._call("stop")
        return self.process.wait(timeout=SECONDS_MAX)

    def close(self) -> None:
        """However it is."""
        self.process.kill()
        self.process.wait(timeout=SECONDS_MAX)
        self._socket.close()

    def _call(self, *message: Any) -> Any:
        assert self.endpoint
        send(self._socket, msgspec.msgpack.encode(message))
        return msgspec.msgpack.decode(receive(self._socket))


def send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(HEADER.pack(len(payload)) + payload)


def receive(connection: socket.socket) -> bytes:
    """Raises EOFError when the other end is gone."""
    (size,) = HEADER.unpack(_receive_exactly(connection, HEADER.size))
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(size)
        if not part:
            raise EOFError("the other process is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main() -> None:
    fd, kind, agent, regions = sys.argv[1:]
    connection = socket.socket(fileno=int(fd))
    builder = open_transfer(kind, agent=agent)
    memory = {name: builder.allocate(name, size, count) for name, size, count in msgspec.json.decode(regions)}
    engine = builder.start()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    owner = TransferOwner(
        engine, on_event=events.put, on_failure=lambda error: os._exit(3), clock=SystemClock()
    )
    owner.start()
    send(connection, msgspec.msgpack.encode(engine.endpoint))
    remote = Remote(owner, memory, events)
    try:
        while True:
            name, *values = msgspec.msgpack.decode(receive(connection))
            send(connection, msgspec.msgpack.encode(getattr(remote, name)(*values)))
            if name == "stop":
                break
    except EOFError:
        owner.stop(seconds_max=5)
    assert threading.active_count() == 1, "the owner's thread lives on"


class Remote:
    """What the process does when it is told to."""

    def __init__(
        self, owner: TransferOwner, memory: dict[str, ByteArray], events: queue.SimpleQueue[Event]
    ) -> None:
        self._owner = owner
        self._memory = memory
        self._events = events

    def connect(self, peer: int, endpoint: bytes) -> None:
        self._submit(Connect(peer=PeerId(peer), endpoint=msgspec.msgpack.decode(endpoint, type=Endpoint)))

    def disconnect(self, peer: int) -> None:
        self._submit(Disconnect(peer=PeerId(peer)))

    def expose(self, active: bool) -> None:
        self._submit(Expose(active=active))

    def fetch(self, fetch: int, peer: int, flat: list[list[Any]], seconds: float) -> None:
        runs = [Run(region=r, source=s, target=t, num_bytes=n) for r, s, t, n in flat]
        self._submit(Fetch(fetch=fetch, peer=PeerId(peer), runs=runs, seconds=seconds, verify=lambda: ""))

    def _submit(self, command: Command) -> None:
        self._owner.submit(command)

    def event(self, seconds: float) -> tuple[str, dict[str, Any]] | None:
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        names = type(event).__slots__
        return type(event).__name__, {name: getattr(event, name) for name in names}

    def fill(self, seed: int) -> None:
        for index, array in enumerate(self._memory.values()):
            array[:] = pattern(seed + index, len(array))

    def memory(self, region: str) -> bytes:
        return self._memory[region].tobytes()

    def cpu(self, seconds: float) -> float:
        before = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - before) / seconds

    def stop(self) -> None:
        assert self._owner.stop(seconds_max=5), "the owner's thread did not end"


if __name__ == "__main__":
    main()

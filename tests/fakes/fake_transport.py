"""Sessions without sockets: the router's fleet connected to hosts in the same process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fake_split import FakeSession, FakeSplitWorker

from engine.worker.host import Host
from engine.worker.session import Session, SessionRefused
from rorqual.session import Command, Hello, StepReport, Welcome
from router.worker_link import SessionLost


class FakeTransport:
    """Addresses to hosts; an address without one refuses connections."""

    def __init__(self, hosts: dict[str, Host | FakeSplitWorker]) -> None:
        self.hosts = hosts
        self.channels: list[FakeChannel] = []
        self.latest: dict[str, FakeChannel] = {}  # by address
        self.versions: dict[str, str] = {}  # by address: that a worker says it runs; else it does not say
        self.num_attempts = 0

    async def connect(self, address: str) -> FakeChannel:
        self.num_attempts += 1
        host = self.hosts.get(address)
        if host is None:
            raise SessionLost(f"{address}: connection refused")
        channel = FakeChannel(host, version=self.versions.get(address, ""))
        self.channels.append(channel)
        self.latest[address] = channel
        return channel


class FakeChannel:
    def __init__(self, host: Host | FakeSplitWorker, *, version: str = "") -> None:
        self.sent: list[Hello | Command] = []
        self.is_mute = False  # the worker is there and says nothing
        self._host = host
        self._version = version
        self._session: Session | FakeSession | None = None
        self._welcome: Welcome | None = None
        self._broken = asyncio.Event()

    def cut(self) -> None:
        """The network fails: both ends notice."""
        self._broken.set()
        if self._session is not None:
            self._session.close()

    async def send(self, command: Hello | Command) -> None:
        if self._broken.is_set():
            raise SessionLost("the network failed")
        self.sent.append(command)
        try:
            if isinstance(command, Hello):
                self._session = self._host.connect(command.router_id)
                self._welcome = replace(self._host.welcome(), version=self._version)
            else:
                assert self._session is not None
                self._session.submit(command)
        except SessionRefused as error:
            raise SessionLost(str(error)) from None

    async def receive(self) -> Welcome | StepReport:
        if self.is_mute:
            await asyncio.Event().wait()
        if self._welcome is not None:
            welcome, self._welcome = self._welcome, None
            return welcome
        assert self._session is not None
        reading = asyncio.create_task(self._session.next_report())
        breaking = asyncio.create_task(self._broken.wait())
        try:
            await asyncio.wait({reading, breaking}, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.is_set():
                raise SessionLost("the network failed")
            return reading.result()
        finally:
            for task in (reading, breaking):
                task.cancel()
            await asyncio.gather(reading, breaking, return_exceptions=True)

    async def close(self) -> None:
        if self._session is not None:
            self._session.close()

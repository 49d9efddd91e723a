"""All of the stand-in, running within its `async with` block."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.cluster.stand_in.addresses import Addresses
from tests.cluster.stand_in.controllers import BY_NAME, Controllers
from tests.cluster.stand_in.kinds import KINDS, Kind
from tests.cluster.stand_in.kubelet import ToyKubelet
from tests.cluster.stand_in.objects import Objects
from tests.cluster.stand_in.proxy import ToyProxy
from tests.cluster.stand_in.server import ApiServer, Faults

KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "XDG_CACHE_HOME",
    "PYTHONPATH",
)


class StandIn:
    def __init__(
        self, *, kinds: tuple[Kind, ...] = (), environment: dict[str, str] | None = None, pods_max: int = 16
    ) -> None:
        if sys.platform != "linux":
            pytest.skip("a stand-in needs addresses of the loopback beyond 127.0.0.1, which Linux has")
        self._folder = tempfile.TemporaryDirectory(prefix="rorqual-stand-in-")
        folder = Path(self._folder.name)
        self.objects = Objects()
        self.addresses = Addresses()
        self.server = ApiServer(self.objects, (*KINDS, *kinds), folder=folder)
        self.kubelet = ToyKubelet(
            self.objects,
            rights=self.server.rights,
            addresses=self.addresses,
            folder=folder / "pods",
            kubeconfig=self.server.kubeconfig,
            environment={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
            | (environment or {}),
            pods_max=pods_max,
        )
        self.server.log_of = self.kubelet.log_of
        self.kubeconfig = folder / "kubeconfig"
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def faults(self) -> Faults:
        return self.server.faults

    async def __aenter__(self) -> Self:
        await self.server.start()
        for name in ("default", "kube-system"):
            self.objects.create(
                BY_NAME["Namespace"], "", {"metadata": {"name": name}, "status": {"phase": "Active"}}
            )
            self.objects.create(BY_NAME["ServiceAccount"], name, {"metadata": {"name": "default"}})
        self.kubeconfig.write_text(self.server.kubeconfig(), encoding="utf-8")
        self.kubeconfig.chmod(0o600)
        runs = (
            Controllers(self.objects, addresses=self.addresses).run(),
            self.kubelet.run(),
            ToyProxy(self.objects).run(),
        )
        self._tasks = [asyncio.create_task(run) for run in runs]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.server.stop()
        self.addresses.close()
        self._folder.cleanup()
        if kind is None:
            self.check()

    @property
    def is_whole(self) -> bool:
        return not any(task.done() for task in self._tasks)

    def check(self) -> None:
        """Raises what ended a controller, the kubelet or the proxy, if one has ended."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

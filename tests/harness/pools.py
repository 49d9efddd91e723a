"""Prefill and decode workers and a router as separate real processes, which a test can stop, kill and start again.

Where `tests.harness.system` runs the one command, here every process is started by itself, as in a cluster: with its
own ready file and its own output, on an address that stays the same when it is started again. What a test learns it
learns from there and from /metrics. Nothing is left running after `close`, whatever the test did. Processes die with
the thread that started them: start them from the test's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.harness.system import (
    IDLE_SECONDS_MAX,
    SECONDS_MAX,
    Served,
    held_by_router,
    held_by_workers,
    is_alive,
    rorqual_command,
    scrape,
    wait_until,
    wait_until_nothing,
)

Role = Literal["prefill", "decode", "both", "router"]
Part = Literal["all", "host", "rank"]
COMMANDS: Mapping[Role, str] = {
    "prefill": "prefill",
    "decode": "decode",
    "both": "worker",
    "router": "router",
}
FAKE_WORKER = Path(__file__).parents[1] / "fakes" / "fake_worker.py"
STOP_SECONDS_MAX = 30.0

PORTS = range(12000, 30000)
"""Below the ports that systems give to outgoing connections: none of those takes a dead worker's port before it is
started again, and no connection to a port where nobody listens meets itself."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "UCX_NET_DEVICES": "lo",
    "UCX_LOG_LEVEL": "error",
}


class Member:
    """A router, or a worker: a host and its rank. It may live several times, with one address."""

    def __init__(
        self,
        name: str,
        role: Role,
        *,
        address: str,
        arguments: list[str],
        folder: Path,
        environment: dict[str, str],
        fake: tuple[str, ...] | None = None,
    ) -> None:
        """`fake`: options of a worker over a fake rank (`tests/fakes/fake_worker.py`); None: it is real."""
        self.name = name
        self.role: Role = role
        self.address = address  # of a worker's sessions, of a router's HTTP
        self.pids: list[int] = []  # host and rank, or the router's one; of the present life
        self.metrics_url = ""
        self.is_stopped = False  # the host is, so that it tells nothing
        self._arguments = arguments
        self._folder = folder
        self._environment = environment
        self._fake = fake
        self.ready_file = folder / f"{name}.ready.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._num_lives = 0
        self._was_hurt = False

    @property
    def host(self) -> int:
        return self.pids[0]

    @property
    def rank(self) -> int:
        assert self.role != "router", "a router has no rank"
        return self.pids[1]

    def start(self, *options: str) -> None:
        """It need not be ready yet: see `wait_until_ready`. `options` are this life's, and come last: they win."""
        assert not self.is_alive(), f"{self.name} is still there"
        self.ready_file.unlink(missing_ok=True)
        self._num_lives += 1
        self._was_hurt = False
        self.is_stopped = False
        self.pids = []
        arguments = [*self._arguments, *options, "--ready-file", str(self.ready_file)]
        with self._output_file().open("wb") as output:
            self._process = subprocess.Popen(
                self._command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    def wait_until_ready(self) -> dict[str, Any]:
        process = self._running()
        wait_until(lambda: self.ready_file.exists() or process.poll() is not None, seconds_max=SECONDS_MAX)
        assert self.ready_file.exists(), f"{self.name} did not become ready:\n{self.output()}"
        ready = json.loads(self.ready_file.read_text(encoding="utf-8"))
        self.pids = [ready["pid"]] if self.role == "router" else ready["processes"]
        self.metrics_url = f"{ready['http']}/metrics" if self.role == "router" else ready["metrics"]
        assert self.pids[0] == process.pid
        return ready

    def signal(self, number: signal.Signals, *, part: Part = "all") -> None:
        """After SIGKILL it returns when host and rank are gone: neither lives without the other."""
        assert self.is_alive(), f"{self.name} is not there"
        for pid in {"all": self.pids, "host": self.pids[:1], "rank": self.pids[1:]}[part]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            self.is_stopped |= part != "rank"
        elif number == signal.SIGCONT:
            self.is_stopped &= part == "rank"
        elif number == signal.SIGKILL:
            self._was_hurt = True
            self.wait_until_gone()

    def terminate(self) -> list[str]:
        """Ask it to end in good order. It need not have ended yet: see `end`. What is to be complained about."""
        if not self.is_alive():
            return []
        lost = [pid for pid in self.pids if not is_alive(pid)]
        self.signal(signal.SIGCONT)
        self._running().send_signal(signal.SIGTERM)
        return [f"{self.name} had lost processes {lost}:\n{self.output()}"] if lost else []

    def end(self) -> list[str]:
        """See it end after `terminate`, by force if it must be. What is to be complained about."""
        process = self._process
        if process is None:
            return []
        complaints: list[str] = []
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            complaints.append(f"{self.name} did not end within {STOP_SECONDS_MAX:g} s of SIGTERM")
            process.kill()
            process.wait(STOP_SECONDS_MAX)
        if process.returncode != 0 and not self._was_hurt and not complaints:
            complaints.append(f"{self.name} ended with status {process.returncode}:\n{self.output()}")
        try:
            self.wait_until_gone()
        except AssertionError:
            complaints.append(f"{self.name} left processes: {[pid for pid in self.pids if is_alive(pid)]}")
        return complaints

    def wait_until_gone(self) -> None:
        process = self._running()
        wait_until(
            lambda: process.poll() is not None and not any(map(is_alive, self.pids)),
            seconds_max=STOP_SECONDS_MAX,
        )

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def metrics(self) -> dict[str, float]:
        """What it exports, summed over labels."""
        assert not self.is_stopped, f"{self.name} is stopped and tells nothing"
        return scrape(self.metrics_url)

    def by_label(self, metric: str, label: str) -> dict[str, float]:
        """One of its metrics by the values of one of its labels; zeros are left out."""
        assert not self.is_stopped, f"{self.name} is stopped and tells nothing"
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(self.metrics_url, timeout=SECONDS_MAX).text):
            for sample in family.samples:
                if sample.name == metric and sample.value:
                    value = sample.labels[label]
                    counts[value] = counts.get(value, 0.0) + sample.value
        return counts

    def held(self) -> dict[str, float]:
        metrics = self.metrics()
        return held_by_router(metrics) if self.role == "router" else held_by_workers(metrics)

    def output(self) -> str:
        """All it wrote, over all its lives."""
        files = [self._output_file(number) for number in range(1, self._num_lives + 1)]
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def kill(self) -> None:
        """By force, whatever state it is in; for cleaning up."""
        # While its host is not waited for, the number of a rank is nobody else's.
        if self.is_alive():
            ranks = [pid for pid in self.pids[1:] if is_alive(pid)]
            self._running().kill()
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._running().wait(STOP_SECONDS_MAX)

    def _command(self, arguments: list[str]) -> list[str]:
        if self._fake is None:
            return rorqual_command(COMMANDS[self.role], *arguments)
        fake = ["--parent", str(os.getpid()), "--role", self.role, *self._fake]
        return [sys.executable, str(FAKE_WORKER), *fake, "--", *arguments]

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was never started"
        return self._process

    def _output_file(self, number: int | None = None) -> Path:
        return self._folder / f"{self.name}.{number or self._num_lives}.txt"


class Pools(Served):
    """Start workers, then the router, which is told of all of them. Then ask, as of any `Served`."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *options: str,
        transfer: str | None = None,
        ucx_tls: str | None = None,
        environment: Mapping[str, str] | None = None,
        fake: tuple[str, ...] | None = None,
    ) -> None:
        """`options` are every worker's; `transfer` every prefill and decode worker's; `fake`, if given, those of the
        fake workers that take the place of real ones."""
        super().__init__(model.name)
        self.members: dict[str, Member] = {}
        self._model = model
        self._folder = folder
        self._options = options
        self._transfer = transfer
        self._environment = dict(os.environ) | ENVIRONMENT | ({"UCX_TLS": ucx_tls} if ucx_tls else {})
        self._environment |= environment or {}
        self._fake = fake
        self._ports = free_ports()

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def workers(self, role: Role | None = None) -> list[Member]:
        return [
            member
            for member in self.members.values()
            if member.role == role or (not role and member.role != "router")
        ]

    def start(self, role: Role, num: int = 1, *options: str) -> list[Member]:
        """Start workers of a role, named role-0, role-1 and so on, and wait until they are ready."""
        members = self.add(role, num, *options)
        for member in members:
            member.start()
        for member in members:
            member.wait_until_ready()
        return members

    def add(self, role: Role, num: int = 1, *options: str) -> list[Member]:
        """Workers that are yet to be started."""
        first = len(self.workers(role))
        return [self._add_worker(role, number, options) for number in range(first, first + num)]

    def start_router(self, *options: str) -> Member:
        """Before all the workers that have been added; ready when a request would be answered."""
        http, grpc = (f"127.0.0.1:{next(self._ports)}" for _ in range(2))
        arguments = ["--model", str(self._model), "--http", http, "--grpc", grpc]
        for worker in self.workers():
            arguments += ["--worker", worker.address]
        router = self._add("router", "router", address=http, arguments=[*arguments, *options])
        router.start()
        ready = router.wait_until_ready()
        self.http, self.grpc = ready["http"], ready["grpc"]
        return router

    def start_all(self, *, prefill: int = 1, decode: int = 1) -> None:
        """With no options of their own; all weights are loaded at once."""
        members = [self._add_worker("prefill", number, ()) for number in range(prefill)]
        members += [self._add_worker("decode", number, ()) for number in range(decode)]
        for member in members:
            member.start()
        for member in members:
            member.wait_until_ready()
        self.start_router()

    def stop(self, *names: str, part: Part = "all") -> None:
        """They stand still, connections open, until `resume`."""
        for name in names:
            self[name].signal(signal.SIGSTOP, part=part)

    def resume(self, *names: str) -> None:
        for name in names:
            self[name].signal(signal.SIGCONT)

    def kill(self, name: str, *, part: Part = "all") -> None:
        """No good-bye. The other part of a worker ends with it."""
        self[name].signal(signal.SIGKILL, part=part)

    def restart(self, name: str, *options: str, wait: bool = True) -> Member:
        """In its place: the same address, a new incarnation, the same options and, for this life, more. Ends it first
        if it still lives. Waits until it serves: a worker, until the router has found it again."""
        member = self[name]
        complaints = member.terminate() + member.end()
        assert not complaints, "\n".join(complaints)
        member.start(*options)
        if wait:
            member.wait_until_ready()
            self.wait_until_connected()
        return member

    def heal(self) -> None:
        """Whoever stands still goes on, whoever is dead is started again; then nothing is left of any request."""
        for member in self.members.values():
            if member.is_alive():
                member.signal(signal.SIGCONT)
            else:
                member.start()
        for member in self.members.values():
            member.wait_until_ready()
        self.wait_until_connected()
        self.wait_until_idle()

    def wait_until_connected(self) -> None:
        """Until the router, if there is one to ask, has a session with every surviving worker."""
        survivors = self.survivors()
        num_workers = sum(member.role != "router" for member in survivors)
        for router in (member for member in survivors if member.role == "router"):
            wait_until(
                lambda router=router: router.metrics()["rorqual_router_workers_connected"] >= num_workers,
                seconds_max=IDLE_SECONDS_MAX,
            )

    def survivors(self) -> list[Member]:
        """Alive and not stopped."""
        return [member for member in self.members.values() if member.is_alive() and not member.is_stopped]

    def held(self) -> dict[str, float]:
        """By survivors: everything that is zero when no request is open, by process and name; only what is not."""
        return {
            f"{member.name}: {what.partition(': ')[2]}": count
            for member in self.survivors()
            for what, count in member.held().items()
        }

    def wait_until_idle(self, *, seconds_max: float = IDLE_SECONDS_MAX) -> None:
        wait_until_nothing(self.held, seconds_max=seconds_max)

    def output(self) -> str:
        """Everything that anybody wrote, process by process."""
        return "".join(f"--- {name}\n{member.output()}" for name, member in self.members.items())

    def close(self) -> None:
        """The router ends first, as its workers would be missed. Whoever was not killed must end well; nobody may
        have shown a traceback, and no process may be left."""
        complaints: list[str] = []
        try:
            for group in (self._routers(), self.workers()):
                for member in group:
                    complaints += member.terminate()
                for member in group:
                    complaints += member.end()
        finally:
            for member in self.members.values():
                member.kill()
        for member in self.members.values():
            output = member.output()
            if "Traceback" in output:
                complaints.append(f"{member.name} showed a traceback:\n{output}")
        assert not complaints, "\n".join(complaints)

    def _routers(self) -> list[Member]:
        return [member for member in self.members.values() if member.role == "router"]

    def _add_worker(self, role: Role, number: int, options: tuple[str, ...]) -> Member:
        name, address = f"{role}-{number}", f"127.0.0.1:{next(self._ports)}"
        arguments = ["--model", str(self._model), "--listen", address, "--worker-id", name, *self._options]
        if self._transfer is not None and role in ("prefill", "decode"):
            arguments += ["--transfer", self._transfer]
        return self._add(name, role, address=address, arguments=[*arguments, *options])

    def _add(self, name: str, role: Role, *, address: str, arguments: list[str]) -> Member:
        assert name not in self.members, f"{name} is already there: restart it"
        self.members[name] = Member(
            name,
            role,
            address=address,
            arguments=arguments,
            folder=self._folder,
            environment=self._environment,
            fake=None if role == "router" else self._fake,
        )
        return self.members[name]


def free_ports() -> Iterator[int]:
    """Ports that nobody listens on now, no port twice. Test processes that run together begin in different places."""
    begin = os.getpid() * 31 % len(PORTS)
    for number in itertools.islice(itertools.cycle(PORTS), begin, begin + len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                continue
        yield number
    raise AssertionError("no port is free")

"""`rorqual up`: a whole local cluster in one command: workers and a router as real child processes.

Owns the children's lives and nothing else: it starts them, forwards their log lines, waits until a request
would be answered, and stops them. It never speaks to the model and never restarts anything: a child's death
ends the cluster with one clear line, because a supervisor that hides a crash hides the bug. Only the embedded
store may die: workers go on without one, and that is told. With --autoscale workers come and go instead, as
`rorqual.up_scaling` says. Called by `rorqual.cli` and `rorqual.demo`; which
workers there are, and what each is told, is `rorqual.up_options`'; which store, `rorqual.up_store`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rorqual.api_keys import write_api_key_file
from rorqual.console import Console
from rorqual.errors import ConfigError, RorqualError
from rorqual.model_config import load_model_config
from rorqual.processes import Child, describe_exit, start_child, stop_children
from rorqual.service import end_task, remove_ready_file, write_ready_file
from rorqual.up_options import (
    UpOptions,
    WorkerPlan,
    autoscaler_arguments,
    child_environment,
    parse_options,
    plan_workers,
    router_arguments,
    worker_arguments,
)
from rorqual.up_scaling import ROLES, WORKERS, LocalPools
from rorqual.up_store import StorePlan, embedded_url, has_embedded_server, plan_store, store_arguments

READY_POLL_SECONDS = 0.05
STILL_STARTING_SECONDS = 15.0
STORE_STOP_SECONDS_MAX = 1.0
"""It has nothing to finish."""

Program = Callable[[str], Sequence[str]]
"""The command line that starts a child of a role ("prefill", "router"), before its options."""


def main(argv: list[str]) -> int:
    """Entry of `rorqual up`; the exit status."""
    options = parse_options(argv)
    console = Console(sys.stdout, colour=sys.stdout.isatty())
    try:
        return asyncio.run(Supervisor(options, console=console, environment=os.environ).run())
    finally:
        console.close()


def rorqual_program(role: str) -> Sequence[str]:
    """This very installation, told to die with this very process."""
    return (sys.executable, "-m", "rorqual.cli", "--parent", str(os.getpid()), role)


class Supervisor:
    """One run of a local cluster. `program` says how a child of a role is started: tests put small scripts
    there.
    """

    def __init__(
        self,
        options: UpOptions,
        *,
        console: Console,
        environment: Mapping[str, str],
        program: Program = rorqual_program,
        num_cores: int | None = None,
    ) -> None:
        self._options = options
        self._console = console
        self._environment = dict(environment)
        self._program = program
        self._plans = plan_workers(options, num_cores=num_cores or _num_cores())
        self._store_plan = plan_store(options, environment, has_embedded=has_embedded_server())
        self._width = max(len(name) for name in ("router", *(plan.name for plan in self._plans)))
        self._stores: list[Child] = []  # one, or none
        self._is_store_missed = False
        self._workers: list[Child] = []
        self._routers: list[Child] = []  # and the autoscaler, if there is one
        self._pools: LocalPools | None = None  # with --autoscale; then workers are its
        self._scaling: asyncio.Task[None] | None = None
        self._runs: dict[Child, asyncio.Task[None]] = {}
        self._signals = _Signals()

    async def run(self) -> int:
        """Serve until told to stop (0), or until a child dies (raises RorqualError). No process is left
        either way.
        """
        options = self._options
        _check(options)
        remove_ready_file(options.ready_file)
        with self._signals.installed(), tempfile.TemporaryDirectory(prefix="rorqual-up-") as folder:
            try:
                await self._serve(Path(folder))
            except _Stopped:
                self._console.line("rorqual up: stopping")
            finally:
                remove_ready_file(options.ready_file)
                await self._stop()
        return 0

    async def _serve(self, folder: Path) -> None:
        options = self._options
        url = self._store_plan.url
        if self._store_plan.is_embedded:
            url = embedded_url(folder)
            self._start_store(folder, url)
        workers = await self._start_workers(folder, store_url=url)
        stores = await self._store_ready(folder)
        addresses = [_text(ready, "address") for ready in workers]
        if options.autoscale is not None:
            self._pools = self._hand_over_workers(folder, store_url=url)
            addresses = []
        router = await self._start_router(folder, addresses=addresses, store_url=url)
        processes = [_pid(router.get("pid"))]
        for ready in (*workers, *stores):
            processes += [_pid(pid) for pid in cast("list[Any]", ready.get("processes") or [])]
        http, grpc = _text(router, "http"), _text(router, "grpc")
        if self._pools is not None:
            processes += await self._start_scaling(folder, self._pools, http=http)
        content = {"http": http, "grpc": grpc, "processes": processes}
        write_ready_file(self._options.ready_file, content)
        for line in _banner(self._options, store=self._store_plan, http=http, grpc=grpc):
            self._console.line(line)
        await self._watch(lambda: False, stage="serving", seconds_max=None)

    def _start_store(self, folder: Path, url: str) -> None:
        """Beside the workers, which take longer and look for it when they are ready."""
        arguments = store_arguments(self._options, ready_file=folder / "store.json")
        self._stores.append(self._start("kv", "store", arguments, threads=1, store_url=url))

    async def _store_ready(self, folder: Path) -> list[dict[str, Any]]:
        """What the embedded store wrote, if there is one and it lives."""
        file = folder / "store.json"
        await self._watch(
            lambda: file.exists() or not self._stores or self._is_store_missed,
            stage="starting store",
            seconds_max=self._options.start_seconds_max,
        )
        return [_read_ready_file(file)] if file.exists() else []

    async def _start_workers(self, folder: Path, *, store_url: str) -> list[dict[str, Any]]:
        self._console.line(f"rorqual up: starting {_told(self._plans)} on {self._options.model}")
        files = [folder / f"{plan.name}.json" for plan in self._plans]
        for plan, file in zip(self._plans, files, strict=True):
            arguments = worker_arguments(self._options, plan, ready_file=file)
            self._workers.append(
                self._start(plan.command, plan.name, arguments, threads=plan.threads, store_url=store_url)
            )
        return await self._ready(files)

    async def _start_router(
        self, folder: Path, *, addresses: Sequence[str], store_url: str
    ) -> dict[str, Any]:
        file = folder / "router.json"
        keys = folder / "api-keys" if self._options.api_keys else None
        if keys is not None:
            write_api_key_file(keys, self._options.api_keys)
        arguments = router_arguments(
            self._options,
            addresses=addresses,
            ready_file=file,
            api_key_file=keys,
            discover=f"file:{folder / WORKERS}" if self._pools is not None else "",
        )
        self._routers.append(self._start("router", file.stem, arguments, threads=1, store_url=store_url))
        return (await self._ready([file]))[0]

    def _hand_over_workers(self, folder: Path, *, store_url: str) -> LocalPools:
        """From now on workers come and go, and a death of one ends nothing."""
        threads = {plan.name.rpartition("-")[0]: plan.threads for plan in self._plans}

        def start(role: str, name: str, ready_file: Path) -> Child:
            for child in [child for child, task in self._runs.items() if task.done()]:
                del self._runs[child]  # one of many that have come and gone
            command = "worker" if role == "both" else role
            plan = WorkerPlan(name=name, command=command, threads=threads.get(role, 1))
            arguments = worker_arguments(self._options, plan, ready_file=ready_file)
            return self._start(command, name, arguments, threads=plan.threads, store_url=store_url)

        pools = LocalPools(folder, start=start, tell=lambda text: self._console.line(f"rorqual up: {text}"))
        now = asyncio.get_running_loop().time()
        for plan, child in zip(self._plans, self._workers, strict=True):
            role = plan.name.rpartition("-")[0]
            assert role in ROLES
            pools.adopt(role, child, ready_file=folder / f"{plan.name}.json", now=now)
        pools.write(now)
        self._workers = []
        return pools

    async def _start_scaling(self, folder: Path, pools: LocalPools, *, http: str) -> list[int]:
        """Start the autoscaler and follow what it wants; its process."""
        assert self._options.autoscale is not None
        pools.set_router(http.partition("://")[2])
        file = folder / "autoscaler.json"
        arguments = autoscaler_arguments(
            self._options.autoscale, folder=folder, ready_file=file, log_level=self._options.log_level
        )
        self._scaling = asyncio.get_running_loop().create_task(pools.run())
        self._scaling.add_done_callback(lambda _: self._signals.news.set())
        self._routers.append(self._start("autoscaler", file.stem, arguments, threads=1))
        return [_pid((await self._ready([file]))[0].get("pid"))]

    def _start(
        self, role: str, name: str, arguments: Sequence[str], *, threads: int, store_url: str = ""
    ) -> Child:
        number = len(self._runs)
        child = start_child(
            [*self._program(role), *arguments],
            name=name,
            environment=child_environment(self._environment, threads=threads, store_url=store_url),
            on_line=lambda text: self._console.prefixed(name, text, width=self._width, number=number),
        )
        # Owned by `_stop`, which gathers it; its end is news for `_watch`.
        task = asyncio.get_running_loop().create_task(child.run())
        task.add_done_callback(lambda _: self._signals.news.set())
        self._runs[child] = task
        return child

    async def _ready(self, files: Sequence[Path]) -> list[dict[str, Any]]:
        """What the children wrote once they were ready."""
        await self._watch(
            lambda: all(file.exists() for file in files),
            stage="starting " + ", ".join(file.stem for file in files),
            seconds_max=self._options.start_seconds_max,
        )
        return [_read_ready_file(file) for file in files]

    async def _watch(self, until: Callable[[], bool], *, stage: str, seconds_max: float | None) -> None:
        """Wait for `until`, a signal (raises _Stopped), a child's death or the deadline (RorqualError)."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        reminder = start + STILL_STARTING_SECONDS
        while not until():
            if self._signals.num_requests:
                raise _Stopped
            for child in (*self._workers, *self._routers):
                if child.exit_status is not None:
                    raise await self._death(child)
            if self._scaling is not None and self._scaling.done():
                self._scaling.result()  # it runs until cancelled: what ended it is told
            for child in self._stores:
                if child.exit_status is not None and not self._is_store_missed:
                    await self._miss_store(child, is_starting=seconds_max is not None)
            waited = loop.time() - start
            if seconds_max is not None and waited > seconds_max:
                raise RorqualError(f"{stage}: not done after {seconds_max:g} s (--start-seconds)")
            if seconds_max is not None and loop.time() > reminder:
                reminder += STILL_STARTING_SECONDS
                self._console.line(f"rorqual up: still {stage} ({waited:.0f} s)")
            self._signals.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._signals.news.wait(), None if seconds_max is None else READY_POLL_SECONDS
                )

    async def _miss_store(self, child: Child, *, is_starting: bool) -> None:
        """The store is dead. Raises RorqualError where it was asked for and never was there; else workers compute what
        it would have given."""
        self._is_store_missed = True
        death = await self._death(child)
        if is_starting and self._store_plan.is_required:
            raise death
        self._console.line(f"rorqual up: serving goes on without a store: {death}")

    async def _death(self, child: Child) -> RorqualError:
        """The one line about a dead child, with the last lines it wrote."""
        # Its run task is still forwarding what the pipe holds.
        await asyncio.wait({self._runs[child]})
        said = "".join(f"\n  {line}" for line in child.tail) or " nothing"
        status = describe_exit(child.exit_status or 0)
        return RorqualError(f"{child.name} (process {child.pid}) died: {status}; the last it said:{said}")

    async def _stop(self) -> None:
        """The router first, so that it can let its streams finish while there are workers to finish them; the store
        last, to which these write what they leave behind."""
        half = self._options.stop_seconds_max / 2
        requests = self._signals.num_requests
        if self._scaling is not None:
            # Whatever it would start now would outlive this.
            await end_task(self._scaling)
        workers = [child for child in self._runs if child not in (*self._routers, *self._stores)]
        try:
            for children, seconds in (
                (self._routers, half),
                (workers, half),
                (self._stores, STORE_STOP_SECONDS_MAX),
            ):
                # Another Ctrl-C while stopping ends everything at once.
                late = await stop_children(
                    children, grace_seconds=seconds, is_hurried=lambda: self._signals.num_requests > requests
                )
                for child in late:
                    self._console.line(f"rorqual up: {child.name} did not stop in time and was killed")
        finally:
            for child in self._runs:
                child.kill()
            await asyncio.gather(*self._runs.values())


class _Stopped(Exception):
    """SIGINT or SIGTERM asked for an orderly end."""


class _Signals:
    """Counts the requests to stop. `news` is set with each of them."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.num_requests = 0

    @contextlib.contextmanager
    def installed(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in handled:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self.num_requests += 1
        self.news.set()


def _check(options: UpOptions) -> None:
    """Find what can be found in milliseconds, before a model is loaded for minutes."""
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such directory")
    load_model_config(options.model)
    if options.autoscale is not None and not options.autoscale.is_file():
        raise ConfigError(f"--autoscale: {options.autoscale}: no such file")
    if options.http_port and options.http_port == options.grpc_port:
        raise ConfigError(f"--http and --grpc are both port {options.http_port}")
    for option, port in (("--http", options.http_port), ("--grpc", options.grpc_port)):
        _check_port(option, options.host, port)


def _check_port(option: str, host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: a port whose last connections are still winding down is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"{option}: cannot listen on {host}:{port}: {why}; choose another port, or 0 for any"
        ) from None


def _num_cores() -> int:
    """Cores this process may use, which a container or taskset can make fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_ready_file(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RorqualError(f"{file.stem}: its ready file cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise RorqualError(f"{file.stem}: its ready file must hold a JSON object")
    return cast("dict[str, Any]", content)


def _text(ready: Mapping[str, Any], key: str) -> str:
    value = ready.get(key)
    if not isinstance(value, str):
        raise RorqualError(f"a child's ready file has no text under {key!r}")
    return value


def _pid(value: object) -> int:
    if not isinstance(value, int) or value <= 0:
        raise RorqualError(f"a child's ready file names {value!r} as a process")
    return value


def _told(plans: Sequence[WorkerPlan]) -> str:
    """ "2 prefill workers of 3 threads, 1 decode worker of 1 thread", for a person."""
    kinds = Counter((plan.name.rpartition("-")[0], plan.threads) for plan in plans)
    return ", ".join(
        f"{count} {kind} worker{'s' * (count > 1)} of {threads} thread{'s' * (threads > 1)}"
        for (kind, threads), count in kinds.items()
    )


def _banner(options: UpOptions, *, store: StorePlan, http: str, grpc: str) -> list[str]:
    name = options.served_name or options.model.resolve().name
    has_tokenizer = (options.model / "tokenizer.json").exists()
    body: dict[str, object] = {"model": name, "max_tokens": 32, "stream": True}
    if has_tokenizer:
        route, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": "Hello"}]}
    else:
        route, body = "/v1/completions", body | {"prompt": [1, 2, 3]}
    key = ' -H "Authorization: Bearer $RORQUAL_API_KEY"' if options.api_keys else ""
    return [
        "",
        f"rorqual up: {name} is ready",
        f"  HTTP  {http}/v1",
        f"  gRPC  {grpc}",
        *([f"  store {store.told}"] if store.told else []),
        f"  try   curl -N {http}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        "  stop  Ctrl-C",
        "",
    ]

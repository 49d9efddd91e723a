"""`rorqual up`: a whole local cluster in one command: N workers and a router as real child processes.

Owns the children's lives and nothing else: it starts them, forwards their log lines, waits until a request
would be answered, and stops them. It never speaks to the model and never restarts anything: a child's death
ends the cluster with one clear line, because a supervisor that hides a crash hides the bug. Called by
`rorqual.cli` and `rorqual.demo`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rorqual.api_keys import read_api_keys, write_api_key_file
from rorqual.console import Console
from rorqual.errors import ConfigError, RorqualError
from rorqual.model_config import load_model_config
from rorqual.processes import Child, describe_exit, start_child, stop_children
from rorqual.service import format_address, remove_ready_file, write_ready_file
from rorqual.telemetry import LOG_LEVELS

WORKERS_MAX = 64
READY_POLL_SECONDS = 0.05
STILL_STARTING_SECONDS = 15.0

# One number sets the threads of every numeric library: whichever a process loads, it must not fight its
# neighbours.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `rorqual up` was asked for. None: the child's own default."""

    model: Path
    num_both: int = 1
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    served_name: str | None = None
    numerics: str | None = None
    exact: bool = False
    pages: int | None = None
    kv_bytes: str | None = None
    slots: int | None = None
    prefill_tokens: int | None = None
    threads: int | None = None
    kernels: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    log_level: str | None = None
    ready_file: Path | None = None
    start_seconds_max: float = 3600.0
    stop_seconds_max: float = 15.0

    @property
    def drain_seconds(self) -> float:
        """What a child may take to finish its requests: a little less than it is given before it is killed."""
        return 0.8 * self.stop_seconds_max / 2


Program = Callable[[str], Sequence[str]]
"""The command line that starts a child of a role ("worker", "router"), before its options."""


def main(argv: list[str]) -> int:
    """Entry of `rorqual up`; the exit status."""
    options = parse_options(argv)
    console = Console(sys.stdout, colour=sys.stdout.isatty())
    try:
        return asyncio.run(Supervisor(options, console=console, environment=os.environ).run())
    finally:
        console.close()


def parse_options(argv: list[str]) -> UpOptions:
    """The options of a command line. Exits with status 2 as argparse does; raises ConfigError for a bad
    value.
    """
    args = _parser().parse_args(argv)
    if not 1 <= args.both <= WORKERS_MAX:
        raise ConfigError(f"--both must be between 1 and {WORKERS_MAX}, not {args.both}")
    for option in ("http", "grpc"):
        if not 0 <= getattr(args, option) <= 65535:
            raise ConfigError(f"--{option} must be a port between 0 and 65535, not {getattr(args, option)}")
    for option in ("pages", "slots", "prefill_tokens", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    if args.exact and (args.threads or 1) > 1:
        raise ConfigError(f"--exact computes with one thread; leave out --threads {args.threads}")
    return UpOptions(
        model=args.model,
        num_both=args.both,
        host=args.host,
        http_port=args.http,
        grpc_port=args.grpc,
        served_name=args.served_name,
        numerics=args.numerics,
        exact=args.exact,
        pages=args.pages,
        kv_bytes=args.kv_bytes,
        slots=args.slots,
        prefill_tokens=args.prefill_tokens,
        threads=args.threads,
        kernels=tuple(args.kernel),
        api_keys=read_api_keys(args.api_key, args.api_key_file),
        log_level=args.log_level,
        ready_file=args.ready_file,
        start_seconds_max=args.start_seconds,
        stop_seconds_max=args.stop_seconds,
    )


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
        self._num_cores = num_cores or _num_cores()
        self._workers: list[Child] = []
        self._routers: list[Child] = []
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
        workers = await self._start_workers(folder)
        router = await self._start_router(folder, addresses=[_text(ready, "address") for ready in workers])
        processes = [_pid(router.get("pid"))]
        for ready in workers:
            processes += [_pid(pid) for pid in cast("list[Any]", ready.get("processes") or [])]
        http, grpc = _text(router, "http"), _text(router, "grpc")
        content = {"http": http, "grpc": grpc, "processes": processes}
        write_ready_file(self._options.ready_file, content)
        for line in _banner(self._options, http=http, grpc=grpc):
            self._console.line(line)
        await self._watch(lambda: False, stage="serving", seconds_max=None)

    async def _start_workers(self, folder: Path) -> list[dict[str, Any]]:
        options = self._options
        threads = options.threads or threads_per_worker(
            num_cores=self._num_cores, num_workers=options.num_both, exact=options.exact
        )
        self._console.line(
            f"rorqual up: starting {options.num_both} worker(s) on {options.model}, {threads} thread(s) each"
        )
        files = [folder / f"both-{index}.json" for index in range(options.num_both)]
        for file in files:
            arguments = worker_arguments(options, threads=threads, ready_file=file)
            self._workers.append(self._start("worker", file.stem, arguments, threads=threads))
        return await self._ready(files)

    async def _start_router(self, folder: Path, *, addresses: Sequence[str]) -> dict[str, Any]:
        file = folder / "router.json"
        keys = folder / "api-keys" if self._options.api_keys else None
        if keys is not None:
            write_api_key_file(keys, self._options.api_keys)
        arguments = router_arguments(self._options, addresses=addresses, ready_file=file, api_key_file=keys)
        self._routers.append(self._start("router", file.stem, arguments, threads=1))
        return (await self._ready([file]))[0]

    def _start(self, role: str, name: str, arguments: Sequence[str], *, threads: int) -> Child:
        number = len(self._workers) + len(self._routers)
        width = len(f"both-{self._options.num_both - 1}") if self._options.num_both > 10 else len("router")
        child = start_child(
            [*self._program(role), *arguments],
            name=name,
            environment=self._environment
            | {variable: str(threads) for variable in _THREAD_VARIABLES}
            | {"PYTHONUNBUFFERED": "1"},
            on_line=lambda text: self._console.prefixed(name, text, width=width, number=number),
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

    async def _death(self, child: Child) -> RorqualError:
        """The one line about a dead child, with the last lines it wrote."""
        # Its run task is still forwarding what the pipe holds.
        await asyncio.wait({self._runs[child]})
        said = "".join(f"\n  {line}" for line in child.tail) or " nothing"
        status = describe_exit(child.exit_status or 0)
        return RorqualError(f"{child.name} (process {child.pid}) died: {status}; the last it said:{said}")

    async def _stop(self) -> None:
        """The router first, so that it can let its streams finish while there are workers to finish them."""
        half = self._options.stop_seconds_max / 2
        requests = self._signals.num_requests
        try:
            for children in (self._routers, self._workers):
                # Another Ctrl-C while stopping ends everything at once.
                late = await stop_children(
                    children, grace_seconds=half, is_hurried=lambda: self._signals.num_requests > requests
                )
                for child in late:
                    self._console.line(f"rorqual up: {child.name} did not stop in time and was killed")
        finally:
            for child in (*self._routers, *self._workers):
                child.kill()
            await asyncio.gather(*self._runs.values())


def threads_per_worker(*, num_cores: int, num_workers: int, exact: bool) -> int:
    """Compute threads for each worker such that the processes of one host do not fight.

    About one core stays with the router and the workers' hosts: a second torch thread on two busy cores
    makes tiny steps ten times slower, not faster. Exact mode fixes the reduction order with one thread.
    """
    return 1 if exact else max(1, (num_cores - 1) // num_workers)


def worker_arguments(options: UpOptions, *, threads: int, ready_file: Path) -> list[str]:
    """The options of one worker that serves prefill and decode; it listens on loopback only."""
    arguments = ["--model", str(options.model), "--listen", "127.0.0.1:0", "--ready-file", str(ready_file)]
    arguments += ["--worker-id", ready_file.stem, "--threads", str(threads)]
    for option, value in (
        ("--numerics", options.numerics),
        ("--pages", options.pages),
        ("--kv-bytes", options.kv_bytes),
        ("--slots", options.slots),
        ("--prefill-tokens", options.prefill_tokens),
        ("--log-level", options.log_level),
        ("--drain-seconds", options.drain_seconds),
    ):
        if value is not None:
            arguments += [option, str(value)]
    for kernel in options.kernels:
        arguments += ["--kernel", kernel]
    return [*arguments, "--exact"] if options.exact else arguments


def router_arguments(
    options: UpOptions, *, addresses: Sequence[str], ready_file: Path, api_key_file: Path | None
) -> list[str]:
    """The options of the router. Keys come in a file: everyone on the machine can read a command line."""
    arguments = ["--model", str(options.model), "--ready-file", str(ready_file)]
    arguments += ["--http", format_address(options.host, options.http_port)]
    arguments += ["--grpc", format_address(options.host, options.grpc_port)]
    for address in addresses:
        arguments += ["--worker", address]
    for option, value in (
        ("--served-name", options.served_name),
        ("--log-level", options.log_level),
        ("--drain-seconds", options.drain_seconds),
        ("--api-key-file", api_key_file),
    ):
        if value is not None:
            arguments += [option, str(value)]
    return arguments


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual up",
        description="Start a local cluster: workers that prefill and decode, and a router before them.",
        epilog="example: rorqual up --model models/demo --both 2 --http 8000",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint directory to serve")
    add("--both", type=int, default=1, metavar="N", help="workers that prefill and decode (default 1)")
    add("--host", default="127.0.0.1", help="address the router listens on (default 127.0.0.1)")
    add("--http", type=int, default=8000, metavar="PORT", help="HTTP port (default 8000, 0 = any free one)")
    add("--grpc", type=int, default=8001, metavar="PORT", help="gRPC port (default 8001, 0 = any free one)")
    add("--served-name", metavar="NAME", help="model name of the API (default: the directory's name)")
    add(
        "--numerics",
        choices=("float32", "served"),
        help="rounding (default: served for a quantised checkpoint, else float32)",
    )
    add("--exact", action="store_true", help="logits bit-identical whatever the batch; slower")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--pages", type=int, metavar="N", help="pages of cached state per worker")
    size.add_argument("--kv-bytes", metavar="SIZE", help="memory for pages per worker, such as 2GB")
    add("--slots", type=int, metavar="N", help="sequences a worker runs at once")
    add("--prefill-tokens", type=int, metavar="N", help="prompt tokens a worker computes in one step")
    add("--threads", type=int, metavar="N", help="compute threads per worker (default: cores shared fairly)")
    add("--kernel", action="append", default=[], metavar="OP=NAME", help="force a kernel (repeatable)")
    add("--api-key", action="append", default=[], metavar="KEY", help="require this bearer key (repeatable)")
    add(
        "--api-key-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="require one of these bearer keys, one per line, that stand in no process list (repeatable)",
    )
    add("--log-level", choices=LOG_LEVELS, help="least severe log line (default info)")
    add(
        "--ready-file",
        type=Path,
        metavar="FILE",
        help="written once a request would be answered: JSON of URLs, pids",
    )
    add(
        "--start-seconds",
        type=float,
        default=3600.0,
        metavar="S",
        help="give up starting after this (default 3600)",
    )
    add(
        "--stop-seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="time to finish requests on stop (default 15)",
    )
    return parser


def _check(options: UpOptions) -> None:
    """Find what can be found in milliseconds, before a model is loaded for minutes."""
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such directory")
    load_model_config(options.model)
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


def _banner(options: UpOptions, *, http: str, grpc: str) -> list[str]:
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
        f"  try   curl -N {http}{route}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        "  stop  Ctrl-C",
        "",
    ]

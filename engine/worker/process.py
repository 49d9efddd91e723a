"""The worker process: `rorqual worker`.

Owns the life of a worker: options, gRPC door, metrics, the rank process, the host between them, and the
orderly end. A worker here takes both roles, prefill and decode. It never imports torch: the rank does.

Exit status: 0 after a drain (SIGTERM, SIGINT), 1 with one clear line when something is wrong with the
model, a port or the rank.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.plan import RankFailed, RankProgress, RankReady, RankSettings
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.rank_link import RANK_COMMAND, RankLost, RankProcess, start_rank
from engine.worker.session_server import SessionServer
from rorqual.errors import ConfigError
from rorqual.ids import WorkerId, draw_incarnation
from rorqual.metrics_endpoint import MetricsEndpoint
from rorqual.model_config import PAGE_TOKENS
from rorqual.service import (
    StopSignals,
    end_task,
    parse_address,
    remove_ready_file,
    run_service,
    until_first,
    write_ready_file,
)
from rorqual.telemetry import add_log_options, configure_logging, fields

log = logging.getLogger(__name__)

FLUSH_SECONDS_MAX = 2.0


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


def main(argv: list[str]) -> int:
    """Entry of `rorqual worker`; the exit status. Raises RorqualError for what a person can put right."""
    options, log_level = parse_options(argv)
    configure_logging(level=log_level)
    run_service(serve(options))
    return 0


def parse_options(argv: list[str]) -> tuple[WorkerOptions, str]:
    """The options of a command line, and the log level. Raises ConfigError naming the option."""
    args = _parser().parse_args(argv)
    for option in ("pages", "slots", "prefill_tokens", "threads", "drain_seconds"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise ConfigError(f"--{option.replace('_', '-')} must be above 0, not {value}")
    if args.prefill_tokens % PAGE_TOKENS:
        raise ConfigError(f"--prefill-tokens must be a multiple of {PAGE_TOKENS}, not {args.prefill_tokens}")
    if args.exact and args.threads > 1:
        raise ConfigError(f"--exact computes with one thread; leave out --threads {args.threads}")
    if not 0 <= args.metrics_port <= 65535:
        raise ConfigError(f"--metrics-port must be between 0 and 65535, not {args.metrics_port}")
    options = WorkerOptions(
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
    )
    return options, args.log_level


async def serve(options: WorkerOptions) -> None:
    """Run a worker until a signal or its rank's end. Raises RorqualError for the latter, with nothing left
    running.
    """
    if not (options.model / "config.json").is_file():
        raise ConfigError(f"--model: {options.model / 'config.json'}: no such file")
    signals = StopSignals()
    metrics = WorkerMetrics()
    server, endpoint = SessionServer(), MetricsEndpoint(metrics.registry)
    rank: RankProcess | None = None
    try:
        address = await server.start(host=options.listen[0], port=options.listen[1])
        metrics_url = await endpoint.start(host=options.listen[0], port=options.metrics_port)
        rank = await start_rank(rank_settings(options), command=options.rank_command)
        log.info("started the rank %s", fields(process=rank.pid, model=options.model))
        loading = asyncio.create_task(_load(rank, options))
        await until_first(loading, signals.stop.wait())
        if not loading.done():
            await end_task(loading)
            return
        ready = loading.result()
        host = Host(link=rank, ready=ready, config=_host_config(options), metrics=metrics)
        # Modules and stubs live as long as the process: the collector need not walk them again.
        gc.collect()
        gc.freeze()
        await server.attach(host)
        ready_content = {"address": address, "metrics": metrics_url, "processes": [os.getpid(), rank.pid]}
        write_ready_file(options.ready_file, ready_content)
        log.info("became ready %s", fields(address=address, metrics=metrics_url))
        await _serve_until_stopped(host, server, options, signals)
    finally:
        signals.close()
        await server.stop()
        await endpoint.stop()
        if rank is not None:
            await rank.stop(seconds_max=options.rank_stop_seconds_max)
        remove_ready_file(options.ready_file)


def rank_settings(options: WorkerOptions) -> RankSettings:
    return RankSettings(
        model=str(options.model),
        numerics=options.numerics,
        exact=options.exact,
        num_pages=options.num_pages,
        kv_bytes=options.kv_bytes,
        num_slots=options.num_slots,
        prefill_tokens_max=options.prefill_tokens_max,
        threads=options.threads,
        kernels=options.kernels,
    )


def parse_bytes(text: str, *, option: str) -> int:
    """A size: 1500000000, 1.5GB or 1.4GiB. Raises ConfigError naming the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{option} must be a size such as 2GB or 512MiB, not {text!r}")
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))
    if size <= 0:
        raise ConfigError(f"{option} must be above 0, not {text!r}")
    return size


async def _load(rank: RankProcess, options: WorkerOptions) -> RankReady:
    """Forward the rank's progress until it is ready. Raises RankLost."""
    while True:
        try:
            async with asyncio.timeout(options.load_seconds_max):
                message = await rank.receive()
        except TimeoutError:
            raise RankLost(
                f"the rank said nothing for {options.load_seconds_max:g} s while loading"
            ) from None
        match message:
            case RankProgress():
                progress = f"{message.done:.3g} of {message.total:.3g} {message.unit}"
                log.info("loaded %s", fields(stage=message.stage, progress=progress))
            case RankReady():
                _log_ready(message)
                return message
            case RankFailed():
                raise RankLost(message.message)
            case _:
                raise RankLost(f"the rank sent {type(message).__name__} while loading")


def _log_ready(ready: RankReady) -> None:
    log.info(
        "loaded the model %s",
        fields(
            pages=ready.num_pages,
            slots=ready.num_slots,
            weights_mb=ready.weight_bytes // 1_000_000,
            state_mb=ready.state_bytes // 1_000_000,
            mtp=ready.has_mtp,
            fingerprint=ready.model_fingerprint,
        ),
    )
    log.info("chose kernels %s", fields(**dict(ready.kernels)))
    for notice in ready.notices:  # "no MTP weights: served without drafts"
        log.info("noticed about the checkpoint: %s", notice)


async def _serve_until_stopped(
    host: Host, server: SessionServer, options: WorkerOptions, signals: StopSignals
) -> None:
    """Serve, then drain on the first signal; a second one cuts the drain short. Raises when the rank is
    lost.
    """
    serving = asyncio.create_task(host.run())
    try:
        await until_first(serving, signals.stop.wait())
        await server.refuse_probes()
        if not serving.done():
            await until_first(
                serving, host.drain(seconds_max=options.drain_seconds_max), signals.hurry.wait()
            )
        if serving.done():
            serving.result()
    finally:
        await host.flush(seconds_max=FLUSH_SECONDS_MAX)
        await end_task(serving)
        log.info("stopped serving")


def _host_config(options: WorkerOptions) -> HostConfig:
    return HostConfig(
        worker_id=WorkerId(options.worker_id or f"{socket.gethostname()}-{os.getpid()}"),
        incarnation=draw_incarnation(),
        exact=options.exact,
        prefill_tokens_max=options.prefill_tokens_max,
        plans_inflight_max=options.plans_inflight_max,
        step_seconds_max=options.step_seconds_max,
    )


def _parse_kernels(choices: list[str]) -> dict[str, str]:
    kernels: dict[str, str] = {}
    for choice in choices:
        operation, equals, name = choice.partition("=")
        if not (operation and equals and name):
            raise ConfigError(f"--kernel must be OPERATION=NAME, not {choice!r}")
        kernels[operation] = name
    return kernels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual worker",
        description="Run one worker: a host, which schedules, and its rank, which computes.",
    )
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
    add("--metrics-port", type=int, default=0, metavar="PORT", help="port of /metrics (default: any)")
    add("--ready-file", type=Path, metavar="FILE", help="written, as JSON, once the worker is ready")
    add("--worker-id", default="", metavar="NAME", help="name in logs (default: host name and process id)")
    add("--drain-seconds", type=float, default=30.0, metavar="S", help="for running sequences at the end")
    add_log_options(parser)
    return parser

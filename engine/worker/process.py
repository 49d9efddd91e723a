"""The worker process: `rorqual worker`, and what the commands of the single roles share with it.

Owns the life of a worker: gRPC door, metrics, the rank process, the host between them, and the orderly end. What a
role adds comes as a `RoleSetup`. It never imports torch: the rank does.

Exit status: 0 after a drain (SIGTERM, SIGINT), 1 with one clear line when something is wrong with the
model, a port or the rank.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from engine.plan import RankFailed, RankProgress, RankReady, RankSettings
from engine.worker.compile_caches import unusable_caches
from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.options import WorkerOptions, parse_options
from engine.worker.rank_link import RankLost, RankProcess, start_rank
from engine.worker.role import BothRole, RoleHandler
from engine.worker.session_server import SessionServer
from engine.worker.tiers.store_metrics import StoreMetrics
from engine.worker.tiers.store_tier import StoreTier
from engine.worker.tiers.storing import make_store_tier
from kvstore.budget import TAIL_SHARE
from kvstore.layout import DRAFTS_MAX
from kvstore.store.address import parse_address as parse_store_address
from rorqual.errors import ConfigError
from rorqual.ids import WorkerId, draw_incarnation
from rorqual.metrics_endpoint import MetricsEndpoint
from rorqual.service import (
    StopSignals,
    end_task,
    remove_ready_file,
    run_service,
    until_first,
    write_ready_file,
)
from rorqual.session import Role
from rorqual.telemetry import configure_logging, fields

log = logging.getLogger(__name__)

FLUSH_SECONDS_MAX = 2.0


class RoleSetup(Protocol):
    """What the command of one role brings into the worker it starts."""

    @property
    def role(self) -> Role: ...

    def services(self) -> Sequence[grpc.GenericRpcHandler[Any, Any]]:
        """More services of the worker's gRPC door. They answer UNAVAILABLE before `make` was called."""
        ...

    def make(self, ready: RankReady, config: HostConfig, metrics: WorkerMetrics) -> RoleHandler:
        """The rank is ready. Raises RorqualError."""
        ...

    async def close(self) -> None: ...


class BothSetup:
    """A worker that computes prompts and decodes."""

    role = Role.BOTH

    def services(self) -> Sequence[grpc.GenericRpcHandler[Any, Any]]:
        return ()

    def make(self, ready: RankReady, config: HostConfig, metrics: WorkerMetrics) -> RoleHandler:
        return BothRole()

    async def close(self) -> None:
        pass


def main(argv: list[str]) -> int:
    """Entry of `rorqual worker`; the exit status. Raises RorqualError for what a person can put right."""
    options, log_level = parse_options(argv)
    configure_logging(level=log_level)
    run_service(serve(options))
    return 0


async def serve(options: WorkerOptions, setup: RoleSetup | None = None) -> None:
    """Run a worker until a signal or its rank's end. Raises RorqualError for the latter, with nothing left
    running.
    """
    setup = setup or BothSetup()
    if not (options.model / "config.json").is_file():
        raise ConfigError(f"--model: {options.model / 'config.json'}: no such file")
    if options.store is not None:
        parse_store_address(options.store.url)  # what is wrong with it is told before weights are read
    for line in unusable_caches(os.environ):
        log.warning("cannot keep compiled kernels where they were to be kept %s", fields(cache=line))
    signals = StopSignals()
    metrics = WorkerMetrics()
    server = SessionServer(services=setup.services(), tls=options.tls)
    endpoint = MetricsEndpoint(metrics.registry, missing=lambda: "the model is being loaded")
    config = _host_config(options)
    rank: RankProcess | None = None
    try:
        address = await server.start(host=options.listen[0], port=options.listen[1])
        metrics_url = await endpoint.start(host=options.listen[0], port=options.metrics_port)
        rank = await start_rank(rank_settings(options, config, setup.role), command=options.rank_command)
        log.info("started the rank %s", fields(process=rank.pid, model=options.model))
        loading = asyncio.create_task(_load(rank, options))
        await until_first(loading, signals.stop.wait())
        if not loading.done():
            await end_task(loading)
            return
        ready = loading.result()
        if options.drafts == "auto" and not ready.drafts_max:
            log.info("serves without drafts %s", fields(reason="the checkpoint has no MTP block"))
        handler = setup.make(ready, config, metrics)
        store: StoreTier | None = None
        if options.store is not None:
            counted = StoreMetrics(metrics.registry)
            store = make_store_tier(options.store, ready, role=setup.role, metrics=counted)
        host = Host(link=rank, ready=ready, config=config, metrics=metrics, handler=handler, store=store)
        # Modules and stubs live as long as the process: the collector need not walk them again.
        gc.collect()
        gc.freeze()
        await server.attach(host)
        endpoint.missing = lambda: "the worker is draining" if host.draining else ""
        ready_content = {"address": address, "metrics": metrics_url, "processes": [os.getpid(), rank.pid]}
        write_ready_file(options.ready_file, ready_content)
        log.info("became ready %s", fields(address=address, metrics=metrics_url))
        await _serve_until_stopped(host, server, options, signals)
    finally:
        signals.close()
        await server.stop()
        await setup.close()
        await endpoint.stop()
        if rank is not None:
            await rank.stop(seconds_max=options.rank_stop_seconds_max)
        remove_ready_file(options.ready_file)


def rank_settings(options: WorkerOptions, config: HostConfig, role: Role) -> RankSettings:
    is_single = role is not Role.BOTH
    num_records = options.num_records
    tail_share = TAIL_SHARE if options.prefix_cache and num_records is None else 0.0
    if num_records is None:
        # Where nothing is handed over records are tails only, one of which each decoding sequence may hold.
        num_records = 2 * options.num_slots if is_single else options.num_slots * options.prefix_cache
    elif not (is_single or options.prefix_cache):
        num_records = 0
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
        transfer=options.transfer if is_single else "",
        num_records=num_records,
        tail_share=tail_share,
        agent=f"{config.worker_id}#{config.incarnation:x}",
        drafts_max=DRAFTS_MAX if options.drafts == "auto" else options.drafts,
        drafts_required=options.drafts not in ("auto", 0),
        num_host_pages=options.num_host_pages,
        host_bytes=options.host_bytes,
        shares_host_memory=options.store is not None,
        num_hot_buffers=options.num_hot_buffers,
        num_hot_rows=options.num_hot_rows,
        num_thin_pages=options.num_thin_pages,
    )


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
            host_pages=ready.num_host_pages,
            thin_pages=ready.num_thin_pages,
            hot_buffers=ready.num_hot_buffers,
            weights_mb=ready.weight_bytes // 1_000_000,
            state_mb=ready.state_bytes // 1_000_000,
            mtp=ready.has_mtp,
            drafts_max=ready.drafts_max,
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
        drafts=options.drafts,
        prefix_cache=options.prefix_cache,
        writes=None if options.store is None else options.store.writes,
    )

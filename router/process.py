"""The router process: `rorqual router`.

Owns the life of a router: options, the prompt side, the fleet, the dispatcher and the two gateways,
readiness and the orderly end. It never imports torch or the engine.

Exit status: 0 after SIGTERM or SIGINT, 1 with one clear line for a port in use, a bad model directory, or
when no workers could be reached that answer a request between them. With --discover it waits for these instead, not
ready.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvstore.store.address import parse_address as parse_store_address
from kvstore.store.finder import StoreFinder
from rorqual.api_keys import ApiKeyKeeper, ApiKeySource
from rorqual.clock import Clock, SystemClock
from rorqual.discovery import SourceSpec, make_source, parse_source
from rorqual.errors import ConfigError, RorqualError
from rorqual.model_config import load_model_config
from rorqual.performance import FLASH, HARDWARE, model_costs
from rorqual.service import (
    STORE_VARIABLE,
    StopSignals,
    check_above_zero,
    end_task,
    format_address,
    parse_address,
    remove_ready_file,
    run_service,
    until_first,
    write_ready_file,
)
from rorqual.telemetry import add_log_options, configure_logging, fields
from rorqual.tls import TlsFiles, add_gateway_tls_options, add_tls_options, read_gateway_tls, read_tls
from router.admission import Admission
from router.dispatch import ChoiceTextLike, DispatchConfig, Dispatcher
from router.finding import WORKERS_MAX, Finding, FindingMetrics
from router.fleet import Fleet, FleetConfig
from router.fleet_metrics import FleetMetrics
from router.gateway.server import HttpGateway, HttpSettings
from router.gateway_metrics import GatewayMetrics
from router.generation import Generation
from router.grpc_gateway import GrpcGateway, GrpcSettings
from router.placement.policies import NAMES, WorkerModel, make_placement
from router.prompt import PromptEncoder
from router.session_client import GrpcTransport
from router.stored import StoreKnowledge
from router.text import ChoiceText, StopStrings

log = logging.getLogger(__name__)

API_KEY_SECONDS = 2.0
"""From one look at the files of API keys to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    workers: tuple[str, ...]  # these stay
    discover: tuple[SourceSpec, ...] = ()  # these name others that come and go
    model: Path  # for its tokenizer and prompt texts; weights are the workers'
    served_name: str = ""  # empty: the model directory's name
    http: tuple[str, int] = ("127.0.0.1", 8000)
    grpc: tuple[str, int] = ("127.0.0.1", 8001)
    api_keys: ApiKeySource = field(default_factory=ApiKeySource, repr=False)
    shared_cache_salt: str = ""
    ready_file: Path | None = None
    requests_max: int = 1024  # a request of several choices counts as that many
    sequences_per_worker_max: int = 1024
    credit_queue_max: int = 1024
    bind_early_tokens: int = 8192
    placement: str = "rorqual"
    store: str = field(default="", repr=False)  # URL, perhaps with a password; empty: none
    hardware: str = ""  # of workers, for predictions; empty: not known
    devices_per_worker: int = 1
    start_seconds_max: float = 30.0  # until enough workers are connected to answer a request
    connect_seconds_max: float = 10.0
    silence_seconds_max: float = 8.0
    place_seconds_max: float = 10.0
    credit_seconds_max: float = 60.0
    first_token_seconds_max: float = 600.0
    hand_over_seconds_max: float = 30.0
    next_token_seconds_max: float = 120.0
    drain_seconds_max: float = 30.0
    tls: TlsFiles | None = None  # towards workers
    gateway_tls: TlsFiles | None = None  # towards clients


def main(argv: list[str]) -> int:
    """Entry of `rorqual router`; the exit status. Raises RorqualError for what a person can put right."""
    options, log_level = parse_options(argv)
    configure_logging(level=log_level)
    run_service(serve(options))
    return 0


def parse_options(argv: list[str]) -> tuple[RouterOptions, str]:
    """The options of a command line, and the log level. Raises ConfigError naming the option."""
    args = _parser().parse_args(argv)
    check_above_zero(args, *_ABOVE_0)
    if args.bind_early_tokens < 0:
        raise ConfigError(f"--bind-early-tokens must be 0 or more, not {args.bind_early_tokens}")
    workers = tuple(format_address(*parse_address(text, option="--worker")) for text in args.worker)
    if len(set(workers)) != len(workers):
        raise ConfigError("--worker names the same address twice")
    discover = tuple(parse_source(text, option="--discover") for text in dict.fromkeys(args.discover))
    if not workers and not discover:
        raise ConfigError("a router needs workers: give --worker HOST:PORT or --discover SOURCE")
    if args.store and args.store != "none":
        parse_store_address(args.store)  # what is wrong with it is told at once, without the password
    options = RouterOptions(
        workers=workers,
        discover=discover,
        model=args.model,
        served_name=args.served_name,
        http=parse_address(args.http, option="--http"),
        grpc=parse_address(args.grpc, option="--grpc"),
        api_keys=ApiKeySource(given=tuple(args.api_key), files=tuple(args.api_key_file)),
        shared_cache_salt=args.shared_cache_salt,
        ready_file=args.ready_file,
        requests_max=args.requests_max,
        sequences_per_worker_max=args.sequences_per_worker,
        credit_queue_max=args.credit_queue,
        bind_early_tokens=args.bind_early_tokens,
        placement=args.placement,
        store="" if args.store == "none" else args.store,
        hardware=args.hardware,
        devices_per_worker=args.devices_per_worker,
        start_seconds_max=args.start_seconds,
        connect_seconds_max=args.connect_seconds,
        silence_seconds_max=args.silence_seconds,
        place_seconds_max=args.place_seconds,
        credit_seconds_max=args.credit_seconds,
        first_token_seconds_max=args.first_token_seconds,
        hand_over_seconds_max=args.hand_over_seconds,
        next_token_seconds_max=args.next_token_seconds,
        drain_seconds_max=args.drain_seconds,
        tls=read_tls(args, serves=False),
        gateway_tls=read_gateway_tls(args),
    )
    return options, args.log_level


async def serve(options: RouterOptions, *, clock: Clock | None = None) -> None:
    """Run a router until a signal. Raises RorqualError when it cannot start, with nothing left running."""
    if not options.model.is_dir():
        raise ConfigError(f"--model: {options.model}: no such directory")
    api_keys = ApiKeyKeeper(options.api_keys)
    clock = clock or SystemClock()
    signals = StopSignals()
    prompts = PromptEncoder.from_model_dir(options.model)
    registry = CollectorRegistry()
    fleet, dispatcher = build_dispatcher(options, prompts=prompts, registry=registry, clock=clock)
    finding = Finding(
        [make_source(spec) for spec in options.discover], fleet=fleet, metrics=FindingMetrics(registry)
    )
    http, grpc = _gateways(
        options,
        dispatcher,
        api_keys=api_keys.keys,
        finding=finding,
        prompts=prompts,
        registry=registry,
        clock=clock,
    )
    keeping_keys = asyncio.create_task(_keep_api_keys(api_keys, http, grpc))
    keeping_sessions = asyncio.create_task(_keep(fleet, finding, dispatcher.store))
    try:
        http_url = await _listen(http.start(), option="--http", address=options.http)
        grpc_address = await _listen(grpc.start(), option="--grpc", address=options.grpc)
        log.info("started to listen %s", fields(http=http_url, grpc=grpc_address))
        connecting = finding.until_connected(seconds_max=options.start_seconds_max)
        await until_first(connecting, keeping_sessions, grpc.watch(), signals.stop.wait())
        _raise_if_ended(keeping_sessions)
        if not signals.stop.is_set():
            if fleet.missing() and not options.discover:
                raise _no_worker(fleet, options)
            await grpc.refresh_health()
            write_ready_file(options.ready_file, {"http": http_url, "grpc": grpc_address, "pid": os.getpid()})
            log.info("became ready %s", fields(http=http_url, grpc=grpc_address))
            _freeze_what_stays()
            await until_first(keeping_sessions, grpc.watch(), signals.stop.wait())
            _raise_if_ended(keeping_sessions)
    finally:
        remove_ready_file(options.ready_file)
        # Streams that run are finished while their workers are still there to finish them.
        stopping = asyncio.create_task(_stop_gateways(http, grpc))
        await until_first(stopping, signals.hurry.wait())
        stopped = stopping.done()
        await end_task(stopping)
        await end_task(keeping_keys)
        await end_task(keeping_sessions)
        await prompts.aclose()
        signals.close()
        if stopped:
            stopping.result()  # a fault of the stopping itself is not hidden
        log.info("stopped serving")


def build_dispatcher(
    options: RouterOptions, *, prompts: PromptEncoder, registry: CollectorRegistry, clock: Clock
) -> tuple[Fleet, Dispatcher]:
    """The fleet, which somebody must `run`, and the dispatcher on top of it."""
    metrics = FleetMetrics(registry)
    fleet = Fleet(
        addresses=options.workers,
        transport=GrpcTransport(silence_seconds_max=options.silence_seconds_max, tls=options.tls),
        config=FleetConfig(
            connect_seconds_max=options.connect_seconds_max,
            silence_seconds_max=options.silence_seconds_max,
            sequences_per_worker_max=options.sequences_per_worker_max,
            credit_waiting_max=options.credit_queue_max,
        ),
        metrics=metrics,
        router_id=f"router-{os.getpid()}",
        randomness=random.Random(),
        workers_max=WORKERS_MAX if options.discover else 0,
    )

    def make_texts(generation: Generation) -> Sequence[ChoiceTextLike]:
        stops = StopStrings(generation.stop)
        return [
            ChoiceText(tokenizer=prompts.tokenizer, stops=stops, split_reasoning=generation.split_reasoning)
            for _ in range(generation.num_choices)
        ]

    config = DispatchConfig(
        served_name=options.served_name or options.model.resolve().name,
        created=int(clock.wall()),
        place_seconds_max=options.place_seconds_max,
        credit_seconds_max=options.credit_seconds_max,
        first_token_seconds_max=options.first_token_seconds_max,
        hand_over_seconds_max=options.hand_over_seconds_max,
        next_token_seconds_max=options.next_token_seconds_max,
        bind_early_tokens=options.bind_early_tokens,
    )
    placement = make_placement(options.placement, caches=fleet.picture, workers=_worker_model(options))
    dispatcher = Dispatcher(
        fleet=fleet,
        placement=placement,
        make_texts=make_texts,
        config=config,
        metrics=metrics,
        store=_store(options, fleet, metrics=metrics, clock=clock),
    )
    return fleet, dispatcher


def _store(
    options: RouterOptions, fleet: Fleet, *, metrics: FleetMetrics, clock: Clock
) -> StoreKnowledge | None:
    if not options.store:
        return None
    return StoreKnowledge(
        StoreFinder(options.store, clock=clock),
        caches=fleet.picture,
        rebuild_pages=_worker_model(options).costs.rebuild_pages,
        metrics=metrics,
    )


async def _keep(fleet: Fleet, finding: Finding, store: StoreKnowledge | None) -> None:
    """Sessions, the search for workers, and the connection to the store. Ends only by being cancelled, or by a bug."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fleet.run())
        tasks.create_task(finding.run())
        if store is not None:
            tasks.create_task(store.run())


async def _keep_api_keys(keeper: ApiKeyKeeper, http: HttpGateway, grpc: GrpcGateway) -> None:
    """Until cancelled."""
    while True:
        await asyncio.sleep(API_KEY_SECONDS)
        keys = keeper.changed()
        if keys is not None:
            http.replace_api_keys(keys)
            grpc.replace_api_keys(keys)


def _worker_model(options: RouterOptions) -> WorkerModel:
    """What predictions of times are made from. A directory with a tokenizer alone stands for a released model."""
    has_config = (options.model / "config.json").is_file()
    config = load_model_config(options.model) if has_config else FLASH
    return WorkerModel(
        costs=model_costs(config), hardware=options.hardware, num_devices=options.devices_per_worker
    )


def _gateways(
    options: RouterOptions,
    dispatcher: Dispatcher,
    *,
    api_keys: tuple[str, ...],
    finding: Finding,
    prompts: PromptEncoder,
    registry: CollectorRegistry,
    clock: Clock,
) -> tuple[HttpGateway, GrpcGateway]:
    metrics = GatewayMetrics(registry)
    admission = Admission(num_choices_max=options.requests_max)
    metrics.choices_inflight.set_function(lambda: admission.num_choices)
    http = HttpGateway(
        generator=dispatcher,
        prompts=prompts,
        settings=HttpSettings(
            host=options.http[0],
            port=options.http[1],
            api_keys=api_keys,
            shared_cache_salt=options.shared_cache_salt,
            drain_seconds_max=options.drain_seconds_max,
            tls=options.gateway_tls,
        ),
        metrics=metrics,
        admission=admission,
        clock=clock,
        missing=finding.missing,
    )
    grpc = GrpcGateway(
        generator=dispatcher,
        prompts=prompts,
        settings=GrpcSettings(
            host=options.grpc[0],
            port=options.grpc[1],
            api_keys=api_keys,
            shared_cache_salt=options.shared_cache_salt,
            drain_seconds_max=options.drain_seconds_max,
            tls=options.gateway_tls,
        ),
        metrics=metrics,
        admission=admission,
        clock=clock,
    )
    return http, grpc


async def _listen(start: Awaitable[str], *, option: str, address: tuple[str, int]) -> str:
    try:
        return await start
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot listen on {format_address(*address)}: {error.strerror or error}"
        ) from None


def _no_worker(fleet: Fleet, options: RouterOptions) -> RorqualError:
    # Every worker may be there and none of the role that is missing.
    what = fleet.missing() if fleet.welcomes() else "no worker could be reached"
    why = "; ".join(fleet.failures()) or "none of --worker is one"
    return RorqualError(f"{what} within {options.start_seconds_max:g} s: {why}")


def _freeze_what_stays() -> None:
    """Modules, tokenizer and tables are there for good: the collector need not walk them again and again
    while every stream waits."""
    gc.collect()
    gc.freeze()


def _raise_if_ended(keeping_sessions: asyncio.Task[None]) -> None:
    """The fleet runs until it is cancelled: if it has ended, it was by a bug, which is not hidden."""
    if keeping_sessions.done():
        keeping_sessions.result()


async def _stop_gateways(http: HttpGateway, grpc: GrpcGateway) -> None:
    await asyncio.gather(http.stop(), grpc.stop())


_ABOVE_0 = (
    "requests_max",
    "sequences_per_worker",
    "credit_queue",
    "devices_per_worker",
    "start_seconds",
    "connect_seconds",
    "silence_seconds",
    "place_seconds",
    "credit_seconds",
    "first_token_seconds",
    "hand_over_seconds",
    "next_token_seconds",
    "drain_seconds",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual router",
        description="Run the router: HTTP and gRPC in front of workers. A worker says itself what it does: a request"
        " is served by one of both roles, or split over a prefill and a decode worker.",
    )
    add = parser.add_argument
    add(
        "--worker",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a worker of any role, for as long as the router runs; repeatable",
    )
    add(
        "--discover",
        action="append",
        default=[],
        metavar="SOURCE",
        help="where other workers are named, that come and go: static:HOST:PORT,..., dns:NAME:PORT,"
        " file:PATH?pool=NAME, or kubernetes:NAMESPACE?selector=LABELS&port=NAME (EndpointSlices; NAMESPACE may be left"
        " out: this pod's). The router then does not end without workers but is not ready. Repeatable",
    )
    add("--model", type=Path, required=True, metavar="DIR", help="model directory, for its tokenizer")
    add("--served-name", default="", metavar="NAME", help="model name in the API (default: the directory's)")
    add("--http", default="127.0.0.1:8000", metavar="HOST:PORT", help="OpenAI-style API; port 0: any")
    add("--grpc", default="127.0.0.1:8001", metavar="HOST:PORT", help="gRPC API; port 0: any")
    add("--api-key", action="append", default=[], metavar="KEY", help="ask clients for it; repeatable")
    add(
        "--api-key-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="keys, one per line, that stand in no process list; read again when it changes; repeatable",
    )
    add(
        "--shared-cache-salt",
        default="",
        metavar="NAME",
        help="let clients share what workers keep of prompts, whatever their keys; NAME separates deployments. An"
        " answer that comes sooner tells that others have asked alike (default: each key by itself; without keys all)",
    )
    add("--ready-file", type=Path, metavar="FILE", help="written, as JSON, once a request would be answered")
    add("--requests-max", type=int, default=1024, metavar="N", help="choices at once (default 1024)")
    add("--sequences-per-worker", type=int, default=1024, metavar="N", help="sequences open on one worker")
    add_log_options(parser)
    _add_placement_options(parser)
    _add_split_options(parser)
    _add_deadlines(parser)
    add_tls_options(parser)
    add_gateway_tls_options(parser)
    return parser


def _add_placement_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--placement",
        choices=NAMES,
        default="rorqual",
        help="who computes a prompt. rorqual: whoever gives the first token soonest, by what workers keep and have to"
        " do (-nofetch: workers read nothing from each other); least_wait: by load alone; the others are rules of other"
        " routers, to compare with (default rorqual)",
    )
    group.add_argument(
        "--store",
        default=os.environ.get(STORE_VARIABLE, ""),
        metavar="URL",
        help="the Redis or Valkey that the workers share (their --store): where the fleet keeps little of a prompt, it"
        " is asked what it has, for 5 ms at most, and a prompt that can be read goes to whoever is free. The router"
        f" reads none of it. Rather give it in {STORE_VARIABLE}, which other users of the machine cannot see; none: no"
        " store (default: none)",
    )
    group.add_argument(
        "--hardware",
        choices=("", *HARDWARE),
        default="",
        metavar="NAME",
        help="what workers run on, for predictions until they have measured something"
        f" ({', '.join(HARDWARE)}; default: not known)",
    )
    group.add_argument(
        "--devices-per-worker",
        type=int,
        default=1,
        metavar="N",
        help="accelerators of one worker (default 1)",
    )


def _add_split_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prefill and decode workers")
    group.add_argument(
        "--credit-queue",
        type=int,
        default=1024,
        metavar="N",
        help="sequences that may wait until a decode worker has room for them, before their prompts are computed;"
        " beyond it requests are refused with 503 (default 1024)",
    )
    group.add_argument(
        "--bind-early-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="decode workers read the state of prompts of so many tokens while they are computed, of shorter ones"
        " when they are done; 0: always while (default 8192)",
    )


def _add_deadlines(parser: argparse.ArgumentParser) -> None:
    text = "Each stage of a request has one, and rorqual_router_stages_overdue counts those missed."
    group = parser.add_argument_group("deadlines", text)

    def add(option: str, seconds: float, text: str) -> None:
        group.add_argument(
            option, type=float, default=seconds, metavar="S", help=f"{text} (default {seconds:g})"
        )

    add("--start-seconds", 30.0, "until workers are reached; with --discover it only tells what is missing")
    add("--connect-seconds", 10.0, "for a worker to welcome us; then it is tried again")
    add("--silence-seconds", 8.0, "without a word from a worker, which reports every second; then it is lost")
    add("--place-seconds", 10.0, "a request waits while no worker is connected that could serve it")
    add("--credit-seconds", 60.0, "a request waits until a decode worker has room for it")
    add("--first-token-seconds", 600.0, "to the first token, all waiting before it included")
    add(
        "--hand-over-seconds",
        30.0,
        "from the first token, of the prefill worker, to the decode worker's first",
    )
    add("--next-token-seconds", 120.0, "from one token to the next")
    add("--drain-seconds", 30.0, "for running requests at the end")

"""The process of a prefill worker: `rorqual prefill`. A worker (`engine.worker.process`) that lends state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from engine.plan import RankReady
from engine.worker.host import HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.options import WorkerOptions, add_transfer_options, worker_options, worker_parser
from engine.worker.process import serve
from engine.worker.role import RoleHandler
from engine.worker.sharing.exposure import Exposure
from engine.worker.sharing.handler import SharingHandler
from engine.worker.sharing.key_lending import KeyLender, KeyLenderConfig, KeyLendingMetrics
from engine.worker.sharing.lending_client import GrpcLenders
from engine.worker.sharing.lending_server import LendingServer
from engine.worker.sharing.peer_reading import PeerReader, PeerReaderConfig, PeerReadMetrics
from prefill_worker.lending import Lender, LenderConfig
from prefill_worker.metrics import LendingMetrics
from rorqual.clock import SystemClock
from rorqual.errors import ConfigError
from rorqual.service import check_above_zero, run_service
from rorqual.session import Role
from rorqual.telemetry import configure_logging
from rorqual.tls import TlsFiles


def main(argv: list[str]) -> int:
    """Entry of `rorqual prefill`; the exit status. Raises RorqualError for what a person can put right."""
    options, setup, log_level = parse_options(argv)
    configure_logging(level=log_level)
    run_service(serve(options, setup))
    return 0


def parse_options(argv: list[str]) -> tuple[WorkerOptions, PrefillSetup, str]:
    """The options of a command line, and the log level. Raises ConfigError naming the option."""
    parser = worker_parser(
        prog="rorqual prefill",
        description="Run one prefill worker: it computes prompts, samples the first token, and lends the state to a"
        " decode worker, which reads it out of this worker's memory under a lease.",
        epilog="Decode workers call the Lending service at the address that the router was given for this worker"
        " (--worker): they must be able to reach it.",
        drafts_help="anything but 0: keep and lend the MTP block's state, so that decode workers can draft from their"
        " first step on. Both sides must do so, or neither (default 0)",
    )
    add_transfer_options(parser)
    parser.add_argument(
        "--lease-seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="a lease ends this long after its last renewal (default 15)",
    )
    args = parser.parse_args(argv)
    options = worker_options(args)
    check_above_zero(args, "records", "transfer_seconds", "lease_seconds")
    if options.num_hot_buffers:
        raise ConfigError(
            "--hot-buffers is for workers that decode: what a prefill worker computes, it lends whole"
        )
    if args.transfer_seconds >= args.lease_seconds:
        raise ConfigError(
            f"--lease-seconds ({args.lease_seconds:g}) must be above --transfer-seconds ({args.transfer_seconds:g}):"
            " no read begins with less of its lease left than it may take"
        )
    setup = PrefillSetup(
        lease_seconds=args.lease_seconds, transfer_seconds_max=args.transfer_seconds, tls=options.tls
    )
    return options, setup, args.log_level


class PrefillSetup:
    role = Role.PREFILL

    def __init__(
        self, *, lease_seconds: float, transfer_seconds_max: float, tls: TlsFiles | None = None
    ) -> None:
        self._tls = tls
        self._lease_seconds = lease_seconds
        self._transfer_seconds_max = transfer_seconds_max
        self._server = LendingServer()
        self._lenders: GrpcLenders | None = None

    def services(self) -> Sequence[grpc.GenericRpcHandler[Any, Any]]:
        return (self._server.handler(),)

    def make(self, ready: RankReady, config: HostConfig, metrics: WorkerMetrics) -> RoleHandler:
        assert ready.endpoint is not None, "the rank exports no memory"
        lending_metrics, exposure, clock = LendingMetrics(metrics.registry), Exposure(), SystemClock()
        lender = Lender(
            LenderConfig(
                worker_id=config.worker_id,
                incarnation=config.incarnation,
                wire_id=ready.wire_id,
                num_records=ready.num_records,
                lease_seconds=self._lease_seconds,
                transfer_seconds_max=self._transfer_seconds_max,
            ),
            clock=clock,
            metrics=lending_metrics,
            exposure=exposure,
        )
        keys = KeyLender(
            KeyLenderConfig(
                worker_id=config.worker_id,
                incarnation=config.incarnation,
                wire_id=ready.wire_id,
                lease_seconds=self._lease_seconds,
                transfer_seconds_max=self._transfer_seconds_max,
            ),
            clock=clock,
            metrics=KeyLendingMetrics(metrics.registry),
            exposure=exposure,
        )
        self._server.attach(
            keys,
            others=(lender,),
            endpoint=ready.endpoint,
            endpoints_sent=lending_metrics.endpoints_sent,
        )
        self._lenders = GrpcLenders(tls=self._tls)
        reader = PeerReader(
            PeerReaderConfig(
                wire_id=ready.wire_id,
                num_page_components=ready.num_page_components,
                transfer_seconds_max=self._transfer_seconds_max,
            ),
            lenders=self._lenders,
            clock=clock,
            metrics=PeerReadMetrics(metrics.registry),
        )
        return SharingHandler(lender, keys=keys, reader=reader)

    async def close(self) -> None:
        if self._lenders is not None:
            await self._lenders.close()

"""The process of a decode worker: `rorqual decode`. A worker (`engine.worker.process`) that reads leased state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from decode_worker.borrowing import Borrower, BorrowerConfig
from decode_worker.metrics import BorrowingMetrics
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
from rorqual.clock import SystemClock
from rorqual.service import check_above_zero, run_service
from rorqual.session import Role
from rorqual.telemetry import configure_logging
from rorqual.tls import TlsFiles


def main(argv: list[str]) -> int:
    """Entry of `rorqual decode`; the exit status. Raises RorqualError for what a person can put right."""
    options, setup, log_level = parse_options(argv)
    configure_logging(level=log_level)
    run_service(serve(options, setup))
    return 0


def parse_options(argv: list[str]) -> tuple[WorkerOptions, DecodeSetup, str]:
    """The options of a command line, and the log level. Raises ConfigError naming the option."""
    parser = worker_parser(
        prog="rorqual decode",
        description="Run one decode worker: it reads the state of computed prompts out of prefill workers' memory and"
        " generates from there.",
        epilog="A sequence that has to give up its pages is computed anew here, so --prefill-tokens matters a little.",
    )
    add_transfer_options(parser)
    parser.add_argument(
        "--call-seconds",
        type=float,
        default=3.0,
        metavar="S",
        help="deadline of one call to a prefill worker: its endpoint, a renewal, a release (default 3)",
    )
    parser.add_argument(
        "--offer-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="for the next pages of a prompt that is still computed, with early binding (default 600)",
    )
    args = parser.parse_args(argv)
    options = worker_options(args)
    check_above_zero(args, "records", "transfer_seconds", "call_seconds", "offer_seconds")
    setup = DecodeSetup(
        transfer_seconds_max=args.transfer_seconds,
        call_seconds_max=args.call_seconds,
        offer_seconds_max=args.offer_seconds,
        tls=options.tls,
    )
    return options, setup, args.log_level


class DecodeSetup:
    role = Role.DECODE

    def __init__(
        self,
        *,
        transfer_seconds_max: float,
        call_seconds_max: float,
        offer_seconds_max: float,
        tls: TlsFiles | None = None,
    ) -> None:
        self._tls = tls
        self._transfer_seconds_max = transfer_seconds_max
        self._call_seconds_max = call_seconds_max
        self._offer_seconds_max = offer_seconds_max
        self._lenders: GrpcLenders | None = None
        self._server = LendingServer()

    def services(self) -> Sequence[grpc.GenericRpcHandler[Any, Any]]:
        return (self._server.handler(),)

    def make(self, ready: RankReady, config: HostConfig, metrics: WorkerMetrics) -> RoleHandler:
        assert ready.endpoint is not None, "the rank has no engine of transfers"
        self._lenders = GrpcLenders(tls=self._tls)
        borrowing_metrics, clock = BorrowingMetrics(metrics.registry), SystemClock()
        borrower = Borrower(
            BorrowerConfig(
                wire_id=ready.wire_id,
                num_slots=ready.num_slots,
                num_page_components=ready.num_page_components,
                transfer_seconds_max=self._transfer_seconds_max,
                call_seconds_max=self._call_seconds_max,
                offer_seconds_max=self._offer_seconds_max,
            ),
            lenders=self._lenders,
            clock=clock,
            metrics=borrowing_metrics,
        )
        keys = KeyLender(
            KeyLenderConfig(
                worker_id=config.worker_id,
                incarnation=config.incarnation,
                wire_id=ready.wire_id,
                lease_seconds=max(15.0, 1.5 * self._transfer_seconds_max),
                transfer_seconds_max=self._transfer_seconds_max,
            ),
            clock=clock,
            metrics=KeyLendingMetrics(metrics.registry),
            exposure=Exposure(),
        )
        self._server.attach(keys, endpoint=ready.endpoint, endpoints_sent=borrowing_metrics.endpoints_sent)
        return SharingHandler(borrower, keys=keys)

    async def close(self) -> None:
        if self._lenders is not None:
            await self._lenders.close()

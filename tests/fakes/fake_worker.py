"""A whole worker, real but for its rank: `python fake_worker.py [--role ROLE] [--fail MODE] [--step-ms M] -- OPTIONS`.

The options are those of `rorqual worker`, `rorqual prefill` or `rorqual decode`, as the role is."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from decode_worker.process import DecodeSetup
from engine.worker.options import add_transfer_options, worker_options, worker_parser
from engine.worker.process import RoleSetup, serve
from prefill_worker.process import PrefillSetup
from rorqual.errors import RorqualError
from rorqual.processes import die_with_parent
from rorqual.service import run_service
from rorqual.telemetry import configure_logging

CALL_SECONDS_MAX, OFFER_SECONDS_MAX = 3.0, 60.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--role", choices=["both", "prefill", "decode"], default="both")
    parser.add_argument("--fail", default=None)
    parser.add_argument("--step-ms", default="0")
    parser.add_argument("--no-mtp", action="store_true")
    parser.add_argument("--positions-max", default=None)
    parser.add_argument("--step-seconds-max", type=float, default=600.0)
    parser.add_argument("worker", nargs="*")
    args = parser.parse_args()
    die_with_parent(args.parent)
    command = [
        sys.executable,
        str(Path(__file__).with_name("fake_rank_process.py")),
        "--step-ms",
        args.step_ms,
    ]
    if args.no_mtp:
        command.append("--no-mtp")
    if args.fail:
        command += ["--fail", args.fail]
    if args.positions_max:
        command += ["--positions-max", args.positions_max]
    try:
        worker = _worker_arguments(args.role, args.worker)
        configure_logging(level=worker.log_level)
        options = dataclasses.replace(
            worker_options(worker),
            rank_command=tuple(command),
            rank_stop_seconds_max=0.5,
            step_seconds_max=args.step_seconds_max,
        )
        run_service(serve(options, _setup(args.role, worker)))
    except RorqualError as error:
        # As `rorqual.cli` does it.
        print(f"rorqual: {error}", file=sys.stderr)
        return 1
    return 0


def _worker_arguments(role: str, arguments: list[str]) -> argparse.Namespace:
    parser = worker_parser(prog="fake worker", description="A worker over a fake rank.")
    if role != "both":
        add_transfer_options(parser)
        parser.add_argument("--lease-seconds", type=float, default=15.0)
    return parser.parse_args(arguments)


def _setup(role: str, worker: argparse.Namespace) -> RoleSetup | None:
    if role == "both":
        return None
    if role == "prefill":
        return PrefillSetup(lease_seconds=worker.lease_seconds, transfer_seconds_max=worker.transfer_seconds)
    return DecodeSetup(
        transfer_seconds_max=worker.transfer_seconds,
        call_seconds_max=CALL_SECONDS_MAX,
        offer_seconds_max=OFFER_SECONDS_MAX,
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""A whole worker, real but for its rank: `python fake_worker.py [--fail MODE] [--step-ms M] -- WORKER OPTIONS`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from engine.worker.options import parse_options
from engine.worker.process import serve
from rorqual.errors import RorqualError
from rorqual.processes import die_with_parent
from rorqual.service import run_service
from rorqual.telemetry import configure_logging


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--fail", default=None)
    parser.add_argument("--step-ms", default="0")
    parser.add_argument("--no-mtp", action="store_true")
    parser.add_argument("--step-seconds-max", type=float, default=600.0)
    parser.add_argument("worker", nargs="*")
    args = parser.parse_args()
    die_with_parent(args.parent)
    command = [sys.executable, str(Path(__file__).with_name("fake_rank.py")), "--step-ms", args.step_ms]
    if args.no_mtp:
        command.append("--no-mtp")
    if args.fail:
        command += ["--fail", args.fail]
    try:
        options, log_level = parse_options(args.worker)
        configure_logging(level=log_level)
        options = dataclasses.replace(
            options,
            rank_command=tuple(command),
            rank_stop_seconds_max=0.5,
            step_seconds_max=args.step_seconds_max,
        )
        run_service(serve(options))
    except RorqualError as error:
        # As `rorqual.cli` does it.
        print(f"rorqual: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

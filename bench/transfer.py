"""Hand-over between two processes: reads through our transfer thread beside plain NIXL with the same runs.

Pages lie scattered on both sides, so nothing is merged. A read is timed from its first post to its last DONE, on both
sides; of ours, digests and the way between threads (submission to event, without the read and the digests) have columns
of their own, and so have the calls to the owner (two renewals and a release). Beside it stand the same runs as plain
copies within one process. Ratios are of one round each, in which the sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from bench import lending_calls
from bench.transfer_pair import CaseRounds
from rorqual.errors import RorqualError

PATHS = {
    "shm": ("shm", {}),
    "cma": ("nixl", {"UCX_TLS": "tcp,cma"}),
    "tcp": ("nixl", {"UCX_TLS": "tcp"}),
}
"""Engine and environment of both processes."""

REQUIRED = 0.8
SECONDS_MAX = 300


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns each side takes (default 9)")
    parser.add_argument("--only", choices=PATHS, metavar="PATH", help=f"one of: {', '.join(PATHS)}")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores; GB/s, medians of {args.rounds} rounds; ratio to plain nixl [least..most]")
    columns = (
        f"{'ours':>8}{'nixl':>8}  {'ratio':<20}{'copy':>8}{'digest ms':>11}{'threads ms':>12}{'rpc ms':>8}"
    )
    print(f"{'path':6}{'model, pages':16}{'MB':>8}{'runs':>6}{columns}  needed")
    figures: dict[str, list[object]] = {}
    for name, (kind, environment) in PATHS.items():
        if args.only in (None, name):
            cases = _run_pair(kind, environment, rounds=args.rounds)
            rpc = f"{lending_calls.seconds() * 1e3:.2f}"
            for case in cases:
                _report(name, case, rpc)
            figures[name] = [asdict(case) for case in cases]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


def _run_pair(kind: str, environment: dict[str, str], *, rounds: int) -> list[CaseRounds]:
    local = {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.transfer_pair", kind, str(rounds)],
        env=os.environ | local | environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS_MAX,
    )
    if done.returncode:
        raise RorqualError(f"the pair of processes ended with status {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[CaseRounds])


def _report(path: str, case: CaseRounds, rpc: str) -> None:
    rounds = case.rounds
    ours = case.num_bytes / statistics.median(item.ours_seconds for item in rounds) / 1e9
    copy = case.num_bytes / statistics.median(item.copy_seconds for item in rounds) / 1e9
    digest_ms = statistics.median(item.digest_seconds for item in rounds) * 1e3
    turns_ms = statistics.median(item.turns_seconds for item in rounds) * 1e3
    raw_seconds = [item.raw_seconds for item in rounds if item.raw_seconds is not None]
    raw, ratio, needed = "-", "-", ""
    if raw_seconds:
        ratios = [item.raw_seconds / item.ours_seconds for item in rounds if item.raw_seconds is not None]
        raw = f"{case.num_bytes / statistics.median(raw_seconds) / 1e9:.2f}"
        ratio = _spread(ratios)
        needed = f"{REQUIRED:g}"
    name = f"{case.model}, {case.num_pages}"
    columns = f"{ours:8.2f}{raw:>8}  {ratio:<20}{copy:8.2f}{digest_ms:11.2f}{turns_ms:12.2f}{rpc:>8}"
    print(f"{path:6}{name:16}{case.num_bytes / 1e6:8.1f}{case.num_runs:6}{columns}  {needed}", flush=True)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"


if __name__ == "__main__":
    sys.exit(main())

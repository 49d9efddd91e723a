"""The command line of `rorqual bench scale`: options in, every rule over every workload and seed, tables and files out.

The only module of the race that reads a clock (for the display of progress) and starts processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from bench.scale import race, report, workloads
from bench.scale.race import Figures
from bench.scale.rules import ENTRANTS, RuleConfig
from bench.scale.world import WorldConfig
from rorqual.performance import HARDWARE, PRESETS, PerformanceModel, model_costs

STATE_SHARE = 0.8
"""Of the memory that weights leave, what pages may have."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    loads: list[str] = [*args.workload, *args.trace]
    jobs = [Job(args, load, seed) for load in loads for seed in args.seeds]
    results: dict[str, dict[str, list[Figures]]] = {}
    began = time.perf_counter()
    _say(_heading(args))
    for number, (job, name, found) in enumerate(_run_all(jobs, args.jobs), start=1):
        by_rule = results.setdefault(name, {rule: [] for rule in args.rules})
        for rule, figures in found.items():
            by_rule[rule].append(figures)
        seconds = time.perf_counter() - began
        _say(f"{number} of {len(jobs)}: {name}, seed {job.seed}, {seconds:.0f} s so far")
    found = report.rows(results)
    for name, by_rule in found.items():
        print(report.table(name, by_rule))
    print(_notes(args))
    for name, by_rule in found.items():
        for line in report.verdicts(name, by_rule):
            print(f"verdict: {line}")
    if args.json is not None:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "plot", "trace")}
        content = {"options": options, "workloads": report.as_json(results)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _say(f"wrote {args.json}")
    if args.plot is not None:
        report.plot(results, file=args.plot)
        _say(f"wrote {args.plot}")
    return 0


@dataclass(frozen=True, slots=True)
class Job:
    """All rules over one workload with one seed."""

    args: argparse.Namespace
    load: str  # one of workloads.NAMES, or the file of a trace
    seed: int


def _run_all(jobs: Sequence[Job], num_processes: int) -> Iterator[tuple[Job, str, dict[str, Figures]]]:
    """In the order of the jobs, whatever ends first."""
    if num_processes == 1:
        yield from ((job, *_work(job)) for job in jobs)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for job, (name, found) in zip(jobs, pool.map(_work, jobs), strict=True):
            yield job, name, found


def _work(job: Job) -> tuple[str, dict[str, Figures]]:
    args = job.args
    model = PerformanceModel(
        hardware=HARDWARE[args.hardware], costs=model_costs(PRESETS[args.model]), num_devices=args.devices
    )
    make = workloads.made if job.load in workloads.NAMES else workloads.from_trace
    load = make(job.load, model=model, peak_workers=args.peak_workers, seed=job.seed)
    prefill, decode = race.hidden_factors(job.seed)
    world = WorldConfig(
        model=model,
        slots=args.slots,
        pages=pages_of(model),
        start_seconds=args.start_seconds,
        failures_per_hour=args.failures_per_hour,
        replicas_max=args.workers_max,
        prefill_factor=prefill,
        decode_factor=decode,
        seed=job.seed,
    )
    rules = RuleConfig(
        model=model,
        hardware=args.hardware,
        model_name=args.model,
        slots=args.slots,
        ttft_seconds=args.ttft,
        itl_seconds=args.itl,
        start_seconds=args.start_seconds,
        replicas_max=args.workers_max,
    )
    return load.name, {name: race.race(name, load, world, rules) for name in args.rules}


def pages_of(model: PerformanceModel) -> int:
    """Pages of a decode worker: what the weights leave of its memory, times STATE_SHARE."""
    weights = float(model.weights_seconds(1e9)) * model.hardware.memory_bytes_per_second
    left = model.hardware.memory_bytes - weights * model.efficiency.memory
    return max(int(STATE_SHARE * left * model.num_devices / model.costs.page_bytes), 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual bench scale",
        description="Race rules that set the replicas of a prefill and a decode pool, on a simulated fleet and virtual"
        " time: what share of requests is in time, and how many GPU-hours that takes. All rules meet the same requests,"
        " failures, start-up delay and true speeds, which differ from the model that they know by hidden factors.",
        epilog="rules:\n" + "\n".join(f"  {item.name:18} {item.summary}" for item in ENTRANTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--trace",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines (.jsonl, .jsonl.gz) with timestamp, input_length, output_length and hash_ids of 512 tokens;"
        " stretched to two hours (default none)",
    )
    add(
        "--workload",
        nargs="*",
        default=list(workloads.NAMES),
        choices=workloads.NAMES,
        metavar="NAME",
        help=f"of {', '.join(workloads.NAMES)} (default all)",
    )
    add("--seeds", type=_whole, nargs="+", default=[1, 2, 3, 4, 5], metavar="N", help="(default 1 2 3 4 5)")
    add(
        "--rules",
        nargs="+",
        default=[name for name in ENTRANTS if name != report.ORACLE],
        choices=list(ENTRANTS),
        metavar="NAME",
        help=f"some of those below (default all but {report.ORACLE})",
    )
    add("--ttft", type=_positive, default=2.0, metavar="SECONDS", help="objective (default 2)")
    add("--itl", type=_positive, default=0.05, metavar="SECONDS", help="objective (default 0.05)")
    add("--model", choices=tuple(PRESETS), default="flash", help="whose costs are used (default flash)")
    add("--hardware", choices=tuple(HARDWARE), default="h200", help="of a worker's devices (default h200)")
    add("--devices", type=_whole, default=8, metavar="N", help="of a worker (default 8)")
    add("--slots", type=_whole, default=256, metavar="N", help="sequences of a decode worker (default 256)")
    add("--start-seconds", type=_positive, default=180.0, metavar="S", help="of a replica (default 180)")
    add("--workers-max", type=_whole, default=32, metavar="N", help="of each pool (default 32)")
    add(
        "--peak-workers",
        type=_positive,
        default=8.0,
        metavar="N",
        help="prefill workers that the busiest five minutes would keep wholly busy (default 8)",
    )
    add(
        "--failures-per-hour",
        type=float,
        default=0.02,
        metavar="X",
        help="of each worker (default 0.02)",
    )
    add(
        "--jobs",
        type=_whole,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one for each processor)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write attainment, GPU-hours, load and replicas as a picture",
    )
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 100,000")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1e-3 <= number <= 1e5:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.001 to 100,000")
    return number


def _heading(args: argparse.Namespace) -> str:
    return (
        f"{args.model} on workers of {args.devices} {args.hardware}, up to {args.workers_max} a pool, {args.slots}"
        f" slots of a decode worker, starts of {args.start_seconds:g} s; {len(args.rules)} rules, seeds"
        f" {' '.join(map(str, args.seeds))}"
    )


def _notes(args: argparse.Namespace) -> str:
    return (
        f"\nin time: requests with TTFT <= {args.ttft:g} s and mean ITL <= {1000 * args.itl:g} ms, of all, lost too;"
        " GPU-hours: from the order of a replica until it is gone, until the last arrival; flaps: reversals within 10"
        " minutes without 15 % of change in load; prefill, decode: mean replicas. Simulated; static is an oracle."
    )


def _say(text: str) -> None:
    print(f"bench.scale: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

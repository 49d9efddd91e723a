"""The command line of `rorqual bench route`: options in, a race of each policy, a table and files out.

The only module of the race that reads a clock (for decisions per second and the display of progress).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.route import report, trace
from bench.route.fleet import Outcome, Simulation
from bench.route.policies import ENTRANTS, Entrant
from bench.route.store import StoreConfig, StoreWrite, lru_hit_rate
from bench.route.worker import WHOLE_BLOCKS, WorkerConfig
from kvstore.handover import record_bytes
from kvstore.layout import Numerics, build_layout
from kvstore.shadow_radix import EvictionOrder, TailPolicy
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import HARDWARE, PRESETS, PerformanceModel, SourceSpeed, model_costs

FREE_TAILS = "rorqual-freetails"
"""Not a policy but a bound: ours, with a tail behind every page that takes no room."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    config = _worker_config(args)
    requests, ideal = _arrivals(args, config.model)
    gc.freeze()  # the trace stays as it is: looking through it again and again takes a tenth of the time
    names: list[str] = list(ENTRANTS) if args.policy == ["all"] else args.policy
    _say(_heading(args, config, requests, ideal))
    found: dict[str, report.Figures] = {}
    outcomes: dict[str, Sequence[Outcome]] = {}
    for name in names:
        run = _race(ENTRANTS[name], config, requests, args)
        found[name] = report.figures(
            run, ttft_target=args.ttft_target, uses_picture=ENTRANTS[name].uses_picture
        )
        outcomes[name] = run.outcomes
    free: float | None = None
    if not args.no_bounds:
        run = _race(ENTRANTS["rorqual"], _with_free_tails(config), requests, args, label=FREE_TAILS)
        free = report.figures(run, ttft_target=args.ttft_target, uses_picture=True).hit_rate
    print(report.table(found))
    lru = lru_hit_rate(requests, num_pages=args.store_pages) if args.store_pages else None
    print(_notes(names, ideal=ideal, free=free, ttft_target=args.ttft_target))
    if lru is not None:
        print(_store_notes(found, lru=lru, num_pages=args.store_pages))
    if args.json is not None:
        content = {
            "trace": args.trace,
            "num_requests": len(requests),
            "workers": args.workers,
            "pages_per_worker": args.pages_per_worker,
            "load": args.load,
            "arrivals": args.arrivals,
            "seed": args.seed,
            "ttft_target": args.ttft_target,
            "ideal_hit_rate": ideal,
            "free_tails_hit_rate": free,
            "store_pages": args.store_pages,
            "store_bandwidth": args.store_bandwidth,
            "store_latency_ms": args.store_latency_ms,
            "store_write": args.store_write,
            "store_tails_every": args.store_tails_every,
            "store_lru_hit_rate": lru,
            "policies": report.as_json(found),
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _say(f"wrote {args.json}")
    if args.plot is not None:
        report.plot(found, outcomes, ideal=ideal, file=args.plot)
        _say(f"wrote {args.plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rorqual bench route",
        description="Replay a trace of prompts through the real placement and the real prefix index, with simulated"
        " prefill workers on virtual time, once for each policy. Every policy has the same workers, caches and tails;"
        " only ours plans reads from peers, and rorqual-nofetch is ours without them.",
        epilog="policies:\n" + "\n".join(f"  {item.name:20} {item.summary}" for item in ENTRANTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--trace",
        default="synthetic:2000",
        metavar="FILE",
        help="JSON lines (.jsonl, .jsonl.gz) with timestamp, input_length, output_length and hash_ids of 512 tokens, or"
        " synthetic:N for N made requests (default synthetic:2000)",
    )
    add("--workers", type=_positive, default=8, metavar="N", help="prefill workers (default 8, at most 1000)")
    add(
        "--pages-per-worker",
        type=_positive,
        default=8000,
        metavar="N",
        help="a worker's cache has the bytes of so many pages, for pages and tails together (default 8000)",
    )
    add(
        "--load",
        type=_load,
        default=0.75,
        metavar="X",
        help="work that an endless shared cache would leave, over what the workers can do; time stamps are scaled to"
        " reach it (default 0.75)",
    )
    add(
        "--policy",
        nargs="+",
        default=["all"],
        choices=["all", *ENTRANTS],
        metavar="NAME",
        help="all, or some of those below (default all)",
    )
    add(
        "--arrivals",
        choices=("raw", "smeared"),
        default="raw",
        help="as the trace says, or spread inside each step of 3 s (default raw)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of made traces and smeared arrivals (default 0)")
    add(
        "--ttft-target",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="goodput is the share of prompts whose first token comes within this (default 1.0)",
    )
    _add_worker(parser)
    _add_store(parser)
    add("--no-bounds", action="store_true", help="leave out the run with free tails")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="write hit rates and times to first token as a picture")
    return parser


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="flash", help="whose costs are used (default flash)")
    add("--hardware", choices=tuple(HARDWARE), default="h200", help="of a worker's devices (default h200)")
    add("--devices", type=_positive, default=8, metavar="N", help="of a worker (default 8)")
    add("--eviction", choices=[item.value for item in EvictionOrder], default="value", help="(default value)")
    add(
        "--tails-every",
        type=int,
        default=0,
        metavar="N",
        help="pages between tails of a prompt (default 0: none)",
    )


def _add_store(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--store-pages",
        type=_count,
        default=0,
        metavar="N",
        help="a store that all workers share has the bytes of so many pages, for pages and tails together (default 0:"
        " there is none)",
    )
    add(
        "--store-bandwidth",
        type=_number,
        default=2e9,
        metavar="BYTES",
        help="a second, of one worker's reads from the store, and as much of its writes (default 2e9)",
    )
    add(
        "--store-latency-ms",
        type=_number,
        default=2.0,
        metavar="MS",
        help="of a read or a write (default 2)",
    )
    add(
        "--store-write",
        choices=[item.value for item in StoreWrite],
        default=StoreWrite.PROMPT_END.value,
        help="what workers write: prompts that they have computed, or what their caches give up (default prompt_end)",
    )
    add(
        "--store-tails-every",
        type=_count,
        default=16,
        metavar="N",
        help="pages between the tails of a prompt that are taken for the store alone (default 16; 0: none)",
    )


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1e-3 <= number <= 1e15:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.001 to 1e15")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to 10,000,000")
    return int(text)


def _load(text: str) -> float:
    try:
        load = float(text)
    except ValueError:
        load = 0.0
    if not 0.01 <= load <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.01 to 10")
    return load


def _worker_config(args: argparse.Namespace) -> WorkerConfig:
    preset = PRESETS[args.model]
    layout = build_layout(preset, Numerics.SERVED)
    model = PerformanceModel(
        hardware=HARDWARE[args.hardware],
        costs=model_costs(preset),
        num_devices=args.devices,
        store=SourceSpeed(
            bytes_per_second=args.store_bandwidth, latency_seconds=args.store_latency_ms / 1000
        ),
    )
    assert layout.page_bytes == model.costs.page_bytes, "both count the same rows"
    store: StoreConfig | None = None
    if args.store_pages:
        store = StoreConfig(
            budget_bytes=args.store_pages * layout.page_bytes,
            write=StoreWrite(args.store_write),
            tails_every=args.store_tails_every,
        )
    return WorkerConfig(
        model=model,
        store=store,
        tail_bytes=record_bytes(layout, PAGE_TOKENS, drafts=True),
        budget_bytes=args.pages_per_worker * layout.page_bytes,
        order=EvictionOrder(args.eviction),
        tails=replace(WHOLE_BLOCKS, every_pages=args.tails_every),
    )


def _with_free_tails(config: WorkerConfig) -> WorkerConfig:
    every_page = TailPolicy(num_tails_max=1 << 20, every_pages=1)
    return replace(config, tail_bytes=1, tails=every_page)


def _arrivals(args: argparse.Namespace, model: PerformanceModel) -> tuple[list[trace.Request], float]:
    """The requests at the load asked for, and the hit rate of an endless cache."""
    requests = trace.load_trace(args.trace, seed=args.seed)
    if args.arrivals == "smeared":
        requests = trace.smear(requests, seed=args.seed)
    seconds = trace.ideal_seconds(
        requests, lambda tokens, context: float(model.work_seconds(tokens, context))
    )
    requests = trace.to_load(requests, work_seconds=seconds, num_workers=args.workers, load=args.load)
    num_pages = sum(item.num_pages for item in requests)
    return requests, sum(item.ideal_pages for item in requests) / max(num_pages, 1)


def _race(
    entrant: Entrant,
    config: WorkerConfig,
    requests: Sequence[trace.Request],
    args: argparse.Namespace,
    *,
    label: str = "",
) -> Simulation:
    run = Simulation(
        config=config,
        num_workers=args.workers,
        policy=entrant.make(config, args.seed),
        timer=time.perf_counter,
    )
    began = time.perf_counter()
    is_terminal = sys.stderr.isatty()
    for num_placed in run.run(requests):
        if is_terminal:
            print(
                f"\r{label or entrant.name}: {num_placed} of {len(requests)} prompts", end="", file=sys.stderr
            )
    if is_terminal:
        print("\r\x1b[K", end="", file=sys.stderr)
    _say(f"{label or entrant.name}: {len(requests)} prompts in {time.perf_counter() - began:.1f} s")
    return run


def _heading(
    args: argparse.Namespace, config: WorkerConfig, requests: Sequence[trace.Request], ideal: float
) -> str:
    tail_pages = config.tail_bytes / config.model.costs.page_bytes
    return (
        f"{len(requests)} prompts, {sum(item.num_pages for item in requests):,} full pages, in"
        f" {requests[-1].seconds:.1f} s of virtual time: load {args.load:g}, {args.arrivals} arrivals;"
        f" {args.workers} workers of {args.devices} {args.hardware}, each with the bytes of {args.pages_per_worker:,}"
        f" pages (a tail takes {tail_pages:.2f}); an endless cache of one worker would reuse {100 * ideal:.1f} %"
    )


def _notes(names: Sequence[str], *, ideal: float, free: float | None, ttft_target: float) -> str:
    lines = [
        "",
        "hits: full prompt pages not computed; there: present when the prompt began; goodput: first token within"
        f" {ttft_target:g} s.",
        f"Bounds of hits: {100 * ideal:.1f} % with an endless cache of one worker"
        + (
            f", {100 * free:.1f} % for ours if tails were free behind every page."
            if free is not None
            else "."
        ),
    ]
    if "rorqual" in names and len(names) > 1:
        lines.append(
            "Caches, tails and eviction are the same for all. Only rorqual reads pages and tails from peers."
        )
    return "\n".join(lines)


def _store_notes(found: Mapping[str, report.Figures], *, lru: float, num_pages: int) -> str:
    """Hits over those of one LRU cache as large as the store, of each policy."""
    shares = ", ".join(f"{name} {100 * item.hit_rate / max(lru, 1e-9):.1f} %" for name, item in found.items())
    return (
        f"store: full prompt pages read from it. One LRU cache of {num_pages:,} pages, without tails, would have"
        f" {100 * lru:.2f} %; hits over that: {shares}."
    )


def _say(text: str) -> None:
    print(f"bench.route: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench [RACE ...]`, `rorqual bench RACE [OPTIONS]`: run the named races, or one with options of its own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import cast

RACES = {
    "capacity": (
        "bench.capacity",
        "requests that a device holds, with all rows there and with hot buffers: by formula (1 second)",
    ),
    "engine": (
        "bench.engine",
        "prefill, decode and makespan beside transformers, fast and exact (6 minutes)",
    ),
    "hisparse": (
        "bench.hisparse.command",
        "requests that fit and what steps cost, with and without HiSparse, on the CPU engine (5 minutes)",
    ),
    "hot_rows": (
        "bench.hot_rows",
        "bringing picked rows into hot buffers beside looking them up, by batch and hit rate (1 minute)",
    ),
    "http_servers": (
        "bench.http_servers",
        "HTTP servers: requests, events, slow readers, vanished clients (1 minute)",
    ),
    "picture": (
        "bench.picture",
        "the router's picture of all caches: memory, look-ups, changes, loading, up to 10 million pages (2 minutes)",
    ),
    "restore": (
        "bench.restore.command",
        "a prefix brought back from host memory, peers and a store beside computing it, by length (1 minute)",
    ),
    "route": (
        "bench.route.command",
        "placement policies over a trace of prompts, on simulated workers (1 minute)",
    ),
    "scale": (
        "bench.scale.command",
        "rules that set replicas over loads on a simulated fleet, beside each other (5 minutes)",
    ),
    "shadow_radix": (
        "bench.shadow_radix",
        "the index of cached prefixes: keys, match, insertion, eviction a page, beside a dictionary (2 seconds)",
    ),
    "speculation": (
        "bench.speculation",
        "decode speed of the demo model by number of drafts and batch, through the whole system (10 minutes)",
    ),
    "transfer": (
        "bench.transfer",
        "reads of a hand-over between two processes beside plain NIXL (1 minute)",
    ),
    "turns": (
        "bench.turns",
        "conversations through prefill and decode workers: computed and moved, beside the least (2 minutes)",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) > 1 and arguments[0] in RACES and arguments[1].startswith("-"):
        return _run(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(
        prog="rorqual bench",
        description="Races, as ratios measured side by side in one run: these numbers hold within a run, not between.",
        epilog="\n".join(f"  {name:14} {text}" for name, (_, text) in RACES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "races", nargs="*", metavar="RACE", help="default: all; a single one may have options"
    )
    names = cast("list[str]", parser.parse_args(arguments).races) or list(RACES)
    unknown = [name for name in names if name not in RACES]
    if unknown:
        parser.error(f"unknown race {unknown[0]!r}; known are {', '.join(RACES)}")
    for name in names:
        print(f"== {name}: {RACES[name][1]}", flush=True)
        status = _run(name, [])
        if status:
            return status
    return 0


def _run(name: str, arguments: list[str]) -> int:
    race = cast("Callable[[list[str]], int]", importlib.import_module(RACES[name][0]).main)
    return race(arguments)


if __name__ == "__main__":
    sys.exit(main())

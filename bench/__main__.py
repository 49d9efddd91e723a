"""`python -m bench [RACE ...]`: run the named races, or all that need no options of their own."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import cast

RACES = {
    "engine": (
        "bench.engine",
        "prefill, decode and makespan beside transformers, fast and exact (6 minutes)",
    ),
    "http_servers": (
        "bench.http_servers",
        "HTTP servers: requests, events, slow readers, vanished clients (1 minute)",
    ),
    "picture": (
        "bench.picture",
        "the router's picture of all caches: memory, look-ups, changes, loading, up to 10 million pages (2 minutes)",
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
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Races, as ratios measured side by side in one run: these numbers hold within a run, not between.",
        epilog="\n".join(f"  {name:14} {text}" for name, (_, text) in RACES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("races", nargs="*", metavar="RACE", help="default: all")
    names = cast("list[str]", parser.parse_args().races) or list(RACES)
    unknown = [name for name in names if name not in RACES]
    if unknown:
        parser.error(f"unknown race {unknown[0]!r}; known are {', '.join(RACES)}")
    for name in names:
        module, text = RACES[name]
        print(f"== {name}: {text}", flush=True)
        race = cast("Callable[[list[str]], int]", importlib.import_module(module).main)
        status = race([])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

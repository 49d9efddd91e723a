"""Restore against recompute: how long until a prefix can be gone on from, computed or brought back, by its length.

Real rank processes with served numerics, driven as a worker's host does: chunked prefill; pages and a tail copied from
host memory; read out of another rank's memory over shm and NIXL, digests checked; read from an embedded Valkey into
host memory, then as from there. All ways take turns, round after round, and each ends with the token behind the
prefix, which must be the same. What lies between a worker's host and others (sessions, leases) is not in these times.
Beside it, computed and not measured: the released models on an accelerator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.restore import released, report
from bench.restore.ranks import Rank, running_rank
from bench.restore.sources import (
    COMPUTE,
    Compute,
    FromHost,
    FromPeer,
    FromStore,
    Taken,
    Way,
    prepare,
    running_store,
)
from kvstore.store.embedded import EmbeddedFailed
from rorqual.demo import TRAINED
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS, load_model_config
from rorqual.performance import HARDWARE
from rorqual.performance.sources import break_even_tokens
from rorqual.session import TokenArray

LENGTHS = (1, 2, 4, 8, 16, 32)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Within this machine UCX needs no more; elsewhere it would look for devices.
    for name, value in {"UCX_NET_DEVICES": "lo", "UCX_LOG_LEVEL": "error"}.items():
        os.environ.setdefault(name, value)
    found = released.computed(args.hardware)
    taken, break_evens = asyncio.run(_race(args))
    rows = report.summarise(taken)
    print(report.table(rows))
    print(report.break_even_table(break_evens))
    print(report.released_table(found, hardware=args.hardware))
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "measured": [asdict(row) for row in rows],
        "break_even": [asdict(item) for item in break_evens],
        "samples": [
            {"way": way, "num_pages": num_pages, **asdict(item)}
            for (way, num_pages), items in taken.items()
            for item in items
        ],
        "computed": [asdict(item) for item in found],
    }
    (args.out / "restore.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    report.plot(rows, found, args.out / "restore.png", hardware=args.hardware)
    print(f"bench.restore: wrote {args.out}/restore.json and restore.png")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench restore", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=TRAINED, metavar="DIR", help="default: the demo model")
    add("--pages", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="lengths of prefixes")
    add("--rounds", type=int, default=7, metavar="N", help="of everything (default 7)")
    add("--threads", type=int, default=1, metavar="N", help="of each rank (default 1)")
    add("--hardware", choices=sorted(HARDWARE), default="h200", help="of the computed table (default h200)")
    add("--out", type=Path, default=Path(".run/bench"), metavar="DIR", help="of JSON and plot")
    return parser


Times = dict[tuple[str, int], list[Taken]]


async def _race(args: argparse.Namespace) -> tuple[Times, list[report.BreakEven]]:
    config = load_model_config(args.model / "config.json")
    lengths = sorted({pages for pages in args.pages if pages * PAGE_TOKENS <= config.max_position_embeddings})
    prompt = (
        np.random.default_rng(1).integers(2, config.vocab_size, lengths[-1] * PAGE_TOKENS).astype(np.int32)
    )
    async with AsyncExitStack() as stack:
        ways = await _ways(stack, args, prompt, lengths)
        taken: Times = {(way.name, pages): [] for pages in lengths for way in ways}
        for number in range(-1, args.rounds):
            for pages in lengths:
                # Another one is first each time; a round before the first warms all of them.
                turn = number % len(ways)
                times = {way.name: await way.take(pages) for way in (*ways[turn:], *ways[:turn])}
                wrong = [name for name, item in times.items() if item.token != times[COMPUTE].token]
                if wrong:
                    raise RorqualError(f"{pages} pages: {', '.join(wrong)} gave another token than computing")
                if number >= 0:
                    for name, item in times.items():
                        taken[name, pages].append(item)
            print(f"bench.restore: round {number + 1} of {args.rounds}", flush=True)
        return taken, _break_evens(ways, taken, lengths)


async def _ways(
    stack: AsyncExitStack, args: argparse.Namespace, prompt: TokenArray, lengths: list[int]
) -> list[Way]:
    async def a_rank(name: str, transfer: str) -> Rank:
        return await stack.enter_async_context(
            running_rank(
                args.model,
                prompt,
                transfer=transfer,
                name=f"{name}#{os.getpid():x}",
                num_tails=len(lengths),
                threads=args.threads,
            )
        )

    rank = await a_rank("reader-shm", "shm")
    own = await prepare(rank, lengths)
    ways: list[Way] = [Compute(rank), FromHost(rank, own)]
    for kind in ("shm", "nixl"):
        try:
            owner = await a_rank(f"owner-{kind}", kind)
            reader = rank if kind == "shm" else await a_rank(f"reader-{kind}", kind)
        except RorqualError as error:
            print(f"bench.restore: leaves out reads over {kind}: {error}", flush=True)
            continue
        assert owner.ready.endpoint is not None
        await reader.connect(owner.ready.endpoint)
        lent = await prepare(owner, lengths)
        assert lent.digests == own.digests, "two ranks have computed different bytes"
        ways.append(FromPeer(f"peer, {kind}", reader, lent))
    try:
        store = await stack.enter_async_context(running_store(rank))
    except EmbeddedFailed as error:
        print(f"bench.restore: leaves out the store: {error}", flush=True)
        return ways
    stored = FromStore(rank, own, store, memory=rank.host_memory())
    await stored.fill()
    return [*ways, stored]


def _break_evens(ways: list[Way], taken: Times, lengths: list[int]) -> list[report.BreakEven]:
    """By the first way's rate of computing: not every rank computes."""
    ratios = {(row.way, row.num_tokens): row.ratio for row in report.summarise(taken)}
    per_token = ways[0].speeds.compute_seconds(1)
    found: list[report.BreakEven] = []
    for way in ways[1:]:
        points = [(pages * PAGE_TOKENS, ratios[way.name, pages * PAGE_TOKENS]) for pages in lengths]
        sizes = [taken[way.name, pages][0].num_bytes for pages in (lengths[0], lengths[-1])]
        each = (sizes[1] - sizes[0]) / max(1, points[-1][0] - points[0][0])
        path = [source.speed for source in way.path]
        found.append(
            report.BreakEven(
                way=way.name,
                crossed_tokens=report.crossing(points),
                used_tokens=break_even_tokens(
                    path,
                    bytes_fixed=sizes[0] - points[0][0] * each,
                    bytes_per_token=each,
                    seconds_per_token=per_token,
                ),
                bytes_per_second=path[0].bytes_per_second,
                latency_seconds=path[0].latency_seconds,
            )
        )
    return found

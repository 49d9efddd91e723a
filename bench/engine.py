"""The engine beside transformers: same random float32 checkpoint, same thread count, one run.

Ours goes through the real plan messages to a rank process, with the production scheduler, in fast and in exact mode;
beside them the whole system over HTTP, in fast mode. Each figure is the median of several rounds in which the sides
take turns, so that a machine whose speed drifts slows all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.sides import Request, Side, SideOptions, http_side, plan_side
from bench.transformers_baseline import Baseline, faster_baseline
from engine.checkpoint import cli as checkpoint_cli
from rorqual.session import TokenArray

RAW_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 128,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 128, 4],
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 8192,
}
REQUIRED = {"prefill 2k": 4.0, "decode, batch 1": 2.0, "decode, batch 16": 2.5, "makespan, 32 requests": 8.0}
PREFILL_TOKENS = 2048
DECODE_PROMPT, DECODE_TOKENS = 256, 48
MAKESPAN_ROUNDS = 3  # of ours; theirs takes over a minute and is run once


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on both sides (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each side takes (default 5)")
    parser.add_argument(
        "--prefill-tokens", type=int, default=1024, help="our tokens per step (default 1024, as served)"
    )
    parser.add_argument("--only", choices=REQUIRED, metavar="RACE", help=f"one of: {', '.join(REQUIRED)}")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rorqual-bench-") as folder:
        model = Path(folder) / "model"
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(RAW_CONFIG))
        status = checkpoint_cli.main(
            ["init", "--config", str(config), "--seed", "1", "--out", str(model), "--weights", "float32"]
        )
        if status:
            return status
        baseline = faster_baseline(model, RAW_CONFIG, threads=args.threads)
        print(
            f"baseline: transformers {baseline.version}, experts_implementation={baseline.experts}",
            flush=True,
        )
        figures = asyncio.run(_race(model, baseline, args))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


async def _race(model: Path, baseline: Baseline, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    options = SideOptions(model=model, threads=args.threads, prefill_tokens_max=args.prefill_tokens)
    async with (
        plan_side(options, exact=False) as fast,
        plan_side(options, exact=True) as exact,
        http_side(options) as http,
    ):
        sides: dict[str, Side] = {"fast": fast, "exact": exact, "http": http}
        races: list[tuple[str, Callable[[], float], Callable[[Side], Awaitable[float]]]] = [
            ("prefill 2k", lambda: baseline.prefill_seconds(PREFILL_TOKENS), _prefill_seconds),
            (
                "decode, batch 1",
                lambda: baseline.decode_seconds(1, DECODE_PROMPT, 12),
                lambda side: _decode_seconds(side, 1),
            ),
            (
                "decode, batch 16",
                lambda: baseline.decode_seconds(16, DECODE_PROMPT, 12),
                lambda side: _decode_seconds(side, 16),
            ),
        ]
        _print_header()
        for name, theirs, ours in races:
            if args.only not in (None, name):
                continue
            figures[name] = await _take_turns(name, theirs, ours, sides, rounds=args.rounds)
        name = "makespan, 32 requests"
        if args.only in (None, name):
            figures[name] = await _makespan_race(name, baseline, sides)
    return figures


async def _take_turns(
    name: str,
    theirs: Callable[[], float],
    ours: Callable[[Side], Awaitable[float]],
    sides: dict[str, Side],
    *,
    rounds: int,
) -> dict[str, float]:
    theirs()  # warm, as ours is
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in ("transformers", *sides)}
    for _ in range(rounds):
        base = theirs()
        seconds["transformers"].append(base)
        for name_of_side, side in sides.items():
            taken = await ours(side)
            seconds[name_of_side].append(taken)
            ratios[name_of_side].append(base / taken)
    return _report(name, seconds, ratios)


async def _makespan_race(name: str, baseline: Baseline, sides: dict[str, Side]) -> dict[str, float]:
    """One request after another on their side; on ours all arrive within 5 % of that time and run together."""
    requests = _unequal_requests(32, seed=7)
    base = sum(baseline.request_seconds(item.prompt, item.max_tokens) for item in requests)
    gaps = np.random.default_rng(8).exponential(size=len(requests))
    arrivals = np.cumsum(gaps) / gaps.sum() * 0.05 * base
    timed = [replace(item, arrival_seconds=float(at)) for item, at in zip(requests, arrivals, strict=True)]
    seconds: dict[str, list[float]] = {"transformers": [base]} | {side: [] for side in sides}
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(MAKESPAN_ROUNDS):
        for name_of_side, side in sides.items():
            run = await side.serve(timed)
            seconds[name_of_side].append(run.makespan)
            ratios[name_of_side].append(base / run.makespan)
    return _report(name, seconds, ratios)


def _unequal_requests(count: int, *, seed: int) -> list[Request]:
    random = np.random.default_rng(seed)
    lengths = random.integers(32, 769, size=count)
    outputs = random.integers(32, 161, size=count)
    return [
        Request(prompt=_prompt(int(length), seed=index), max_tokens=int(output))
        for index, (length, output) in enumerate(zip(lengths, outputs, strict=True))
    ]


def _prompt(length: int, *, seed: int) -> TokenArray:
    return np.random.default_rng(seed).integers(2, RAW_CONFIG["vocab_size"], size=length, dtype=np.int32)


async def _prefill_seconds(side: Side) -> float:
    run = await side.serve([Request(prompt=_prompt(PREFILL_TOKENS, seed=0), max_tokens=1)])
    return run.makespan


async def _decode_seconds(side: Side, batch: int) -> float:
    """Seconds a step of a full batch, from the moment the last sequence has its first token."""
    requests = [
        Request(prompt=_prompt(DECODE_PROMPT, seed=i), max_tokens=DECODE_TOKENS) for i in range(batch)
    ]
    run = await side.serve(requests)
    started = max(times[0] for times in run.token_times)
    ended = min(times[-1] for times in run.token_times)
    steps = min(sum(time > started for time in times) for times in run.token_times)
    return (ended - started) / steps


SIDES = ("fast", "exact", "http")


def _print_header() -> None:
    print(
        f"{os.cpu_count()} cores; medians over the rounds, ratio to transformers in the same round [least..most]"
    )
    columns = "".join(f"{side:>28}" for side in SIDES)
    print(f"{'race':24}{'transformers':>13}{columns}    needed of fast")


def _report(name: str, seconds: dict[str, list[float]], ratios: dict[str, list[float]]) -> dict[str, float]:
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    ratio = {side: statistics.median(values) for side, values in ratios.items()}
    shown = "".join(
        f"{f'{middle[side]:.4f}s {ratio[side]:.2f}x [{min(ratios[side]):.1f}..{max(ratios[side]):.1f}]':>28}"
        for side in SIDES
    )
    print(f"{name:24}{middle['transformers']:12.4f}s{shown}    {REQUIRED[name]:g}x", flush=True)
    return {f"{side}_seconds": value for side, value in middle.items()} | {
        f"{side}_ratio": value for side, value in ratio.items()
    }


if __name__ == "__main__":
    sys.exit(main())

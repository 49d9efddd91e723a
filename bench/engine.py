"""The engine beside transformers: same random float32 checkpoint, same thread count, one run.

Ours goes through the real plan messages to a rank process, with the production scheduler. Each figure is the median of
several rounds in which the two take turns, so that a machine whose speed drifts slows both. HTTP is measured beside it
through `rorqual up`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.transformers_baseline import Baseline, faster_baseline
from engine.checkpoint import cli as checkpoint_cli
from engine.plan import RankFailed, RankReady, RankSettings, StepPlan, StepResult
from engine.rank_link import RankProcess, start_rank
from engine.scheduler import Scheduler, SchedulerConfig, SequenceKey
from rorqual.errors import RorqualError
from rorqual.sampling import SamplingParams
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
GREEDY = SamplingParams(seed=1, temperature=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    prompt: TokenArray
    max_tokens: int
    arrival_seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on both sides (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each side takes (default 5)")
    parser.add_argument("--prefill-tokens", type=int, default=512, help="our tokens per step (default 512, as served)")
    parser.add_argument("--skip-makespan", action="store_true", help="leave out the longest race")
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
        print(f"baseline: transformers {baseline.version}, experts_implementation={baseline.experts}", flush=True)
        figures = asyncio.run(_race(model, baseline, args))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


async def _race(model: Path, baseline: Baseline, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    async with _engine(model, args, exact=False) as fast, _engine(model, args, exact=True) as exact:
        sides = {"fast": fast, "exact": exact}
        races: list[tuple[str, Callable[[], float], Callable[[Engine], Awaitable[float]]]] = [
            ("prefill 2k", lambda: baseline.prefill_seconds(PREFILL_TOKENS), _prefill_seconds),
            ("decode, batch 1", lambda: baseline.decode_seconds(1, DECODE_PROMPT, 12), lambda e: _decode_seconds(e, 1)),
            ("decode, batch 16", lambda: baseline.decode_seconds(16, DECODE_PROMPT, 12), lambda e: _decode_seconds(e, 16)),
        ]
        _print_header()
        for name, theirs, ours in races:
            figures[name] = await _take_turns(name, theirs, ours, sides, rounds=args.rounds)
        if not args.skip_makespan:
            name = "makespan, 32 requests"
            figures[name] = await _makespan_race(name, baseline, sides)
    return figures


async def _take_turns(
    name: str,
    theirs: Callable[[], float],
    ours: Callable[[Engine], Awaitable[float]],
    sides: dict[str, Engine],
    *,
    rounds: int,
) -> dict[str, float]:
    theirs()  # warm, as ours is
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in ("transformers", *sides)}
    for _ in range(rounds):
        base = theirs()
        seconds["transformers"].append(base)
        for side, engine in sides.items():
            taken = await ours(engine)
            seconds[side].append(taken)
            ratios[side].append(base / taken)
    return _report(name, seconds, ratios)


async def _makespan_race(name: str, baseline: Baseline, sides: dict[str, Engine]) -> dict[str, float]:
    """One request after another on their side; on ours all arrive within 5 % of that time and run together."""
    requests = _unequal_requests(32, seed=7)
    base = sum(baseline.request_seconds(item.prompt, item.max_tokens) for item in requests)
    gaps = np.random.default_rng(8).exponential(size=len(requests))
    arrivals = np.cumsum(gaps) / gaps.sum() * 0.05 * base
    timed = [replace(item, arrival_seconds=float(at)) for item, at in zip(requests, arrivals, strict=True)]
    seconds: dict[str, list[float]] = {"transformers": [base]}
    ratios: dict[str, list[float]] = {}
    for side, engine in sides.items():
        run = await engine.serve(timed)
        seconds[side] = [run.makespan]
        ratios[side] = [base / run.makespan]
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


async def _prefill_seconds(engine: Engine) -> float:
    run = await engine.serve([Request(prompt=_prompt(PREFILL_TOKENS, seed=0), max_tokens=1)])
    return run.makespan


async def _decode_seconds(engine: Engine, batch: int) -> float:
    """Seconds a step of a full batch, from the moment the last sequence has its first token."""
    requests = [Request(prompt=_prompt(DECODE_PROMPT, seed=i), max_tokens=DECODE_TOKENS) for i in range(batch)]
    run = await engine.serve(requests)
    started = max(times[0] for times in run.token_times)
    ended = min(times[-1] for times in run.token_times)
    steps = min(sum(time > started for time in times) for times in run.token_times)
    return (ended - started) / steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    makespan: float
    token_times: list[list[float]]


class Engine:
    """A rank process under the production scheduler, driven without sessions: two plans in flight, as served."""

    def __init__(self, link: RankProcess, ready: RankReady, prefill_tokens_max: int) -> None:
        self._link = link
        self._config = SchedulerConfig(
            num_pages=ready.num_pages,
            num_slots=ready.num_slots,
            vocab_size=ready.vocab_size,
            sequence_tokens_max=ready.max_position_embeddings,
            eos_token_ids=frozenset(),
            prefill_tokens_max=prefill_tokens_max,
        )
        self._scheduler = Scheduler(self._config)
        self._num_served = 0

    async def serve(self, requests: Sequence[Request]) -> Run:
        waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival_seconds)
        times: list[list[float]] = [[] for _ in requests]
        places: dict[SequenceKey, int] = {}
        start = time.perf_counter()
        inflight = 0
        while waiting or not self._scheduler.is_idle:
            while waiting and requests[waiting[0]].arrival_seconds <= time.perf_counter() - start:
                index = waiting.pop(0)
                key = (0, self._num_served)
                self._num_served += 1
                places[key] = index
                item = requests[index]
                self._scheduler.open(
                    key, prompt=item.prompt, max_tokens=item.max_tokens, ignore_eos=True, sampling=GREEDY
                )
            while inflight < self._config.plans_inflight_max and (plan := self._scheduler.plan()) is not None:
                self._send(plan)
                inflight += 1
            if inflight == 0:
                await asyncio.sleep(0.0005)  # the next request has not arrived yet
                continue
            result = await self._link.receive()
            assert isinstance(result, StepResult), f"the rank answered {result}"
            inflight -= 1
            now = time.perf_counter() - start
            for event in self._scheduler.apply(result):
                times[places[event.key]].append(now)
        return Run(makespan=time.perf_counter() - start, token_times=times)

    def _send(self, plan: StepPlan) -> None:
        self._link.send(plan)


@asynccontextmanager
async def _engine(model: Path, args: argparse.Namespace, *, exact: bool) -> AsyncIterator[Engine]:
    settings = RankSettings(
        model=str(model),
        numerics="float32",
        exact=exact,
        num_pages=32 * 8,
        kv_bytes=None,
        num_slots=32,
        prefill_tokens_max=args.prefill_tokens,
        threads=args.threads,
        kernels={},
    )
    link = await start_rank(settings)
    try:
        while not isinstance(message := await link.receive(), RankReady):
            if isinstance(message, RankFailed):
                raise RorqualError(message.message)
        yield Engine(link, message, args.prefill_tokens)
    finally:
        await link.stop(seconds_max=5)


def _print_header() -> None:
    print(f"{os.cpu_count()} cores; seconds are medians, ratios are medians of rounds [least..most]")
    print(f"{'race':24}{'transformers':>13}{'fast':>10}{'exact':>10}  ratio fast           ratio exact          needed")


def _report(name: str, seconds: dict[str, list[float]], ratios: dict[str, list[float]]) -> dict[str, float]:
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    shown = {
        side: f"{statistics.median(values):5.2f}x [{min(values):.2f}..{max(values):.2f}]"
        for side, values in ratios.items()
    }
    print(
        f"{name:24}{middle['transformers']:12.4f}s{middle['fast']:9.4f}s{middle['exact']:9.4f}s"
        f"  {shown['fast']:20} {shown['exact']:20} {REQUIRED[name]:g}x",
        flush=True,
    )
    return {f"{side}_seconds": value for side, value in middle.items()} | {
        f"{side}_ratio": statistics.median(values) for side, values in ratios.items()
    }


if __name__ == "__main__":
    sys.exit(main())

"""Where drafts pay: decode speed through the whole system for 0 to 4 drafts a step and for adaptive ones, by batch.

`python -m bench.speculation` (about 10 minutes): one `rorqual up --both 1` for each arm, all alive at once, asked in
turn, round after round, so that whatever else the machine does meets all arms alike. As many clients as the batch ask
one completion after the other, and tokens are counted by the worker over a window in which all of them do: the end of a
batch, when the slowest sequences run alone, is no measure of a batch. An arm's figure is the median over rounds of its
speed over the same round's speed without drafts. Writes a table, JSON and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rorqual.demo import TRAINED
from rorqual.local_cluster import LocalCluster

ARMS = ("0", "1", "2", "3", "4", "auto")
BATCHES = (1, 2, 4, 8, 16)
WARM_SECONDS = 0.3
"""Until every client has begun."""
OPENINGS = (
    "Emma was very much pleased with",
    "It was a fine morning in the country, and",
    "Mr. Knightley had always been",
    "The two sisters walked together to",
    "She had not been long in the room before",
    '"I am very sorry," said Elizabeth,',
    "Captain Wentworth looked at her, and",
    "The whole party were assembled in the drawing-room, when",
    "Her mother was delighted to hear that",
    "There was no occasion for",
    "Catherine could not help thinking that",
    "The carriage was at the door, and",
    "Sir Thomas came towards the table where",
    "Nothing could be more agreeable than",
    '"You are quite mistaken," replied Fanny;',
    "In the course of the evening",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One arm, batch and temperature in one round."""

    arm: str
    batch: int
    temperature: float
    round: int
    tokens_per_second: float  # of all sequences together, beside the prompts of new ones
    tokens_per_step: float  # and sequence: 1 and the drafts accepted


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    measures: list[Measure] = []
    with contextlib.ExitStack() as stack:
        clusters: dict[str, LocalCluster] = {}
        for arm in args.arms:
            options = ["--both", "1", "--threads", str(args.threads), "--slots", str(max(BATCHES))]
            clusters[arm] = stack.enter_context(LocalCluster(args.model, *options, "--drafts", arm))
            print(f"bench.speculation: arm {arm} is up", flush=True)
        for arm, cluster in clusters.items():
            _serve(cluster, arm=arm, batch=2, temperature=0.0, args=args, number=-1)  # warm
        for number in range(args.rounds):
            measures += _round(clusters, args, number)
            print(f"bench.speculation: round {number + 1} of {args.rounds}", flush=True)
    summary = summarise(measures)
    print(_table(summary))
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"summary": summary, "measures": [asdict(item) for item in measures]}
    (args.out / "speculation.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _plot(summary, args.out / "speculation.png")
    print(f"bench.speculation: wrote {args.out}/speculation.json and speculation.png")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speculation",
        description="Decode speed by number of drafts and batch, all in one run.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=TRAINED,
        metavar="DIR",
        help="a model with an MTP block (default: the demo)",
    )
    add("--rounds", type=int, default=5, metavar="N", help="of everything (default 5)")
    add("--tokens", type=int, default=96, metavar="N", help="of each completion (default 96)")
    add("--seconds", type=float, default=1.2, metavar="S", help="of each window (default 1.2)")
    add("--threads", type=int, default=1, metavar="N", help="compute threads of a worker (default 1)")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="values of --drafts (default: all)")
    add("--batches", nargs="+", type=int, default=list(BATCHES), metavar="N", help="sequences at once")
    add("--temperatures", nargs="+", type=float, default=[0.0, 0.7], metavar="T", help="(default 0 and 0.7)")
    add("--out", type=Path, default=Path(".run/bench"), metavar="DIR", help="of JSON and plot")
    return parser


def _round(clusters: dict[str, LocalCluster], args: argparse.Namespace, number: int) -> list[Measure]:
    """Every arm in every case, the arms in another order each time: none is always first."""
    arms: list[str] = [*args.arms[number % len(args.arms) :], *args.arms[: number % len(args.arms)]]
    return [
        _serve(
            clusters[arm],
            arm=arm,
            batch=batch,
            temperature=temperature,
            args=args,
            number=number,
        )
        for temperature in args.temperatures
        for batch in args.batches
        for arm in arms
    ]


def _serve(
    cluster: LocalCluster,
    *,
    arm: str,
    batch: int,
    temperature: float,
    args: argparse.Namespace,
    number: int,
) -> Measure:
    is_over = threading.Event()

    def client(index: int) -> None:
        for turn in itertools.count():
            if is_over.is_set():
                return
            body: dict[str, Any] = {
                "prompt": OPENINGS[(index + turn) % len(OPENINGS)],
                "max_tokens": args.tokens,
                "temperature": temperature,
                "seed": (number + 1) * 10_000 + 100 * index + turn,
                "ignore_eos": True,
            }
            answer = cluster.ask("/v1/completions", body)
            assert answer["usage"]["completion_tokens"] == args.tokens

    with ThreadPoolExecutor(batch) as pool:
        clients = [pool.submit(client, index) for index in range(batch)]
        time.sleep(WARM_SECONDS)
        began, before = time.perf_counter(), cluster.metrics()
        time.sleep(args.seconds)
        seconds, after = time.perf_counter() - began, cluster.metrics()
        is_over.set()
        for item in clients:
            item.result()

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    generated = grown("rorqual_worker_tokens_generated_total")
    return Measure(
        arm=arm,
        batch=batch,
        temperature=temperature,
        round=number,
        tokens_per_second=generated / seconds,
        tokens_per_step=generated / (generated - grown("rorqual_worker_drafts_accepted_total")),
    )


def summarise(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """For each temperature, batch and arm: medians over rounds, and the ratio to the same round without drafts."""
    by_case: dict[tuple[float, int, str], dict[int, Measure]] = {}
    for item in measures:
        by_case.setdefault((item.temperature, item.batch, item.arm), {})[item.round] = item
    rows: list[dict[str, Any]] = []
    for (temperature, batch, arm), rounds in sorted(by_case.items()):
        plain = by_case.get((temperature, batch, "0"), {})
        ratios = sorted(
            item.tokens_per_second / plain[number].tokens_per_second
            for number, item in rounds.items()
            if number in plain
        )
        rows.append(
            {
                "temperature": temperature,
                "batch": batch,
                "arm": arm,
                "tokens_per_second": statistics.median(item.tokens_per_second for item in rounds.values()),
                "tokens_per_step": statistics.median(item.tokens_per_step for item in rounds.values()),
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_least": ratios[0] if ratios else None,
                "ratio_most": ratios[-1] if ratios else None,
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["", "temperature batch drafts tokens/s tokens/step  ratio (least..most over rounds)"]
    for row in rows:
        ratio = (
            "-"
            if row["ratio"] is None
            else f"{row['ratio']:5.2f} ({row['ratio_least']:.2f}..{row['ratio_most']:.2f})"
        )
        lines.append(
            f"{row['temperature']:11.1f} {row['batch']:5d} {row['arm']:>6} {row['tokens_per_second']:8.0f} "
            f"{row['tokens_per_step']:11.2f}  {ratio}"
        )
    return "\n".join(lines)


def _plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """matplotlib is a development dependency: imported here alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = sorted({row["temperature"] for row in rows})
    figure, grid = pyplot.subplots(
        2, len(temperatures), figsize=(5.5 * len(temperatures), 8), layout="constrained", squeeze=False
    )
    for column, temperature in enumerate(temperatures):
        for line, (key, label) in enumerate(
            (("ratio", "speed over no drafts"), ("tokens_per_step", "tokens a step and sequence"))
        ):
            axes = grid[line][column]
            for arm in dict.fromkeys(row["arm"] for row in rows):
                found = [
                    row
                    for row in rows
                    if row["arm"] == arm and row["temperature"] == temperature and row[key] is not None
                ]
                style = {"linewidth": 2.5, "color": "black"} if arm == "auto" else {"linewidth": 1.2}
                axes.plot(
                    [row["batch"] for row in found], [row[key] for row in found], "o-", label=arm, **style
                )
            axes.set_xscale("log", base=2)
            axes.set_xlabel("sequences at once")
            axes.set_ylabel(label)
            axes.set_title(f"temperature {temperature:g}")
            axes.grid(alpha=0.3)
            axes.legend(title="drafts")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())

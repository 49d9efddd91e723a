"""`python -m bench hisparse` (5 minutes): what HiSparse gains and costs, measured on the CPU engine.

Requests that fit into a device's bytes, with and without, beside the formula (`kvstore.hisparse.capacity`); what a step
costs while nobody is spilled, in operations and in CPU time; and what it costs when everybody is, by the rows of a hot
buffer. Times are the process's own CPU time, of workers that take turns, so that other programs show little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from bench.hisparse.fits import Fits, Load, measure_fits
from bench.hisparse.resident import Resident, Work, measure_resident
from bench.hisparse.spilled import Spilled, measure_spilled, texts, trained_model
from bench.hisparse.worker import layout_of, random_model
from engine.model.forward import Model
from kvstore.hisparse import hot_shape
from rorqual.model_config import PAGE_TOKENS

PARTS = ("fits", "resident", "spilled")
HOT_ROWS = (64, 128, 256, 512, 1024)
OPERATIONS_GENERATED = 12
"""Tokens of each request whose operations are compared: those of a page that fills are among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured; None: it was left out."""

    fits: tuple[Fits, ...] = ()
    resident: Resident | None = None
    spilled: tuple[Spilled, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    parts = cast("list[str]", args.parts)
    found: dict[str, Any] = {}
    model = trained_model() if {"resident", "spilled"} & set(parts) else None
    if "fits" in parts:
        found["fits"] = _fits(args)
    if "resident" in parts and model is not None:
        found["resident"] = _resident(model, args)
    if "spilled" in parts and model is not None:
        found["spilled"] = _spilled(model, args)
    figures = Figures(**found)
    if args.json:
        args.json.write_text(json.dumps(as_json(figures), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(figures, args.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench hisparse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    add(
        "--pages", type=int, default=48, metavar="N", help="of a request, where they are counted (default 48)"
    )
    add("--fit", type=int, default=14, metavar="N", help="requests for which the device is made (default 14)")
    add(
        "--prompt",
        type=int,
        default=7000,
        metavar="N",
        help="tokens of a request that is timed (default 7000)",
    )
    add("--requests", type=int, default=4, metavar="N", help="that are timed (default 4)")
    add("--pairs", type=int, default=60, metavar="N", help="of measurements in turn (default 60)")
    add("--steps", type=int, default=8, metavar="N", help="of each measurement (default 8)")
    add("--hot-rows", type=int, nargs="+", default=list(HOT_ROWS), metavar="N", help="sizes of hot buffers")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    add("--plot", type=Path, metavar="FILE", help="also draw them")
    return parser


def _fits(args: argparse.Namespace) -> tuple[Fits, ...]:
    """Of requests that all turn a page after they were counted, and of such as are amid their last one."""
    model = random_model(num_pages=args.pages)
    print(f"requests of {args.pages} pages on one device, 4 layers, 3 of them C4; hot rows 8 x top-k")
    print(f"{'prompt':>8} {'MB':>7} {'':12} {'formula':>8} {'measured':>9} {'spilled':>8} {'MB taken':>9}")
    found: list[Fits] = []
    for tokens_before in (PAGE_TOKENS // 4, -PAGE_TOKENS // 2):
        load = Load(num_pages=args.pages, tokens_before=tokens_before)
        item = measure_fits(model, load, num_spilled=args.fit)
        found.append(item)
        for name, held, computed in (
            ("without", item.without, item.formula.num_resident),
            ("with", item.spilling, item.formula.num_spilled),
        ):
            sizes = f"{load.num_prompt:8,} {item.device_bytes / 1e6:7.2f} {name:12}"
            counts = f"{computed:8} {held.num_running:9} {held.num_spilled:8} {held.device_bytes / 1e6:9.2f}"
            print(f"{sizes} {counts}")
        print(
            f"{'':17}gain {item.gain:.2f}x, by the formula {item.formula.gain_here:.2f}x; measured / formula"
            f" {item.of_formula:.3f}",
            flush=True,
        )
    return tuple(found)


def _work(args: argparse.Namespace, num_generated: int, *, prompt: int | None = None) -> Work:
    return Work(prompts=texts(args.requests, prompt or args.prompt), num_generated=num_generated)


def _resident(model: Model, args: argparse.Namespace) -> Resident:
    config = model.config
    shape = hot_shape(
        layout_of(config),
        index_topk=config.index_topk,
        num_drafts=0,
        num_tokens_max=config.max_position_embeddings,
    )
    found = measure_resident(
        model,
        _work(args, _num_generated(args), prompt=args.prompt // 4),
        shape,
        num_pairs=args.pairs,
        num_steps=args.steps,
        compared=_work(args, OPERATIONS_GENERATED, prompt=5 * PAGE_TOKENS - OPERATIONS_GENERATED // 2),
    )
    same = "the same with and without" if not found.first_difference else found.first_difference
    print(f"nobody spilled: {found.num_operations:,} operations of {found.num_steps} steps, {same}")
    print(
        f"CPU time of a decode step of {args.requests} requests: {found.seconds * 1e3:.2f} ms without; with / without"
        f" {found.ratio}, without / without {found.control}, over {found.ratio.num_pairs} pairs",
        flush=True,
    )
    return found


def _spilled(model: Model, args: argparse.Namespace) -> tuple[Spilled, ...]:
    work = _work(args, _num_generated(args))
    found = measure_spilled(model, work, args.hot_rows, num_pairs=args.pairs, num_steps=args.steps)
    topk = model.config.index_topk
    print(f"all of {args.requests} requests spilled, {args.prompt:,} tokens, top-k {topk}; demo model")
    print(
        f"{'hot rows':>9} {'x top-k':>8} {'step, spilled / resident':>26} {'found':>7} {'missed':>14}"
        f" {'ahead: useful':>14} {'wasted':>7}"
    )
    for item in found:
        print(
            f"{item.num_hot:9} {item.num_hot / topk:8.0f} {item.ratio!s:>26} {item.hit_rate:7.1%}"
            f" {item.rows_missed:14.1f} {item.useful:14.0%} {item.wasted:7.0%}",
            flush=True,
        )
    return tuple(found)


def _num_generated(args: argparse.Namespace) -> int:
    """For all pairs, and for the steps of each until the last one has started."""
    return args.pairs * args.steps + args.requests * (args.prompt // 256 + 16)


def as_json(figures: Figures) -> dict[str, Any]:
    found = asdict(figures)
    for row, item in zip(found["fits"], figures.fits, strict=True):
        row |= {"gain": item.gain, "of_formula": item.of_formula}
    for row, item in zip(found["spilled"], figures.spilled, strict=True):
        row |= {"hit_rate": item.hit_rate}
    return found


def plot(figures: Figures, file: Path) -> None:
    """Requests that fit; and by the rows of a hot buffer what a step takes, and misses. matplotlib is a development
    dependency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    if figures.fits:
        item = figures.fits[0]
        formula = (item.formula.num_resident, item.formula.num_spilled)
        left.bar((0, 1), (item.without.num_running, item.spilling.num_running), width=0.6, label="measured")
        left.hlines(formula, (-0.4, 0.6), (0.4, 1.4), "black", "dashed", label="formula")
        left.set_xticks((0, 1), ("without", "with HiSparse"))
        left.set_ylabel(f"requests of {item.formula.num_tokens:,} tokens, {item.device_bytes / 1e6:.1f} MB")
        left.legend()
    sizes = [item.num_hot for item in figures.spilled]
    if sizes:
        ratios = [item.ratio for item in figures.spilled]
        median = [ratio.median for ratio in ratios]
        below = [ratio.median - ratio.low for ratio in ratios]
        above = [ratio.high - ratio.median for ratio in ratios]
        middle.errorbar(sizes, median, yerr=(below, above), fmt="o-", capsize=4)
        middle.axhline(1, color="grey", linewidth=0.8)
        middle.set_ylabel("CPU time of a step, spilled / resident (95 %)")
        right.plot(sizes, [item.rows_missed for item in figures.spilled], "o-", label="missed")
        right.plot(sizes, [item.rows_wanted for item in figures.spilled], "--", label="wanted")
        right.set_ylabel("rows of a request, layer and step")
        right.legend()
        for axes in (middle, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("hot rows")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())

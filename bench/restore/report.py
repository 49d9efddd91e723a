"""What was measured by `bench.restore`, and what was computed beside it: summaries, tables and a plot. Pure but for the
plot's file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.restore.released import Released
from bench.restore.sources import COMPUTE, Taken
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way and length, over rounds. The ratio is of the same round's computing over it: above 1 it is sooner."""

    way: str
    num_tokens: int
    num_bytes: int
    seconds: float
    seconds_least: float
    seconds_most: float
    read_seconds: float
    ratio: float
    ratio_least: float
    ratio_most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Of one source, in tokens: where measured times cross, 0 if they do below the shortest length, inf if nowhere; and
    what a worker that has measured these reads decides by."""

    way: str
    crossed_tokens: float
    used_tokens: float
    bytes_per_second: float
    latency_seconds: float


def summarise(taken: Mapping[tuple[str, int], Sequence[Taken]]) -> list[Row]:
    """`taken` by way and number of pages, one for each round, in order."""
    rows: list[Row] = []
    for (way, num_pages), times in taken.items():
        base = taken[COMPUTE, num_pages]
        ratios = sorted(one.seconds / other.seconds for one, other in zip(base, times, strict=True))
        seconds = sorted(item.seconds for item in times)
        rows.append(
            Row(
                way=way,
                num_tokens=num_pages * PAGE_TOKENS,
                num_bytes=times[0].num_bytes,
                seconds=statistics.median(seconds),
                seconds_least=seconds[0],
                seconds_most=seconds[-1],
                read_seconds=statistics.median(item.read_seconds for item in times),
                ratio=statistics.median(ratios),
                ratio_least=ratios[0],
                ratio_most=ratios[-1],
            )
        )
    return rows


def crossing(points: Sequence[tuple[float, float]]) -> float:
    """Where the ratio first reaches 1, of points (tokens, ratio) in order of tokens: between two of them on a straight
    line of logarithms. 0: before the first; inf: never."""
    for at, (tokens, ratio) in enumerate(points):
        if ratio >= 1:
            if not at:
                return 0.0
            before, least = points[at - 1]
            share = -math.log(least) / (math.log(ratio) - math.log(least))
            return before * (tokens / before) ** share
    return math.inf


def table(rows: Sequence[Row]) -> str:
    ways = list(dict.fromkeys(row.way for row in rows))
    found = {(row.way, row.num_tokens): row for row in rows}
    others = [way for way in ways if way != COMPUTE]
    lines = [
        "milliseconds to the token behind a prefix that is computed, or brought back; medians, and how many times as"
        " long computing took (least..most over rounds)",
        f"{'tokens':>7}{'KiB':>8}{'compute':>10}  " + "".join(f"{way:>32}" for way in others),
    ]
    for tokens in sorted({row.num_tokens for row in rows}):
        base, sizes = found[COMPUTE, tokens], [found[way, tokens].num_bytes for way in others]
        cells = "".join(
            f"{row.seconds * 1e3:9.2f} {row.ratio:6.1f}x {f'({row.ratio_least:.1f}..{row.ratio_most:.1f})':>14}"
            for way in others
            for row in [found[way, tokens]]
        )
        lines.append(f"{tokens:>7}{max(sizes) / 1024:>8.0f}{base.seconds * 1e3:>10.1f}  {cells}")
    return "\n".join(lines)


def break_even_table(items: Sequence[BreakEven]) -> str:
    lines = [
        "break-even in tokens: measured, and as a worker decides that has measured these reads",
        f"{'source':>12}{'measured':>14}{'used':>10}{'MB/s':>10}{'latency ms':>12}",
    ]
    lines += [
        f"{item.way:>12}{_tokens(item.crossed_tokens):>14}{_tokens(item.used_tokens):>10}"
        f"{item.bytes_per_second / 1e6:>10.0f}{item.latency_seconds * 1e3:>12.2f}"
        for item in items
    ]
    return "\n".join(lines)


def released_table(items: Sequence[Released], *, hardware: str) -> str:
    lengths = list(items[0].num_bytes)
    lines = [
        f"computed, not measured: released models on 8 x {hardware}; milliseconds to compute a prefix, and how many"
        " times as long as reading it that is",
        f"{'model':>6} {'source':>18}{'GB/s':>8}"
        + "".join(f"{length:>10}" for length in lengths)
        + "  break-even",
    ]
    for model in dict.fromkeys(item.model for item in items):
        own = [item for item in items if item.model == model]
        times = "".join(f"{own[0].compute_seconds[length] * 1e3:>10.0f}" for length in lengths)
        lines.append(f"{model:>6} {'compute, ms':>18}{'':>8}{times}")
        for item in own:
            cells = "".join(
                f"{item.compute_seconds[length] / item.read_seconds[length]:>9.2f}x" for length in lengths
            )
            lines.append(
                f"{model:>6} {item.source:>18}{item.bytes_per_second / 1e9:>8.1f}{cells}  "
                f"{_tokens(item.break_even_tokens)}"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Row], released: Sequence[Released], file: Path, *, hardware: str) -> None:
    """matplotlib is a development dependency: imported here alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(item.model for item in released))
    figure, grid = pyplot.subplots(
        1, 1 + len(models), figsize=(5.5 * (1 + len(models)), 4.5), layout="constrained"
    )
    measured, *others = grid
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        tokens, times = [row.num_tokens for row in own], [row.seconds * 1e3 for row in own]
        style = {"color": "black", "linewidth": 2.0} if way == COMPUTE else {}
        [line] = measured.plot(tokens, times, "o-", label=way, **style)
        spread = [[row.seconds_least * 1e3 for row in own], [row.seconds_most * 1e3 for row in own]]
        measured.fill_between(tokens, *spread, alpha=0.15, color=line.get_color())
    measured.set_title("measured here: the model of this run")
    for axes, model in zip(others, models, strict=True):
        own = [item for item in released if item.model == model]
        lengths = list(own[0].compute_seconds)
        axes.plot(
            lengths,
            [own[0].compute_seconds[length] * 1e3 for length in lengths],
            "k-",
            label=COMPUTE,
            linewidth=2.0,
        )
        for item in own:
            axes.plot(lengths, [item.read_seconds[length] * 1e3 for length in lengths], label=item.source)
        axes.set_title(f"computed: {model} on 8 x {hardware}")
    for axes in grid:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the prefix")
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _tokens(count: float) -> str:
    if math.isinf(count):
        return "never"
    return f"{count:.0f}" if count > 0 else f"< {PAGE_TOKENS}"

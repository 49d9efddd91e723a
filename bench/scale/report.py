"""What a race says: figures over seeds, a table, verdicts, plots. Called by `bench.scale.command`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.scale.race import Figures

OURS = ("rorqual", "rorqual-no-spare")
ORACLE = "static"
POINT = 0.01
NOISE = 0.0005
"""Of attainment: means that are nearer to each other than this are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rule over one workload."""

    attainment: Mean
    gpu_hours: Mean
    flaps: Mean
    ttft_p90: Mean
    itl_p90: Mean
    backlog_max: int
    lost: int
    prefill: float
    decode: float


Results = Mapping[str, Mapping[str, Sequence[Figures]]]  # by workload and rule, one for each seed


def rows(results: Results) -> dict[str, dict[str, Row]]:
    return {
        workload: {rule: _row(found) for rule, found in by_rule.items()}
        for workload, by_rule in results.items()
    }


def _row(found: Sequence[Figures]) -> Row:
    return Row(
        attainment=_mean([item.attainment for item in found]),
        gpu_hours=_mean([item.gpu_hours for item in found]),
        flaps=_mean([float(item.flaps) for item in found]),
        ttft_p90=_mean([item.ttft_p90 for item in found]),
        itl_p90=_mean([item.itl_p90 for item in found]),
        backlog_max=max(item.backlog_max for item in found),
        lost=sum(item.num_lost for item in found),
        prefill=float(np.mean([item.prefill_mean for item in found])),
        decode=float(np.mean([item.decode_mean for item in found])),
    )


def _mean(values: Sequence[float]) -> Mean:
    return Mean(mean=float(np.mean(values)), low=min(values), high=max(values))


def table(workload: str, found: Mapping[str, Row]) -> str:
    lines = [
        "",
        f"{workload:18} {'in time':>8} {'(seeds)':>13} {'GPU-hours':>9} {'(seeds)':>13} {'flaps':>6} {'TTFT p90':>9}"
        f" {'ITL p90':>8} {'backlog':>8} {'lost':>8} {'prefill':>7} {'decode':>7}",
    ]
    for name, row in found.items():
        in_time, hours = row.attainment, row.gpu_hours
        lines.append(
            f"{name:18} {100 * in_time.mean:7.2f}% {100 * in_time.low:6.1f}-{100 * in_time.high:5.1f}%"
            f" {hours.mean:9.1f} {hours.low:6.0f}-{hours.high:6.0f} {row.flaps.mean:6.1f}"
            f" {_seconds(row.ttft_p90.mean):>9} {1000 * row.itl_p90.mean:5.1f} ms {row.backlog_max:8,}"
            f" {row.lost:8,} {row.prefill:7.2f} {row.decode:7.2f}"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if np.isfinite(value) else "lost"


def verdicts(workload: str, found: Mapping[str, Row]) -> list[str]:
    """What the race says of each of ours beside every other rule, the oracle left out."""
    others = {name: row for name, row in found.items() if name not in (*OURS, ORACLE)}
    if not others:
        return []
    return [line for name in OURS if name in found for line in _verdict(workload, name, found[name], others)]


def _verdict(workload: str, name: str, ours: Row, others: Mapping[str, Row]) -> list[str]:
    beaten = [other for other, row in others.items() if beats(row, ours)]
    near = {
        other: row for other, row in others.items() if row.attainment.mean >= ours.attainment.mean - POINT
    }
    dearer = [other for other, row in near.items() if row.gpu_hours.mean <= ours.gpu_hours.mean]
    both = f"beaten on both by {', '.join(beaten)}" if beaten else "beaten on both by none"
    if dearer:
        cheap = f"no cheaper than {', '.join(dearer)}"
    elif near:
        best = min(row.gpu_hours.mean for row in near.values())
        saved = 100 * (1 - ours.gpu_hours.mean / best)
        cheap = f"{saved:.0f} % cheaper than the cheapest of {len(near)} within a point"
    else:
        cheap = "no rule comes within a point of it"
    lines = [f"{workload}: {name}: {both}; {cheap}"]
    if workload == "constant":
        lines.append(f"constant: {name}: {ours.flaps.mean:g} flaps (most in a seed {ours.flaps.high:g})")
    return lines


def beats(row: Row, ours: Row) -> bool:
    """More in time, for fewer GPU-hours."""
    no_worse = row.attainment.mean >= ours.attainment.mean - NOISE
    return (
        no_worse
        and row.gpu_hours.mean <= ours.gpu_hours.mean
        and (row.gpu_hours.mean < ours.gpu_hours.mean or row.attainment.mean > ours.attainment.mean + NOISE)
    )


def as_json(results: Results) -> dict[str, Any]:
    found = rows(results)
    return {
        workload: {
            rule: {"over_seeds": asdict(found[workload][rule]), "runs": [_run(item) for item in figures]}
            for rule, figures in by_rule.items()
        }
        for workload, by_rule in results.items()
    }


def _run(item: Figures) -> dict[str, Any]:
    content = asdict(item)
    del content["series"]  # it is for the plot
    return content


def plot(results: Results, *, file: Path) -> None:
    """Above, attainment against GPU-hours of each rule; below, load and replicas of ours. A column each workload.
    matplotlib is a development dependency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = rows(results)
    figure, axes = pyplot.subplots(
        2, len(found), figsize=(4.6 * len(found), 8), layout="constrained", squeeze=False
    )
    for column, (workload, by_rule) in enumerate(found.items()):
        above, below = axes[0][column], axes[1][column]
        for number, (name, row) in enumerate(by_rule.items()):
            x, y = row.gpu_hours, row.attainment
            above.errorbar(
                x.mean,
                100 * y.mean,
                xerr=[[x.mean - x.low], [x.high - x.mean]],
                yerr=[[100 * (y.mean - y.low)], [100 * (y.high - y.mean)]],
                fmt="*" if name in OURS else "o",
                markersize=14 if name in OURS else 6,
                color=f"C{number % 10}",
                elinewidth=0.6,
                label=name,
            )
        above.set_title(workload)
        above.set_xlabel("GPU-hours")
        above.set_ylabel("requests in time, %")
        above.grid(alpha=0.3)
        shown = next((name for name in OURS if name in by_rule), next(iter(by_rule)))
        series = results[workload][shown][0].series
        minutes = np.array(series.seconds) / 60
        below.plot(
            minutes, series.load, color="black", linewidth=0.9, label="prefill load, workers kept busy"
        )
        for pool, values in series.replicas.items():
            below.step(minutes, values, where="post", label=f"{pool} replicas ({shown})")
        below.set_xlabel("minutes")
        below.set_ylim(bottom=0)
        below.grid(alpha=0.3)
        if column == 0:
            above.legend(fontsize=7, loc="lower right")
            below.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

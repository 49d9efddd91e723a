"""What a race says: figures of each run, a table, a plot. Called by `bench.route.command`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.route.fleet import Outcome, Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One policy on one trace. Rates are shares, times seconds."""

    hit_rate: float  # full pages not computed by the worker, of all full pages
    present_rate: float  # full pages that were there when the prompt began, resumable behind or not
    fetched_rate: float  # full pages read from a peer
    stored_rate: float  # full pages read from the store that all share
    work_max_over_mean: float  # of the workers' busy seconds
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    goodput: float  # share of prompts whose first token came within the target
    store_refused: int  # reads and writes not made, since too much was on its way
    decisions_per_s: float  # on this machine; the only figures that are measured are this one and the next
    memory_bytes: int  # of the policy, and of the picture it reads, at the end


def figures(run: Simulation, *, ttft_target: float, uses_picture: bool) -> Figures:
    """`ttft_target` in seconds."""
    outcomes = run.outcomes
    num_pages = max(sum(item.num_pages for item in outcomes), 1)
    ttft = np.array([item.ttft_seconds for item in outcomes])
    work = np.array([worker.work_seconds for worker in run.workers])
    p50, p90, p99 = (float(value) for value in np.percentile(ttft, (50, 90, 99)))
    return Figures(
        hit_rate=sum(item.num_reused for item in outcomes) / num_pages,
        present_rate=sum(item.num_present for item in outcomes) / num_pages,
        fetched_rate=sum(item.num_fetched for item in outcomes) / num_pages,
        stored_rate=sum(item.num_stored for item in outcomes) / num_pages,
        work_max_over_mean=float(work.max() / work.mean()),
        ttft_mean=float(ttft.mean()),
        ttft_p50=p50,
        ttft_p90=p90,
        ttft_p99=p99,
        goodput=float((ttft <= ttft_target).mean()),
        store_refused=sum(worker.link.num_refused for worker in run.workers if worker.link is not None),
        decisions_per_s=len(outcomes) / max(run.decision_seconds, 1e-9),
        memory_bytes=deep_bytes(run.policy) + (run.picture.memory_bytes() if uses_picture else 0),
    )


def table(found: Mapping[str, Figures]) -> str:
    """Lines of text, one for each policy."""
    lines = [
        "",
        f"{'policy':20} {'hits':>6} {'there':>6} {'fetched':>7} {'store':>6} {'max/mean':>8} {'TTFT p50':>8} {'p90':>8}"
        f" {'p99':>8} {'goodput':>7} {'decisions/s':>11} {'memory MB':>9}",
    ]
    lines += [
        f"{name:20} {100 * item.hit_rate:5.1f}% {100 * item.present_rate:5.1f}% {100 * item.fetched_rate:6.1f}%"
        f" {100 * item.stored_rate:5.1f}%"
        f" {item.work_max_over_mean:8.3f} {1000 * item.ttft_p50:5.0f} ms {1000 * item.ttft_p90:5.0f} ms"
        f" {1000 * item.ttft_p99:5.0f} ms {100 * item.goodput:6.1f}% {item.decisions_per_s:11,.0f}"
        f" {item.memory_bytes / 1e6:9.1f}"
        for name, item in found.items()
    ]
    return "\n".join(lines)


def as_json(found: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    return {name: asdict(item) for name, item in found.items()}


def plot(
    found: Mapping[str, Figures], outcomes: Mapping[str, Sequence[Outcome]], *, ideal: float, file: Path
) -> None:
    """Hit rates, and the share of prompts by time to first token. matplotlib is a development dependency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    names = list(found)
    left.barh(names, [100 * found[name].hit_rate for name in names])
    left.axvline(100 * ideal, color="black", linestyle="--", label="endless cache, one worker, free tails")
    left.invert_yaxis()
    left.set_xlabel("pages reused, % of all full prompt pages")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    for name in names:
        ttft = np.sort([item.ttft_seconds for item in outcomes[name]])
        width = 2.5 if name == "rorqual" else 1.2
        right.plot(ttft, np.arange(1, len(ttft) + 1) / len(ttft), label=name, linewidth=width)
    right.set_xscale("log")
    right.set_xlabel("time to first token, s")
    right.set_ylabel("share of prompts")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def deep_bytes(root: object) -> int:
    """Bytes of an object and of all it holds, each counted once. Objects that others hold too are counted in full."""
    seen: set[int] = set()
    left: list[object] = [root]
    total = 0
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, Mapping):
            for key, value in item.items():
                left += [key, value]
        elif isinstance(item, list | tuple | set | frozenset):
            left += item
        else:
            left += vars(item).values() if hasattr(item, "__dict__") else ()
            names = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
            left += [getattr(item, name) for name in names if hasattr(item, name)]
    return total

"""Pictures of a training run. matplotlib is imported here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot_losses(history: Sequence[dict[str, float]], file: Path) -> None:
    """Losses and accuracies over the tokens of a run, from the trainer's history."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, names in (
        (left, ("loss", "prose nats", "indexer")),
        (right, ("recall", "draft agreement", "second draft agreement")),
    ):
        for name in names:
            points = [(entry["tokens"] / 1e6, entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("nats a token")
    right.set_ylim(0, 1)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

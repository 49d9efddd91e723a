"""What arrives: traces brought to a rate, and made loads whose rate or mix changes. Called by `bench.scale`.

Every workload is arrays of N requests in the order of their arrival. Its size is set by `peak_workers`: in the busiest
five minutes, the prompts are as much work as so many prefill workers can do, by the model without hidden factors.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.route import trace
from rorqual.errors import RorqualError
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel

Floats = NDArray[np.float64]

PEAK_SECONDS = 300.0
PROMPT_TOKENS_MAX = 200_000
DAY_SECONDS = 14_400.0
NAMES = ("step", "daily", "bimodal", "constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`prompt`, `cached` (a part of the prompt) and `output` are tokens of each request."""

    name: str
    seconds: float  # until nothing more arrives
    arrive_N: Floats
    prompt_N: Floats
    cached_N: Floats
    output_N: Floats

    def __len__(self) -> int:
        return len(self.arrive_N)


@dataclass(frozen=True, slots=True)
class Shapes:
    """Tokens of requests to draw from."""

    prompt: Floats
    cached: Floats
    output: Floats

    def work(self, model: PerformanceModel) -> Floats:
        """Seconds of prefill of each."""
        return model.work_seconds(self.prompt - self.cached, self.cached)


def made(name: str, *, model: PerformanceModel, peak_workers: float, seed: int) -> Workload:
    """One of NAMES."""
    random = np.random.default_rng((seed, NAMES.index(name)))
    chat, document = _chat(random, 20_000), _documents(random, 20_000)
    if name == "constant":
        return _thinned(
            name, random, model, 3600.0, 0.6 * peak_workers, lambda _: 1.0, [(chat, lambda _: 1.0)]
        )
    if name == "step":  # x3, and down again

        def step(t: Floats) -> Floats:
            return np.where((t >= 1800) & (t < 4500), 1.0, 1 / 3)

        return _thinned(name, random, model, 7200.0, peak_workers, step, [(chat, lambda _: 1.0)])
    if name == "daily":  # a day in four hours, with noise of some minutes
        noise = np.exp(0.12 * _slow_noise(random, DAY_SECONDS, 240.0))

        def daily(t: Floats) -> Floats:
            wave = 0.575 - 0.425 * np.cos(2 * np.pi * t / DAY_SECONDS)
            return wave * noise[np.minimum((t / 10).astype(np.int64), len(noise) - 1)]

        return _thinned(name, random, model, DAY_SECONDS, peak_workers, daily, [(chat, lambda _: 1.0)])
    assert name == "bimodal", name

    def share(t: Floats) -> Floats:
        """Of work, that documents are: from a twentieth to nine tenths, twice, at an even load of prefill."""
        return 0.475 - 0.425 * np.cos(2 * np.pi * t / 3600.0)

    parts: list[tuple[Shapes, Curve]] = [(chat, lambda t: 1 - share(t)), (document, share)]
    return _thinned(name, random, model, 7200.0, 0.8 * peak_workers, lambda _: 1.0, parts)


def from_trace(
    name: str, *, model: PerformanceModel, peak_workers: float, seed: int, seconds_min: float = 7200.0
) -> Workload:
    """A trace file stretched to `seconds_min`: its rate of arrival in steps of a minute keeps its shape, its requests
    are repeated as often as the load asks for, each copy somewhere in its minute. Cached is what an endless cache
    that all workers share would have (`bench.route.trace`)."""
    random = np.random.default_rng((seed, 77))
    requests = trace.load_trace(name, seed=seed)
    outputs = _outputs(name, len(requests), random)
    prompt = np.array([item.num_tokens for item in requests], np.float64)
    cached = np.array([item.ideal_pages * PAGE_TOKENS for item in requests], np.float64)
    cached = np.minimum(cached, prompt - 1)
    at = np.array([item.seconds for item in requests])
    stretch = max(seconds_min / max(at[-1], 1.0), 1.0)
    at = at * stretch
    total = at[-1] + 1.0
    work = Shapes(prompt, cached, outputs).work(model)
    bins = np.zeros(int(total // PEAK_SECONDS) + 1)
    np.add.at(bins, (at // PEAK_SECONDS).astype(np.int64), work)
    copies = peak_workers * PEAK_SECONDS / bins.max()
    whole = int(copies)
    counts = whole + (random.random(len(at)) < copies - whole)
    index = np.repeat(np.arange(len(at)), counts)
    times = at[index] + random.uniform(-30, 30, len(index)) * stretch
    times = np.clip(times, 0.0, total)
    order = np.argsort(times, kind="stable")
    index = index[order]
    return Workload(
        name=Path(name).name.removesuffix(".gz").removesuffix(".jsonl"),
        seconds=total,
        arrive_N=times[order],
        prompt_N=prompt[index],
        cached_N=cached[index],
        output_N=outputs[index],
    )


def _outputs(name: str, count: int, random: np.random.Generator) -> Floats:
    """Tokens of the answers, which the routing race does not need and its reader leaves out."""
    if name.startswith("synthetic:"):
        return np.clip(random.lognormal(5.6, 0.8, count), 2, 4096).round()
    path = Path(name)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    rows.sort(key=lambda row: row["timestamp"])
    try:
        found = np.array([float(row["output_length"]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise RorqualError(f"{path}: every line needs a number output_length: {error!r}") from None
    return np.maximum(found, 1.0)


def _chat(random: np.random.Generator, count: int) -> Shapes:
    """Turns of conversations: some ten thousand tokens, half of them cached, answers of some hundred."""
    prompt = np.clip(random.lognormal(9.3, 0.9, count), 64, 120_000).round()
    cached = np.floor(prompt * random.beta(1.2, 1.2, count) / PAGE_TOKENS) * PAGE_TOKENS
    output = np.clip(random.lognormal(6.3, 0.8, count), 2, 4096).round()
    return Shapes(prompt, cached, output)


def _documents(random: np.random.Generator, count: int) -> Shapes:
    """Long documents that no cache has, with short answers."""
    prompt = np.clip(random.lognormal(10.6, 0.5, count), 8_000, PROMPT_TOKENS_MAX).round()
    return Shapes(prompt, np.zeros(count), np.clip(random.lognormal(4.6, 0.5, count), 2, 1024).round())


def _slow_noise(random: np.random.Generator, seconds: float, scale: float) -> Floats:
    """An Ornstein-Uhlenbeck path of variance 1 in steps of 10 s, with so long a memory."""
    keep = float(np.exp(-10.0 / scale))
    steps = random.standard_normal(int(seconds / 10) + 1)
    found = np.empty_like(steps)
    value = 0.0
    for place, step in enumerate(steps):
        value = keep * value + np.sqrt(1 - keep**2) * step
        found[place] = value
    return found


Curve = Callable[[Floats], Floats | float]


def _thinned(
    name: str,
    random: np.random.Generator,
    model: PerformanceModel,
    seconds: float,
    peak_workers: float,
    rate: Curve,
    parts: list[tuple[Shapes, Curve]],
) -> Workload:
    """Poisson arrivals: those of each part have `rate` x its share of the work of `peak_workers`."""
    grid = np.arange(0.0, seconds, 10.0)
    times: list[Floats] = []
    shapes: list[Floats] = []
    for shape, share in parts:
        each = float(shape.work(model).mean())
        expected = np.broadcast_to(peak_workers * 10.0 / each * rate(grid) * share(grid), grid.shape)
        counts = random.poisson(expected)
        at = np.repeat(grid, counts) + random.uniform(0, 10.0, int(counts.sum()))
        picked = random.integers(len(shape.prompt), size=len(at))
        times.append(at)
        shapes.append(np.stack([shape.prompt[picked], shape.cached[picked], shape.output[picked]]))
    at, tokens = np.concatenate(times), np.concatenate(shapes, axis=1)
    order = np.argsort(at, kind="stable")
    tokens = tokens[:, order]
    return Workload(
        name=name,
        seconds=seconds,
        arrive_N=at[order],
        prompt_N=tokens[0],
        cached_N=tokens[1],
        output_N=tokens[2],
    )

"""What many workers told, as one: counts added up, and of their samples a part that is fair over all of them. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rorqual.usage import PromptSample, StreamSample, Usage

T = TypeVar("T")

SAMPLES_MAX = 2048
"""Of each kind that a planner gets in one look."""

KEPT_MAX = 4 * SAMPLES_MAX
"""Between two looks; beyond it, what there is is thinned out."""


class Gathering:
    """All usage since the last look. A report that holds 256 samples of 1000 prompts must not count for less than one
    with all its 256: each sample stands for `count / samples` of them, and is kept with a chance in proportion."""

    def __init__(self, *, randomness: random.Random) -> None:
        self._prompts: _Kind[PromptSample] = _Kind(randomness)
        self._streams: _Kind[StreamSample] = _Kind(randomness)

    def add(self, usage: Usage) -> None:
        self._prompts.add(usage.num_prompts, usage.prompts)
        self._streams.add(usage.num_streams, usage.streams)

    def take(self) -> Usage:
        num_prompts, prompts = self._prompts.take()
        num_streams, streams = self._streams.take()
        return Usage(num_prompts=num_prompts, prompts=prompts, num_streams=num_streams, streams=streams)


@dataclass(slots=True)
class _Kind(Generic[T]):
    randomness: random.Random
    count: int = 0
    samples: list[tuple[float, T]] = field(default_factory=list[tuple[float, T]])  # weight, sample

    def add(self, count: int, samples: Sequence[T]) -> None:
        self.count += count
        if samples:
            weight = count / len(samples)
            self.samples += [(weight, sample) for sample in samples]
        if len(self.samples) > KEPT_MAX:
            kept = self._fair(SAMPLES_MAX)
            weight = sum(weight for weight, _ in self.samples) / len(kept)
            self.samples = [(weight, sample) for sample in kept]

    def take(self) -> tuple[int, tuple[T, ...]]:
        count, samples = self.count, tuple(self._fair(SAMPLES_MAX))
        self.count, self.samples = 0, []
        return count, samples

    def _fair(self, number_max: int) -> list[T]:
        heaviest = max((weight for weight, _ in self.samples), default=1.0)
        kept = [
            sample
            for weight, sample in self.samples
            if weight == heaviest or self.randomness.random() < weight / heaviest
        ]
        return kept if len(kept) <= number_max else self.randomness.sample(kept, number_max)

"""How fast a rank computes prompts, as it has measured lately: what routers are told of a worker's speed.

Owned by `engine.worker.tiers.speeds`, which is told every plan and every result.
"""

from __future__ import annotations

from collections import deque

RATED_TOKENS_MIN = 64


class PrefillRate:
    """Prompt tokens per second of the rank, over steps with a chunk. Steps land in the order they were planned in, so a
    queue of their token counts is enough; it is as long as plans are in flight."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        self._planned: deque[int] = deque()

    def planned(self, num_prefill: int) -> None:
        self._planned.append(num_prefill)

    def landed(self, seconds: float) -> None:
        num_prefill = self._planned.popleft()
        if num_prefill < RATED_TOKENS_MIN or seconds <= 0:
            return  # a step of few tokens says little about one of many
        rate = num_prefill / seconds
        old = self.tokens_per_second or rate
        self.tokens_per_second = old + 0.25 * (rate - old)

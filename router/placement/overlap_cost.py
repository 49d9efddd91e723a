"""The rule of NVIDIA Dynamo's KV router, as its documentation publishes it: for measurements beside ours. Pure.

cost = overlap_weight x prefill blocks + active blocks, where prefill blocks are those that would have to be computed on
the worker, queued prompts and this one, and active blocks those in use there with this one. The worker is drawn by
softmax over negated costs; at temperature 0, the default, it is the least.
"""

from __future__ import annotations

import numpy as np

from rorqual.model_config import PAGE_TOKENS
from router.placement.cache import CacheDemand, Decision, FleetPicture, plain_decision
from router.placement.simple import least


class OverlapCost:
    """Dynamo's rule with `overlap_weight` 1, as by default. A block is one of our pages. Its block index is fed by
    the workers' events, as our picture is. Of equal costs the worker with the fewest pages kept is taken."""

    def __init__(self, *, overlap_weight: float = 1.0, temperature: float = 0.0, seed: int = 0) -> None:
        self._overlap_weight = overlap_weight
        self._temperature = temperature
        self._random = np.random.default_rng(seed)

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        found = fleet.caches.look_up(request.keys)
        able = fleet.prefill_W
        new_tokens = request.num_tokens - found.pages_W * PAGE_TOKENS
        prefill_blocks = (fleet.queued_tokens_W + new_tokens) / PAGE_TOKENS
        active_blocks = fleet.active_pages_W + request.num_pages
        cost = self._overlap_weight * prefill_blocks + active_blocks
        if self._temperature == 0:
            cheapest = able & (cost == cost[able].min())
            worker = least(fleet.tree_pages_W, cheapest)
        else:
            worker = self._draw(np.where(able, cost, np.inf))
        return plain_decision(fleet, request, worker=worker, found=found)

    def finished(self, number: int) -> None:
        """Nothing is remembered of a request."""

    def _draw(self, cost: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> int:
        spread = max(float(cost[np.isfinite(cost)].max() - cost.min()), 1e-9)
        weights = np.exp(-(cost - cost.min()) / spread / self._temperature)
        return int(self._random.choice(len(cost), p=weights / weights.sum()))

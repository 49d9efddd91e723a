"""The rule of SGLang's cache-aware router, as its documentation publishes it: for measurements beside ours. Pure.

When loads differ by more than both thresholds, the worker with the fewest requests. Else, when the best prefix match in
the router's own tree exceeds `cache_threshold` of the prompt, the worker of that match; else the worker whose tree is
smallest. The tree is the router's: it holds what it has routed, not what workers still keep, up to a size.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from kvstore.keys import PageKey
from router.placement.cache import CacheDemand, Decision, FleetPicture, plain_decision
from router.placement.simple import least

TREE_PAGES_MAX = 2**26 // 1024
"""For each worker. Theirs is bounded by 2**26 characters; a page of 256 tokens is about 1,024."""


class CacheAware:
    """SGLang's rule with its default thresholds. Its tree matches characters; ours, pages."""

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        tree_pages_max: int = TREE_PAGES_MAX,
    ) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold
        self._tree_pages_max = tree_pages_max
        self._trees: list[
            OrderedDict[PageKey, None]
        ] = []  # by worker; a page is younger than those behind it

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        while len(self._trees) < fleet.num_workers:
            self._trees.append(OrderedDict())
        able = fleet.prefill_W
        most, fewest = int(fleet.sequences_W[able].max()), int(fleet.sequences_W[able].min())
        is_uneven = (
            most - fewest > self._balance_abs_threshold and most > self._balance_rel_threshold * fewest
        )
        worker = least(fleet.sequences_W, able) if is_uneven else self._by_cache(fleet, request)
        self._insert(worker, request)
        return plain_decision(fleet, request, worker=worker, found=None)

    def finished(self, number: int) -> None:
        """The tree keeps what was routed."""

    def _by_cache(self, fleet: FleetPicture, request: CacheDemand) -> int:
        able = fleet.prefill_W
        matched = np.array([self._match(tree, request) for tree in self._trees[: fleet.num_workers]])
        best = least(-matched, able)
        if request.num_pages and matched[best] / request.num_pages > self._cache_threshold:
            return best
        return least(np.array([len(tree) for tree in self._trees[: fleet.num_workers]], np.int32), able)

    def _match(self, tree: OrderedDict[PageKey, None], request: CacheDemand) -> int:
        for depth, key in enumerate(request.keys):
            if key not in tree:
                return depth
        return request.num_pages

    def _insert(self, worker: int, request: CacheDemand) -> None:
        tree = self._trees[worker]
        for key in reversed(request.keys):  # the deepest is the oldest, so that leaves go first
            tree[key] = None
            tree.move_to_end(key)
        while len(tree) > self._tree_pages_max:
            tree.popitem(last=False)

"""Placement policies by the names they have on the command line. Called by `router.process`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rorqual.performance import HARDWARE, ModelCosts, PerformanceModel
from rorqual.performance.correction import RATIO_MAX
from router.placement.by_cache import ByCache, Caches
from router.placement.cache import CachePlacement
from router.placement.cache_aware import CacheAware
from router.placement.least_wait import LeastPredictedWait, Placement
from router.placement.overlap_cost import OverlapCost
from router.placement.predictions import RATIO_MAX_UNKNOWN, Predictions, unknown_hardware_model
from router.placement.simple import LeastLoaded, LongestPrefix, RoundRobin, SessionAffinity
from router.placement.soonest import SoonestConfig, SoonestFirstToken

TAIL_PAGES = 4
"""A tail is about as large as so many pages, in released models: for predictions of reads only."""

LEAST_WAIT = "least_wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """What predictions are made from. `hardware` is a name of `rorqual.performance.HARDWARE`; "": not known, all comes
    from what workers measure."""

    costs: ModelCosts
    hardware: str = ""
    num_devices: int = 1


def _ours(model: PerformanceModel, *, fetches: bool) -> CachePlacement:
    config = SoonestConfig(fetches=fetches)
    return SoonestFirstToken(model=model, tail_bytes=TAIL_PAGES * model.costs.page_bytes, config=config)


BY_CACHE: Mapping[str, Callable[[PerformanceModel], CachePlacement]] = {
    "rorqual": lambda model: _ours(model, fetches=True),
    "rorqual-nofetch": lambda model: _ours(model, fetches=False),
    "round_robin": lambda _: RoundRobin(),
    "least_loaded": lambda _: LeastLoaded(),
    "session_affinity": lambda _: SessionAffinity(),
    "longest_prefix": lambda _: LongestPrefix(),
    "sglang_cache_aware": lambda _: CacheAware(),
    "dynamo": lambda _: OverlapCost(),
}

NAMES = (*BY_CACHE, LEAST_WAIT)


def make_placement(name: str, *, caches: Caches, workers: WorkerModel) -> Placement:
    """Of NAMES."""
    if name == LEAST_WAIT:
        return LeastPredictedWait()
    if workers.hardware:
        hardware = HARDWARE[workers.hardware]
        model = PerformanceModel(hardware=hardware, costs=workers.costs, num_devices=workers.num_devices)
    else:
        model = unknown_hardware_model(workers.costs)
    predictions = Predictions(model, ratio_max=RATIO_MAX if workers.hardware else RATIO_MAX_UNKNOWN)
    return ByCache(BY_CACHE[name](model), caches=caches, predictions=predictions)

"""Who races: each policy by name, as `rorqual bench route` makes it. Called by `bench.route.command`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.route.worker import WorkerConfig
from router.placement.cache import CachePlacement
from router.placement.cache_aware import CacheAware
from router.placement.overlap_cost import OverlapCost
from router.placement.simple import LeastLoaded, LongestPrefix, RoundRobin, SessionAffinity
from router.placement.soonest import SoonestConfig, SoonestFirstToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """`make` gives a fresh policy. `uses_picture`: it reads the router's picture of caches, whose memory it needs."""

    name: str
    summary: str
    make: Callable[[WorkerConfig, int], CachePlacement]  # of the workers' configuration and a seed
    uses_picture: bool = False


def _ours(config: WorkerConfig, *, fetches: bool) -> CachePlacement:
    return SoonestFirstToken(
        model=config.model, tail_bytes=config.tail_bytes, config=SoonestConfig(fetches=fetches)
    )


ENTRANTS = {
    entrant.name: entrant
    for entrant in (
        Entrant(
            name="rorqual",
            summary="ours: predicted first token, copies charged, pages and tails read from peers",
            make=lambda config, _: _ours(config, fetches=True),
            uses_picture=True,
        ),
        Entrant(
            name="rorqual-nofetch",
            summary="ours without reads from peers, which no other policy has",
            make=lambda config, _: _ours(config, fetches=False),
            uses_picture=True,
        ),
        Entrant(name="round_robin", summary="workers in turn", make=lambda _, __: RoundRobin()),
        Entrant(
            name="least_loaded", summary="fewest tokens to be computed", make=lambda _, __: LeastLoaded()
        ),
        Entrant(
            name="session_affinity",
            summary="a session stays where it began (sessions derived from the trace)",
            make=lambda _, __: SessionAffinity(),
        ),
        Entrant(
            name="longest_prefix",
            summary="most leading pages, then fewest tokens to be computed",
            make=lambda _, __: LongestPrefix(),
            uses_picture=True,
        ),
        Entrant(
            name="sglang_cache_aware",
            summary="SGLang router's published rule: load thresholds, match over 0.3, else smallest tree",
            make=lambda _, __: CacheAware(),
        ),
        Entrant(
            name="dynamo",
            summary="Dynamo router's published cost: prefill blocks + active blocks, temperature 0",
            make=lambda _, seed: OverlapCost(seed=seed),
            uses_picture=True,
        ),
    )
}

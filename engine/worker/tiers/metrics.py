"""What a worker tells Prometheus of the tiers of its kept state, under the same names for each: device, host, store.

Called by `engine.worker.host`. A hit is a page that a tier gave to the one above it, and the device to a prompt; so a
page that came all the way up is a hit of each. A miss is a page that was asked for and not there in time. What a store
holds and evicts is its servers' to tell (`rorqual kv stat`): all workers share it. How fast a tier is read:
`rorqual_worker_source_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge

from engine.worker.cache.prefix_cache import CacheState
from engine.worker.tiers.host_tier import HostTierState

Value = Callable[[], float]


class PageCounts(Protocol):
    """Of a store."""

    @property
    def num_pages_read(self) -> int: ...

    @property
    def num_pages_missed(self) -> int: ...


def watch_tiers(
    registry: CollectorRegistry,
    *,
    device: Callable[[], CacheState],
    host: Callable[[], HostTierState] | None,
    store: PageCounts | None,
) -> None:
    """Export what is read when scraped; of tiers that there are."""
    tiers: dict[str, dict[str, Value]] = {
        "device": {
            "pages": lambda: device().num_pages,
            "tails": lambda: device().num_tails,
            "bytes": lambda: device().num_bytes,
            "pages_hit": lambda: sum(device().counts.pages_hit.values()),
            "pages_missed": lambda: device().counts.pages_missed,
            "pages_evicted": lambda: device().counts.pages_evicted,
            "tails_evicted": lambda: device().counts.tails_evicted,
        }
    }
    if host is not None:
        tiers["host"] = {
            "pages": lambda: host().num_pages,
            "tails": lambda: host().num_tails,
            "bytes": lambda: host().num_bytes,
            "pages_hit": lambda: host().counts.pages_hit,
            # What was computed is what host memory had not, or what was not worth copying.
            "pages_missed": lambda: device().counts.pages_missed,
            "pages_evicted": lambda: host().counts.pages_evicted,
            "tails_evicted": lambda: host().counts.tails_evicted,
        }
    if store is not None:
        tiers["store"] = {
            "pages_hit": lambda: store.num_pages_read,
            "pages_missed": lambda: store.num_pages_missed,
        }
    for name, text in (
        ("pages", "Pages kept."),
        ("tails", "Tails kept."),
        ("bytes", "Of pages and tails kept, counted as the longest."),
        ("pages_hit", "Pages so far that a tier gave to the one above it, the device to prompts."),
        ("pages_missed", "Pages so far that were asked of a tier and not there in time."),
        ("pages_evicted", "Pages given up so far."),
        ("tails_evicted", "Tails given up so far."),
    ):
        gauge = Gauge(f"rorqual_worker_tier_{name}", f"{text} By tier.", ["tier"], registry=registry)
        for tier, values in tiers.items():
            if name in values:
                gauge.labels(tier).set_function(lambda value=values[name]: float(value()))

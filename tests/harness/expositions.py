"""The metrics of our programs as a Prometheus gets them: made by their own classes, with one sample of each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from autoscaler.metrics import AutoscalerMetrics
from decode_worker.metrics import BorrowingMetrics
from engine.worker.metrics import WorkerMetrics
from engine.worker.sharing.key_lending import KeyLendingMetrics
from engine.worker.sharing.peer_reading import PeerReadMetrics
from engine.worker.tiers.metrics import watch_tiers
from engine.worker.tiers.store_metrics import StoreMetrics
from prefill_worker.metrics import LendingMetrics
from router.finding import FindingMetrics
from router.fleet_metrics import FleetMetrics
from router.gateway_metrics import GatewayMetrics

SCRAPED = frozenset({"job", "instance", "namespace", "pod", "container", "endpoint", "service", "le"})
"""Labels that Prometheus and its operator give, beside those that the chart's monitors copy from objects."""


class Nothing:
    """Of a program that has just started: every count is 0, every collection empty."""

    def __getattr__(self, name: str) -> Any:
        return 0 if name.startswith("num_") else self

    def __call__(self, *_: object) -> Nothing:
        return self

    def __getitem__(self, _: object) -> Nothing:
        return self

    def __iter__(self) -> Iterator[object]:
        return iter(())

    def __float__(self) -> float:
        return 0.0


@functools.cache
def registries() -> dict[str, CollectorRegistry]:
    """By component: router, prefill, decode, autoscaler."""
    router = CollectorRegistry()
    FleetMetrics(router)
    GatewayMetrics(router)
    FindingMetrics(router)
    prefill, decode = _worker(), _worker()
    LendingMetrics(prefill).watch(num_leases=lambda: 0, num_pages=lambda: 0)
    PeerReadMetrics(prefill)
    KeyLendingMetrics(prefill)
    BorrowingMetrics(decode).watch(num_fetches=lambda: 0, num_peers=lambda: 0)
    KeyLendingMetrics(decode)
    autoscaler = AutoscalerMetrics(CollectorRegistry()).registry
    found = {"router": router, "prefill": prefill, "decode": decode, "autoscaler": autoscaler}
    for registry in found.values():
        _fill(registry)
    return found


def _worker() -> CollectorRegistry:
    nothing: Any = Nothing()
    metrics = WorkerMetrics()
    metrics.watch(
        load=nothing,
        num_preemptions=lambda: 0,
        num_records=0,
        num_records_free=lambda: 0,
        cache=nothing,
    )
    metrics.watch_host_tier(nothing)
    metrics.watch_hisparse(nothing)
    speeds: Any = SimpleNamespace(ways=lambda: [("host", (nothing,))], break_even_tokens=lambda *_, **__: 0)
    metrics.watch_speeds(speeds, page_bytes=1, tail_bytes=1)
    StoreMetrics(metrics.registry).watch(nothing, nothing)
    watch_tiers(metrics.registry, device=nothing, host=nothing, store=nothing)
    return metrics.registry


def _fill(registry: CollectorRegistry) -> None:
    """A metric with labels has no samples until it is first counted: give it one."""
    for collector in list(registry._collector_to_names):  # pyright: ignore
        names: tuple[str, ...] = collector._labelnames  # pyright: ignore
        if names and not collector._metrics:  # pyright: ignore
            collector.labels(*("sample" for _ in names))  # pyright: ignore


@functools.cache
def known() -> dict[str, tuple[str, frozenset[str]]]:
    """By a sample's name: the metric's type, and its labels."""
    return {
        sample.name: (family.type, frozenset(sample.labels))
        for registry in registries().values()
        for family in registry.collect()
        for sample in family.samples
    }

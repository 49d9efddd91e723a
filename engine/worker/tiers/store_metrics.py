"""What a worker with a store tells Prometheus of it: its reads and writes, and what the store counts about itself.

Made by `engine.worker.process`; counted into by `engine.worker.tiers.store_tier`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore.store.breaker import BreakerState
from kvstore.store.contract import Drop, Kind, Miss
from kvstore.store.counts import StoreCounts, StoreState

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class StoreMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.reads = Counter(
            "rorqual_worker_store_reads",
            "Prompts for which the store was asked, by what came of it: nothing in it, all that was wanted, a part,"
            " overdue (the rest may still come into host memory), too many at once.",
            ["outcome"],
            registry=registry,
        )
        self.wait_seconds = Histogram(
            "rorqual_worker_store_wait_seconds",
            "That a prompt waited for the store.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.read_seconds = Histogram(
            "rorqual_worker_store_read_seconds",
            "One read of values, from when it was asked for.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens_saved = Counter(
            "rorqual_worker_store_tokens_saved",
            "Tokens that need not be computed, since the store had their state in time.",
            registry=registry,
        )
        self.not_written = Counter(
            "rorqual_worker_store_not_written",
            "Pages and tails that were not offered to the store, by reason.",
            ["reason"],
            registry=registry,
        )

        self.held = Gauge(
            "rorqual_worker_store_values_held",
            "Pages and tails in host memory that wait to be offered to the store; until then their places are taken.",
            registry=registry,
        )
        self.not_held = Gauge(
            "rorqual_worker_store_values_not_held",
            "Pages and tails so far that were not offered to the store, since too many waited in host memory already,"
            " or nothing could prove them later.",
            registry=registry,
        )

    def watch(self, counts: StoreCounts, state: Callable[[], StoreState]) -> None:
        """Export what the store counts, read when scraped."""
        for name, text, found in (
            ("read", "Values read", counts.values_read),
            ("read_bytes", "Bytes of values read", counts.bytes_read),
            ("written", "Values written", counts.values_written),
            ("written_bytes", "Bytes of values written", counts.bytes_written),
            ("present", "Values not written, since they were there", counts.values_present),
        ):
            gauge = self._gauge(f"values_{name}", f"{text} so far.", "kind")
            for kind in Kind:
                gauge.labels(kind.value).set_function(lambda found=found, kind=kind: float(found[kind]))
        missed = self._gauge("values_missed", "Values asked for and not given so far, by reason.", "reason")
        for miss in Miss:
            missed.labels(miss.value).set_function(lambda miss=miss: float(counts.values_missed[miss]))
        dropped = self._gauge("values_dropped", "Values not written so far, by reason.", "reason")
        for drop in Drop:
            dropped.labels(drop.value).set_function(lambda drop=drop: float(counts.values_dropped[drop]))
        servers = self._gauge("servers", "Servers known, by the state of their breaker.", "state")
        for breaker in BreakerState:
            servers.labels(breaker.value).set_function(
                lambda breaker=breaker: float(list(state().breakers.values()).count(breaker))
            )
        for name, text, value in (
            ("values_deleted", "Values deleted so far.", lambda: counts.values_deleted),
            ("reads_overdue", "Reads so far that ended with their time.", lambda: counts.reads_overdue),
            ("breakers_opened", "Servers given up for a time so far.", lambda: counts.breakers_opened),
            ("write_pauses", "Pauses so far, since a server was full.", lambda: counts.write_pauses),
            ("bytes_in_flight", "Room taken for values on their way here.", lambda: state().bytes_in_flight),
            ("bytes_queued", "Of values that wait to be written.", lambda: state().bytes_queued),
            ("connections", "Connections to servers.", lambda: state().connections),
        ):
            gauge = Gauge(f"rorqual_worker_store_{name}", text, registry=self._registry)
            gauge.set_function(lambda value=value: float(value()))

    def _gauge(self, name: str, text: str, label: str) -> Gauge:
        return Gauge(f"rorqual_worker_store_{name}", text, [label], registry=self._registry)

"""What a decode worker tells Prometheus beside what every worker does; counted into by `decode_worker.borrowing`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class BorrowingMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.hand_overs = Counter(
            "rorqual_worker_hand_overs",
            "Sequences whose state was to be read, by how that ended.",
            ["outcome"],
            registry=registry,
        )
        self.bytes_read = Counter(
            "rorqual_worker_state_bytes_read",
            "State read from other workers; digests and metadata not counted.",
            registry=registry,
        )
        self.fetch_seconds = Histogram(
            "rorqual_worker_fetch_seconds",
            "A fetch, from post to done, measured on the rank.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.verify_seconds = Histogram(
            "rorqual_worker_fetch_verify_seconds",
            "Checking the digests of a fetch, measured on the rank.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.call_seconds = Histogram(
            "rorqual_worker_lending_call_seconds",
            "A call to the worker that lends, by method.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages_overdue = Counter(
            "rorqual_worker_stages_overdue",
            "Deadlines of a hand-over missed, by stage.",
            ["stage"],
            registry=registry,
        )

        self.endpoints_sent = Counter(
            "rorqual_worker_endpoints_sent", "Readers told where the memory is.", registry=registry
        )

    def watch(self, *, num_fetches: Callable[[], int], num_peers: Callable[[], int]) -> None:
        """Export counts of the borrower, read when scraped."""
        fetches = Gauge(
            "rorqual_worker_fetches_open",
            "Reads that write into this worker's memory, or may.",
            registry=self._registry,
        )
        fetches.set_function(lambda: float(num_fetches()))
        peers = Gauge("rorqual_worker_peers", "Owners of state known here.", registry=self._registry)
        peers.set_function(lambda: float(num_peers()))

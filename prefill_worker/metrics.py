"""What a prefill worker tells Prometheus beside what every worker does; counted into by `prefill_worker.lending`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class LendingMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.leases_granted = Counter("rorqual_worker_leases_granted", "Leases begun.", registry=registry)
        self.leases_renewed = Counter(
            "rorqual_worker_leases_renewed",
            "Renewals, by who asked; refused: of a lease that had ended.",
            ["by"],
            registry=registry,
        )
        self.leases_released = Counter(
            "rorqual_worker_leases_released", "Leases whose reader was done.", registry=registry
        )
        self.leases_expired = Counter(
            "rorqual_worker_leases_expired", "Leases that nobody renewed in time.", registry=registry
        )
        self.leases_revoked = Counter(
            "rorqual_worker_leases_revoked",
            "Leases ended by this worker: cancelled sequences, routers gone.",
            registry=registry,
        )
        self.endpoints_sent = Counter(
            "rorqual_worker_endpoints_sent", "Readers told where the memory is.", registry=registry
        )

    def watch(self, *, num_leases: Callable[[], int], num_pages: Callable[[], int]) -> None:
        """Export the ledger's own counts, read when scraped."""
        leases = Gauge(
            "rorqual_worker_leases",
            "Leases that run, or whose pages are kept until no read can be under way.",
            registry=self._registry,
        )
        leases.set_function(lambda: float(num_leases()))
        pages = Gauge("rorqual_worker_lease_pages", "Pages of those.", registry=self._registry)
        pages.set_function(lambda: float(num_pages()))

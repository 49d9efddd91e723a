"""What the router tells Prometheus about its workers and sequences; counted into by `router.worker_link`,
`router.dispatch` and `router.split`. Every bound and deadline of theirs has a metric here."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rorqual.session import Role


class HandOverMetrics:
    """Of sequences that are split: credit, binding, leases."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.credit_waiting = Gauge(
            "rorqual_router_credit_waiting",
            "Sequences that wait for credit of a decode worker.",
            registry=registry,
        )
        self.credit_sequences = Gauge(
            "rorqual_router_credit_sequences",
            "Sequences charged to a decode worker's credit.",
            ["worker"],
            registry=registry,
        )
        self.credit_pages = Gauge(
            "rorqual_router_credit_pages",
            "Pages charged to a decode worker's credit.",
            ["worker"],
            registry=registry,
        )
        self.binds = Counter(
            "rorqual_router_binds",
            "Decode workers told to read a prompt's state: early, late, or again after one was lost.",
            ["kind"],
            registry=registry,
        )
        self.hand_over_seconds = Histogram(
            "rorqual_router_hand_over_seconds",
            "From a split sequence's first token to its decode worker's first one.",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=registry,
        )
        self.leases_renewed = Counter(
            "rorqual_router_leases_renewed",
            "Renewals sent to prefill workers, one for each sequence.",
            registry=registry,
        )


class FeedMetrics:
    """Of feeds and the picture that is made of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.feed_items = Counter(
            "rorqual_router_feed_items",
            "Descriptions of workers' prefix caches taken in.",
            registry=registry,
        )
        self.feed_faults = Counter(
            "rorqual_router_feed_faults",
            "Feeds that could not be followed any further, and were asked for anew.",
            ["worker", "reason"],
            registry=registry,
        )
        self.feed_pages = Gauge(
            "rorqual_router_feed_pages",
            "Pages that a worker is known to hold.",
            ["worker"],
            registry=registry,
        )
        self.picture_pairs = Gauge(
            "rorqual_router_picture_pairs",
            "Pages of workers, one for each that holds it, in the picture of all caches.",
            registry=registry,
        )
        self.picture_bytes = Gauge(
            "rorqual_router_picture_bytes", "Memory of the picture of all caches.", registry=registry
        )


class StoreMetrics:
    """Of questions to the store that all workers share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.store_questions = Counter(
            "rorqual_router_store_questions",
            "Prompts for which the store was asked what it has: found, absent, or unknown since it was late or lost.",
            ["outcome"],
            registry=registry,
        )
        self.store_seconds = Histogram(
            "rorqual_router_store_seconds",
            "That a prompt waited for the store to say what it has.",
            buckets=(0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02),
            registry=registry,
        )


class FleetMetrics(HandOverMetrics, FeedMetrics, StoreMetrics):
    def __init__(self, registry: CollectorRegistry) -> None:
        HandOverMetrics.__init__(self, registry)
        FeedMetrics.__init__(self, registry)
        StoreMetrics.__init__(self, registry)
        self.workers_connected = Gauge(
            "rorqual_router_workers_connected", "Workers with a session.", registry=registry
        )
        self.worker_info = Gauge(
            "rorqual_router_worker_info",
            "1 for each worker with a session, with its role and the version of Rorqual that it runs.",
            ["worker", "role", "version"],
            registry=registry,
        )
        self.sessions_opened = Counter(
            "rorqual_router_sessions_opened", "Sessions opened.", ["worker"], registry=registry
        )
        self.sessions_lost = Counter(
            "rorqual_router_sessions_lost",
            "Sessions and attempts that failed.",
            ["worker"],
            registry=registry,
        )
        self.sequences_opened = Counter(
            "rorqual_router_sequences_opened", "Sequences sent to a worker.", ["worker"], registry=registry
        )
        self.sequences_outstanding = Gauge(
            "rorqual_router_sequences_outstanding", "Sequences open.", ["worker"], registry=registry
        )
        self.tokens_outstanding = Gauge(
            "rorqual_router_tokens_outstanding",
            "Tokens to be computed or generated for open sequences, at most.",
            ["worker"],
            registry=registry,
        )
        self.sequences_cancelled = Counter(
            "rorqual_router_sequences_cancelled", "Cancels sent to workers.", registry=registry
        )
        self.sequences_retried = Counter(
            "rorqual_router_sequences_retried", "Sequences opened a second time.", registry=registry
        )
        self.sequences_lost = Counter(
            "rorqual_router_sequences_lost",
            "Sequences that ended because a worker failed.",
            registry=registry,
        )
        self.sequences_unread = Counter(
            "rorqual_router_sequences_unread",
            "Sequences cancelled because the client read too slowly.",
            registry=registry,
        )
        self.tokens_duplicate = Counter(
            "rorqual_router_tokens_duplicate", "Tokens that came twice and were dropped.", registry=registry
        )
        self.sequences_placed = Counter(
            "rorqual_router_sequences_placed",
            "Sequences opened whole on one worker, or split over a prefill and a decode worker.",
            ["kind"],
            registry=registry,
        )
        self.peer_fetches = Counter(
            "rorqual_router_peer_fetches",
            "Prompts sent to a worker that is to read some of it from another one first.",
            registry=registry,
        )
        self.requests_overloaded = Counter(
            "rorqual_router_requests_overloaded",
            "Requests refused since no worker had room.",
            registry=registry,
        )
        self.stages_overdue = Counter(
            "rorqual_router_stages_overdue", "Deadlines missed, by stage.", ["stage"], registry=registry
        )

    def describe_worker(self, address: str, *, role: Role, version: str) -> None:
        """`version` empty: it does not say."""
        # An empty label would be none to Prometheus.
        self.worker_info.labels(address, role.value, version or "unknown").set(1)

    def forget(self, address: str) -> None:
        """Of this worker nothing is told any more: workers come and go for ever, and series must not pile up."""
        for metric in (
            self.credit_sequences,
            self.credit_pages,
            self.feed_faults,
            self.feed_pages,
            self.sessions_opened,
            self.sessions_lost,
            self.sequences_opened,
            self.sequences_outstanding,
            self.tokens_outstanding,
        ):
            metric.remove_by_labels({"worker": address})

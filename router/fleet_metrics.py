"""What the router tells Prometheus about its workers and sequences; counted into by `router.fleet` and
`router.dispatch`. Every bound and deadline of theirs has a metric here."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class FleetMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.workers_connected = Gauge(
            "rorqual_router_workers_connected", "Workers with a session.", registry=registry
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
        self.requests_overloaded = Counter(
            "rorqual_router_requests_overloaded",
            "Requests refused since no worker had room.",
            registry=registry,
        )
        self.stages_overdue = Counter(
            "rorqual_router_stages_overdue", "Deadlines missed, by stage.", ["stage"], registry=registry
        )

"""The autoscaler's metrics, all named `rorqual_autoscaler_*`, on a registry that is passed in."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class AutoscalerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"rorqual_autoscaler_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rorqual_autoscaler_{name}", text, labels, registry=registry)

        self.wanted = gauge("replicas_wanted", "Replicas that a pool's target is set to.", "pool")
        self.replicas_max = gauge("replicas_max", "Replicas that the policy lets a pool have.", "pool")
        self.decided = gauge("replicas_decided", "Replicas by the last decision.", "pool")
        self.ready = gauge("replicas_ready", "Workers of a pool that are connected and do not drain.", "pool")
        self.starting = gauge("replicas_starting", "Replicas that are wanted and do not serve yet.", "pool")
        self.problem = gauge("pool_problem", "1 while a pool's replicas cannot start.", "pool")
        self.figure = gauge("figure", "Numbers that the last decision went by, by name with unit.", "figure")
        self.notes = gauge(
            "notes", "Reasons why nothing else was decided: holds, limits that bind, problems."
        )
        self.holds = gauge("holds", "Pools left as somebody else has set them.")
        self.pending = gauge("writes_pending", "Pools whose replicas could not be set yet.")
        self.missing = gauge("workers_missing", "Workers known of that are not connected.")
        self.leader = gauge("leader", "1 while this autoscaler may act.")
        self.look_age = gauge("seconds_since_look", "Since the last look that was decided on.")
        self.policy_age = gauge("seconds_since_policy", "Since the policy in force was loaded.")
        self.ttft = gauge("router_ttft_seconds", "Mean time to first token at routers since the last look.")
        self.itl = gauge("router_itl_seconds", "Mean time between tokens at routers since the last look.")
        self.waiting = gauge("router_waiting", "Requests that wait at routers for a worker.")
        self.decisions = counter("decisions", "Changes of replicas, by direction.", "pool", "direction")
        self.edits = counter("edits_by_others", "Times that somebody else set a pool's replicas.", "pool")
        self.reload_failures = counter("reload_failures", "Changed policies that could not be used.")
        self.reloads = counter("reloads", "Changed policies that were taken.")
        self.api_failures = counter("api_failures", "Calls to a target or for the lease that failed.", "what")

    def forget(self) -> None:
        """What was last seen and decided: by one that decides no more, or of other pools. Alerts go by it."""
        for by_pool in (self.wanted, self.decided, self.ready, self.starting, self.problem, self.figure):
            by_pool.clear()
        for alone in (self.notes, self.holds, self.pending, self.waiting, self.ttft, self.itl):
            alone.set(0)

    def show_limits(self, limits: Mapping[str, int]) -> None:
        """Of the policy in force: the most replicas by pool. Pools that it does not name any more are forgotten."""
        self.replicas_max.clear()
        for pool, most in limits.items():
            self.replicas_max.labels(pool).set(most)

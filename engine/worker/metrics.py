"""What a worker tells Prometheus.

Made by `engine.worker.process`, which serves it through `rorqual.metrics_endpoint`; counted into by
`engine.worker.host`.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.worker.cache.prefix_cache import CacheState
from engine.worker.tiers.hisparse import HiSparseState
from engine.worker.tiers.host_tier import HostTierState
from engine.worker.tiers.speeds import Speeds
from kvstore.shadow_radix import StartKind
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance.sources import MeasuredSpeed
from rorqual.session import Load

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class WorkerMetrics:
    """Counters of one worker, in a registry of its own: no globals, so tests run many workers in one
    process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.sequences_opened = Counter(
            "rorqual_worker_sequences_opened", "Sequences accepted.", registry=registry
        )
        self.sequences_ended = Counter(
            "rorqual_worker_sequences_ended", "Sequences ended, by reason.", ["reason"], registry=registry
        )
        self.sequences_refused = Counter(
            "rorqual_worker_sequences_refused", "Opens refused, by code.", ["code"], registry=registry
        )
        self.tokens_generated = Counter(
            "rorqual_worker_tokens_generated", "Tokens sampled for live sequences.", registry=registry
        )
        self.tokens_computed = Counter(
            "rorqual_worker_tokens_computed",
            "Tokens run through the model, by phase.",
            ["phase"],
            registry=registry,
        )
        self.drafts_proposed = Counter(
            "rorqual_worker_drafts_proposed", "Drafted tokens run through the model.", registry=registry
        )
        self.drafts_accepted = Counter(
            "rorqual_worker_drafts_accepted",
            "Drafted tokens that were equal to the sampled ones.",
            registry=registry,
        )
        self.decode_tokens = Histogram(
            "rorqual_worker_decode_tokens",
            "Tokens that one sequence got from one step, where it had drafts.",
            buckets=(1, 2, 3, 4, 5),
            registry=registry,
        )
        self.step_seconds = Histogram(
            "rorqual_worker_step_seconds",
            "A step, measured on the rank.",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.copy_seconds = Counter(
            "rorqual_worker_copy_seconds",
            "Part of the steps: copies of pages and tails to host memory and back.",
            registry=registry,
        )
        self.steps_overdue = Counter(
            "rorqual_worker_steps_overdue", "Steps that outlived their deadline.", registry=registry
        )
        self.sessions = Gauge("rorqual_worker_sessions", "Sessions connected.", registry=registry)
        self.sessions_slow = Counter(
            "rorqual_worker_sessions_slow",
            "Sessions closed because the router did not read.",
            registry=registry,
        )
        self.feed_items = Counter(
            "rorqual_worker_feed_items",
            "Descriptions of the prefix cache sent to routers, by kind.",
            ["kind"],
            registry=registry,
        )
        self.feed_snapshots = Counter(
            "rorqual_worker_feed_snapshots", "Whole descriptions begun, for all routers.", registry=registry
        )
        self.feed_number = Gauge(
            "rorqual_worker_feed_number", "Changes of the prefix cache published.", registry=registry
        )
        self.draining = Gauge("rorqual_worker_draining_bool", "1 while draining.", registry=registry)

    def watch(
        self,
        *,
        load: Callable[[], Load],
        num_preemptions: Callable[[], int],
        num_records: int,
        num_records_free: Callable[[], int],
        cache: Callable[[], CacheState],
    ) -> None:
        """Export the scheduler's own counts, read when scraped."""
        records = Gauge("rorqual_worker_records_total", "Hand-over records.", registry=self.registry)
        records.set(num_records)
        records_free = Gauge("rorqual_worker_records_free", "Hand-over records free.", registry=self.registry)
        records_free.set_function(lambda: float(num_records_free()))
        for name, text, field in (
            ("sequences_running", "Sequences that hold a slot.", "sequences_running"),
            ("sequences_waiting", "Sequences in the queue.", "sequences_waiting"),
            ("tokens_waiting", "Known tokens not yet computed.", "tokens_waiting"),
            ("pages_free", "Pages free.", "pages_free"),
            ("pages_total", "Pages in the pools.", "pages_total"),
            (
                "pages_leased",
                "Pages lent out, or kept until nobody can be reading or writing them.",
                "pages_leased",
            ),
            ("prefill_tokens_per_second", "Prompt tokens, measured lately.", "prefill_tokens_per_second"),
            ("slots_free", "Slots free.", "slots_free"),
            ("slots_total", "Slots.", "slots_total"),
        ):
            gauge = Gauge(f"rorqual_worker_{name}", text, registry=self.registry)
            gauge.set_function(lambda field=field: float(getattr(load(), field)))
        self._watch_cache(cache)
        preemptions = Gauge(
            "rorqual_worker_preemptions", "Preemptions by recompute so far.", registry=self.registry
        )
        preemptions.set_function(lambda: float(num_preemptions()))

    def watch_host_tier(self, state: Callable[[], HostTierState]) -> None:
        """Export what host memory holds of prefixes, where there is some."""

        def show(name: str, text: str, value: Callable[[HostTierState], float]) -> None:
            gauge = Gauge(f"rorqual_worker_host_{name}", text, registry=self.registry)
            gauge.set_function(lambda: float(value(state())))

        show("pages", "Pages kept in host memory.", lambda now: now.num_pages)
        show("tails", "Tails kept in host memory.", lambda now: now.num_tails)
        show("bytes", "Of pages and tails kept in host memory.", lambda now: now.num_bytes)
        show("pages_total", "Pages that host memory holds.", lambda now: now.num_pages_total)
        show("records_total", "Tails that host memory holds.", lambda now: now.num_records_total)
        for kind in ("pages", "tails"):
            for name, text in (
                ("taken", "copied to host memory so far"),
                ("kept", "evicted so far while host memory had them already"),
                ("hit", "that came back from host memory so far"),
                ("refused", "evicted so far that host memory did not take"),
                ("evicted", "that host memory has given up so far"),
            ):
                show(
                    f"{kind}_{name}",
                    f"{kind.capitalize()} {text}.",
                    lambda now, field=f"{kind}_{name}": getattr(now.counts, field),
                )

    def watch_hisparse(self, state: Callable[[], HiSparseState]) -> None:
        """Export what is spilled of running sequences, where anything can be."""

        def show(name: str, text: str, value: Callable[[HiSparseState], float], **labels: str) -> None:
            gauge = gauges.get(name)
            if gauge is None:
                full_name = f"rorqual_worker_hisparse_{name}"
                gauge = gauges[name] = Gauge(full_name, text, list(labels), registry=self.registry)
            (gauge.labels(**labels) if labels else gauge).set_function(lambda: float(value(state())))

        gauges: dict[str, Gauge] = {}
        show("sequences", "Running sequences whose C4 rows are in host memory.", lambda now: now.num_spilled)
        show("buffers_total", "Sequences of which they can be.", lambda now: now.num_buffers)
        show("thin_pages_total", "Pages without C4 rows.", lambda now: now.num_thin_pages)
        show("thin_pages_free", "Pages without C4 rows that are free.", lambda now: now.num_thin_pages_free)
        show(
            "host_pages", "Pages in host memory that running sequences hold.", lambda now: now.num_host_pages
        )
        show("spills", "Sequences that have spilled so far.", lambda now: now.counts.num_spills)
        show("returns", "Sequences that have come back so far.", lambda now: now.counts.num_returns)
        show("pages_spilled", "Pages spilled so far.", lambda now: now.counts.pages_spilled)
        for kind in ("hit", "missed"):
            show(
                "rows",
                "C4 rows picked so far by spilled sequences, over all layers: found on the device, or copied from host"
                " memory.",
                lambda now, kind=kind: getattr(now.counts, f"rows_{kind}"),
                kind=kind,
            )
        for kind in ("useful", "wasted"):
            show(
                "rows_prefetched",
                "C4 rows brought in ahead so far: wanted then, or evicted before.",
                lambda now, kind=kind: getattr(now.counts, f"rows_{kind}"),
                kind=kind,
            )

    def watch_speeds(self, speeds: Speeds, *, page_bytes: int, tail_bytes: int) -> None:
        """Export how fast kept state is read, as measured or, before that, assumed."""

        def show(name: str, text: str, value: Callable[[tuple[MeasuredSpeed, ...]], float]) -> None:
            gauge = Gauge(f"rorqual_worker_source_{name}", text, ["source"], registry=self.registry)
            for source, way in speeds.ways():
                gauge.labels(source).set_function(lambda way=way: float(value(way)))

        show(
            "bytes_per_second",
            "Bandwidth of reads of kept state, by source; of a store up to host memory.",
            lambda way: way[0].speed.bytes_per_second,
        )
        show(
            "latency_seconds",
            "Of a read, however short, by source.",
            lambda way: way[0].speed.latency_seconds,
        )
        show("reads_measured", "Reads measured so far, by source.", lambda way: way[0].num_samples)
        show(
            "reads_refused",
            "Prefixes so far that were not read, since computing them seemed sooner, by source.",
            lambda way: way[0].num_refused,
        )
        show(
            "break_even_tokens",
            "Length from which on a prefix with a tail is read instead of computed, by source.",
            lambda way: speeds.break_even_tokens(
                way, tail_bytes=tail_bytes, bytes_per_token=page_bytes / PAGE_TOKENS
            ),
        )

    def _watch_cache(self, cache: Callable[[], CacheState]) -> None:
        def show(name: str, text: str, value: Callable[[CacheState], float], **labels: str) -> None:
            gauge = gauges.get(name)
            if gauge is None:
                gauge = Gauge(f"rorqual_worker_{name}", text, list(labels), registry=self.registry)
                gauges[name] = gauge
            (gauge.labels(**labels) if labels else gauge).set_function(lambda: float(value(cache())))

        gauges: dict[str, Gauge] = {}
        show("pages_cached", "Pages kept of prefixes, in use or not.", lambda state: state.num_pages)
        show("tails_cached", "Records kept to resume from.", lambda state: state.num_tails)
        for kind in StartKind:
            show(
                "pages_hit",
                "Full pages of prompts so far that were not computed, by how it was resumed.",
                lambda state, kind=kind: state.counts.pages_hit.get(kind, 0),
                kind=kind.value,
            )
        show(
            "pages_missed",
            "Full pages of prompts so far that were computed, replayed ones too.",
            lambda state: state.counts.pages_missed,
        )
        show("pages_evicted", "Pages evicted so far.", lambda state: state.counts.pages_evicted)
        show("tails_evicted", "Tails evicted so far.", lambda state: state.counts.tails_evicted)
        for kind in ("reused", "computed"):
            show(
                "prompt_tokens",
                "Tokens of prompts started so far, by whether they had to be computed.",
                lambda state, kind=kind: getattr(state.counts, f"tokens_{kind}"),
                kind=kind,
            )

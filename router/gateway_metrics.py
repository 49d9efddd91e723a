"""The router's metrics at its two doors, HTTP and gRPC.

One `GatewayMetrics` per process, on a registry that is passed in; each request has a `RequestMeter` of its
own. Called by the gateways; it reads no clock but the one it is given and never fails a request.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from rorqual.clock import Clock
from rorqual.ids import RequestId
from rorqual.telemetry import fields
from router.generation import ChoiceUpdate, Usage

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 30, 60, 300)


class GatewayMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "rorqual_router_requests_total",
            "Requests answered, by route and status (HTTP code or gRPC name); a stream that fails counts as"
            " its failure.",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "rorqual_router_request_seconds",
            "From a request's last byte to its reply's last byte.",
            ["route"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "rorqual_router_first_token_seconds",
            "From a request's last byte to its first token.",
            ["route"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.inter_token_seconds = Histogram(
            "rorqual_router_inter_token_seconds",
            "Between a choice's tokens after its first, averaged over tokens that came together.",
            ["route"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "rorqual_router_prompt_tokens_total", "Prompt tokens accepted.", ["route"], registry=registry
        )
        self.completion_tokens = Counter(
            "rorqual_router_completion_tokens_total", "Tokens generated.", ["route"], registry=registry
        )
        self.cached_tokens = Counter(
            "rorqual_router_cached_tokens_total",
            "Prompt tokens that no worker had to compute.",
            ["route"],
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "rorqual_router_in_flight_requests", "Requests being answered.", ["route"], registry=registry
        )
        self.cancelled = Counter(
            "rorqual_router_cancelled_requests_total",
            "Requests whose client went away, was cut off or cancelled.",
            ["route"],
            registry=registry,
        )
        self.cut_off = Counter(
            "rorqual_router_cut_off_connections_total",
            "HTTP connections ended by the router, by deadline or bound.",
            ["reason"],
            registry=registry,
        )
        self.body_bytes_inflight = Gauge(
            "rorqual_router_in_flight_body_bytes",
            "Bytes of HTTP bodies that are being received or wait to be read.",
            registry=registry,
        )
        self.choices_inflight = Gauge(
            "rorqual_router_in_flight_choices",
            "Choices being read or generated over both gateways, as the bound on them counts.",
            registry=registry,
        )
        self.internal_errors = Counter(
            "rorqual_router_internal_errors_total",
            "Requests that failed by a fault of the router itself.",
            ["route"],
            registry=registry,
        )


class RequestMeter:
    """Follows one request from its last byte to the reply's last byte."""

    def __init__(self, metrics: GatewayMetrics, *, route: str, clock: Clock) -> None:
        self.route = route
        self.request_id: RequestId | None = None  # once the request has been read
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self._metrics = metrics
        self._clock = clock
        self._start = clock.monotonic()
        self._last_by_choice: dict[int, float] = {}
        self._cached_by_prompt: dict[int, int] = {}  # by the choice that had most of it computed
        self._inter_token_seconds = metrics.inter_token_seconds.labels(route)
        metrics.requests_in_flight.labels(route).inc()

    def prompted(self, num_tokens: int) -> None:
        self.num_prompt_tokens += num_tokens
        self._metrics.prompt_tokens.labels(self.route).inc(num_tokens)

    @property
    def usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            num_cached_tokens=sum(self._cached_by_prompt.values()),
        )

    def saw(self, update: ChoiceUpdate, *, choice: int, prompt: int = 0) -> None:
        num_tokens = len(update.tokens)
        if num_tokens == 0:
            return
        if update.first_index == 0:
            least = self._cached_by_prompt.get(prompt, update.cached_tokens)
            self._cached_by_prompt[prompt] = min(least, update.cached_tokens)
        now = self._clock.monotonic()
        last = self._last_by_choice.get(choice)
        if last is not None:
            self._inter_token_seconds.observe((now - last) / num_tokens)
        elif not self._last_by_choice:
            self._metrics.first_token_seconds.labels(self.route).observe(now - self._start)
        self._last_by_choice[choice] = now
        self.num_completion_tokens += num_tokens

    def about(self) -> str:
        """What every log line of a request ends with."""
        return fields(route=self.route, request=self.request_id)

    def finished(self) -> str:
        """What the log line of a request that was answered to its end says besides."""
        return fields(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            ms=1e3 * self.seconds(),
        )

    def seconds(self) -> float:
        return self._clock.monotonic() - self._start

    def cancelled(self) -> None:
        self._metrics.cancelled.labels(self.route).inc()

    def failed(self) -> None:
        self._metrics.internal_errors.labels(self.route).inc()

    def end(self, status: str) -> None:
        metrics = self._metrics
        metrics.requests_in_flight.labels(self.route).dec()
        metrics.requests.labels(self.route, status).inc()
        metrics.request_seconds.labels(self.route).observe(self.seconds())
        metrics.completion_tokens.labels(self.route).inc(self.num_completion_tokens)
        metrics.cached_tokens.labels(self.route).inc(self.usage.num_cached_tokens)

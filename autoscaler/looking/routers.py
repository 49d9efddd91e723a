"""What routers tell by their metrics: who waits there, whom they turned away, and what users see.

One `RouterReader` for each router that is known of, asked every `interval_seconds`. Counters are read as differences;
one that went back began anew with its router. A router that does not answer is missing: what it said last stands, until
its source forgets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from rorqual.errors import ConfigError
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

ASK_SECONDS_MAX = 5.0
BODY_BYTES_MAX = 8 << 20

WAITING = "rorqual_router_credit_waiting"
REQUESTS = "rorqual_router_requests_total"
TTFT = "rorqual_router_first_token_seconds"
ITL = "rorqual_router_inter_token_seconds"
_UNSERVED_STATUS = frozenset({"429", "503", "504", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFigures:
    """Of one text of metrics. Sums and counts are since the router began."""

    num_waiting: float = 0.0
    num_unserved: float = 0.0
    ttft_seconds: float = 0.0
    ttft_count: float = 0.0
    itl_seconds: float = 0.0
    itl_count: float = 0.0


@dataclass(slots=True, kw_only=True)
class RouterNews:
    """What is new since the last look, of one or of many routers."""

    num_waiting: int = 0
    num_unserved: int = 0
    ttft_seconds: float = 0.0
    ttft_count: float = 0.0
    itl_seconds: float = 0.0
    itl_count: float = 0.0
    missing: list[str] = field(default_factory=list[str])

    @property
    def ttft_mean(self) -> float | None:
        return self.ttft_seconds / self.ttft_count if self.ttft_count else None

    @property
    def itl_mean(self) -> float | None:
        return self.itl_seconds / self.itl_count if self.itl_count else None


def read_figures(text: str) -> RouterFigures:
    """Raises ValueError for a text that is not Prometheus' format."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not math.isfinite(sample.value):
                continue  # no count or sum of ours
            if sample.name == REQUESTS:
                if sample.labels.get("status") in _UNSERVED_STATUS:
                    sums["unserved"] = sums.get("unserved", 0.0) + sample.value
            elif sample.name in _PLAIN:
                name = _PLAIN[sample.name]
                sums[name] = sums.get(name, 0.0) + sample.value
    return RouterFigures(
        num_waiting=sums.get("waiting", 0.0),
        num_unserved=sums.get("unserved", 0.0),
        ttft_seconds=sums.get("ttft_seconds", 0.0),
        ttft_count=sums.get("ttft_count", 0.0),
        itl_seconds=sums.get("itl_seconds", 0.0),
        itl_count=sums.get("itl_count", 0.0),
    )


class Pinned:
    """Trust in one certificate, whatever address it is met at: routers are reached by theirs, and the certificate that
    they show to clients names another. Read anew as the file changes."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError."""
        self._file = file
        self._read_at = 0
        self._context = self._read()

    def context(self) -> ssl.SSLContext:
        with contextlib.suppress(
            ConfigError, OSError
        ):  # in the middle of being replaced: the one before it holds
            if self._file.stat().st_mtime_ns != self._read_at:
                self._context = self._read()
        return self._context

    def _read(self) -> ssl.SSLContext:
        try:
            self._read_at = self._file.stat().st_mtime_ns
            context = ssl.create_default_context(cafile=str(self._file))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--routers-cert: {self._file} cannot be used: {error}") from None
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


class RouterReader:
    """One router. `run` asks until cancelled."""

    def __init__(
        self,
        address: str,
        *,
        session: aiohttp.ClientSession,
        interval_seconds: float,
        trust: Pinned | None = None,
    ) -> None:
        """With `trust` routers speak HTTPS."""
        self.address = address
        self.failure = "not asked yet"
        self.interval_seconds = interval_seconds
        self._url = f"{'http' if trust is None else 'https'}://{address}/metrics"
        self._trust = trust
        self._session = session
        self._now: RouterFigures | None = None
        self._base: RouterFigures | None = None

    async def run(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(self.interval_seconds)

    def leave(self) -> bool:
        return False

    def stay(self) -> None:
        pass

    async def ask(self) -> None:
        try:
            trust = self._trust.context() if self._trust else True
            async with asyncio.timeout(ASK_SECONDS_MAX):
                async with self._session.get(self._url, ssl=trust) as response:
                    text = (await response.content.read(BODY_BYTES_MAX)).decode("utf-8", "replace")
                    while not response.content.at_eof():
                        text += (await response.content.read(BODY_BYTES_MAX)).decode("utf-8", "replace")
                        if len(text) > BODY_BYTES_MAX:
                            raise ValueError("more metrics than anybody has")
                    status = response.status
            if status != 200:
                raise ValueError(f"it answered {status}")
            figures = read_figures(text)
        except (TimeoutError, OSError, aiohttp.ClientError, ValueError) as error:
            failure = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            if failure != self.failure:
                log.warning(
                    "failed to read a router's metrics %s", fields(router=self.address, error=failure)
                )
            self.failure = failure or type(error).__name__
        else:
            self.take_in(figures)

    def take_in(self, figures: RouterFigures) -> None:
        self.failure = ""
        if self._base is None:
            self._base = figures  # what was before we came is nobody's news
        self._now = figures

    def add_news(self, news: RouterNews) -> None:
        """Since the last call."""
        if self.failure:
            news.missing.append(f"{self.address}: {self.failure}")
        if self._now is None or self._base is None:
            return
        news.num_waiting += round(self._now.num_waiting)
        news.num_unserved += round(_rise(self._base.num_unserved, self._now.num_unserved))
        news.ttft_seconds += _rise(self._base.ttft_seconds, self._now.ttft_seconds)
        news.ttft_count += _rise(self._base.ttft_count, self._now.ttft_count)
        news.itl_seconds += _rise(self._base.itl_seconds, self._now.itl_seconds)
        news.itl_count += _rise(self._base.itl_count, self._now.itl_count)
        self._base = self._now


def gather_news(readers: Iterable[RouterReader]) -> RouterNews:
    news = RouterNews()
    for reader in readers:
        reader.add_news(news)
    return news


def _rise(before: float, now: float) -> float:
    return now - before if now >= before else now


_PLAIN: Mapping[str, str] = {
    WAITING: "waiting",
    f"{TTFT}_sum": "ttft_seconds",
    f"{TTFT}_count": "ttft_count",
    f"{ITL}_sum": "itl_seconds",
    f"{ITL}_count": "itl_count",
}

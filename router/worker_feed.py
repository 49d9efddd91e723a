"""The feed of one worker, followed: from its session into the router's picture of all caches.

Made by `router.worker_link`, which passes every item of its sessions on and carries the commands out. A feed that is
lost is asked for anew, after a wait that doubles as long as it is lost again and again: each time costs the worker a
snapshot. While nothing is known of a worker it counts as empty, and so it does without a session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from kvstore.feed import FeedReader
from rorqual.feed import FeedItem, Subscribe
from rorqual.ids import Incarnation
from rorqual.telemetry import fields
from router.fleet_metrics import FleetMetrics
from router.picture import WorkerContent, WorkerIndex

log = logging.getLogger(__name__)

RESUBSCRIBE_SECONDS_MIN = 0.1
RESUBSCRIBE_SECONDS_MAX = 30.0


class WorkerFeed:
    def __init__(self, content: WorkerContent, *, address: str, metrics: FleetMetrics) -> None:
        self.reader = FeedReader(content)
        self.content = content
        self._address = address
        self._metrics = metrics
        self._lost = asyncio.Event()
        self._num_losses = 0  # since it was last followed from a snapshot to a delta or digest behind it
        metrics.feed_pages.labels(address).set_function(lambda: float(self.reader.num_entries))

    @property
    def index(self) -> WorkerIndex:
        """The worker's place in the picture."""
        return self.content.index

    def begin(self, incarnation: Incarnation) -> Subscribe:
        """A session has begun: what to ask for."""
        self._lost.clear()
        self._num_losses = 0
        return self.reader.welcome(incarnation)

    def take(self, items: Iterable[FeedItem]) -> None:
        """Of one report, in order."""
        for item in items:
            number = self.reader.number
            lost = self.reader.take(item)
            self._metrics.feed_items.inc()
            if lost is not None:
                self._num_losses += 1
                self._metrics.feed_faults.labels(self._address, lost.reason.value).inc()
                log.warning(
                    "lost the feed of a worker's cache %s",
                    fields(worker=self._address, reason=lost.reason.value, error=lost.detail),
                )
                self._lost.set()
            elif number is not None and self.reader.number is not None:
                self._num_losses = 0

    async def keep(self, send: Callable[[Subscribe], None]) -> None:
        """Ask anew whenever the feed was lost, for as long as the session lasts."""
        while True:
            await self._lost.wait()
            wait = RESUBSCRIBE_SECONDS_MIN * 2 ** min(self._num_losses - 1, 30)
            await asyncio.sleep(min(wait, RESUBSCRIBE_SECONDS_MAX))
            self._lost.clear()
            send(self.reader.subscribe())

    def end(self) -> None:
        """The session is over: nobody can say what the worker holds now."""
        self.reader.leave()

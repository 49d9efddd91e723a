"""What a worker's prefix cache holds, described to every router that asked: the worker's side of the feed.

Owned by `engine.worker.host`, which publishes once a turn; each `engine.worker.session` takes what its router has not
had yet and sends it in the reports that go out anyway. It decides nothing about the cache and holds nothing for a slow
session: one that falls behind the history gets a new snapshot (`kvstore.feed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.worker.metrics import WorkerMetrics
from kvstore.feed import FeedWriter, Subscription
from kvstore.keys import PageKey
from kvstore.shadow_radix import Changes
from rorqual.feed import FeedItem, SnapshotPart, Subscribe
from rorqual.ids import Incarnation

ENTRIES_MAX = 8192
"""Of one report: 140 KB. A snapshot of more travels in several, with other reports in between."""

ITEMS_MAX = 64
"""Of one report: a router that was away for a while reads its deltas in several."""


class CacheIndex(Protocol):
    """The cache that is described: `engine.worker.prefix_cache.PrefixCache`."""

    def take_changes(self) -> Changes:
        """What is different from the last time; at first from an empty cache."""
        ...

    def contents(self) -> Iterator[tuple[PageKey, int]]:
        """Every page, and its flags."""
        ...


class CacheFeed:
    """Without a cache it describes an empty one, so that a router need not tell the two apart."""

    def __init__(self, index: CacheIndex | None, *, incarnation: Incarnation, metrics: WorkerMetrics) -> None:
        self._index = index
        self._writer = FeedWriter(incarnation)
        self._metrics = metrics
        metrics.feed_number.set_function(lambda: float(self._writer.number))

    @property
    def writer(self) -> FeedWriter:
        """For those who check what is published."""
        return self._writer

    def publish(self) -> bool:
        """Number what the cache has changed since the last time. True when there is news."""
        if self._index is None:
            return False
        changes = self._index.take_changes()
        if changes.is_empty:
            return False
        if changes.is_overflowed:
            self._writer.replace(self._index.contents())
        else:
            self._writer.note(changes.entries)
        return self._writer.publish() > 0

    def subscribe(self, wish: Subscribe) -> FeedCursor:
        """How far one session has read, in place of what it had."""
        return FeedCursor(self._writer.subscribe(wish), metrics=self._metrics)


class FeedCursor:
    """One session's position in the feed."""

    def __init__(self, subscription: Subscription, *, metrics: WorkerMetrics) -> None:
        self._subscription = subscription
        self._metrics = metrics

    @property
    def is_current(self) -> bool:
        """There is nothing to take."""
        return self._subscription.is_current

    def take(self, *, with_digest: bool) -> tuple[FeedItem, ...]:
        """For the next report; `with_digest`: say what the content is when there is nothing else to say of it."""
        num_snapshots = self._subscription.num_snapshots
        items = self._subscription.take(entries_max=ENTRIES_MAX, items_max=ITEMS_MAX, with_digest=with_digest)
        self._metrics.feed_snapshots.inc(self._subscription.num_snapshots - num_snapshots)
        for item in items:
            kind = "part" if isinstance(item, SnapshotPart) else type(item).__name__.lower()
            self._metrics.feed_items.labels(kind).inc()
        return items

"""The worker's side of the feed: it numbers the changes of a cache and hands each session what it has not had yet.

A host owns one `FeedWriter` for its index of pages and a `Subscription` for each session that asked. Every step it
tells the changes, publishes them under the next number, and lets each session take. Pure: no I/O, no clock. It never
holds anything for a slow session: a subscription is a position in the history that all share, and one that has fallen
out of it gets a new snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvstore.feed.digest import MASK, digest_of, mix_key
from rorqual.feed import (
    ABSENT,
    CHANGE_FLAGS,
    CONTENT_ENTRIES_MAX,
    CONTENT_FLAGS,
    KEY_BYTES,
    PART_ENTRIES_MAX,
    PARTS_MAX,
    Delta,
    Digest,
    FeedItem,
    SnapshotPart,
    Subscribe,
)
from rorqual.ids import Incarnation


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedBounds:
    """Part of the host's configuration."""

    history_deltas_max: int = 4096  # older ones are forgotten: who has not had them gets a snapshot
    history_entries_max: int = 256 * 1024  # of those deltas together: 4.5 MB
    part_entries_max: int = PART_ENTRIES_MAX  # of one snapshot part or delta

    def __post_init__(self) -> None:
        assert 1 <= self.part_entries_max <= PART_ENTRIES_MAX
        assert self.history_deltas_max >= 1
        assert self.history_entries_max >= self.part_entries_max


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The content at `number`, sorted by key and cut into parts. Shared by the sessions that read it."""

    number: int
    parts: tuple[SnapshotPart, ...]


class FeedWriter:
    """Content, number and recent history of one cache. At most CONTENT_ENTRIES_MAX pages, and as many as fit into
    PARTS_MAX parts."""

    def __init__(self, incarnation: Incarnation, *, bounds: FeedBounds | None = None) -> None:
        assert incarnation > 0
        self.incarnation = incarnation
        self.bounds = bounds or FeedBounds()
        self._entries_max = min(CONTENT_ENTRIES_MAX, PARTS_MAX * self.bounds.part_entries_max)
        self._content: dict[bytes, int] = {}  # as published
        self._pending: dict[bytes, int] = {}  # flags from the next number on
        self._number = 0
        self._digest = 0
        self._history: deque[Delta] = deque()  # ends with `_number`, without gaps
        self._history_entries = 0
        self._snapshot: Snapshot | None = None

    @property
    def number(self) -> int:
        """Of the newest published content; 0 is the empty one."""
        return self._number

    @property
    def oldest(self) -> int:
        """Who has the content of this number or a later one can go on with deltas."""
        return self._number - len(self._history)

    @property
    def num_entries(self) -> int:
        """Pages of the published content."""
        return len(self._content)

    def note(self, changes: Iterable[tuple[bytes, int, int]]) -> None:
        """What the index has changed: keys with their flags before, which are those told so far, and now."""
        for key, before, now in changes:
            assert len(key) == KEY_BYTES
            assert before << 4 | now in CHANGE_FLAGS, "the index told flags that cannot be"
            assert before == self.flags(key), "the index told a change that cannot be"
            self._pending[key] = now

    def flags(self, key: bytes) -> int:
        """As told so far; ABSENT when there is no such page."""
        flags = self._pending.get(key)
        return self._content.get(key, ABSENT) if flags is None else flags

    def replace(self, content: Iterable[tuple[bytes, int]]) -> None:
        """Forget what is pending: from the next number on the content is this, by key and flags. For an index that
        has changed more than it can list. Costs a pass over everything."""
        wanted = dict(content)
        assert all(flags in CONTENT_FLAGS for flags in wanted.values()), (
            "content has an entry with wrong flags"
        )
        self._pending = {key: ABSENT for key in self._content if key not in wanted}
        self._pending.update((k, flags) for k, flags in wanted.items() if self._content.get(k) != flags)

    def publish(self) -> int:
        """Number what has changed since the last time, in one delta, or more when one may not hold so much. Returns
        how many: none when all is as it was."""
        if not self._pending:
            return 0
        changes = [
            (key, before, after)
            for key, after in self._pending.items()
            if (before := self._content.get(key, ABSENT)) != after
        ]
        self._pending.clear()
        size = self.bounds.part_entries_max
        for start in range(0, len(changes), size):
            self._append(changes[start : start + size])
        assert len(self._content) <= self._entries_max, "more pages than a feed can describe"
        return -(-len(changes) // size)

    def digest(self) -> Digest:
        """Of the newest published content."""
        return Digest(
            incarnation=self.incarnation,
            number=self._number,
            num_entries=len(self._content),
            digest=self._digest,
        )

    def subscribe(self, wish: Subscribe) -> Subscription:
        """For one session; takes the place of the one it had."""
        resumes = wish.incarnation == self.incarnation and self.oldest <= wish.number <= self._number
        return Subscription(self, number=wish.number if resumes else None)

    def since(self, number: int) -> Delta:
        """The delta that follows this number, which must not be the newest nor below `oldest`."""
        assert self.oldest <= number < self._number, "no delta is remembered for this number"
        return self._history[number - self.oldest]

    def snapshot(self) -> Snapshot:
        """Of the published content, or of one a little older that was made before: routers that start together cost
        one sort (100,000 pages: about 40 ms)."""
        made = self._snapshot
        if made is None or self._number - made.number > len(self._history) // 2:
            made = self._snapshot = self._make_snapshot()
        return made

    def check(self) -> None:
        """Asserts that counts and digest are those of the content. Costs a pass over everything."""
        assert all(flags in CONTENT_FLAGS for flags in self._content.values())
        digest = digest_of(b"".join(self._content), bytes(self._content.values()))
        assert digest == self._digest, "digest is not that of the content"
        assert self._history_entries == sum(len(delta.changes) for delta in self._history)

    def _append(self, changes: list[tuple[bytes, int, int]]) -> None:
        for key, before, after in changes:
            if after:
                self._content[key] = after
            else:
                del self._content[key]
            self._digest += mix_key(key, after) - mix_key(key, before)
        self._digest &= MASK
        self._number += 1
        self._history.append(
            Delta(
                incarnation=self.incarnation,
                number=self._number,
                digest=self._digest,
                keys=b"".join(key for key, _, _ in changes),
                changes=bytes(before << 4 | after for _, before, after in changes),
            )
        )
        self._history_entries += len(changes)
        while (
            len(self._history) > self.bounds.history_deltas_max
            or self._history_entries > self.bounds.history_entries_max
        ):
            self._history_entries -= len(self._history.popleft().changes)

    def _make_snapshot(self) -> Snapshot:
        keys = np.frombuffer(b"".join(self._content), dtype=">u8").reshape(-1, 2)
        flags = np.frombuffer(bytes(self._content.values()), dtype=np.uint8)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys_sorted, flags_sorted = keys[order].tobytes(), flags[order].tobytes()
        size = self.bounds.part_entries_max
        num_parts = max(1, -(-len(flags_sorted) // size))
        return Snapshot(
            number=self._number,
            parts=tuple(
                SnapshotPart(
                    incarnation=self.incarnation,
                    number=self._number,
                    part=part,
                    num_parts=num_parts,
                    num_entries=len(flags_sorted),
                    digest=self._digest,
                    keys=keys_sorted[part * size * KEY_BYTES : (part + 1) * size * KEY_BYTES],
                    flags=flags_sorted[part * size : (part + 1) * size],
                )
                for part in range(num_parts)
            ),
        )


class Subscription:
    """How far one session has read. It holds no more than the snapshot it is reading."""

    def __init__(self, writer: FeedWriter, *, number: int | None) -> None:
        """`number`: of the content the reader has; None when it has none that can be gone on with."""
        self._writer = writer
        self._number = number
        self._snapshot: Snapshot | None = None
        self._next_part = 0
        self.num_snapshots = 0  # begun; more than one: the session was too slow for the history

    @property
    def is_current(self) -> bool:
        """Everything that has been published has been taken."""
        return self._number == self._writer.number

    def take(self, *, entries_max: int, items_max: int, with_digest: bool = False) -> tuple[FeedItem, ...]:
        """What to send next: in order, at most so many items, and as many entries, but always one item while there is
        any. `with_digest` adds the digest when nothing else is left to send, as a heartbeat does."""
        items: list[FeedItem] = []
        num_entries = 0
        while len(items) < items_max:
            item = self._peek()
            if item is None:
                break
            num_entries += len(item.keys) // KEY_BYTES
            if items and num_entries > entries_max:
                break
            self._advance(item)
            items.append(item)
        if with_digest and self.is_current and len(items) < items_max:
            items.append(self._writer.digest())
        return tuple(items)

    def _peek(self) -> SnapshotPart | Delta | None:
        if self._snapshot is not None and self._snapshot.number < self._writer.oldest:
            self._snapshot = None  # its deltas are gone already: reading it to its end would be of no use
        if self._snapshot is None and (self._number is None or self._number < self._writer.oldest):
            self._number, self._snapshot, self._next_part = None, self._writer.snapshot(), 0
            self.num_snapshots += 1
        if self._snapshot is not None:
            return self._snapshot.parts[self._next_part]
        assert self._number is not None
        return self._writer.since(self._number) if self._number < self._writer.number else None

    def _advance(self, item: SnapshotPart | Delta) -> None:
        if isinstance(item, Delta):
            self._number = item.number
            return
        assert self._snapshot is not None
        self._next_part += 1
        if self._next_part == len(self._snapshot.parts):
            self._number, self._snapshot = self._snapshot.number, None

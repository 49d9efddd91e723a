"""The router's side of the feed: it follows one worker's cache exactly, or says that it has to start anew.

A link to a worker owns one `FeedReader` and gives it every item of the session in order. The content itself is kept
elsewhere, behind `Content`, since all workers' are kept together; this decides what may go into it. Pure: no I/O, no
clock. It never lets a part of anything be seen: an item is checked whole, digest included, before the content is
touched, and a snapshot becomes visible with its last part.

At all times the visible content is that of the worker at `number`, or empty while `number` is None.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvstore.feed.digest import MASK, digest_of
from rorqual.feed import (
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

_BEFORE = bytes(value >> 4 for value in range(256))
_AFTER = bytes(value & 15 for value in range(256))


class Content(Protocol):
    """What is known of one worker's cache. The bytes given may be kept. Keys are packed, 16 bytes each."""

    def start(self) -> None:
        """Begin a new content beside the visible one; it stays invisible."""
        ...

    def add(self, keys: bytes, flags: bytes) -> bool:
        """To the content that was begun; no key comes twice. False: there is no room, and it is to be abandoned."""
        ...

    def commit(self) -> None:
        """What was begun is complete: it takes the place of the visible content at once."""
        ...

    def abandon(self) -> None:
        """Throw away what was begun. The visible content stays."""
        ...

    def change(self, keys: bytes, flags: bytes) -> bool:
        """Of the visible content: these keys have these flags now, 0 is absent. False: there is no room, and the
        content is wrong until it is cleared."""
        ...

    def clear(self) -> None:
        """The visible content is empty from now on."""
        ...


class Reason(enum.Enum):
    """Why a feed cannot be followed any further."""

    GAP = "gap"  # a number or a part is missing
    DUPLICATE = "duplicate"  # a number or a part came again
    OUTDATED = "outdated"  # a snapshot from before what is known
    INCARNATION = "incarnation"  # of another worker than the one that welcomed us
    COUNT = "count"  # more than there can be, or not as much as was said
    ENTRY = "entry"  # flags that cannot be, or keys out of order
    DIGEST = "digest"  # the content is not the worker's
    ROOM = "room"  # the router's picture is full


@dataclass(frozen=True, slots=True, kw_only=True)
class Resubscribe:
    """The feed is lost and its worker counts as empty. Send `FeedReader.subscribe()`; wait in between, longer each
    time: a feed that is lost again and again costs a snapshot each time."""

    reason: Reason
    detail: str  # one line for the log


class FeedLost(Exception):
    """Inside this module: how a check that fails ends the reading of an item."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class FeedReader:
    """Follows one worker, over all its sessions and incarnations."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._incarnation = Incarnation(0)  # of the session; 0 before the first
        self._number: int | None = None
        self._num_entries = 0
        self._digest = 0
        self._loading: _Loading | None = None
        self._is_lost = True  # until it subscribes, nothing is listened to
        self.faults: Counter[Reason] = Counter()
        self.num_passed_over = 0  # items of a subscription that was given up already

    @property
    def number(self) -> int | None:
        """The visible content is the worker's at this number; None: it is empty because nothing is known."""
        return self._number

    @property
    def num_entries(self) -> int:
        return self._num_entries

    @property
    def is_loading(self) -> bool:
        """A snapshot is arriving."""
        return self._loading is not None

    def welcome(self, incarnation: Incarnation) -> Subscribe:
        """A session has begun, with a worker of this incarnation: what to ask it for. The same one as before may go
        on where it was, and its content stays visible, exact at its number; of another one nothing is left."""
        assert incarnation > 0
        if incarnation != self._incarnation:
            self._forget()
        self._incarnation = incarnation
        return self.subscribe()

    def subscribe(self) -> Subscribe:
        """What to ask for, now that it is asked; the answers are listened to from now on."""
        self._abandon()
        self._is_lost = False
        if self._number is None:
            return Subscribe()
        return Subscribe(incarnation=self._incarnation, number=self._number)

    def leave(self) -> None:
        """The worker is gone for good: it counts as empty."""
        self._forget()
        self._is_lost = True

    def take(self, item: FeedItem) -> Resubscribe | None:
        """One item of the session, in order. None: all is well."""
        if self._is_lost:
            self.num_passed_over += 1
            return None
        try:
            if item.incarnation != self._incarnation:
                raise FeedLost(Reason.INCARNATION, f"an item of incarnation {item.incarnation:x}")
            match item:
                case SnapshotPart():
                    self._take_part(item)
                case Delta():
                    self._take_delta(item)
                case Digest():
                    self._take_digest(item)
        except FeedLost as lost:
            self.faults[lost.reason] += 1
            self._forget()
            self._is_lost = True
            return Resubscribe(reason=lost.reason, detail=str(lost))
        return None

    def _take_part(self, part: SnapshotPart) -> None:
        loading = self._loading
        if part.part == 0:
            if self._number is not None and part.number < self._number:
                raise FeedLost(Reason.OUTDATED, f"a snapshot of {part.number} after {self._number}")
            self._abandon()
            _check_head(part)
            loading = self._loading = _Loading(head=part)
            self._content.start()
        elif loading is None:
            if self._number is not None:
                raise FeedLost(Reason.GAP, f"part {part.part} of a snapshot that did not begin")
            self.num_passed_over += 1  # on its way when we subscribed anew
            return
        loading.take(part)
        if not self._content.add(part.keys, part.flags):
            raise FeedLost(Reason.ROOM, "no room for a snapshot")
        if loading.is_complete:
            loading.check_whole()
            self._content.commit()
            self._loading = None
            self._number, self._num_entries, self._digest = part.number, part.num_entries, part.digest

    def _take_delta(self, delta: Delta) -> None:
        if self._loading is not None:
            raise FeedLost(Reason.GAP, f"delta {delta.number} in the middle of a snapshot")
        if self._number is None:
            self.num_passed_over += 1
            return
        if delta.number <= self._number:
            raise FeedLost(Reason.DUPLICATE, f"delta {delta.number} after {self._number}")
        if delta.number != self._number + 1:
            raise FeedLost(Reason.GAP, f"delta {delta.number} after {self._number}")
        _check_changes(delta)
        before, after = delta.changes.translate(_BEFORE), delta.changes.translate(_AFTER)
        num_entries = self._num_entries + before.count(0) - after.count(0)
        if not 0 <= num_entries <= CONTENT_ENTRIES_MAX:
            raise FeedLost(Reason.COUNT, f"delta {delta.number} leaves {num_entries} entries")
        digest = (self._digest + digest_of(delta.keys, after) - digest_of(delta.keys, before)) & MASK
        if digest != delta.digest:
            raise FeedLost(Reason.DIGEST, f"delta {delta.number} does not lead to the worker's content")
        if not self._content.change(delta.keys, after):
            raise FeedLost(Reason.ROOM, "no room for a delta")
        self._number, self._num_entries, self._digest = delta.number, num_entries, digest

    def _take_digest(self, digest: Digest) -> None:
        if self._loading is not None:
            raise FeedLost(Reason.GAP, "a digest in the middle of a snapshot")
        if self._number is None:
            self.num_passed_over += 1
            return
        if digest.number != self._number:
            raise FeedLost(Reason.GAP, f"a digest of {digest.number} at {self._number}")
        if digest.num_entries != self._num_entries:
            raise FeedLost(
                Reason.COUNT, f"{self._num_entries} entries where the worker has {digest.num_entries}"
            )
        if digest.digest != self._digest:
            raise FeedLost(Reason.DIGEST, f"another content at {digest.number}")

    def _abandon(self) -> None:
        if self._loading is not None:
            self._loading = None
            self._content.abandon()

    def _forget(self) -> None:
        self._abandon()
        if self._number is not None:
            self._content.clear()
        self._number, self._num_entries, self._digest = None, 0, 0


class _Loading:
    """A snapshot that is arriving."""

    def __init__(self, *, head: SnapshotPart) -> None:
        self._head = head
        self._num_parts = 0
        self._num_entries = 0
        self._digest = 0
        self._last_key = b""

    @property
    def is_complete(self) -> bool:
        return self._num_parts == self._head.num_parts

    def take(self, part: SnapshotPart) -> None:
        head = self._head
        if part.part < self._num_parts:
            raise FeedLost(Reason.DUPLICATE, f"part {part.part} where {self._num_parts} was due")
        if part.part > self._num_parts:
            raise FeedLost(Reason.GAP, f"part {part.part} where {self._num_parts} was due")
        if (part.number, part.num_parts, part.num_entries, part.digest) != (
            head.number,
            head.num_parts,
            head.num_entries,
            head.digest,
        ):
            raise FeedLost(Reason.GAP, f"part {part.part} of another snapshot")
        _check_lengths(part.keys, part.flags)
        self._num_entries += len(part.flags)
        if self._num_entries > head.num_entries:
            raise FeedLost(Reason.COUNT, f"more than the {head.num_entries} entries of the snapshot")
        if part.flags.translate(None, CONTENT_FLAGS):
            raise FeedLost(Reason.ENTRY, f"flags of part {part.part} that cannot be")
        if part.keys and not (self._last_key < part.keys[:KEY_BYTES] and _are_ascending(part.keys)):
            raise FeedLost(Reason.ENTRY, f"keys of part {part.part} are not in ascending order")
        self._digest = (self._digest + digest_of(part.keys, part.flags)) & MASK
        self._last_key = part.keys[-KEY_BYTES:] or self._last_key
        self._num_parts += 1

    def check_whole(self) -> None:
        if self._num_entries != self._head.num_entries:
            raise FeedLost(
                Reason.COUNT, f"{self._num_entries} of {self._head.num_entries} entries of a snapshot"
            )
        if self._digest != self._head.digest:
            raise FeedLost(Reason.DIGEST, f"the snapshot of {self._head.number} is not the worker's content")


def _check_head(part: SnapshotPart) -> None:
    if not 1 <= part.num_parts <= PARTS_MAX:
        raise FeedLost(Reason.COUNT, f"a snapshot of {part.num_parts} parts")
    if part.num_entries > min(CONTENT_ENTRIES_MAX, part.num_parts * PART_ENTRIES_MAX):
        raise FeedLost(Reason.COUNT, f"a snapshot of {part.num_entries} entries in {part.num_parts} parts")


def _check_lengths(keys: bytes, flags: bytes) -> None:
    if len(keys) != KEY_BYTES * len(flags) or len(flags) > PART_ENTRIES_MAX:
        raise FeedLost(Reason.COUNT, f"{len(keys)} bytes of keys beside {len(flags)} of flags")


def _check_changes(delta: Delta) -> None:
    _check_lengths(delta.keys, delta.changes)
    if not delta.changes:
        raise FeedLost(Reason.COUNT, f"delta {delta.number} changes nothing")
    if delta.changes.translate(None, CHANGE_FLAGS):
        raise FeedLost(Reason.ENTRY, f"changes of delta {delta.number} that cannot be")
    words = struct.unpack(f"<{2 * len(delta.changes)}Q", delta.keys)
    if len(set(zip(words[::2], words[1::2], strict=True))) != len(delta.changes):
        raise FeedLost(Reason.ENTRY, f"delta {delta.number} changes a page twice")


def _are_ascending(keys: bytes) -> bool:
    """Strictly, as unsigned big-endian numbers, which is the order of bytes."""
    words = np.frombuffer(keys, dtype=">u8").astype(np.uint64).reshape(-1, 2)
    high, low = words[:, 0], words[:, 1]
    is_more = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))
    return bool(is_more.all())

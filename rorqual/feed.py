"""The feed in a session: what a worker tells a router about its cache, as our own dataclasses and their bounds.

`kvstore.feed` writes and reads these, `rorqual.feed_wire` turns them into protobuf and back; nothing else takes them
apart. An item names pages by their 16-byte keys, packed one after another, with one byte for each key beside them.
Content is described, never carried: no item has a byte of cached state.

The content of a cache at number n is a set of entries (page key, flags). A page that is there has the flag PAGE; one
that a sequence can resume behind has TAIL too. HOST_PAGE and HOST_TAIL say that the page, or the tail, is in the
worker's host memory only: it can use it, others cannot read it. What is on the device and in host memory is on the
device, so copying there is no change. Every change makes a new number.

A reader that does not know a flag refuses the item: to a router from before there was host memory such a worker counts
as empty.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.ids import Incarnation

KEY_BYTES = 16

PAGE = 1
TAIL = 2  # never without PAGE: a tail leaves with its page
HOST_PAGE = 4  # never without PAGE; its tail, if any, is in host memory too
HOST_TAIL = 8  # never without TAIL; its page may be on the device
ABSENT = 0

CONTENT_FLAGS = bytes(
    (
        PAGE,
        PAGE | TAIL,
        PAGE | TAIL | HOST_TAIL,
        PAGE | HOST_PAGE,
        PAGE | TAIL | HOST_PAGE | HOST_TAIL,
    )
)
"""Flags that an entry can have."""

CHANGE_FLAGS = bytes(
    before << 4 | after
    for before in (ABSENT, *CONTENT_FLAGS)
    for after in (ABSENT, *CONTENT_FLAGS)
    if before != after
)
"""What a changed entry can say: its flags before in the upper four bits, its flags from now on in the lower."""

PART_ENTRIES_MAX = 4096
"""Entries of one snapshot part or one delta: 70 KB on the wire, and a few milliseconds of a router's time."""

CONTENT_ENTRIES_MAX = 1 << 22
"""Entries of one worker's content: a thousand million tokens. A feed that claims more is absurd."""

PARTS_MAX = CONTENT_ENTRIES_MAX // PART_ENTRIES_MAX

ITEMS_MAX = 256
"""Items in one report."""


NO_INCARNATION = Incarnation(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """A router's command: describe your cache from now on. With the incarnation and number whose content the router
    has, a worker that remembers all deltas since goes on from there; with 0 and 0, or else, it begins anew."""

    incarnation: Incarnation = NO_INCARNATION
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPart:
    """A run of the content at `number`. The parts of a snapshot come in order and together hold it whole, with all
    keys in ascending order."""

    incarnation: Incarnation
    number: int
    part: int  # 0, 1, ... num_parts - 1
    num_parts: int  # an empty content has one empty part
    num_entries: int  # of the whole content
    digest: int  # of the whole content, unsigned 64 bits (`kvstore.feed.digest`)
    keys: bytes  # 16 each
    flags: bytes  # 1 each, of CONTENT_FLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What made the content at `number` out of the one at `number - 1`. No key twice."""

    incarnation: Incarnation
    number: int
    digest: int  # of the content at `number`
    keys: bytes  # 16 each
    changes: bytes  # 1 each, of CHANGE_FLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The content at `number`, which is the newest, in short: finds a delta that was lost when none came after."""

    incarnation: Incarnation
    number: int
    num_entries: int
    digest: int


FeedItem = SnapshotPart | Delta | Digest

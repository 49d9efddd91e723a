"""What the index is made of: a node for each page that is present, a tail on some, pins on those in use.

Only `index` makes and changes these; others see `Match`, which is a copy, and hold `Pin`, which is a handle.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvstore.keys import PageKey
from rorqual.ids import PageId, RecordId


class TailKind(IntEnum):
    """Why a tail was taken. A higher one says more about its being used again."""

    EVERY_K = 1  # on the way through a long prompt
    TURN_END = 2  # at the last boundary of generated tokens
    PROMPT_END = 3  # at the last boundary of a prompt
    BRANCH = 4  # where prompts were seen to part


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What the index has of one prefix. Depths are in pages from the start of the prompt."""

    num_pages: int  # leading pages that are present
    tail_depths: tuple[int, ...]  # of live tails among them, ascending
    is_branch: (
        bool  # the path goes on beyond num_pages, but with other tokens or longer than the keys asked for
    )

    @property
    def resumable(self) -> int:
        """The deepest depth with a tail; 0 when there is none."""
        return self.tail_depths[-1] if self.tail_depths else 0


class Node:
    """One page. It exists exactly while its page is present, and its parent exists as long as it does."""

    __slots__ = (
        "depth",
        "entry",
        "hits",
        "is_branch",
        "key",
        "num_children",
        "num_holds",
        "page",
        "parent",
        "stamp",
        "tail",
    )

    def __init__(self, key: PageKey, parent: Node | None, page: PageId, stamp: int) -> None:
        self.key = key
        self.parent = parent  # None: the root, which is no page
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.page = page
        self.num_children = 0
        self.num_holds = 0  # pins that end here, and children with holds
        self.tail: Tail | None = None
        self.stamp = stamp  # the index's clock at the last use of it, or of descendants that are gone
        self.hits = 0  # pins through it, the first not counted
        self.is_branch = False  # has had two children at once
        self.entry = 0  # its live entry in the eviction queue; 0: none


class Tail:
    """State to resume from behind a node's page."""

    __slots__ = ("entry", "hits", "kind", "node", "num_pins", "record", "stamp")

    def __init__(self, node: Node, record: RecordId, kind: TailKind, stamp: int) -> None:
        self.node = node
        self.record = record
        self.kind = kind
        self.num_pins = 0
        self.stamp = stamp
        self.hits = 0  # resumed from so often
        self.entry = 0


class Pin:
    """The right to use leading pages of a prefix, and perhaps one tail: none of them is evicted until it is released.

    The index moves it when its path is extended. Whoever pinned releases it, once.
    """

    __slots__ = ("node", "pages", "pinned_tail")

    def __init__(self, node: Node, pages: list[PageId], pinned_tail: Tail | None) -> None:
        self.node: Node | None = node  # the deepest; None: released. For the index only.
        self.pages = pages  # ids in order of depth; to be read only
        self.pinned_tail = pinned_tail  # for the index only

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def tail(self) -> RecordId | None:
        """The record of the tail that is pinned."""
        return self.pinned_tail.record if self.pinned_tail is not None else None

"""What has changed in an index since somebody last asked: for the feed that shows routers a worker's cache.

Changes of one key are folded: what was added and removed in between never shows. That bounds the log by the number of
keys touched, and beyond `num_keys_max` it says that it overflowed, upon which the reader takes the whole contents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.keys import PageKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The difference between two moments. Parents are added before their children and removed after them, unless a
    tier below keeps pages too: then in any order. A tail that went with its page is in `tails_removed` too."""

    pages_added: tuple[PageKey, ...] = ()
    pages_removed: tuple[PageKey, ...] = ()
    tails_added: tuple[PageKey, ...] = ()
    tails_removed: tuple[PageKey, ...] = ()
    is_overflowed: bool = False  # there was too much to list: all four are empty, take the contents instead

    @property
    def is_empty(self) -> bool:
        lists = (self.pages_added, self.pages_removed, self.tails_added, self.tails_removed)
        return not self.is_overflowed and not any(lists)


class ChangeLog:
    """Belongs to one index, which tells it what each key was before it changes: whether its page and its tail were
    there."""

    def __init__(self, *, num_keys_max: int) -> None:
        self._num_keys_max = num_keys_max
        self._before: dict[PageKey, tuple[bool, bool]] = {}  # (page, tail) present at the last `take`
        self._is_overflowed = False

    def note_page(self, key: PageKey, before: tuple[bool, bool]) -> None:
        """Called before a page comes, or goes after its tail. The key moves to the end, so that keys added stand in the
        order in which they came for good, and keys removed in that in which they went."""
        if not self._is_overflowed:
            self._before[key] = self._before.pop(key, before)
            self._bound()

    def note_tail(self, key: PageKey, before: tuple[bool, bool]) -> None:
        """Called before a tail comes or goes; its page is there. The key stays where it is, before its children."""
        if not self._is_overflowed:
            self._before.setdefault(key, before)
            self._bound()

    def take(self, state: Callable[[PageKey], tuple[bool, bool]]) -> Changes:
        """The difference to the last time; `state` says whether a key has a page and a tail now."""
        before, self._before = self._before, {}
        if self._is_overflowed:
            self._is_overflowed = False
            return Changes(is_overflowed=True)
        lists: tuple[list[PageKey], ...] = ([], [], [], [])
        pages_added, pages_removed, tails_added, tails_removed = lists
        for key, (had_page, had_tail) in before.items():
            has_page, has_tail = state(key)
            if has_page != had_page:
                (pages_added if has_page else pages_removed).append(key)
            if has_tail != had_tail:
                (tails_added if has_tail else tails_removed).append(key)
        return Changes(
            pages_added=tuple(pages_added),
            pages_removed=tuple(pages_removed),
            tails_added=tuple(tails_added),
            tails_removed=tuple(tails_removed),
        )

    def _bound(self) -> None:
        if len(self._before) > self._num_keys_max:
            self._before.clear()
            self._is_overflowed = True

"""What has changed in an index since somebody last asked: for the feed that shows routers a worker's cache.

A state is what `rorqual.feed` calls flags: whether a key has a page and a tail, and in which tier. Changes of one key
are folded: what was added and removed in between never shows. That bounds the log by the number of keys touched, and
beyond `num_keys_max` it says that it overflowed, upon which the reader takes the whole contents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.keys import PageKey
from rorqual.feed import PAGE, TAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The difference between two moments. Parents are added before their children and removed after them, unless a
    tier below keeps pages too: then in any order."""

    entries: tuple[tuple[PageKey, int, int], ...] = ()  # (key, flags before, flags now), which differ
    is_overflowed: bool = False  # there was too much to list: take the contents instead

    @property
    def is_empty(self) -> bool:
        return not self.is_overflowed and not self.entries

    @property
    def pages_added(self) -> tuple[PageKey, ...]:
        """In any tier, as the three below."""
        return tuple(key for key, before, now in self.entries if now & ~before & PAGE)

    @property
    def pages_removed(self) -> tuple[PageKey, ...]:
        return tuple(key for key, before, now in self.entries if before & ~now & PAGE)

    @property
    def tails_added(self) -> tuple[PageKey, ...]:
        return tuple(key for key, before, now in self.entries if now & ~before & TAIL)

    @property
    def tails_removed(self) -> tuple[PageKey, ...]:
        """Those that went with their pages too."""
        return tuple(key for key, before, now in self.entries if before & ~now & TAIL)


class ChangeLog:
    """Belongs to one index, which tells it the state of each key before it changes."""

    def __init__(self, *, num_keys_max: int) -> None:
        self._num_keys_max = num_keys_max
        self._before: dict[PageKey, int] = {}  # at the last `take`
        self._is_overflowed = False

    def note_page(self, key: PageKey, before: int) -> None:
        """Called before a page comes, or goes after its tail. The key moves to the end, so that keys added stand in the
        order in which they came for good, and keys removed in that in which they went."""
        if not self._is_overflowed:
            self._before[key] = self._before.pop(key, before)
            self._bound()

    def note_tail(self, key: PageKey, before: int) -> None:
        """Called before a tail comes or goes; its page is there. The key stays where it is, before its children."""
        if not self._is_overflowed:
            self._before.setdefault(key, before)
            self._bound()

    def take(self, state: Callable[[PageKey], int]) -> Changes:
        """The difference to the last time; `state` is that of a key now."""
        before, self._before = self._before, {}
        if self._is_overflowed:
            self._is_overflowed = False
            return Changes(is_overflowed=True)
        found = ((key, had, state(key)) for key, had in before.items())
        return Changes(entries=tuple(entry for entry in found if entry[1] != entry[2]))

    def _bound(self) -> None:
        if len(self._before) > self._num_keys_max:
            self._before.clear()
            self._is_overflowed = True

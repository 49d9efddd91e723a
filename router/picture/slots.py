"""Which slots of a picture are free, in use, or dead, and how dead ones become free: the table's rebuilds leave out
what they hold. Owned by one `Picture`; `KeyTable` calls it as its `Mover`. It knows nothing of workers.

A dead slot's pairs stay where they are and are passed over. Each rebuild visits every reference once, so the slots that
were dead when it began hold nothing when it ends.
"""

from __future__ import annotations

from router.picture.holders import Holders
from router.picture.table import U32

NOTHING = 0
"""The slot of a content of which nothing is known: always empty, never taken, never dead."""


class Slots:
    """The life of every slot but NOTHING: free, taken, dead, leaving, free. One is leaving when it was dead already as
    the rebuild that goes on began."""

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._free = list(range(holders.num_slots - 1, NOTHING, -1))
        self._dead: list[int] = []
        self._leaving: list[int] = []
        self._is_rebuilding = False

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_dead(self) -> int:
        """Leaving ones too."""
        return len(self._dead) + len(self._leaving)

    @property
    def num_pairs_dead(self) -> int:
        return sum(self._holders.num_of_slot[slot] for slot in (*self._dead, *self._leaving))

    @property
    def wants_rebuild(self) -> bool:
        """A sixteenth of all pairs or slots would be gained. A rebuild visits everything: for less it does not pay."""
        if self._is_rebuilding or not self._dead:
            return False
        num_pairs = sum(self._holders.num_of_slot[slot] for slot in self._dead)
        return 16 * num_pairs >= self._holders.num_pairs or 16 * len(self._dead) >= self._holders.num_slots

    def take(self) -> int:
        """A slot that holds nothing; NOTHING when none is free."""
        return self._free.pop() if self._free else NOTHING

    def bury(self, slot: int) -> None:
        """Nobody needs what is in this slot any more."""
        assert slot != NOTHING
        if self._holders.num_of_slot[slot] == 0:
            self._free.append(slot)
        else:
            self._holders.set_dead(slot, is_dead=True)
            self._dead.append(slot)

    def begin(self) -> None:
        """See `router.picture.table.Mover`."""
        assert not self._is_rebuilding
        self._is_rebuilding = True
        self._leaving, self._dead = self._dead, []

    def end(self) -> None:
        """See `router.picture.table.Mover`."""
        self._is_rebuilding = False
        for slot in self._leaving:
            assert self._holders.num_of_slot[slot] == 0, "a rebuild has left pairs of a dead slot"
            self._holders.set_dead(slot, is_dead=False)
        self._free.extend(self._leaving)
        self._leaving = []

    def move_one(self, ref: int) -> int:
        """See `router.picture.table.Mover`."""
        return self._holders.move_one(ref)

    def move_many(self, refs: U32) -> U32:
        """See `router.picture.table.Mover`."""
        return self._holders.move_many(refs)

    def check(self, used: set[int]) -> None:
        """Asserts that every slot has one owner; `used` are those that were taken and not buried."""
        everything = sorted([*self._free, *self._dead, *self._leaving, *used, NOTHING])
        assert everything == list(range(self._holders.num_slots)), "a slot has no owner, or two"
        assert all(self._holders.num_of_slot[slot] == 0 for slot in (*self._free, NOTHING))

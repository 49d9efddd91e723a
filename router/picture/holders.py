"""Who holds a page: sets of slots with flags, each behind one reference of 32 bits.

Owned by one `Picture`. A slot is a number for one worker's content; a holder is a slot with flags (PAGE, perhaps TAIL).
Most pages are held by one worker and some by nearly all, so a set has one of three forms, by the upper bits of its
reference:

- one holder: in the reference itself;
- a few, up to `FEW`: a row of 16-bit holders, in no order;
- many: a row of two bit sets over all slots, pages and tails.

A reference names its set as long as nobody has changed it: whoever puts or purges stores what comes back instead. Rows
are reserved for the stated maximum at once and cost memory only as they are first used (the system hands out zeroed
memory page by page); the rows that are free again are used first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rorqual.feed import ABSENT, PAGE, TAIL
from router.picture.table import U32, U64

FEW = 8
SLOTS_MAX = 1 << 14
"""With two bits of flags a holder is 16 bits."""

_KIND = 3 << 30
_KIND_FEW = 1 << 30
_KIND_MANY = 2 << 30
_ROW = (1 << 30) - 1

Bits = npt.NDArray[np.uint64]
"""A bit for each slot in the last axis: slot s is bit s % 64 of word s // 64."""


class Rows:
    """Which rows of a pool are in use. The free ones that were used before go first, the last one freed foremost."""

    def __init__(self, num_rows_max: int) -> None:
        self._num_rows_max = num_rows_max
        self._num_touched = 0
        self._free: list[int] = []

    @property
    def num_used(self) -> int:
        return self._num_touched - len(self._free)

    @property
    def num_touched(self) -> int:
        return self._num_touched

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        assert self._num_touched < self._num_rows_max, "more sets than holders allow"
        self._num_touched += 1
        return self._num_touched - 1

    def give_back(self, row: int) -> None:
        self._free.append(row)


class Holders:
    """All sets. `dead` slots count for nobody: `move_one` and `move_many` leave them out."""

    def __init__(self, *, num_slots: int, pairs_max: int) -> None:
        """`pairs_max`: (page, slot) pairs there can be at once. It bounds the rows."""
        assert 1 <= num_slots <= SLOTS_MAX
        assert 1 <= pairs_max <= _ROW
        self.num_slots = num_slots
        self.num_words = -(-num_slots // 64)
        self.num_of_slot = [0] * num_slots  # pairs
        self.num_pairs = 0
        self._dead_host = np.zeros(64 * self.num_words, dtype=bool)
        # A row of a few has two holders at least. One of many has more than FEW // 2, else it is a row of a few again.
        num_few, num_many = pairs_max // 2 + 1, pairs_max // (FEW // 2 + 1) + 1
        self._few_rows, self._many_rows = Rows(num_few), Rows(num_many)
        self._few_host = np.zeros((num_few, FEW), dtype=np.uint16)  # 0: no holder
        self._pages_host: U64 = np.zeros((num_many, self.num_words), dtype=np.uint64)
        self._tails_host: U64 = np.zeros((num_many, self.num_words), dtype=np.uint64)
        self._counts_host = np.zeros(num_many, dtype=np.uint16)
        self._few = self._few_host.reshape(-1).data
        self._pages = self._pages_host.reshape(-1).data
        self._tails = self._tails_host.reshape(-1).data
        self._counts = self._counts_host.data

    @property
    def num_bytes(self) -> int:
        """Of all rows ever touched."""
        many = 16 * self.num_words + 2
        return 2 * FEW * self._few_rows.num_touched + many * self._many_rows.num_touched

    @property
    def num_rows(self) -> int:
        """In use."""
        return self._few_rows.num_used + self._many_rows.num_used

    def put(self, ref: int, slot: int, flags: int) -> int:
        """The set of `ref` (0 is the empty one) with this slot's flags as given, ABSENT removes it. Returns its
        reference from now on, 0 when it is empty."""
        kind = ref & _KIND
        if kind == _KIND_MANY:
            return self._put_many(ref & _ROW, slot, flags)
        if kind == _KIND_FEW:
            return self._put_few(ref, slot, flags)
        holder = slot << 2 | flags
        if ref == 0 or ref >> 2 == slot:
            self._count(slot, (flags != ABSENT) - (ref != 0))
            return holder if flags else 0
        if not flags:
            return ref
        row = self._few_rows.take()
        self._few[FEW * row] = ref
        self._few[FEW * row + 1] = holder
        self._count(slot, 1)
        return _KIND_FEW | row

    def fresh(self, slot: int, flags: npt.NDArray[np.uint8]) -> U32:
        """References of new sets, each with this slot alone, with flags that are not 0."""
        self._count(slot, len(flags))
        return flags.astype(np.uint32) | np.uint32(slot << 2)

    def put_many(self, refs: U32, slot: int, flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """As `put` with flags that are not 0, for those of these distinct sets that have the form of many; in none of
        them has the slot a tail. Their references stay as they are. Returns which they were."""
        is_many = refs & np.uint32(_KIND) == _KIND_MANY
        rows = (refs[is_many] & np.uint32(_ROW)).astype(np.int64)
        word, bit = slot >> 6, np.uint64(1 << (slot & 63))
        was_there = self._pages_host[rows, word] & bit != 0
        has_tail = flags[is_many] & TAIL != 0
        self._pages_host[rows, word] |= bit
        self._tails_host[rows[has_tail], word] |= bit
        self._counts_host[rows[~was_there]] += np.uint16(1)
        self._count(slot, len(rows) - int(np.count_nonzero(was_there)))
        return is_many

    def bits(self, refs: U32) -> tuple[Bits, Bits]:
        """Of each set, which is not empty: who holds the page, who the tail; u64 [sets, words] each. Dead slots are
        among them."""
        pages: Bits = np.zeros((len(refs), self.num_words), dtype=np.uint64)
        tails: Bits = np.zeros((len(refs), self.num_words), dtype=np.uint64)
        kinds = refs & np.uint32(_KIND)
        rows = (refs & np.uint32(_ROW)).astype(np.int64)
        is_one = np.flatnonzero(kinds == 0)
        _set_bits(pages, tails, is_one, rows[is_one])
        is_few = np.flatnonzero(kinds == _KIND_FEW)
        if len(is_few):
            few = self._few_host[rows[is_few]].astype(np.int64)
            for column in range(FEW):
                held = np.flatnonzero(few[:, column])
                _set_bits(pages, tails, is_few[held], few[held, column])
        is_many = np.flatnonzero(kinds == _KIND_MANY)
        pages[is_many] = self._pages_host[rows[is_many]]
        tails[is_many] = self._tails_host[rows[is_many]]
        return pages, tails

    def set_dead(self, slot: int, *, is_dead: bool) -> None:
        self._dead_host[slot] = is_dead

    def move_one(self, ref: int) -> int:
        """The set without dead slots: its reference from now on, 0 when nothing is left."""
        kind = ref & _KIND
        if kind == 0:
            slots = [ref >> 2]
        elif kind == _KIND_FEW:
            row = FEW * (ref & _ROW)
            slots = [holder >> 2 for holder in self._few[row : row + FEW] if holder]
        else:
            slots = _slots_of(self._pages_host[ref & _ROW]).tolist()
        for slot in slots:
            if self._dead_host[slot]:
                ref = self.put(ref, slot, ABSENT)
        return ref

    def move_many(self, refs: U32) -> U32:
        """As `move_one`, of each."""
        if not self._dead_host.any():
            return refs
        kinds = refs & np.uint32(_KIND)
        rows = (refs & np.uint32(_ROW)).astype(np.int64)
        has_dead = np.zeros(len(refs), dtype=bool)
        is_one = kinds == 0
        has_dead[is_one] = self._dead_host[rows[is_one] >> 2]
        is_few = kinds == _KIND_FEW
        # Slot 0 is what an empty place of a row seems to name. It is never dead.
        has_dead[is_few] = self._dead_host[self._few_host[rows[is_few]] >> 2].any(axis=1)
        is_many = kinds == _KIND_MANY
        dead_bits: Bits = np.packbits(self._dead_host, bitorder="little").view("<u8")
        has_dead[is_many] = (self._pages_host[rows[is_many]] & dead_bits).any(axis=1)
        moved = refs.copy()
        gone = np.flatnonzero(has_dead & is_one)
        moved[gone] = 0
        slots, counts = np.unique(rows[gone] >> 2, return_counts=True)
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            self._count(slot, -count)
        for i in np.flatnonzero(has_dead & ~is_one).tolist():
            moved[i] = self.move_one(int(refs[i]))
        return moved

    def _put_few(self, ref: int, slot: int, flags: int) -> int:
        few = self._few
        start = FEW * (ref & _ROW)
        end = start
        at = -1
        while end < start + FEW and few[end]:
            if few[end] >> 2 == slot:
                at = end
            end += 1
        if flags:
            if at >= 0:
                few[at] = slot << 2 | flags
                return ref
            if end < start + FEW:
                few[end] = slot << 2 | flags
                self._count(slot, 1)
                return ref
            return self._put_many(self._to_many(start), slot, flags)
        if at < 0:
            return ref
        few[at] = few[end - 1]
        few[end - 1] = 0
        self._count(slot, -1)
        if end - start > 2:
            return ref
        last = few[start]
        few[start] = 0
        self._few_rows.give_back(start // FEW)
        return last

    def _to_many(self, start: int) -> int:
        """The row of many that holds what this full row of a few held."""
        row = self._many_rows.take()
        for at in range(start, start + FEW):
            holder = self._few[at]
            self._few[at] = 0
            place, bit = row * self.num_words + (holder >> 8), 1 << (holder >> 2 & 63)
            self._pages[place] |= bit
            if holder & TAIL:
                self._tails[place] |= bit
        self._counts[row] = FEW
        self._few_rows.give_back(start // FEW)
        return row

    def _put_many(self, row: int, slot: int, flags: int) -> int:
        place, bit = row * self.num_words + (slot >> 6), 1 << (slot & 63)
        pages, tails = self._pages[place], self._tails[place]
        change = (flags != ABSENT) - bool(pages & bit)
        self._pages[place] = pages | bit if flags else pages & ~bit
        self._tails[place] = tails | bit if flags & TAIL else tails & ~bit
        if change:
            self._count(slot, change)
            self._counts[row] += change
            if self._counts[row] <= FEW // 2:
                return self._to_few(row)
        return _KIND_MANY | row

    def _to_few(self, many_row: int) -> int:
        """The reference of a row of a few with what this row of many held."""
        row = self._few_rows.take()
        slots = _slots_of(self._pages_host[many_row]).tolist()
        for i, slot in enumerate(slots):
            tails = self._tails[many_row * self.num_words + (slot >> 6)]
            self._few[FEW * row + i] = slot << 2 | PAGE | (TAIL if tails >> (slot & 63) & 1 else 0)
        self._pages_host[many_row] = 0
        self._tails_host[many_row] = 0
        self._counts[many_row] = 0
        self._many_rows.give_back(many_row)
        return _KIND_FEW | row

    def _count(self, slot: int, num: int) -> None:
        self.num_of_slot[slot] += num
        self.num_pairs += num


def _set_bits(pages: Bits, tails: Bits, sets: npt.NDArray[Any], holders: npt.NDArray[np.int64]) -> None:
    """One holder for each of these sets, no set twice."""
    words = holders >> 8
    bits = np.uint64(1) << (holders >> 2 & 63).astype(np.uint64)
    pages[sets, words] |= bits
    tails[sets, words] |= np.where(holders & TAIL, bits, np.uint64(0))


def _slots_of(bits: Bits) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(bits.astype("<u8", copy=False).view(np.uint8), bitorder="little"))

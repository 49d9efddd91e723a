"""Who holds a page: sets of slots with flags, each behind one reference of 32 bits.

Owned by one `Picture`. A slot is a number for one worker's content; a holder is a slot with flags of `rorqual.feed`,
PAGE among them, which is not stored.
Most pages are held by one worker and some by nearly all, so a set has one of three forms, by the upper bits of its
reference:

- one holder: in the reference itself;
- a few, up to `FEW`: a row of 16-bit holders, in no order;
- many: a row of bit sets over all slots: pages, tails, and which of both are in host memory only. The latter two cost
  memory from the first such page or tail on.

A reference names its set as long as nobody has changed it: whoever puts or purges stores what comes back instead. Rows
are reserved for the stated maximum at once and cost memory only as they are first used (the system hands out zeroed
memory page by page); the rows that are free again are used first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rorqual.feed import ABSENT, HOST_PAGE, HOST_TAIL, PAGE, TAIL
from router.picture.table import U32, U64

FEW = 8
FLAG_BITS = 3
SLOTS_MAX = 1 << 16 - FLAG_BITS
"""With three bits of flags, all but PAGE, a holder is 16 bits."""

_KIND = 3 << 30
_KIND_FEW = 1 << 30
_KIND_MANY = 2 << 30
_ROW = (1 << 30) - 1

Bits = npt.NDArray[np.uint64]
"""A bit for each slot in the last axis: slot s is bit s % 64 of word s // 64."""

_FLAGS = (1 << FLAG_BITS) - 1
_HOST = (HOST_PAGE | HOST_TAIL) >> 1  # in a holder


class Sets(NamedTuple):
    """Of several pages: who holds the page, who the tail, and who which of them in host memory only; u64 [sets, words]
    each. Nobody has anything in host memory only where the latter two are None."""

    pages: Bits
    tails: Bits
    host_pages: Bits | None = None
    host_tails: Bits | None = None


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
        self._host_pages_host: U64 = np.zeros((num_many, self.num_words), dtype=np.uint64)
        self._host_tails_host: U64 = np.zeros((num_many, self.num_words), dtype=np.uint64)
        self._has_host_rows = False  # the two before have been written
        self._counts_host = np.zeros(num_many, dtype=np.uint16)
        self._few = self._few_host.reshape(-1).data
        self._pages = self._pages_host.reshape(-1).data
        self._tails = self._tails_host.reshape(-1).data
        self._host_pages = self._host_pages_host.reshape(-1).data
        self._host_tails = self._host_tails_host.reshape(-1).data
        self._counts = self._counts_host.data

    @property
    def num_bytes(self) -> int:
        """Of all rows ever touched."""
        many = (32 if self._has_host_rows else 16) * self.num_words + 2
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
        holder = _holder(slot, flags)
        if ref == 0 or ref >> FLAG_BITS == slot:
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
        return (flags >> 1).astype(np.uint32) | np.uint32(slot << FLAG_BITS)

    def put_many(self, refs: U32, slot: int, flags: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """As `put` with flags that are not 0, for those of these distinct sets that have the form of many; in none of
        them has the slot more than a page on the device. Their references stay as they are. Returns which they were."""
        is_many = refs & np.uint32(_KIND) == _KIND_MANY
        rows = (refs[is_many] & np.uint32(_ROW)).astype(np.int64)
        word, bit = slot >> 6, np.uint64(1 << (slot & 63))
        was_there = self._pages_host[rows, word] & bit != 0
        flags_many = flags[is_many]
        self._pages_host[rows, word] |= bit
        self._tails_host[rows[flags_many & TAIL != 0], word] |= bit
        if (flags_many > PAGE | TAIL).any():
            self._has_host_rows = True
            self._host_pages_host[rows[flags_many & HOST_PAGE != 0], word] |= bit
            self._host_tails_host[rows[flags_many & HOST_TAIL != 0], word] |= bit
        self._counts_host[rows[~was_there]] += np.uint16(1)
        self._count(slot, len(rows) - int(np.count_nonzero(was_there)))
        return is_many

    def bits(self, refs: U32) -> Sets:
        """Of each set, which is not empty. Dead slots are among them."""
        pages, tails = self._no_bits(len(refs)), self._no_bits(len(refs))
        kinds = refs & np.uint32(_KIND)
        rows = (refs & np.uint32(_ROW)).astype(np.int64)
        is_one = np.flatnonzero(kinds == 0)
        ones = rows[is_one]
        is_few = np.flatnonzero(kinds == _KIND_FEW)
        few = self._few_host[rows[is_few]].astype(np.int64)
        is_many = np.flatnonzero(kinds == _KIND_MANY)
        has_host = self._has_host_rows or bool((ones & _HOST).any() or (few & _HOST).any())
        sets = Sets(pages, tails)
        if has_host:
            sets = Sets(pages, tails, self._no_bits(len(refs)), self._no_bits(len(refs)))
        _set_bits(sets, is_one, ones)
        if len(is_few):
            for column in range(FEW):
                held = np.flatnonzero(few[:, column])
                _set_bits(sets, is_few[held], few[held, column])
        pages[is_many] = self._pages_host[rows[is_many]]
        tails[is_many] = self._tails_host[rows[is_many]]
        if sets.host_pages is not None and sets.host_tails is not None and self._has_host_rows:
            sets.host_pages[is_many] = self._host_pages_host[rows[is_many]]
            sets.host_tails[is_many] = self._host_tails_host[rows[is_many]]
        return sets

    def _no_bits(self, num_sets: int) -> Bits:
        return np.zeros((num_sets, self.num_words), dtype=np.uint64)

    def set_dead(self, slot: int, *, is_dead: bool) -> None:
        self._dead_host[slot] = is_dead

    def move_one(self, ref: int) -> int:
        """The set without dead slots: its reference from now on, 0 when nothing is left."""
        kind = ref & _KIND
        if kind == 0:
            slots = [ref >> FLAG_BITS]
        elif kind == _KIND_FEW:
            row = FEW * (ref & _ROW)
            slots = [holder >> FLAG_BITS for holder in self._few[row : row + FEW] if holder]
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
        has_dead[is_one] = self._dead_host[rows[is_one] >> FLAG_BITS]
        is_few = kinds == _KIND_FEW
        # Slot 0 is what an empty place of a row seems to name. It is never dead.
        has_dead[is_few] = self._dead_host[self._few_host[rows[is_few]] >> FLAG_BITS].any(axis=1)
        is_many = kinds == _KIND_MANY
        dead_bits: Bits = np.packbits(self._dead_host, bitorder="little").view("<u8")
        has_dead[is_many] = (self._pages_host[rows[is_many]] & dead_bits).any(axis=1)
        moved = refs.copy()
        gone = np.flatnonzero(has_dead & is_one)
        moved[gone] = 0
        slots, counts = np.unique(rows[gone] >> FLAG_BITS, return_counts=True)
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
            if few[end] >> FLAG_BITS == slot:
                at = end
            end += 1
        if flags:
            if at >= 0:
                few[at] = _holder(slot, flags)
                return ref
            if end < start + FEW:
                few[end] = _holder(slot, flags)
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
            slot = holder >> FLAG_BITS
            self._write(row * self.num_words + (slot >> 6), 1 << (slot & 63), _flags_of(holder))
        self._counts[row] = FEW
        self._few_rows.give_back(start // FEW)
        return row

    def _put_many(self, row: int, slot: int, flags: int) -> int:
        place, bit = row * self.num_words + (slot >> 6), 1 << (slot & 63)
        change = (flags != ABSENT) - bool(self._pages[place] & bit)
        self._write(place, bit, flags)
        if change:
            self._count(slot, change)
            self._counts[row] += change
            if self._counts[row] <= FEW // 2:
                return self._to_few(row)
        return _KIND_MANY | row

    def _write(self, place: int, bit: int, flags: int) -> None:
        """One slot's flags in a row of many."""
        pages, tails = self._pages[place], self._tails[place]
        self._pages[place] = pages | bit if flags else pages & ~bit
        self._tails[place] = tails | bit if flags & TAIL else tails & ~bit
        if flags > PAGE | TAIL:
            self._has_host_rows = True
        if self._has_host_rows:
            pages, tails = self._host_pages[place], self._host_tails[place]
            self._host_pages[place] = pages | bit if flags & HOST_PAGE else pages & ~bit
            self._host_tails[place] = tails | bit if flags & HOST_TAIL else tails & ~bit

    def _read(self, place: int, bit: int) -> int:
        """Flags of a slot that holds the page."""
        flags = PAGE | (TAIL if self._tails[place] & bit else 0)
        if self._has_host_rows:
            flags |= HOST_PAGE if self._host_pages[place] & bit else 0
            flags |= HOST_TAIL if self._host_tails[place] & bit else 0
        return flags

    def _to_few(self, many_row: int) -> int:
        """The reference of a row of a few with what this row of many held."""
        row = self._few_rows.take()
        slots = _slots_of(self._pages_host[many_row]).tolist()
        for i, slot in enumerate(slots):
            flags = self._read(many_row * self.num_words + (slot >> 6), 1 << (slot & 63))
            self._few[FEW * row + i] = _holder(slot, flags)
        self._pages_host[many_row] = 0
        self._tails_host[many_row] = 0
        if self._has_host_rows:
            self._host_pages_host[many_row] = 0
            self._host_tails_host[many_row] = 0
        self._counts[many_row] = 0
        self._many_rows.give_back(many_row)
        return _KIND_FEW | row

    def _count(self, slot: int, num: int) -> None:
        self.num_of_slot[slot] += num
        self.num_pairs += num


def _holder(slot: int, flags: int) -> int:
    return slot << FLAG_BITS | flags >> 1


def _flags_of(holder: int) -> int:
    return (holder & _FLAGS) << 1 | PAGE


def _set_bits(sets: Sets, numbers: npt.NDArray[Any], holders: npt.NDArray[np.int64]) -> None:
    """One holder for each of the sets of these numbers, none twice."""
    slots = holders >> FLAG_BITS
    words = slots >> 6
    bits = np.uint64(1) << (slots & 63).astype(np.uint64)
    sets.pages[numbers, words] |= bits
    for array, flag in ((sets.tails, TAIL), (sets.host_pages, HOST_PAGE), (sets.host_tails, HOST_TAIL)):
        if array is None:
            continue
        flagged = np.flatnonzero(holders & flag >> 1)
        if len(flagged):
            array[numbers[flagged], words[flagged]] |= bits[flagged]


def _slots_of(bits: Bits) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(bits.astype("<u8", copy=False).view(np.uint8), bitorder="little"))

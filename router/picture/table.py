"""An open-addressed table from short keys to references, in two flat arrays: 12 bytes a place.

Owned by one `Picture`, which gives meaning to references; here 0 means absent and all else is opaque. A short key is
the first 8 bytes of a page key, so uniform already; its place comes from a product with an odd number drawn by the
process (multiplicative hashing, Knuth 6.4), so that nobody can choose prompts whose pages crowd one part of the table.
Collisions go to the next place (linear probing), in at most `LOAD_MAX` of all places.

Single keys are read and written through memoryviews, which costs a tenth of indexing an array; many at once by whole
arrays. Both see the same memory.

It grows without a pause. A rebuild makes a second pair of arrays, has the system fill them with zeros piece by piece
(else the first keys that hit all over them would wait for that), and then moves `CHUNK` places at a time; so much of it
for each key that is claimed that it is done before places run out. Meanwhile what is not found in the new arrays is
looked for in the old. Removed keys keep their place until a rebuild leaves them out; they count as used.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]

LOAD_MAX = 0.66
LOAD_REBUILD = 0.62  # of used places: a rebuild begins
LOAD_AFTER = 0.75 * LOAD_MAX  # of live keys, at most, when it begins
PLACES_MIN = 1024
CHUNK = 4096  # places moved at a time: 0.5 ms
WARM_CHUNK = 8 * CHUNK  # places filled with zeros at a time: 384 KB
PLACES_PER_CLAIM = 8
"""Places moved for each key that is claimed, or eight times as many filled with zeros. A table of S places that doubles
has its 2 S zeros after S / 32 claims, before LOAD_MAX. Its S places have moved S / 8 claims later, with 0.66 S keys in
2 S places. One that keeps its size, because most of what fills it was removed, then has at most (LOAD_AFTER + 5 / 32) S
of them in use, which is 0.65 S."""
WINDOW = 8  # places looked at in one go: one cache line of short keys

MASK = (1 << 64) - 1


class Mover(Protocol):
    """May change references while they move, or drop them (0). Each is moved once between `begin` and `end`."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def move_one(self, ref: int) -> int: ...

    def move_many(self, refs: U32) -> U32: ...


class _Places:
    """One pair of arrays."""

    def __init__(self, size: int, multiplier: int) -> None:
        self.size = size
        self.mask = size - 1
        self.shift = 64 - self.mask.bit_length()
        self.multiplier = multiplier
        self.num_used = 0  # places with a short key; it may be one that was removed
        self.shorts_host: U64 = np.zeros(self.size, dtype=np.uint64)  # 0: never used
        self.refs_host: U32 = np.zeros(self.size, dtype=np.uint32)  # 0: removed, or moved on
        self.shorts = self.shorts_host.data
        self.refs = self.refs_host.data

    def warm(self, start: int) -> int:
        """Touch every page of the system's from this place on for a piece. Returns where to go on."""
        end = start + WARM_CHUNK
        self.shorts_host[start : min(end, self.size) : 512] = 0  # 4,096 bytes each
        self.refs_host[start : min(end, self.size) : 1024] = 0
        return end

    def find(self, short: int) -> int:
        """Its place, or the free one where it would be."""
        place = (short * self.multiplier & MASK) >> self.shift
        shorts = self.shorts
        while (there := shorts[place]) != short and there:
            place = (place + 1) & self.mask
        return place

    def homes(self, shorts: U64) -> npt.NDArray[np.int64]:
        return (shorts * np.uint64(self.multiplier) >> np.uint64(self.shift)).astype(np.int64)

    def refs_of(self, shorts: U64) -> U32:
        """0 where absent."""
        place = self.homes(shorts)
        there = self.shorts_host[place]
        refs = np.where(there == shorts, self.refs_host[place], np.uint32(0))
        # Most are at home, or there is nothing there: the others look further.
        todo = np.flatnonzero((there != shorts) & (there != 0))
        place = (place[todo] + 1) & self.mask
        window = np.arange(WINDOW)
        while len(todo):
            places = (place[:, None] + window) & self.mask
            there = self.shorts_host[places]
            is_end = there == shorts[todo][:, None]
            is_hit = is_end.any(axis=1)
            is_end |= there == 0
            first = is_end.argmax(axis=1)
            hits = np.flatnonzero(is_hit)
            # The first end is the key itself: a key is never behind a place that was never used.
            refs[todo[hits]] = self.refs_host[places[hits, first[hits]]]
            rest = np.flatnonzero(~is_end.any(axis=1))
            todo, place = todo[rest], (place[rest] + WINDOW) & self.mask
        return refs

    def insert(self, shorts: U64, refs: U32) -> None:
        """Distinct keys without a reference here. One that was removed gets its own place again."""
        place = self.homes(shorts)
        while len(shorts):
            there = self.shorts_host[place]
            free = np.flatnonzero(there == 0)
            # Of several that want one place the last written has it; the others see that and go on.
            self.shorts_host[place[free]] = shorts[free]
            is_mine = self.shorts_host[place] == shorts
            self.num_used += int(np.count_nonzero(is_mine[free]))
            self.refs_host[place[is_mine]] = refs[is_mine]
            rest = np.flatnonzero(~is_mine)
            shorts, refs, place = shorts[rest], refs[rest], (place[rest] + 1) & self.mask


class KeyTable:
    """Short keys are unsigned 64 bits and never 0 (`clean`)."""

    def __init__(self, mover: Mover, *, multiplier: int) -> None:
        assert multiplier % 2 == 1, "an even multiplier loses bits"
        assert 0 < multiplier < 1 << 64
        self._mover = mover
        self._multiplier = multiplier
        self._new = _Places(PLACES_MIN, multiplier)
        self._next: _Places | None = None  # being filled with zeros
        self._old: _Places | None = None  # being moved
        self._cursor = 0  # places of either that are done
        self._left = 0  # keys with a reference in the old arrays
        self._debt = 0  # places that should be done by now
        self.num_live = 0  # keys with a reference
        self.num_rebuilds = 0  # finished

    @property
    def is_rebuilding(self) -> bool:
        return self._next is not None or self._old is not None

    @property
    def num_bytes(self) -> int:
        """Of all arrays, touched or not."""
        arrays = (self._new, self._old, self._next)
        return sum(12 * places.size for places in arrays if places is not None)

    @property
    def load(self) -> float:
        """Used places of the newest arrays."""
        return self._new.num_used / self._new.size

    def claim(self, short: int) -> int:
        """The place of a key, for `ref_at` and `store` until the next claim; it is given one if it has none."""
        self._pay(1)
        new = self._new
        place = new.find(short)
        if not new.shorts[place]:
            new.shorts[place] = short
            new.num_used += 1
            if self._old is not None:
                self._move_one(short, place)
        return place

    def ref_at(self, place: int) -> int:
        return self._new.refs[place]

    def store(self, place: int, ref: int) -> None:
        self.num_live += (ref != 0) - (self._new.refs[place] != 0)
        self._new.refs[place] = ref

    def refs_of(self, shorts: U64) -> U32:
        """0 where absent. Only looks."""
        refs = self._new.refs_of(shorts)
        if self._old is not None:
            missing = np.flatnonzero(refs == 0)
            if len(missing):
                refs[missing] = self._old.refs_of(shorts[missing])
        return refs

    def insert(self, shorts: U64, refs: U32) -> None:
        """Many distinct keys at once that are absent, with references that are not 0."""
        self._pay(len(shorts))
        self._new.insert(shorts, refs)
        self.num_live += len(shorts)

    def rebuild(self, *, num_more: int = 0) -> None:
        """Begin to move everything, unless that is going on; with room for more keys soon."""
        if self.is_rebuilding:
            return
        size = self._new.size
        wanted = (self.num_live + num_more) / LOAD_AFTER
        # Halved once at most: twice as many places have to move as there will be.
        new_size = max(PLACES_MIN, size // 2 if wanted < 0.35 * size else size)
        while new_size < wanted:
            new_size *= 2
        self._next = _Places(new_size, self._multiplier)
        self._cursor = self._debt = 0

    def step(self) -> bool:
        """One piece of a rebuild. True while there is more to do."""
        if self._next is not None:
            self._cursor = self._next.warm(self._cursor)
            if self._cursor >= self._next.size:
                self._old, self._new, self._next = self._new, self._next, None
                self._cursor, self._left = 0, self.num_live
                self._mover.begin()
        elif self._old is not None:
            self._move_chunk(self._old)
        return self.is_rebuilding

    def _move_chunk(self, old: _Places) -> None:
        chunk = slice(self._cursor, self._cursor + CHUNK)
        refs_old = old.refs_host[chunk]
        live = np.flatnonzero(refs_old)
        shorts = old.shorts_host[chunk][live]
        refs = self._mover.move_many(refs_old[live])
        refs_old[:] = 0
        kept = np.flatnonzero(refs)
        self.num_live -= len(live) - len(kept)
        self._left -= len(live)
        self._new.insert(shorts[kept], refs[kept])
        self._cursor += CHUNK
        if self._cursor >= old.size:
            assert self._left == 0, "a rebuild has lost keys"
            self._old = None
            self.num_rebuilds += 1
            self._mover.end()

    def _move_one(self, short: int, place: int) -> None:
        """Of the old arrays to this place of the new, if it is there."""
        old = self._old
        assert old is not None
        place_old = old.find(short)
        ref = old.refs[place_old]
        if ref:
            old.refs[place_old] = 0
            self._left -= 1
            ref = self._mover.move_one(ref)
            self.num_live -= ref == 0
            self._new.refs[place] = ref

    def _pay(self, num_claims: int) -> None:
        """Make room for so many keys before they are claimed, or do what is due of a rebuild."""
        num_used = self._new.num_used + self._left + num_claims
        if num_used > LOAD_REBUILD * self._new.size:
            self.rebuild(num_more=num_claims)
            while num_used > LOAD_MAX * self._new.size:
                # Only a table that is small beside `num_claims` has to finish a rebuild, or two, here at once.
                while self.step():
                    pass
                num_used = self._new.num_used + num_claims
                if num_used > LOAD_MAX * self._new.size:
                    self.rebuild(num_more=num_claims)
        if self.is_rebuilding:
            self._debt += PLACES_PER_CLAIM * num_claims
            while self._debt >= CHUNK and self.step():
                self._debt -= CHUNK

"""What every worker's cache holds, as the feeds tell it, in one place that placement can ask in well under 2 ms.

Owned by the router's fleet, on one thread. Each worker's link gives the `WorkerContent` of its worker to a
`kvstore.feed.FeedReader`; placement calls `look_up`. Pure: no I/O, no clock; randomness comes in as `multiplier`.

Pages are told apart by the first 8 bytes of their keys, which are parts of SHA-256. Among 10 million pages two share
them with probability 3e-6; who wants a pair must try 2**32 prompts, and gains that a placement counts a page that is
not there, or misses one that is: workers compare whole keys, so no state is ever mistaken for another.

A content lives in a slot. A snapshot is loaded into a slot of its own and takes its worker's place at once; what was
there before is dead, counts for nothing, and is left out when the table is rebuilt the next time. So nothing partial is
ever seen, and neither dropping a worker nor growing stops the router for more than a chunk's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NewType

import numpy as np
import numpy.typing as npt

from rorqual.errors import Overloaded
from rorqual.feed import ABSENT, KEY_BYTES
from router.picture.found import I32, Found, deepest_W
from router.picture.holders import SLOTS_MAX, Bits, Holders
from router.picture.slots import NOTHING, Slots
from router.picture.table import U64, KeyTable

WorkerIndex = NewType("WorkerIndex", int)
"""A worker's place in the arrays of `Found`, from `join` to `leave`; used again afterwards."""

PAIRS_MAX = 1 << 24
VECTOR_MIN = 64
"""From so many entries on whole arrays are faster than one by one (150 us a call beside 2 us an entry)."""

FIRST_KEYS = 64
"""Of a prompt, looked up first: most prompts end, or are nowhere cached, within so many pages."""


class _Reach(NamedTuple):
    """Row d - 1: whose pages reach depth d, and who has a tail at d or deeper; in any tier, and on the device, which
    are the same arrays where all is on devices."""

    pages_DS: Bits
    tails_DS: Bits
    device_pages_DS: Bits
    device_tails_DS: Bits


class Picture:
    """All workers' contents. (page, worker) pairs, dead ones too, are bounded by `pairs_max`: beyond, a feed is refused
    and its worker counts as empty."""

    def __init__(self, *, multiplier: int, workers_max: int = 1024, pairs_max: int = PAIRS_MAX) -> None:
        """`multiplier`: 64 random bits, the lowest of them 1; the same in no two processes."""
        self.workers_max = workers_max
        self.pairs_max = pairs_max
        # Each worker may load one content beside the one it has. For most that is rare: a quarter more is room enough.
        num_slots = 1 + workers_max + max(8, workers_max // 4)
        assert num_slots <= SLOTS_MAX, "more workers than a picture can tell apart"
        self._holders = Holders(num_slots=num_slots, pairs_max=pairs_max)
        self._slots = Slots(self._holders)
        self._table = KeyTable(self._slots, multiplier=multiplier)
        self._slot_host: I32 = np.zeros(workers_max, dtype=np.int32)  # by worker
        self._contents: dict[WorkerIndex, WorkerContent] = {}
        self._indexes_free: list[int] = []
        self._num_indexes = 0
        self._live_host = np.zeros(64 * self._holders.num_words, dtype=bool)  # by slot
        self._live_bits: U64 = self._pack_live()
        self.num_refused = 0  # adds and changes for which there was no room

    @property
    def num_workers(self) -> int:
        return len(self._contents)

    @property
    def num_pairs(self) -> int:
        """(page, worker) pairs that are stored, those that arrive and dead ones too."""
        return self._holders.num_pairs

    @property
    def num_pairs_dead(self) -> int:
        return self._slots.num_pairs_dead

    @property
    def num_keys(self) -> int:
        """Different pages."""
        return self._table.num_live

    @property
    def num_bytes(self) -> int:
        """Of memory, as far as it grows with what is stored."""
        return self._table.num_bytes + self._holders.num_bytes

    def join(self) -> WorkerContent:
        """A worker more, of whose cache nothing is known yet. Raises Overloaded beyond `workers_max`."""
        if self._indexes_free:
            index = WorkerIndex(self._indexes_free.pop())
        elif self._num_indexes < self.workers_max:
            index = WorkerIndex(self._num_indexes)
            self._num_indexes += 1
        else:
            raise Overloaded(f"the picture of caches has room for {self.workers_max} workers")
        content = self._contents[index] = WorkerContent(self, index)
        return content

    def leave(self, content: WorkerContent) -> None:
        """This worker is gone, and its content with it. Its index may be another's from now on."""
        assert self._contents.pop(content.index, None) is content, "a worker left that had not joined"
        content.abandon()
        content.clear()
        self._indexes_free.append(content.index)

    def look_up(self, keys: Sequence[bytes]) -> Found:
        """How far every worker's content reaches into a prompt with these page keys. Arrays are as long as the largest
        index that ever joined; who has left counts as empty."""
        reach = self._reach(_shorts(b"".join(keys)))
        slot_W = self._slot_host[: self._num_indexes]
        pages_W, tail_W = deepest_W(reach.pages_DS, slot_W), deepest_W(reach.tails_DS, slot_W)
        if reach.device_pages_DS is reach.pages_DS and reach.device_tails_DS is reach.tails_DS:
            device_pages_W, device_tail_W = pages_W, tail_W
        else:
            device_pages_W = deepest_W(reach.device_pages_DS, slot_W)
            device_tail_W = deepest_W(reach.device_tails_DS, slot_W)
        return Found(
            pages_W=pages_W,
            tail_W=tail_W,
            device_pages_W=device_pages_W,
            device_tail_W=device_tail_W,
            num_pages=len(reach.pages_DS),
        )

    def tend(self) -> bool:
        """A chunk of the work that is left over: 0.3 ms, or nothing. For when the router is idle; whoever never calls
        it pays with each change. True while there is more."""
        self._tidy()
        return self._table.step()

    def settle(self) -> None:
        """All the work that is left over, and nothing dead afterwards. Takes a second for each 10 million pairs."""
        while self._table.is_rebuilding or self._slots.num_dead:
            self._table.rebuild()
            while self._table.step():
                pass

    def check(self) -> None:
        """Asserts that all counts agree."""
        holders = self._holders
        assert holders.num_pairs == sum(holders.num_of_slot), "pairs are not those of the slots"
        contents = self._contents.values()
        self._slots.check({s for c in contents for s in (c.slot, c.arriving) if s != NOTHING})
        if holders.num_pairs == 0:
            assert (self.num_keys, holders.num_rows) == (0, 0), "sets without holders"

    def _reach(self, shorts: U64) -> _Reach:
        """As far as there is anybody."""
        refs = self._table.refs_of(shorts[:FIRST_KEYS])
        if len(shorts) > FIRST_KEYS and refs.all():
            refs = np.concatenate([refs, self._table.refs_of(shorts[FIRST_KEYS:])])
        absent = np.flatnonzero(refs == 0)
        sets = self._holders.bits(refs[: absent[0]] if len(absent) else refs)
        pages_DS = sets.pages
        if len(pages_DS):
            pages_DS[0] &= self._live_bits
            np.bitwise_and.accumulate(pages_DS, axis=0, out=pages_DS)
        num_pages = int(np.count_nonzero(pages_DS.any(axis=1)))
        pages_DS, tails_DS = pages_DS[:num_pages], sets.tails[:num_pages]
        tails_DS &= pages_DS
        device_pages_DS, device_tails_DS = pages_DS, tails_DS
        if sets.host_pages is not None and sets.host_tails is not None:
            device_pages_DS = np.bitwise_and.accumulate(pages_DS & ~sets.host_pages[:num_pages], axis=0)
            device_tails_DS = _upward(device_pages_DS & tails_DS & ~sets.host_tails[:num_pages])
        tails_DS = _upward(tails_DS)
        if sets.host_tails is None:
            device_tails_DS = tails_DS
        return _Reach(pages_DS, tails_DS, device_pages_DS, device_tails_DS)

    # What follows is for `WorkerContent` alone.

    def take_slot(self) -> int:
        """For a content that arrives; NOTHING when all are in use."""
        if not self._slots.num_free and self._slots.num_dead:
            self.settle()  # rare: contents were replaced faster than rebuilds left the dead ones out
        return self._slots.take()

    def show(self, index: WorkerIndex, slot: int, *, instead_of: int) -> None:
        """The content in this slot is the worker's from now on; nobody needs the other one."""
        self._slot_host[index] = slot
        if slot != NOTHING:
            self._live_host[slot] = True
        if instead_of != NOTHING:
            self._live_host[instead_of] = False
            self.bury(instead_of)
        self._live_bits = self._pack_live()

    def bury(self, slot: int) -> None:
        """Nobody needs what is in this slot."""
        self._slots.bury(slot)
        self._tidy()

    def add(self, slot: int, keys: bytes, flags: bytes) -> bool:
        """New entries, no key twice and none that the slot holds already. False: there is no room."""
        if not self._has_room(len(flags)):
            return False
        shorts = _shorts(keys)
        if len(flags) < VECTOR_MIN or len(np.unique(shorts)) < len(shorts):
            self._put(slot, shorts, flags)
        else:
            self._add_many(slot, shorts, np.frombuffer(flags, dtype=np.uint8))
        return True

    def change(self, slot: int, keys: bytes, flags: bytes) -> bool:
        """Entries as they are from now on; flags 0: absent. False: there is no room."""
        if not self._has_room(len(flags) - flags.count(ABSENT)):
            return False
        self._put(slot, _shorts(keys), flags)
        self._tidy()
        return True

    def _put(self, slot: int, shorts: U64, flags: bytes) -> None:
        table, put = self._table, self._holders.put
        for short, flag in zip(shorts.tolist(), flags, strict=True):
            place = table.claim(short)
            table.store(place, put(table.ref_at(place), slot, flag))

    def _add_many(self, slot: int, shorts: U64, flags: npt.NDArray[np.uint8]) -> None:
        refs = self._table.refs_of(shorts)
        absent = refs == 0
        self._table.insert(shorts[absent], self._holders.fresh(slot, flags[absent]))
        present, flags_present = shorts[~absent], flags[~absent]
        # Looked up again, since `insert` may have moved a rebuild on, which changes references.
        refs = self._table.refs_of(present)
        rest = ~self._holders.put_many(refs, slot, flags_present)
        self._put(slot, present[rest], flags_present[rest].tobytes())

    def _has_room(self, num_more: int) -> bool:
        if self.num_pairs + num_more <= self.pairs_max:
            return True
        if self._slots.num_dead:
            self._table.rebuild()
        self.num_refused += 1
        return False

    def _tidy(self) -> None:
        if self._slots.wants_rebuild:
            self._table.rebuild()

    def _pack_live(self) -> U64:
        return np.packbits(self._live_host, bitorder="little").view("<u8").astype(np.uint64)


class WorkerContent:
    """One worker's part of the picture: a `kvstore.feed.Content`. Made by `Picture.join`."""

    def __init__(self, picture: Picture, index: WorkerIndex) -> None:
        self._picture = picture
        self.index = index
        self.slot = NOTHING  # of the visible content
        self.arriving = NOTHING

    def start(self) -> None:
        self.abandon()
        self.arriving = self._picture.take_slot()

    def add(self, keys: bytes, flags: bytes) -> bool:
        return self.arriving != NOTHING and self._picture.add(self.arriving, keys, flags)

    def commit(self) -> None:
        assert self.arriving != NOTHING, "a content was committed that had not begun"
        arrived, self.arriving = self.arriving, NOTHING
        self._picture.show(self.index, arrived, instead_of=self.slot)
        self.slot = arrived

    def abandon(self) -> None:
        if self.arriving != NOTHING:
            self._picture.bury(self.arriving)
            self.arriving = NOTHING

    def change(self, keys: bytes, flags: bytes) -> bool:
        assert self.slot != NOTHING, "a content was changed of which nothing is known"
        return self._picture.change(self.slot, keys, flags)

    def clear(self) -> None:
        if self.slot != NOTHING:
            self._picture.show(self.index, NOTHING, instead_of=self.slot)
            self.slot = NOTHING


def _upward(bits_DS: Bits) -> Bits:
    """Row d: what is set in any row from d on."""
    upward_DS = np.ascontiguousarray(bits_DS[::-1])
    np.bitwise_or.accumulate(upward_DS, axis=0, out=upward_DS)
    return upward_DS[::-1]


def _shorts(keys: bytes) -> U64:
    """Short keys of packed page keys. 0 marks an unused place in the table, so the one key in 2**64 that has it gets
    another."""
    assert len(keys) % KEY_BYTES == 0
    shorts = np.frombuffer(keys, dtype="<u8")[::2].astype(np.uint64)
    shorts[shorts == 0] = 1
    return shorts

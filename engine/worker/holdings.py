"""Who holds the worker's pages, slots and records: sequences, readers elsewhere, or reads that may still be running.

`engine.worker.scheduler` owns it and is the only one to call it, but for `engine.worker.speculation`, which takes pages
for drafts by `grow`. A page or record that the host has been told of may have been lent: it comes back by `take_back`
alone. One that state is read into comes back when the read is settled. Everything of every kind is free or has one
holder; `check` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.worker.events import SequenceKey, Surrender
from engine.worker.sequences import Sequence
from kvstore.pages import IdAllocator, PageAllocator
from rorqual.ids import PageId, RecordId, SlotId


class Holdings:
    def __init__(self, *, num_pages: int, num_slots: int, num_records: int) -> None:
        self._pages = PageAllocator(num_pages)
        self._slots = IdAllocator(num_slots, make=SlotId)
        self._records = IdAllocator(num_records, make=RecordId)
        self._lent_pages: set[PageId] = set()
        self._lent_records: set[RecordId] = set()
        self._surrenders: list[Surrender] = []  # not taken yet
        self._quarantined: dict[SequenceKey, tuple[list[PageId], RecordId]] = {}

    @property
    def num_pages_free(self) -> int:
        return self._pages.num_free

    @property
    def num_slots_free(self) -> int:
        return self._slots.num_free

    @property
    def num_records_free(self) -> int:
        return self._records.num_free

    @property
    def num_lent_pages(self) -> int:
        return len(self._lent_pages)

    @property
    def num_lent_records(self) -> int:
        return len(self._lent_records)

    @property
    def num_quarantined(self) -> int:
        """Sequences that were cancelled while their state may have been read into what they held."""
        return len(self._quarantined)

    @property
    def num_quarantined_pages(self) -> int:
        return sum(len(pages) for pages, _ in self._quarantined.values())

    @property
    def is_clear(self) -> bool:
        """Nothing is lent, surrendered or in quarantine."""
        return not (self._lent_pages or self._lent_records or self._surrenders or self._quarantined)

    def start(self, sequence: Sequence, *, pages_reserved: int) -> bool:
        """Give a waiting sequence all it needs to start, leaving `pages_reserved` free; or nothing, and False."""
        num_pages = sequence.num_pages_to_start
        if not self._slots.num_free or num_pages + pages_reserved > self._pages.num_free:
            return False
        if sequence.needs_record and not self._records.num_free:
            return False
        slot = self._slots.allocate()
        # Bytes from elsewhere are written outside the order of plans: rather where no plan in flight still works.
        pages = self._pages.allocate(num_pages, cold=sequence.is_adopting)
        assert slot is not None
        assert pages is not None
        sequence.start(slot, pages, self._records.allocate() if sequence.needs_record else None)
        return True

    def last_plan(self, sequence: Sequence) -> int:
        """Number of the last plan that may use the pages of a sequence that has had no plan itself. Its record needs
        no look: a record becomes free when no plan reads it any more."""
        return self._pages.last_plan(sequence.pages)

    def grow(self, sequence: Sequence) -> bool:
        """One page more, if one is free."""
        pages = self._pages.allocate(1)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def free_slot(self, sequence: Sequence) -> SlotId:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        self._slots.free(slot)
        return slot

    def free_pages(self, sequence: Sequence, *, first: int, last_plan: int) -> None:
        """Its pages from number `first` on; the host has not been told of them. Plans up to `last_plan` may use
        them: later ones come after those."""
        assert first >= sequence.num_pages_told
        self._pages.free(sequence.pages[first:], last_plan=last_plan)
        del sequence.pages[first:]

    def free_state(self, sequence: Sequence, *, last_plan: int) -> None:
        """All pages and the record: free, or surrendered where the host has been told of them."""
        self.free_pages(sequence, first=sequence.num_pages_told, last_plan=last_plan)
        if sequence.is_told:
            self._surrender(sequence)
        elif sequence.record is not None:
            self._records.free(sequence.record)
        sequence.pages = []
        sequence.record = None

    def free_record(self, record: RecordId) -> None:
        """The plan that has read it is done."""
        self._records.free(record)

    def take_surrendered(self) -> list[Surrender]:
        taken, self._surrenders = self._surrenders, []
        return taken

    def take_back(self, pages: Iterable[PageId], record: RecordId | None, *, last_plan: int) -> None:
        """Lent state nobody can be reading any more. Plans up to `last_plan` may use it."""
        for page in pages:
            assert page in self._lent_pages, f"page {page} is taken back but not lent"
            self._lent_pages.remove(page)
            self._pages.free((page,), last_plan=last_plan)
        if record is not None:
            assert record in self._lent_records, f"record {record} is taken back but not lent"
            self._lent_records.remove(record)
            self._records.free(record)

    def quarantine(self, sequence: Sequence) -> None:
        """Pages and record of a sequence into which state may be read still."""
        assert sequence.record is not None
        self._quarantined[sequence.key] = (sequence.pages, sequence.record)
        sequence.pages = []
        sequence.record = None

    def settle(self, key: SequenceKey) -> None:
        assert key in self._quarantined, f"sequence {key} is settled but not in quarantine"
        pages, record = self._quarantined.pop(key)
        self._pages.free(pages)
        self._records.free(record)

    def check(self, sequences: Iterable[Sequence], *, num_records_restoring: int) -> None:
        """`sequences`: at least those that hold something; `num_records_restoring`: held by plans in flight."""
        num_pages = num_slots = num_records = 0
        for sequence in sequences:
            num_pages += len(sequence.pages)
            num_slots += sequence.slot is not None
            num_records += sequence.record is not None
        num_pages += self.num_lent_pages + self.num_quarantined_pages
        num_records += self.num_lent_records + self.num_quarantined + num_records_restoring
        self._pages.check()
        self._slots.check()
        self._records.check()
        assert num_pages == self._pages.num_in_use, "pages in use are not those held"
        assert num_slots == self._slots.num_in_use, "slots in use are not the running sequences'"
        assert num_records == self._records.num_in_use, "records in use are not those held"

    def _surrender(self, sequence: Sequence) -> None:
        assert sequence.record is not None
        assert len(sequence.pages) == sequence.num_pages_told
        self._lent_pages.update(sequence.pages)
        self._lent_records.add(sequence.record)
        self._surrenders.append(
            Surrender(key=sequence.key, pages=tuple(sequence.pages), record=sequence.record)
        )

"""Leases: what is lent never returns while somebody who began to read in good order may still be reading."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.leases import LeaseLedger, Returned
from rorqual.ids import Incarnation, LeaseName, PageId, RecordId, WorkerId

LEASE = 15.0
TRANSFER = 10.0


def a_ledger(num_records: int = 4) -> LeaseLedger:
    return LeaseLedger(
        WorkerId("w"),
        Incarnation(7),
        num_records=num_records,
        lease_seconds=LEASE,
        transfer_seconds_max=TRANSFER,
    )


def pages(*numbers: int) -> tuple[PageId, ...]:
    return tuple(PageId(number) for number in numbers)


def test_a_lease_is_named_by_worker_incarnation_record_and_generation() -> None:
    ledger = a_ledger()
    names = []
    for now in (0.0, 1.0):
        name = ledger.grant(RecordId(2), now)
        names.append((name.worker_id, name.incarnation, name.lease_id, name.generation))
        assert ledger.release(name, now) is not None
    assert names == [("w", 7, 2, 1), ("w", 7, 2, 2)]
    assert ledger.grant(RecordId(3), 1.0).generation == 1


def test_a_released_lease_returns_everything_at_once() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 0.0)
    assert ledger.extend(name, pages(5, 6), 1.0)
    assert ledger.extend(name, pages(7), 2.0)
    assert (ledger.num_leases, ledger.num_records, ledger.num_pages) == (1, 1, 3)
    assert ledger.pages_of(RecordId(1)) == pages(5, 6, 7)
    assert ledger.release(name, 3.0) == Returned(
        name=name, pages=pages(5, 6, 7), record=RecordId(1), expired=False
    )
    assert (ledger.num_leases, ledger.num_records, ledger.num_pages) == (0, 0, 0)
    assert ledger.pages_of(RecordId(1)) is None
    assert ledger.release(name, 3.0) is None
    assert ledger.next_deadline is None


def test_an_expired_lease_is_told_once_and_returns_when_it_has_cooled() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 100.0)
    ledger.extend(name, pages(5), 101.0)
    assert ledger.next_deadline == 115.0
    assert ledger.advance(114.9).expired == ()
    due = ledger.advance(115.0)
    assert (due.expired, due.returned) == ((name,), ())
    assert (ledger.num_leases, ledger.num_records, ledger.num_pages) == (0, 1, 1)
    assert ledger.pages_of(RecordId(1)) == pages(5)
    assert ledger.next_deadline == 125.0
    assert ledger.advance(124.9).returned == ()
    due = ledger.advance(125.0)
    assert due.expired == ()
    assert due.returned == (Returned(name=name, pages=pages(5), record=RecordId(1), expired=True),)
    assert ledger.next_deadline is None


def test_a_lease_cools_from_its_end_however_late_that_is_noticed() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 0.0)
    due = ledger.advance(1000.0)
    # Its owner has to end what still uses it before it comes back.
    assert (due.expired, due.returned) == ((name,), ())
    assert ledger.next_deadline is not None
    assert ledger.next_deadline <= 1000.0
    assert [item.name for item in ledger.advance(1000.0).returned] == [name]


def test_a_lease_whose_end_has_come_is_over_even_before_anybody_noticed() -> None:
    for call in ("renew", "release", "extend", "revoke", "is_live"):
        ledger = a_ledger()
        name = ledger.grant(RecordId(1), 0.0)
        if call == "extend":
            assert not ledger.extend(name, pages(5), LEASE)
            assert ledger.num_pages == 0
        else:
            assert not getattr(ledger, call)(name, LEASE)
        # It is due at once, so that the owner hears of it; unless the owner has just been told.
        assert ledger.next_deadline == (LEASE + TRANSFER if call == "revoke" else LEASE)
        assert ledger.advance(LEASE).expired == (() if call == "revoke" else (name,))
        assert ledger.renew(name, LEASE) is None
        (returned,) = ledger.advance(LEASE + TRANSFER).returned
        assert returned.expired


def test_renewing_counts_from_now_and_extending_renews_nothing() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 0.0)
    assert ledger.extend(name, pages(5), 10.0)
    assert ledger.next_deadline == LEASE
    assert ledger.renew(name, 10.0) == LEASE
    assert ledger.next_deadline == 10.0 + LEASE
    assert ledger.is_live(name, 24.9)
    assert not ledger.is_live(name, 25.0)


def test_leases_may_have_pages_in_common_and_each_returns_its_own_claim() -> None:
    ledger = a_ledger()
    first, second = ledger.grant(RecordId(1), 0.0), ledger.grant(RecordId(2), 0.0)
    assert ledger.extend(first, pages(5, 6), 0.0)
    assert ledger.extend(second, pages(5, 7), 0.0)
    assert ledger.num_pages == 3
    returned = ledger.release(first, 1.0)
    assert returned is not None
    assert returned.pages == pages(5, 6)
    assert ledger.num_pages == 2
    assert ledger.pages_of(RecordId(2)) == pages(5, 7)


def test_leases_end_in_the_order_of_their_last_renewals() -> None:
    ledger = a_ledger()
    first, second, third = (ledger.grant(RecordId(number), float(number)) for number in range(3))
    ledger.renew(first, 5.0)
    assert ledger.advance(16.0).expired == (second,)
    assert ledger.advance(17.0).expired == (third,)
    assert ledger.advance(20.0).expired == (first,)


def test_a_revoked_lease_cools_from_then_on() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 0.0)
    assert ledger.revoke(name, 3.0)
    assert not ledger.revoke(name, 4.0)
    assert ledger.renew(name, 4.0) is None
    assert ledger.release(name, 4.0) is None
    due = ledger.advance(12.9)
    assert (due.expired, due.returned) == ((), ())
    (returned,) = ledger.advance(13.0).returned
    assert not returned.expired
    assert ledger.grant(RecordId(1), 13.0).generation == 2


def test_only_the_very_lease_answers_to_its_name() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 0.0)
    others = [
        replace(name, worker_id=WorkerId("other")),
        replace(name, incarnation=Incarnation(8)),
        replace(name, lease_id=2),
        replace(name, lease_id=2**63),
        replace(name, generation=2),
        replace(name, generation=0),
    ]
    for other in others:
        assert ledger.renew(other, 1.0) is None
        assert ledger.release(other, 1.0) is None
        assert not ledger.revoke(other, 1.0)
        assert not ledger.is_live(other, 1.0)
    assert ledger.is_live(name, 1.0)


def test_lending_twice_and_time_going_back_are_broken_invariants() -> None:
    ledger = a_ledger()
    name = ledger.grant(RecordId(1), 1.0)
    ledger.extend(name, pages(5), 1.0)
    with pytest.raises(AssertionError, match="record 1 is lent twice"):
        ledger.grant(RecordId(1), 1.0)
    with pytest.raises(AssertionError, match="time went back"):
        ledger.advance(0.9)
    ledger.revoke(name, 1.0)
    with pytest.raises(AssertionError, match="record 1 is lent twice"):
        ledger.grant(RecordId(1), 1.0)


@dataclass
class Lent:
    """What the model knows of a lease, from its grant to its return."""

    name: LeaseName
    record: int
    end: float
    pages: list[int] = field(default_factory=list)
    ended_at: float | None = None  # None: held
    is_told: bool = False


@dataclass
class Read:
    """A reader's, which it began in good order: over by `end`, one way or the other."""

    lent: Lent
    pages: tuple[int, ...]
    end: float


NUM_RECORDS = 4
NUM_PAGES = 12
# Ends fall together now and then, and exactly on the bounds.
steps = st.sampled_from([0.0, 0.5, 1.0, 4.0, 5.0, 10.0, 15.0, 40.0])


class Leases(RuleBasedStateMachine):
    """The ledger against a list of leases that is gone through at every step, and readers who keep the rule: a read's
    own deadline is within what is left of the lease, and at most the longest transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = a_ledger(NUM_RECORDS)
        self.now = 0.0
        self.lent: list[Lent] = []  # not returned
        self.reads: list[Read] = []
        self.gone: list[LeaseName] = []
        self.generations = [0] * NUM_RECORDS

    @initialize(now=st.floats(-1e6, 1e6))
    def start(self, now: float) -> None:
        self.now = float(round(now))

    @rule(seconds=steps)
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.reads = [read for read in self.reads if read.end > self.now]
        for item in self.lent:
            if item.ended_at is None and item.end <= self.now:
                item.ended_at = item.end

    @precondition(lambda self: len(self.lent) < NUM_RECORDS)
    @rule(data=st.data())
    def grant(self, data: st.DataObject) -> None:
        record = data.draw(
            st.sampled_from(sorted(set(range(NUM_RECORDS)) - {item.record for item in self.lent}))
        )
        name = self.ledger.grant(RecordId(record), self.now)
        assert (name.lease_id, name.generation) == (record, self.generations[record] + 1)
        self.generations[record] += 1
        self.lent.append(Lent(name=name, record=record, end=self.now + LEASE))

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), count=st.integers(0, 3))
    def extend(self, data: st.DataObject, count: int) -> None:
        item = data.draw(st.sampled_from(self.lent))
        new = [page for page in range(NUM_PAGES) if page not in item.pages][:count]
        assert self.ledger.extend(item.name, pages(*new), self.now) == (item.ended_at is None)
        if item.ended_at is None:
            item.pages.extend(new)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.lent))
        left = self.ledger.renew(item.name, self.now)
        assert left == (LEASE if item.ended_at is None else None)
        if left is not None:
            item.end = self.now + left

    @precondition(lambda self: any(item.end > self.now for item in self.lent))
    @rule(data=st.data(), share=st.floats(0, 1))
    def read(self, data: st.DataObject, share: float) -> None:
        """A reader may know an old end of the lease, never one that is too late; it need not know of a revocation."""
        item = data.draw(st.sampled_from([item for item in self.lent if item.ended_at is None] or [None]))
        if item is not None:
            seconds = share * min(TRANSFER, item.end - self.now)
            self.reads.append(Read(lent=item, pages=tuple(item.pages), end=self.now + seconds))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """By the reader, which has then nothing open."""
        item = data.draw(st.sampled_from(self.lent))
        if any(read.lent is item for read in self.reads):
            return
        returned = self.ledger.release(item.name, self.now)
        assert (returned is not None) == (item.ended_at is None)
        if returned is not None:
            self.returned(returned, item)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.lent))
        assert self.ledger.revoke(item.name, self.now) == (item.ended_at is None)
        item.is_told = True
        if item.ended_at is None:
            item.ended_at = self.now

    @rule()
    def advance(self) -> None:
        due = self.ledger.advance(self.now)
        untold = [item for item in self.lent if item.ended_at is not None and not item.is_told]
        assert sorted(due.expired, key=str) == sorted((item.name for item in untold), key=str)
        for item in untold:
            item.is_told = True
        cooled = [
            item for item in self.lent if item.ended_at is not None and item.ended_at + TRANSFER <= self.now
        ]
        if untold:
            assert not due.returned, "something came back before its owner could have ended its use"
            return
        assert len(due.returned) == len(cooled)
        for returned in due.returned:
            (item,) = (item for item in cooled if item.name == returned.name)
            self.returned(returned, item)

    def returned(self, returned: Returned, item: Lent) -> None:
        assert (returned.name, returned.pages, returned.record) == (
            item.name,
            pages(*item.pages),
            item.record,
        )
        assert not any(read.lent is item for read in self.reads), "returned while it is read"
        self.lent.remove(item)
        self.gone.append(item.name)

    @rule(data=st.data())
    @precondition(lambda self: self.gone)
    def try_what_is_gone(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.gone))
        assert self.ledger.renew(name, self.now) is None
        assert self.ledger.release(name, self.now) is None
        assert not self.ledger.extend(name, pages(0), self.now)
        assert not self.ledger.revoke(name, self.now)

    @invariant()
    def everything_adds_up(self) -> None:
        ledger = self.ledger
        assert ledger.num_records == len(self.lent)
        assert ledger.num_pages == len({page for item in self.lent for page in item.pages})
        for item in self.lent:
            assert ledger.is_live(item.name, self.now) == (item.ended_at is None)
            assert ledger.pages_of(RecordId(item.record)) == pages(*item.pages)
        assert ledger.num_leases == sum(1 for item in self.lent if item.ended_at is None)

    @invariant()
    def the_next_deadline_is_when_there_is_something_to_do(self) -> None:
        times = [
            item.end if item.ended_at is None else item.ended_at + (TRANSFER if item.is_told else 0.0)
            for item in self.lent
        ]
        due = self.ledger.next_deadline
        assert (due is None) == (not times)
        if due is not None:
            assert max(due, self.now) == max(min(times), self.now)


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

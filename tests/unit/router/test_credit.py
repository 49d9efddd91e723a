"""The ledger of credit: nothing is charged beyond its limit, nobody waits without need, and turns are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rorqual.errors import Overloaded
from rorqual.session import Credit
from router.credit import CreditLedger, CreditUse, Ticket, TicketState


@dataclass
class Desk:
    """A ledger and what it has told."""

    ledger: CreditLedger = field(default_factory=lambda: CreditLedger(waiting_max=8))
    told: list[str] = field(default_factory=list)

    def limit(
        self, address: str, sequences: int, pages: int, *, session: int, draining: bool = False
    ) -> None:
        limit = Credit(sequences=sequences, pages=pages)
        self.ledger.set_limit(address, limit, session_number=session, is_draining=draining)

    def ask(self, name: str, pages: int = 1, **options: object) -> Ticket:
        return self.ledger.ask(pages, on_grant=lambda: self.told.append(name), **options)


def a_desk(**sequences: int) -> Desk:
    desk = Desk()
    for number, (address, count) in enumerate(sequences.items(), start=1):
        desk.limit(address, count, 100, session=number)
    return desk


def test_what_fits_is_granted_at_once_and_nobody_is_called() -> None:
    desk = a_desk(d=2)
    ticket = desk.ask("a", 7)
    assert ticket.is_granted
    assert (ticket.address, ticket.session_number) == ("d", 1)
    assert desk.ledger.use_of("d") == CreditUse(limit=Credit(sequences=2, pages=100), sequences=1, pages=7)
    assert desk.told == []


def test_the_preferred_worker_is_taken_where_it_has_room_and_else_the_least_full() -> None:
    desk = a_desk(d1=4, d2=4, d3=4)
    assert desk.ask("a", preferred="d3").address == "d3"
    assert desk.ask("b").address == "d1"
    assert desk.ask("c").address == "d2"
    desk.limit("d3", 1, 100, session=3)
    assert desk.ask("e", preferred="d3").address == "d1"


def test_preferring_a_worker_overrules_neither_its_draining_nor_who_avoids_it_nor_who_waits_for_it() -> None:
    desk = a_desk(d1=4, d2=4)
    desk.limit("d2", 4, 100, session=2, draining=True)
    assert desk.ask("a", preferred="d2").address == "d1"
    desk.limit("d2", 4, 100, session=2)
    assert desk.ask("b", preferred="d2", avoided=frozenset({2})).address == "d1"
    long = desk.ask("long", 99, avoided=frozenset({2}))  # waits for the first
    assert long.is_waiting
    assert desk.ask("c", preferred="d1").address == "d2"


def test_those_who_wait_are_granted_in_order_as_room_comes() -> None:
    desk = a_desk(d=1)
    first = desk.ask("first")
    waiting = [desk.ask(name) for name in "abc"]
    assert [ticket.is_waiting for ticket in waiting] == [True] * 3
    desk.ledger.release(first)
    assert desk.told == ["a"]
    desk.limit("d", 3, 100, session=1)
    assert desk.told == ["a", "b", "c"]


def test_a_short_one_does_not_overtake_a_long_one() -> None:
    desk = Desk()
    desk.limit("d", 10, 10, session=1)
    running = desk.ask("running", 6)
    desk.ask("long", 8)
    short = desk.ask("short", 1)
    assert short.is_waiting
    desk.ledger.release(running)
    assert desk.told == ["long", "short"]


def test_one_that_can_never_fit_goes_alone() -> None:
    desk = Desk()
    desk.limit("d", 10, 10, session=1)
    running = desk.ask("running", 1)
    huge = desk.ask("huge", 50)
    assert huge.is_waiting
    desk.ledger.release(running)
    assert huge.is_granted
    assert desk.ask("next", 1).is_waiting


def test_an_urgent_one_goes_first() -> None:
    desk = a_desk(d=1)
    first = desk.ask("first")
    desk.ask("a")
    desk.ask("urgent", is_urgent=True)
    desk.ledger.release(first)
    assert desk.told == ["urgent"]


def test_the_queue_has_a_bound_that_urgent_ones_do_not_meet() -> None:
    desk = a_desk(d=0)
    for number in range(8):
        desk.ask(str(number))
    with pytest.raises(Overloaded, match="8 sequences wait"):
        desk.ask("more")
    assert desk.ask("urgent", is_urgent=True).is_waiting
    assert desk.ledger.num_waiting == 9


def test_one_that_avoids_a_worker_keeps_nobody_else_from_it() -> None:
    desk = a_desk(d1=2, d2=1)
    taken = desk.ask("taken", preferred="d2")
    picky = desk.ask("picky", avoided=frozenset({1}), is_urgent=True)
    assert picky.is_waiting
    assert desk.ask("any").address == "d1"
    desk.ledger.release(taken)
    assert picky.address == "d2"


def test_a_worker_that_is_avoided_is_taken_when_it_is_the_only_one() -> None:
    desk = a_desk(d1=2, d2=1)
    desk.ask("taken", preferred="d2")
    picky = desk.ask("picky", avoided=frozenset({1}))
    assert picky.is_waiting
    desk.ledger.drop("d2")
    assert picky.address == "d1"
    assert desk.told == ["picky"]


def test_a_draining_worker_is_charged_with_nothing_new() -> None:
    desk = a_desk(d=2)
    charged = desk.ask("charged")
    desk.limit("d", 2, 100, session=1, draining=True)
    assert not desk.ledger.is_usable(charged)
    assert desk.ask("new").is_waiting
    desk.limit("d", 2, 100, session=1)
    assert desk.ledger.is_usable(charged)
    assert desk.told == ["new"]


def test_a_lost_session_takes_its_charges_with_it_and_they_can_still_be_given_back() -> None:
    desk = a_desk(d=2)
    ticket = desk.ask("a")
    desk.ledger.drop("d")
    assert ticket.state is TicketState.GONE
    desk.limit("d", 2, 100, session=2)
    desk.ledger.release(ticket)
    desk.ledger.release(ticket)
    use = desk.ledger.use_of("d")
    assert use is not None
    assert (use.sequences, use.pages) == (0, 0)


def test_one_that_gives_its_grant_back_when_told_lets_the_next_go_without_nesting() -> None:
    ledger = CreditLedger(waiting_max=5000)
    tickets: list[Ticket] = []

    def refuse() -> None:
        ledger.release(tickets[len(told)])
        told.append(1)

    told: list[int] = []
    tickets += [ledger.ask(1, on_grant=refuse) for _ in range(5000)]  # nested, these would be too deep
    ledger.set_limit("d", Credit(sequences=1, pages=9), session_number=1, is_draining=False)
    assert len(told) == 5000
    assert ledger.num_waiting == 0


ADDRESSES = st.sampled_from(["d1", "d2", "d3"])


class Ledger(RuleBasedStateMachine):
    """Any course of events, against sums and turns computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, CreditUse | None] = {}  # as they were told
        self.ledger = CreditLedger(waiting_max=6, on_use=self.uses.__setitem__)
        self.limits: dict[str, tuple[int, Credit, bool]] = {}
        self.tickets: list[Ticket] = []
        self.told: list[Ticket] = []
        self.waited: list[Ticket] = []
        self.num_sessions = 0

    @rule(address=ADDRESSES, sequences=st.integers(0, 4), pages=st.integers(0, 8), draining=st.booleans())
    def limit(self, address: str, sequences: int, pages: int, draining: bool) -> None:
        if address not in self.limits:
            self.num_sessions += 1
        session = self.limits[address][0] if address in self.limits else self.num_sessions
        self.limits[address] = session, Credit(sequences=sequences, pages=pages), draining
        before = self.waiting()
        self.ledger.set_limit(address, self.limits[address][1], session_number=session, is_draining=draining)
        self.check_turns(before)

    @rule(address=ADDRESSES)
    def drop(self, address: str) -> None:
        self.limits.pop(address, None)
        before = self.waiting()
        self.ledger.drop(address)
        self.check_turns(before)

    @rule(
        pages=st.integers(1, 5),
        urgent=st.booleans(),
        avoided=st.frozensets(st.integers(1, 4), max_size=2),
        preferred=st.just("") | ADDRESSES,
    )
    def ask(self, pages: int, urgent: bool, avoided: frozenset[int], preferred: str) -> None:
        num_ordinary = sum(1 for ticket in self.waiting() if not ticket.is_urgent)
        tickets: list[Ticket] = []
        try:
            ticket = self.ledger.ask(
                pages,
                on_grant=lambda: self.told.append(tickets[0]),
                is_urgent=urgent,
                avoided=avoided,
                preferred=preferred,
            )
        except Overloaded:
            assert not urgent
            assert num_ordinary == 6
            return
        tickets.append(ticket)
        self.tickets.append(ticket)
        if ticket.is_waiting:
            self.waited.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        before = [item for item in self.waiting() if item is not ticket]
        self.ledger.release(ticket)
        self.tickets.remove(ticket)
        self.check_turns(before)

    def waiting(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.is_waiting]

    def check_turns(self, before: list[Ticket]) -> None:
        """Among tickets that avoid nobody, none is granted before one of its kind that came earlier."""
        for kind in (True, False):
            plain = [ticket for ticket in before if ticket.is_urgent is kind and not ticket.avoided]
            states = [ticket.is_waiting for ticket in plain]
            assert states == sorted(states)

    @invariant()
    def the_sums_are_right_and_within_the_limits_they_were_granted_under(self) -> None:
        for address, (session, limit, _) in self.limits.items():
            charged = [t for t in self.tickets if t.is_granted and t.address == address]
            assert all(ticket.session_number == session for ticket in charged)
            use = self.ledger.use_of(address)
            assert use == CreditUse(
                limit=limit, sequences=len(charged), pages=sum(ticket.pages for ticket in charged)
            )
        for address, use in self.uses.items():
            assert use == self.ledger.use_of(address)
        assert self.uses.keys() >= self.limits.keys()
        for ticket in self.tickets:
            assert not ticket.is_granted or ticket.address in self.limits
        assert self.ledger.num_waiting == len(self.waiting())

    @invariant()
    def the_first_who_waits_has_a_reason(self) -> None:
        waiting = sorted(self.waiting(), key=lambda ticket: not ticket.is_urgent)
        if not waiting:
            return
        first = waiting[0]
        able = {address: item for address, item in self.limits.items() if not item[2]}
        allowed = {a: i for a, i in able.items() if i[0] not in first.avoided} or able
        for address in allowed:
            use = self.ledger.use_of(address)
            assert use is not None
            assert not use.fits(first.pages)

    @invariant()
    def whoever_waited_and_was_granted_has_been_told_once(self) -> None:
        told = [id(ticket) for ticket in self.told]
        assert len(told) == len(set(told))
        for ticket in self.tickets:
            if ticket.is_granted:
                assert (id(ticket) in told) == any(item is ticket for item in self.waited)


Ledger.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedger = pytest.mark.slow(Ledger.TestCase)

"""Who may hand how much over to which decode worker: the ledger of credit.

`router.worker_link` says what each decode worker grants, `router.dispatch` asks before a prompt is sent to a prefill
worker, `router.split` asks again when a hand-over has to go elsewhere. Credit stands: asking is no round trip, so a
decode worker that has stopped answering delays nobody's first token. Pure: no clock, no I/O. It never lends: it only
counts what the router itself has promised, and tells `on_use` of every change.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain

from rorqual.errors import Overloaded
from rorqual.session import Credit


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditUse:
    """What of a decode worker's credit is promised: sequences and pages, of `limit`."""

    limit: Credit
    sequences: int = 0
    pages: int = 0

    def fits(self, pages: int) -> bool:
        """One more sequence of so many pages. One that can never fit may go alone: it waits on the worker."""
        if self.sequences + 1 > self.limit.sequences:
            return False
        return self.sequences == 0 or self.pages + pages <= self.limit.pages

    def fullness_with(self, pages: int) -> float:
        """Share of the credit that is promised with one more such sequence; the scarcer of the two."""
        sequences = (self.sequences + 1) / max(self.limit.sequences, 1)
        return max(sequences, (self.pages + pages) / max(self.limit.pages, 1))

    def plus(self, *, sequences: int, pages: int) -> CreditUse:
        return replace(self, sequences=self.sequences + sequences, pages=self.pages + pages)


class TicketState(enum.Enum):
    WAITING = "waiting"
    GRANTED = "granted"
    GONE = "gone"  # its worker was lost, and the promise with it
    RELEASED = "released"


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One sequence's place in the ledger, kept by whoever asked, who must `release` it. Only the ledger writes."""

    pages: int
    on_grant: Callable[[], None]  # called once, if it had to wait
    preferred: str  # the address of a worker, or empty
    avoided: frozenset[int]  # sessions it goes to only where there is no other
    is_urgent: bool
    state: TicketState = TicketState.WAITING
    address: str = ""  # of the worker charged
    session_number: int = 0

    @property
    def is_waiting(self) -> bool:
        return self.state is TicketState.WAITING

    @property
    def is_granted(self) -> bool:
        return self.state is TicketState.GRANTED


class CreditLedger:
    """Charges and the queue for them, first come first served; urgent ones, whose client has seen tokens or whose
    first attempt was lost, before the others.

    A ticket that cannot be granted keeps those behind it from the workers it waits for, so that a long prompt is not
    overtaken for ever by short ones. At most `waiting_max` tickets wait that are not urgent; of those there are no
    more than open sequences.
    """

    def __init__(
        self, *, waiting_max: int, on_use: Callable[[str, CreditUse | None], None] = lambda address, use: None
    ) -> None:
        """`on_use` is told of an address what `use_of` says from now on."""
        self._waiting_max = waiting_max
        self._on_use = on_use
        self._accounts: dict[str, _Account] = {}
        # Ordered dicts: a ticket may leave from the middle, and the first is found in constant time.
        self._urgent: OrderedDict[int, Ticket] = OrderedDict()
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()
        self._granted: deque[Ticket] = deque()  # whose askers have not been told
        self._is_telling = False

    @property
    def num_waiting(self) -> int:
        return len(self._urgent) + len(self._waiting)

    def use_of(self, address: str) -> CreditUse | None:
        """None: no session with such a decode worker."""
        account = self._accounts.get(address)
        return account.use if account is not None else None

    def set_limit(self, address: str, limit: Credit, *, session_number: int, is_draining: bool) -> None:
        """A decode worker is connected, or grants another amount than before. A lower limit takes nothing back."""
        account = self._accounts.get(address)
        if account is None:
            account = self._accounts[address] = _Account(address, session_number, limit, self._on_use)
        assert account.session_number == session_number, f"{address} was not dropped with its last session"
        account.set_use(replace(account.use, limit=limit))
        account.is_draining = is_draining
        self._grant()

    def drop(self, address: str) -> None:
        """The session is over: what was promised there is gone. Unknown addresses are passed over."""
        account = self._accounts.pop(address, None)
        if account is not None:
            self._on_use(address, None)
            for ticket in account.tickets.values():
                ticket.state = TicketState.GONE
            # Who avoids the others may go to them now if this was the last one it did not.
            self._grant()

    def ask(
        self,
        pages: int,
        *,
        on_grant: Callable[[], None],
        preferred: str = "",
        avoided: frozenset[int] = frozenset(),
        is_urgent: bool = False,
    ) -> Ticket:
        """A ticket, granted already when its turn is now. `preferred` is an address that is taken where there is
        room. Raises Overloaded when the queue is full."""
        if not is_urgent and len(self._waiting) >= self._waiting_max:
            raise Overloaded(
                f"{len(self._waiting)} sequences wait for decode credit already; try again later"
            )
        ticket = Ticket(
            pages=pages, on_grant=on_grant, preferred=preferred, avoided=avoided, is_urgent=is_urgent
        )
        self._queue_of(ticket)[id(ticket)] = ticket
        self._grant(asking=ticket)
        return ticket

    def is_usable(self, ticket: Ticket) -> bool:
        """Granted, by a worker that still takes sequences."""
        return ticket.is_granted and not self._accounts[ticket.address].is_draining

    def release(self, ticket: Ticket) -> None:
        """The sequence has ended, or nobody waits for the ticket any more. May be called again."""
        match ticket.state:
            case TicketState.WAITING:
                del self._queue_of(ticket)[id(ticket)]
            case TicketState.GRANTED:
                self._accounts[ticket.address].refund(ticket)
            case TicketState.GONE | TicketState.RELEASED:
                pass
        ticket.state = TicketState.RELEASED
        self._grant()

    def _queue_of(self, ticket: Ticket) -> OrderedDict[int, Ticket]:
        return self._urgent if ticket.is_urgent else self._waiting

    def _grant(self, *, asking: Ticket | None = None) -> None:
        """Grant in order what can be granted, and tell those who waited. Ends at the first ticket with which every
        worker is waited for: as long as nobody avoids any, at the first that is not granted. A ticket that gets whom it
        prefers, and one that ends while nobody waits, do not walk over the workers: most do either."""
        accounts: list[_Account] | None = None
        granted: list[Ticket] = []
        blocked: set[int] = set()
        for ticket in chain(self._urgent.values(), self._waiting.values()):
            account = self._preferred(ticket, blocked)
            if account is None:
                if accounts is None:
                    accounts = [account for account in self._accounts.values() if not account.is_draining]
                allowed = [account for account in accounts if account.session_number not in ticket.avoided]
                allowed = allowed or accounts
                account = _roomiest([item for item in allowed if item.session_number not in blocked], ticket)
                if account is None:
                    blocked.update(item.session_number for item in allowed)
                    if len(blocked) == len(accounts):
                        break
                    continue
            account.charge(ticket)
            granted.append(ticket)
        for ticket in granted:
            del self._queue_of(ticket)[id(ticket)]
        self._granted.extend(ticket for ticket in granted if ticket is not asking)
        self._tell()

    def _preferred(self, ticket: Ticket, blocked: set[int]) -> _Account | None:
        """Whom the ticket prefers, where that is allowed and has room."""
        account = self._accounts.get(ticket.preferred)
        if account is None or account.is_draining or not account.use.fits(ticket.pages):
            return None
        number = account.session_number
        return account if number not in ticket.avoided and number not in blocked else None

    def _tell(self) -> None:
        """One after the other: what an asker does may grant to the next, and is not done within its call."""
        if self._is_telling:
            return
        self._is_telling = True
        try:
            while self._granted:
                ticket = self._granted.popleft()
                if ticket.state is not TicketState.RELEASED:
                    ticket.on_grant()
        finally:
            self._is_telling = False


class _Account:
    """One decode worker's session and the tickets charged to it."""

    def __init__(
        self,
        address: str,
        session_number: int,
        limit: Credit,
        on_use: Callable[[str, CreditUse | None], None],
    ) -> None:
        self.address = address
        self.session_number = session_number
        self._on_use = on_use
        self.use = CreditUse(limit=limit)
        self.is_draining = False
        self.tickets: dict[int, Ticket] = {}

    def charge(self, ticket: Ticket) -> None:
        assert ticket.is_waiting
        ticket.state = TicketState.GRANTED
        ticket.address, ticket.session_number = self.address, self.session_number
        self.tickets[id(ticket)] = ticket
        self.set_use(self.use.plus(sequences=1, pages=ticket.pages))

    def refund(self, ticket: Ticket) -> None:
        del self.tickets[id(ticket)]
        self.set_use(self.use.plus(sequences=-1, pages=-ticket.pages))
        assert self.use.sequences == len(self.tickets)
        assert self.use.pages >= 0

    def set_use(self, use: CreditUse) -> None:
        self.use = use
        self._on_use(self.address, use)


def _roomiest(accounts: Iterable[_Account], ticket: Ticket) -> _Account | None:
    """The one the ticket prefers, else the least full; among equals the first by address."""
    able = [account for account in accounts if account.use.fits(ticket.pages)]
    return min(
        able,
        key=lambda item: (
            item.address != ticket.preferred,
            item.use.fullness_with(ticket.pages),
            item.address,
        ),
        default=None,
    )

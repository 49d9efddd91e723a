"""The fleet in columns: arrays with a row for each worker, which policies read, and the table they are rows of.

`FleetTable` belongs to `router.fleet`; links and the ledger of credit write a row when something of its worker changes,
in about a microsecond. So placing a sequence costs a few dozen numpy calls, whatever the number of workers, where
asking a thousand of them cost milliseconds. A row is the worker's index in the picture of caches, so names end in _W
as they do there. Policies only read. No clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.session import Credit, Load, Role
from router.credit import CreditUse

Bools = NDArray[np.bool_]
Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

NO_LOAD = Load(
    sequences_running=0,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=0,
    pages_total=0,
    slots_free=0,
    slots_total=0,
    step_ms=0.0,
)
"""Of a worker that is not connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One connected worker: a row, for those who look at few. What is outstanding is the router's own count: it
    includes what the worker's last report could not know yet."""

    address: str
    session_number: int  # over all workers: a worker that came back has another one
    role: Role = Role.BOTH
    draining: bool
    sequences_outstanding: int
    tokens_outstanding: int  # to be computed or generated for the router's sequences, at most
    prompt_tokens_outstanding: int = 0  # of these, to be computed before a first token, as was predicted
    prompt_tokens_sent: int = 0  # the same, as if the worker kept nothing
    sequences_max: int  # that the worker runs at once
    load: Load
    credit: CreditUse | None = None  # of a decode worker
    index: int = 0  # its place in the picture of caches
    pages_cached: int = 0  # that it is known to keep
    can_share: bool = False  # it reads prefixes from others that can, and they from it


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetColumns:
    """All workers as they are now; see `WorkerView` for what is not said here. Arrays change as workers do: who wants
    to keep one copies it. A worker that is not connected has no role."""

    addresses: Sequence[str]
    row_of: Mapping[str, int]  # by address
    loads: Sequence[Load]
    sequences_outstanding_max: int  # on each worker that computes prompts
    session_W: Int64s
    both_W: Bools
    prefill_W: Bools
    decode_W: Bools
    draining_W: Bools
    can_share_W: Bools
    sequences_W: Int64s  # outstanding
    tokens_W: Int64s  # outstanding
    prompt_tokens_W: Int64s  # outstanding
    prompt_tokens_sent_W: Int64s
    sequences_max_W: Int64s
    tokens_waiting_W: Int64s
    pages_free_W: Int64s
    step_ms_W: Float64s
    prefill_rate_W: Float64s  # tokens a second; 0 before there was any
    peer_rate_W: Float64s  # bytes a second that it reads from others; 0: it has measured none lately
    peer_latency_W: Float64s  # seconds of such a read, however short
    host_rate_W: Float64s  # the same of its host memory
    host_latency_W: Float64s
    store_rate_W: Float64s  # and of the store that all workers share
    store_latency_W: Float64s
    pages_cached_W: Int64s
    has_credit_W: Bools
    credit_sequences_W: Int64s  # promised
    credit_pages_W: Int64s
    limit_sequences_W: Int64s
    limit_pages_W: Int64s

    @property
    def num_rows(self) -> int:
        return len(self.session_W)

    @property
    def connected_W(self) -> Bools:
        return self.both_W | self.prefill_W | self.decode_W

    def able_W(self, *, excluded: frozenset[int]) -> Bools:
        """Who may take a sequence now. `excluded` are sessions that have already failed it. How much a decode worker
        may take is a matter of its credit."""
        has_room_W = self.decode_W | (self.sequences_W < self.sequences_outstanding_max)
        return self.there_W(excluded=excluded) & has_room_W

    def there_W(self, *, excluded: frozenset[int]) -> Bools:
        """Who is connected and may take a sequence once there is room."""
        there_W = self.connected_W & ~self.draining_W
        for session in excluded:
            there_W &= self.session_W != session
        return there_W

    def roles(self, among_W: Bools) -> list[Role]:
        """That these workers have between them."""
        return [role for role, has_W in self._roles_W() if (has_W & among_W).any()]

    def tokens_ahead_W(self) -> Int64s:
        """Prompt tokens to be computed before another one's: this router's, and what the worker says beyond them."""
        own_W = np.maximum(self.prompt_tokens_sent_W, self.prompt_tokens_W)
        return self.prompt_tokens_W + np.maximum(self.tokens_waiting_W - own_W, 0)

    def seconds_until_place_W(self) -> Float64s:
        """0 as long as there is a place to run. A prefill worker's are free soon after each prompt."""
        seconds_W = np.zeros(self.num_rows)
        queued_W = self.sequences_W + 1 - self.sequences_max_W
        rows = np.flatnonzero(self.both_W & (queued_W > 0))
        if len(rows):
            # Places become free one by one, as sequences end that have generated all they may.
            tokens_left = self.tokens_W[rows] - self.prompt_tokens_W[rows]
            steps_each = tokens_left / np.maximum(self.sequences_W[rows], 1)
            seconds = queued_W[rows] * steps_each / np.maximum(self.sequences_max_W[rows], 1)
            seconds_W[rows] = seconds * self.step_ms_W[rows] / 1000
        return seconds_W

    def fits_W(self, pages: int) -> Bools:
        """Whose credit has room: `CreditUse.fits` of every decode worker."""
        has_place_W = self.credit_sequences_W + 1 <= self.limit_sequences_W
        has_pages_W = (self.credit_sequences_W == 0) | (self.credit_pages_W + pages <= self.limit_pages_W)
        return self.has_credit_W & has_place_W & has_pages_W

    def fullness_with_W(self, pages: int) -> Float64s:
        """`CreditUse.fullness_with` of every decode worker."""
        sequences_W = (self.credit_sequences_W + 1) / np.maximum(self.limit_sequences_W, 1)
        return np.maximum(sequences_W, (self.credit_pages_W + pages) / np.maximum(self.limit_pages_W, 1))

    def least_busy(self, among_W: Bools) -> int:
        """Of workers whose waits are alike, who comes first; there is one at least."""
        rows = np.flatnonzero(among_W)
        rows = rows[self.tokens_W[rows] == self.tokens_W[rows].min()]
        rows = rows[self.sequences_W[rows] == self.sequences_W[rows].min()]
        return self.first_by_address(rows)

    def first_by_address(self, rows: NDArray[np.intp]) -> int:
        """Who comes first of workers that are equal in all else, wherever their rows are."""
        return min(rows.tolist(), key=self.addresses.__getitem__)

    def view(self, row: int) -> WorkerView:
        """Of a connected worker."""
        (role,) = (role for role, has_W in self._roles_W() if has_W[row])
        return WorkerView(
            address=self.addresses[row],
            session_number=int(self.session_W[row]),
            role=role,
            draining=bool(self.draining_W[row]),
            sequences_outstanding=int(self.sequences_W[row]),
            tokens_outstanding=int(self.tokens_W[row]),
            prompt_tokens_outstanding=int(self.prompt_tokens_W[row]),
            prompt_tokens_sent=int(self.prompt_tokens_sent_W[row]),
            sequences_max=int(self.sequences_max_W[row]),
            load=self.loads[row],
            credit=self._credit(row),
            index=row,
            pages_cached=int(self.pages_cached_W[row]),
            can_share=bool(self.can_share_W[row]),
        )

    def _roles_W(self) -> tuple[tuple[Role, Bools], ...]:
        return (Role.BOTH, self.both_W), (Role.PREFILL, self.prefill_W), (Role.DECODE, self.decode_W)

    def _credit(self, row: int) -> CreditUse | None:
        if not self.has_credit_W[row]:
            return None
        limit = Credit(sequences=int(self.limit_sequences_W[row]), pages=int(self.limit_pages_W[row]))
        return CreditUse(
            limit=limit, sequences=int(self.credit_sequences_W[row]), pages=int(self.credit_pages_W[row])
        )


class FleetTable:
    """The rows and who writes them. Memory is that of `rows_max` rows, about 170 bytes each, from the start."""

    def __init__(self, *, rows_max: int, sequences_outstanding_max: int) -> None:
        self._addresses: list[str] = []
        self._loads: list[Load] = []
        self._row_of: dict[str, int] = {}

        def bools() -> Bools:
            return np.zeros(rows_max, np.bool_)

        def ints() -> Int64s:
            return np.zeros(rows_max, np.int64)

        self._all = FleetColumns(
            addresses=self._addresses,
            row_of=self._row_of,
            loads=self._loads,
            sequences_outstanding_max=sequences_outstanding_max,
            session_W=ints(),
            both_W=bools(),
            prefill_W=bools(),
            decode_W=bools(),
            draining_W=bools(),
            can_share_W=bools(),
            sequences_W=ints(),
            tokens_W=ints(),
            prompt_tokens_W=ints(),
            prompt_tokens_sent_W=ints(),
            sequences_max_W=ints(),
            tokens_waiting_W=ints(),
            pages_free_W=ints(),
            step_ms_W=np.zeros(rows_max),
            prefill_rate_W=np.zeros(rows_max),
            peer_rate_W=np.zeros(rows_max),
            peer_latency_W=np.zeros(rows_max),
            host_rate_W=np.zeros(rows_max),
            host_latency_W=np.zeros(rows_max),
            store_rate_W=np.zeros(rows_max),
            store_latency_W=np.zeros(rows_max),
            pages_cached_W=ints(),
            has_credit_W=bools(),
            credit_sequences_W=ints(),
            credit_pages_W=ints(),
            limit_sequences_W=ints(),
            limit_pages_W=ints(),
        )
        self._columns = self._first(0)

    @property
    def columns(self) -> FleetColumns:
        """As long as the largest row that ever joined: take them anew for each look."""
        return self._columns

    def join(self, row: int, address: str) -> None:
        """A worker more, not connected yet. Its row may have been another's, who is not there any more."""
        assert row < len(self._all.session_W), "more workers than the table has rows"
        assert address not in self._row_of, f"{address} has a row already"
        assert row >= len(self._addresses) or not self._addresses[row], f"row {row} is another's"
        num_more = row + 1 - len(self._addresses)
        self._addresses.extend([""] * num_more)
        self._loads.extend([NO_LOAD] * num_more)
        self._addresses[row] = address
        self._row_of[address] = row
        if num_more > 0:
            self._columns = self._first(len(self._addresses))

    def leave(self, row: int) -> None:
        """The worker is gone for good, and its session before it. The row may be another's from now on."""
        columns = self._all
        assert not columns.has_credit_W[row], "a worker left that has credit to give"
        assert not columns.sequences_W[row], "a worker left that has sequences"
        del self._row_of[self._addresses[row]]
        self._addresses[row] = ""
        columns.session_W[row] = columns.sequences_max_W[row] = columns.pages_cached_W[row] = 0

    def connect(
        self, row: int, *, session_number: int, role: Role, sequences_max: int, can_share: bool, load: Load
    ) -> None:
        """A session has begun; nothing is outstanding on it."""
        columns = self._all
        columns.session_W[row] = session_number
        columns.both_W[row] = role is Role.BOTH
        columns.prefill_W[row] = role is Role.PREFILL
        columns.decode_W[row] = role is Role.DECODE
        columns.sequences_max_W[row] = sequences_max
        columns.can_share_W[row] = can_share
        columns.draining_W[row] = False
        self.set_load(row, load)

    def disconnect(self, row: int) -> None:
        """The session is over: nothing of this row counts until the next."""
        columns = self._all
        columns.both_W[row] = columns.prefill_W[row] = columns.decode_W[row] = False
        columns.draining_W[row] = columns.can_share_W[row] = False
        self.set_load(row, NO_LOAD)

    def set_load(self, row: int, load: Load) -> None:
        """As the worker reports it, about twenty times a second."""
        columns = self._all
        self._loads[row] = load
        columns.tokens_waiting_W[row] = load.tokens_waiting
        columns.pages_free_W[row] = load.pages_free
        columns.step_ms_W[row] = load.step_ms
        columns.prefill_rate_W[row] = load.prefill_tokens_per_second
        columns.peer_rate_W[row] = load.peer_bytes_per_second
        columns.peer_latency_W[row] = load.peer_latency_seconds
        columns.host_rate_W[row] = load.host_bytes_per_second
        columns.host_latency_W[row] = load.host_latency_seconds
        columns.store_rate_W[row] = load.store_bytes_per_second
        columns.store_latency_W[row] = load.store_latency_seconds

    def set_draining(self, row: int, is_draining: bool) -> None:
        self._all.draining_W[row] = is_draining

    def set_pages_cached(self, row: int, num_pages: int) -> None:
        self._all.pages_cached_W[row] = num_pages

    def set_outstanding(
        self, row: int, *, sequences: int, tokens: int, prompt_tokens: int, prompt_tokens_sent: int
    ) -> None:
        """All that is open on the worker, by the router's own count."""
        columns = self._all
        columns.sequences_W[row] = sequences
        columns.tokens_W[row] = tokens
        columns.prompt_tokens_W[row] = prompt_tokens
        columns.prompt_tokens_sent_W[row] = prompt_tokens_sent

    def set_credit(self, address: str, use: CreditUse | None) -> None:
        """As the ledger has it; None: it has no account."""
        row = self._row_of[address]
        columns = self._all
        columns.has_credit_W[row] = use is not None
        if use is not None:
            columns.credit_sequences_W[row] = use.sequences
            columns.credit_pages_W[row] = use.pages
            columns.limit_sequences_W[row] = use.limit.sequences
            columns.limit_pages_W[row] = use.limit.pages

    def _first(self, num_rows: int) -> FleetColumns:
        """Views of so many rows."""
        values: dict[str, Any] = {item.name: getattr(self._all, item.name) for item in fields(FleetColumns)}
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                values[name] = value[:num_rows]
        return FleetColumns(**values)

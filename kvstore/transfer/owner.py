"""The one thread of a process that uses an engine of one-sided reads: connects peers, reads what it is told to, and
lets others read.

The rank starts a `TransferOwner` beside its compute thread and submits commands from the thread that hears its host;
events come back on the owner's thread. Nothing here decides what is read, and nothing waits without a bound: a fetch
that outlives its deadline is told of, and polled on until nobody writes into its targets any more.

How often it looks. Idle, it sleeps until a command comes, and wakes 20 times a second for the sake of peers that
connect. While leases are out or fetches open it looks after 0.05 ms when the last look found something to do, then
ever later: at most 0.1 ms for 10 ms after it was told of a lease, 0.5 ms while leases are out or a peer is new, 2 ms
with only fetches. It never spins: idle it takes 0.002 CPU-seconds a second, with leases out that nobody reads 0.05,
with either engine (measured on two shared cores).
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.transfer.contract import Endpoint, PeerId, ReadId, ReadState, Run, Transfer, TransferError
from kvstore.transfer.runs import cut_runs
from rorqual.clock import Clock

COMMANDS_MAX = 4096
"""Commands that wait for the owner. Its longest pause is one post or one check of digests, tens of milliseconds: a
host that fills the queue meanwhile is broken, and the rank ends."""

POST_BYTES_MAX = 64 << 20
"""A fetch is posted in parts of this size, since a post over cross-memory copies or shared memory blocks for as long
as the copy takes: 64 MiB at 6 GB/s are 11 ms, after which others have their turn."""

IDLE_SECONDS = 0.05
POLL_SECONDS_MIN = 0.00005
POLL_BACKOFF = 1.5
EXPOSED_SECONDS_MAX = 0.0005
EXPECTED_SECONDS, EXPECTED_SECONDS_MAX = 0.01, 0.0001
"""After each word that memory is exposed a read is likely soon: for so long the thread looks at least so often."""

READ_SECONDS_MAX = 0.002
CONNECT_SECONDS = 0.2
"""For so long after a connect it looks as if leases were out: UCX sets the connection up in a few looks on both sides.
Otherwise the first read would: 13 ms instead of 1 ms."""
BUSY_SECONDS, BUSY_FETCH_SECONDS = 0.00002, 0.000005
"""A look that takes longer than this and that for each open fetch found something to do. Driving an idle engine, or
asking after a read that goes nowhere, takes 1 to 3 us; the rest is room for a machine that is busy otherwise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Answered by Connected."""

    peer: PeerId
    endpoint: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    """No fetch from the peer is open or will be made."""

    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Read `runs` of a peer, then `verify`. Answered by exactly one Fetched, once nothing is written into the targets
    any more; an Overdue comes before it when that is not within `seconds` from its submission. No two open fetches
    share a target."""

    fetch: int  # numbered by the caller, not used again
    peer: PeerId
    runs: Sequence[Run]
    seconds: float
    verify: Callable[
        [], str
    ]  # on the owner's thread, when all has been read in time: "" or one line of error


@dataclass(frozen=True, slots=True, kw_only=True)
class Expose:
    """Whether leases are out, so that peers may be reading."""

    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    peer: PeerId
    error: str  # one line; empty: connected


@dataclass(frozen=True, slots=True, kw_only=True)
class Overdue:
    """The deadline has passed; the targets may be written into until the Fetched. Once a fetch at most."""

    fetch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """The fetch is over and its targets are the caller's again. They hold what was asked for when `error` is empty."""

    fetch: int
    error: str
    num_bytes: int  # read, of all that was asked for
    transfer_ms: float  # from the first post to the last DONE
    verify_ms: float


Command = Connect | Disconnect | Fetch | Expose
Event = Connected | Overdue | Fetched


class TransferOwner:
    """Owns the engine from `start` on: it closes it, too.

    `on_event` and `on_failure` are called on the owner's thread and must not wait for it. `on_failure` is told once,
    of an exception nobody expected: the thread has ended then, no fetch is ever answered, and the process must end.
    """

    def __init__(
        self,
        engine: Transfer,
        *,
        on_event: Callable[[Event], None],
        on_failure: Callable[[BaseException], None],
        clock: Clock,
    ) -> None:
        self._loop = OwnerLoop(engine, on_event, clock)
        self._engine = engine
        self._on_failure = on_failure
        self._clock = clock
        self._commands: queue.SimpleQueue[_Submitted | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Command) -> None:
        """From any thread; does not block. Commands are taken up in order."""
        num_waiting = self._commands.qsize()
        assert num_waiting < COMMANDS_MAX, f"{num_waiting} commands wait for the transfer thread"
        self._commands.put(_Submitted(command=command, at=self._clock.monotonic()))

    def stop(self, *, seconds_max: float) -> bool:
        """Ends the thread and closes the engine; open fetches are not answered. False: it has not ended in time, and
        goes with the process."""
        self._commands.put(None)
        self._thread.join(seconds_max)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
            self._engine.close()
        except Exception as error:  # noqa: BLE001  the outermost loop of the thread
            _log.exception("the transfer thread has failed")
            self._on_failure(error)

    def _serve(self) -> None:
        pause = 0.0
        while True:
            try:
                submitted = self._commands.get(timeout=pause) if pause else self._commands.get_nowait()
            except queue.Empty:
                pause = self._loop.look()
                continue
            if submitted is None:
                return
            self._loop.take(submitted.command, submitted_at=submitted.at)
            pause = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Submitted:
    command: Command
    at: float  # clock of the owner


@dataclass(slots=True, kw_only=True, eq=False)
class _Open:
    """A fetch between its command and its Fetched."""

    command: Fetch
    deadline: float  # clock of the owner
    parts: deque[list[Run]]  # not yet posted
    read: ReadId | None = None  # of the part that is posted
    read_bytes: int = 0
    num_bytes: int = 0  # of the parts before
    first_post: float | None = None
    last_done: float = 0.0
    is_overdue: bool = False

    @property
    def is_read(self) -> bool:
        """To the last byte; not yet verified."""
        return self.read is None and not self.parts


class OwnerLoop:
    """What the thread does, one command or one look at a time, each bounded by one post or one check of digests.
    It reads the clock and never waits."""

    def __init__(self, engine: Transfer, on_event: Callable[[Event], None], clock: Clock) -> None:
        self._engine = engine
        self._on_event = on_event
        self._clock = clock
        self._is_exposed = False
        self._connecting_until = -math.inf
        self._expecting_until = -math.inf
        self._fetches: list[_Open] = []  # in the order in which they have their turn to post
        self._pause = 0.0  # after the last look

    def take(self, command: Command, *, submitted_at: float) -> None:
        match command:
            case Connect(peer=peer, endpoint=endpoint):
                self._on_event(Connected(peer=peer, error=self._connect(peer, endpoint)))
                self._connecting_until = self._clock.monotonic() + CONNECT_SECONDS
            case Disconnect(peer=peer):
                is_read = any(item.command.peer == peer for item in self._fetches)
                assert not is_read, f"peer {peer} is closed while a fetch from it is open"
                self._engine.forget(peer)
            case Expose(active=active):
                self._is_exposed = active
                if active:
                    self._expecting_until = self._clock.monotonic() + EXPECTED_SECONDS
                    self._pause = 0.0
            case Fetch() as fetch:
                parts = deque(cut_runs(fetch.runs, POST_BYTES_MAX))
                self._fetches.append(_Open(command=fetch, deadline=submitted_at + fetch.seconds, parts=parts))

    def _connect(self, peer: PeerId, endpoint: Endpoint) -> str:
        try:
            self._engine.connect(peer, endpoint)
        except TransferError as error:
            return str(error)
        return ""

    def look(self) -> float:
        """Moves on what can move. Seconds until the next look is due; 0.0: after the commands that wait."""
        started = self._clock.monotonic()
        self._engine.progress()
        idle_seconds = BUSY_SECONDS + BUSY_FETCH_SECONDS * len(self._fetches)
        for item in tuple(self._fetches):
            self._poll(item)
        now = self._clock.monotonic()
        for item in self._fetches:
            self._tell_if_overdue(item, now)
        is_exposed = self._is_exposed or now < self._connecting_until
        exposed = EXPECTED_SECONDS_MAX if now < self._expecting_until else EXPOSED_SECONDS_MAX
        self._pause = self._next_pause(
            longest=exposed if is_exposed else None, is_busy=now - started > idle_seconds
        )
        ready = next((item for item in self._fetches if item.read is None), None)
        if ready is not None:
            self._advance(ready, now)
            self._pause = 0.0
        return self._pause

    def _next_pause(self, *, longest: float | None, is_busy: bool) -> float:
        """`longest` while memory is exposed."""
        if not self._fetches and longest is None:
            return IDLE_SECONDS
        if is_busy or not self._pause:
            return POLL_SECONDS_MIN
        return min(self._pause * POLL_BACKOFF, READ_SECONDS_MAX if longest is None else longest)

    def _poll(self, item: _Open) -> None:
        if item.read is None:
            return
        try:
            if self._engine.poll(item.read) is ReadState.PENDING:
                return
        except TransferError as error:
            self._end(item, str(error))
            return
        item.read = None
        item.num_bytes += item.read_bytes
        item.last_done = self._clock.monotonic()

    def _tell_if_overdue(self, item: _Open, now: float) -> None:
        if item.is_overdue or (item.is_read and item.last_done <= item.deadline):
            return
        if now > item.deadline:
            item.is_overdue = True
            self._on_event(Overdue(fetch=item.command.fetch))

    def _advance(self, item: _Open, now: float) -> None:
        """It has no read open: post its next part, or end it."""
        if item.is_overdue:
            self._end(item, f"it took longer than {item.command.seconds:g} s")
        elif item.parts:
            self._post(item, item.parts.popleft(), now)
        else:
            started = self._clock.monotonic()
            error = item.command.verify()
            self._end(item, error, verify_seconds=self._clock.monotonic() - started)

    def _post(self, item: _Open, runs: list[Run], now: float) -> None:
        if item.first_post is None:
            item.first_post = now
        self._fetches.remove(item)
        self._fetches.append(item)  # behind those that have not posted yet
        try:
            item.read = self._engine.post(item.command.peer, runs)
        except TransferError as error:
            self._end(item, str(error))
            return
        item.read_bytes = sum(run.num_bytes for run in runs)
        self._poll(item)  # where a post copies, it is done

    def _end(self, item: _Open, error: str, *, verify_seconds: float = 0.0) -> None:
        self._fetches.remove(item)
        seconds = 0.0 if item.first_post is None else max(item.last_done - item.first_post, 0.0)
        self._on_event(
            Fetched(
                fetch=item.command.fetch,
                error=error,
                num_bytes=item.num_bytes,
                transfer_ms=seconds * 1e3,
                verify_ms=verify_seconds * 1e3,
            )
        )

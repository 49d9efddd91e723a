"""Which owners of state this worker's rank knows, and how one becomes known: their endpoint is asked for, checked, and
given to the rank, once for each incarnation.

Used by `decode_worker.borrowing` and `engine.worker.sharing.peer_reading`. An owner from which a read has failed is
made known anew for the next sequence that wants it; one that nobody uses goes when there are many, or when its
successor at the same address comes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from prometheus_client import Counter, Histogram

from engine.plan import PeerClose, PeerOpen, PeerOpened, ToTransfer
from engine.worker.sharing.lenders import Lenders, LendingFailed
from rorqual.session import Source

PEERS_MAX = 256

_Key = tuple[str, int]


class Peer:
    """An owner. `number` is what the rank calls it."""

    def __init__(self, number: int, source: Source) -> None:
        loop = asyncio.get_running_loop()
        self.number = number
        self.address = source.address
        self.key: _Key = (source.address, source.lease.incarnation)
        self.num_users = 0
        self.is_broken = False
        self.opened: asyncio.Future[str] = loop.create_future()  # what the rank said
        self.known: asyncio.Future[LendingFailed | None] = loop.create_future()


class CallMetrics(Protocol):
    """Of whoever reads: a histogram of calls by method, a counter of deadlines missed by stage."""

    @property
    def call_seconds(self) -> Histogram: ...

    @property
    def stages_overdue(self) -> Counter: ...


class Peers:
    def __init__(
        self,
        *,
        lenders: Lenders,
        send: Callable[[ToTransfer], None],
        tasks: asyncio.TaskGroup,
        seconds_max: float,
        metrics: CallMetrics,
    ) -> None:
        self._lenders = lenders
        self._send = send
        self._tasks = tasks
        self._seconds_max = seconds_max
        self._metrics = metrics
        self._known: OrderedDict[_Key, Peer] = OrderedDict()
        self._numbers: dict[int, Peer] = {}  # of all that the rank knows, broken ones too
        self._next_number = 1

    @property
    def num_peers(self) -> int:
        return len(self._numbers)

    async def get(self, source: Source) -> Peer:
        """The owner, known to the rank and with one more user: `put` it back. Raises LendingFailed."""
        peer = self._known.get((source.address, source.lease.incarnation)) or self._add(source)
        self._known.move_to_end(peer.key)
        peer.num_users += 1
        try:
            # Shielded: the others that wait for it do not fail with the first that is cancelled.
            failure = await asyncio.shield(peer.known)
        except asyncio.CancelledError:
            self.put(peer)
            raise
        if failure is not None:
            self.put(peer, is_broken=True)
            raise failure
        return peer

    def put(self, peer: Peer, *, is_broken: bool = False) -> None:
        """A user is done with it: nothing of it reads from the owner any more."""
        peer.num_users -= 1
        assert peer.num_users >= 0
        if is_broken:
            self._forget(peer)
        if peer.is_broken and peer.num_users == 0:
            self._close(peer)

    def opened(self, message: PeerOpened) -> None:
        """From the rank. One that is not waited for any more took too long."""
        peer = self._numbers.get(message.peer)
        if peer is not None and not peer.opened.done():
            peer.opened.set_result(message.error)

    def _add(self, source: Source) -> Peer:
        for other in list(self._known.values()):
            is_old = other.address == source.address
            if other.num_users == 0 and (is_old or len(self._known) >= PEERS_MAX):
                self._forget(other)
                self._close(other)
        peer = Peer(self._next_number, source)
        self._next_number += 1
        self._known[peer.key] = peer
        self._tasks.create_task(self._connect(peer, source))
        return peer

    async def _connect(self, peer: Peer, source: Source) -> None:
        """Ends with `known` set; raises nothing, since several may wait for it, or nobody."""
        failure: LendingFailed | None = None
        try:
            with self._metrics.call_seconds.labels("attach").time():
                endpoint = await self._lenders.attach(source, seconds_max=self._seconds_max)
            self._numbers[peer.number] = peer
            self._send(PeerOpen(peer=peer.number, endpoint=endpoint))
            async with asyncio.timeout(self._seconds_max):
                error = await peer.opened
            if error:
                failure = LendingFailed(f"{source.address}: its memory cannot be read: {error}")
        except TimeoutError:
            text = f"{source.address}: its memory was not known to the rank within {self._seconds_max:g} s"
            failure = LendingFailed(text, is_overdue=True)
        except LendingFailed as error:
            failure = error
        peer.known.set_result(failure)
        if failure is not None:
            # At once: who asks from now on tries anew, even if those who waited have all been cancelled meanwhile.
            self._forget(peer)
            if failure.is_overdue:
                self._metrics.stages_overdue.labels("attach").inc()
        if peer.is_broken and peer.num_users == 0:
            self._close(peer)  # also one that was given up for its successor while it was connecting

    def _forget(self, peer: Peer) -> None:
        """Who asks for the owner from now on makes it known anew."""
        peer.is_broken = True
        if self._known.get(peer.key) is peer:
            del self._known[peer.key]

    def _close(self, peer: Peer) -> None:
        if self._numbers.pop(peer.number, None) is not None:
            self._send(PeerClose(peer=peer.number))

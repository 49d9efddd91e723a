"""The router's workers: one `WorkerLink` each, their credit, and what must be alike among them.

Run by `router.process`; `router.dispatch` and `router.split` look at `columns` and `members`, ask `credit` and open
sequences; `router.finding` says who else is there. It decides nothing about placement.

Workers come and go while it runs. A session that stands knows more than any list of addresses: one that is not on the
list any more is used as long as its session lasts and forgotten with it, its row, its metrics and its task too.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Collection, Sequence, Set

import numpy as np

from rorqual import __version__
from rorqual.errors import Overloaded
from rorqual.session import Role, Welcome
from rorqual.telemetry import fields
from router.credit import CreditLedger
from router.fleet_metrics import FleetMetrics
from router.members import Members
from router.picture import Picture
from router.placement import FleetColumns, FleetTable, WorkerView
from router.sequences import RemoteSequence, SequenceRequest, Sink
from router.worker_link import FleetConfig, SessionLost, Transport, WorkerLink

log = logging.getLogger(__name__)

TEND_SECONDS = 0.002
"""Between two chunks of tidying up, which take about 0.3 ms each: an eighth of the router's time at most."""


class Fleet:
    """All workers. `run` must be awaited by a task of the caller and keeps the sessions up until
    cancelled. `addresses` stay for good; `set_found` says which others there are."""

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        transport: Transport,
        config: FleetConfig,
        metrics: FleetMetrics,
        router_id: str,
        randomness: random.Random,
        workers_max: int = 0,
    ) -> None:
        """`workers_max`: that there can be at once, found ones too; more are left out until others have gone."""
        assert len(set(addresses)) == len(addresses)
        self.config = config
        self.metrics = metrics
        self.transport = transport
        self.router_id = router_id
        self.randomness = randomness
        workers_max = max(64, len(addresses), workers_max)
        self.picture = Picture(multiplier=randomness.getrandbits(64) | 1, workers_max=workers_max)
        self.table = FleetTable(
            rows_max=self.picture.workers_max, sequences_outstanding_max=config.sequences_per_worker_max
        )
        self.members = Members()
        self.credit = CreditLedger(waiting_max=config.credit_waiting_max, on_use=self.table.set_credit)
        self._untidy = asyncio.Event()
        self._num_sessions = 0
        self._changed = asyncio.Event()
        self._stay = frozenset(addresses)
        self._found: frozenset[str] = frozenset()
        self._links: dict[str, WorkerLink] = {}
        self._keeping: dict[str, asyncio.Task[None]] = {}  # who runs each link, while the fleet runs
        self._tasks: asyncio.TaskGroup | None = None  # while it runs
        self._ended: deque[WorkerLink] = deque()  # whose tasks have, to be forgotten
        self._have_ended = asyncio.Event()
        self._num_left_out = 0
        self._is_mixed = False  # the log was told last that versions differ
        for address in addresses:
            self._links[address] = WorkerLink(self, address)
        metrics.picture_pairs.set_function(lambda: float(self.picture.num_pairs))
        metrics.picture_bytes.set_function(lambda: float(self.picture.num_bytes))
        metrics.credit_waiting.set_function(lambda: float(self.credit.num_waiting))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                for link in self._links.values():
                    self._keep(link, tasks)
                tasks.create_task(self._keep_tidy())
                await self._forget_ended()
            finally:
                self._tasks = None  # before the group ends its tasks: no link is begun from here on

    def set_found(self, addresses: Set[str]) -> None:
        """Who else is there from now on. Who is new is connected to. Who is missing, and has no session, is forgotten
        at once; who has one when that is over."""
        self._found = frozenset(addresses) - self._stay
        for address, link in self._links.items():
            is_wanted = self._is_wanted(address)
            if link.stays and not is_wanted:
                log.info(
                    "missed a worker among those found %s",
                    fields(worker=address, connected=link.welcome is not None),
                )
            link.stays = is_wanted
            if not is_wanted and link.welcome is None and address in self._keeping:
                self._keeping[address].cancel()
        if self._tasks is None:
            for link in [link for link in self._links.values() if not link.stays and link.welcome is None]:
                self._forget(link)  # nobody runs it
        self._join_found()

    @property
    def num_known(self) -> int:
        """Workers with a link, connected or not."""
        return len(self._links)

    @property
    def num_left_out(self) -> int:
        """Workers that were found and for which there is no room."""
        return self._num_left_out

    @property
    def columns(self) -> FleetColumns:
        """All workers as they are now, for placement."""
        return self.table.columns

    def view(self) -> list[WorkerView]:
        """The connected workers one by one, for those who look now and then."""
        return [self.columns.view(row) for row in np.flatnonzero(self.columns.connected_W).tolist()]

    def welcomes(self) -> Collection[Welcome]:
        return self.members.welcomes

    def missing(self) -> str:
        """Which worker must connect before a request can be answered; empty when it can."""
        return self.members.missing()

    def failures(self) -> list[str]:
        """Why each worker that is not connected is not, as far as is known."""
        return [
            link.failure or f"{link.address}: no answer"
            for link in self._links.values()
            if link.welcome is None
        ]

    def open(self, address: str, request: SequenceRequest, *, sink: Sink, tag: int) -> RemoteSequence:
        """Open a sequence on a connected worker. Raises Overloaded when its bounds are reached, or it has gone."""
        link = self._links.get(address)
        if link is None:
            raise Overloaded(f"worker {address} is gone")
        return link.open(request, sink=sink, tag=tag)

    def link(self, address: str) -> WorkerLink:
        """For those who look: its feed."""
        return self._links[address]

    @property
    def next_change(self) -> asyncio.Event:
        """Set once a worker connects, leaves or changes its mind about draining. Take it in the same breath
        as the look at the fleet that it is to follow."""
        return self._changed

    async def wait_for_change(self) -> None:
        """Return at the next change after this call."""
        await self.next_change.wait()

    def announce_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self.metrics.workers_connected.set(len(self.members))
        self._tell_versions()

    def tend(self) -> None:
        self._untidy.set()

    async def _keep_tidy(self) -> None:
        """Work that the picture of caches has put off is done while nobody waits for the router: a chunk at a time."""
        while True:
            await self._untidy.wait()
            self._untidy.clear()
            if self.picture.tend():
                await asyncio.sleep(TEND_SECONDS)
                self._untidy.set()

    def _tell_versions(self) -> None:
        """One line once versions differ and one once they are alike again, however many workers a roll replaces. Which
        worker has which is in the metrics."""
        versions = self.members.versions
        if len(versions) > 1 and not self._is_mixed:
            self._is_mixed = True
            told = ", ".join(f"{count} of {name or 'unknown'}" for name, count in sorted(versions.items()))
            log.warning("saw workers of several versions %s", fields(versions=told, router=__version__))
        elif len(versions) == 1 and self._is_mixed:
            self._is_mixed = False
            (name,) = versions
            log.info("saw all workers of one version again %s", fields(version=name or "unknown"))

    def _is_wanted(self, address: str) -> bool:
        return address in self._stay or address in self._found

    def _join_found(self) -> None:
        """Links to all that were found and have none, as far as there is room. Who is about to be forgotten keeps its
        place until that is done, and is joined anew then."""
        missing = sorted(self._found - self._links.keys())
        room = self.picture.workers_max - len(self._links)
        for address in missing[:room]:
            link = self._links[address] = WorkerLink(self, address)
            if self._tasks is not None:
                self._keep(link, self._tasks)
        num_left_out = max(len(missing) - room, 0)
        if num_left_out > self._num_left_out:
            log.warning(
                "left workers out, there is no room for more %s",
                fields(left_out=num_left_out, workers_max=self.picture.workers_max),
            )
        self._num_left_out = num_left_out

    def _keep(self, link: WorkerLink, tasks: asyncio.TaskGroup) -> None:
        """Its task ends once nobody wants the worker and its session is over, which the link itself sees, or is
        cancelled while there is none. A task that never began has no end of its own to see: so by a callback."""

        def end(_: asyncio.Task[None]) -> None:
            self._ended.append(link)
            self._have_ended.set()

        self._keeping[link.address] = tasks.create_task(link.run())
        self._keeping[link.address].add_done_callback(end)

    async def _forget_ended(self) -> None:
        while True:
            await self._have_ended.wait()
            self._have_ended.clear()
            while self._ended:
                link = self._ended.popleft()
                del self._keeping[link.address]
                self._forget(link)
            # Some may have been found again meanwhile.
            self._join_found()

    def _forget(self, link: WorkerLink) -> None:
        """Nothing is left of the worker: its row and its place in the picture are somebody else's from now on."""
        del self._links[link.address]
        link.leave()
        self.tend()
        log.info("forgot a worker %s", fields(worker=link.address))

    def next_session_number(self) -> int:
        self._num_sessions += 1
        return self._num_sessions

    def check_model(self, address: str, welcome: Welcome) -> None:
        """Workers of one fleet answer alike, and those that hand state over mean the same bytes: others among them
        are refused. Raises SessionLost."""
        # All that are there have been compared before: one of them stands for all.
        other = self.members.first
        if other is not None and _identity(other) != _identity(welcome):
            raise SessionLost(
                f"{address} serves {' '.join(map(str, _identity(welcome)))},"
                f" the others {' '.join(map(str, _identity(other)))} (model, vocabulary, numerics, exact)"
            )
        other = self.members.first_to_hand_over if welcome.role is not Role.BOTH else None
        if other is not None and welcome.wire_id != other.wire_id:
            raise SessionLost(
                f"{address} hands state over as {welcome.wire_id}, the others as {other.wire_id} (wire id:"
                " model, numerics, and whether --drafts is 0)"
            )


def _identity(welcome: Welcome) -> tuple[str, int, str, bool]:
    """What must be equal for two workers to give the same answers."""
    return welcome.model_fingerprint, welcome.vocab_size, welcome.numerics, welcome.exact

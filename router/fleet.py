"""The router's workers: one `WorkerLink` each, their credit, and what must be alike among them.

Run by `router.process`; `router.dispatch` and `router.split` look at `columns` and `members`, ask `credit` and open
sequences. It decides nothing about placement.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence

import numpy as np

from rorqual.session import Role, Welcome
from router.credit import CreditLedger
from router.fleet_metrics import FleetMetrics
from router.members import Members
from router.picture import Picture
from router.placement import FleetColumns, FleetTable, WorkerView
from router.sequences import RemoteSequence, SequenceRequest, Sink
from router.worker_link import FleetConfig, SessionLost, Transport, WorkerLink

TEND_SECONDS = 0.002
"""Between two chunks of tidying up, which take about 0.3 ms each: an eighth of the router's time at most."""


class Fleet:
    """All workers. `run` must be awaited by a task of the caller and keeps the sessions up until
    cancelled."""

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        transport: Transport,
        config: FleetConfig,
        metrics: FleetMetrics,
        router_id: str,
        randomness: random.Random,
    ) -> None:
        assert len(set(addresses)) == len(addresses)
        self.config = config
        self.metrics = metrics
        self.transport = transport
        self.router_id = router_id
        self.randomness = randomness
        self.picture = Picture(multiplier=randomness.getrandbits(64) | 1, workers_max=max(64, len(addresses)))
        self.table = FleetTable(
            rows_max=self.picture.workers_max, sequences_outstanding_max=config.sequences_per_worker_max
        )
        self.members = Members()
        self.credit = CreditLedger(waiting_max=config.credit_waiting_max, on_use=self.table.set_credit)
        self._untidy = asyncio.Event()
        self._links = {address: WorkerLink(self, address) for address in addresses}
        self._num_sessions = 0
        self._changed = asyncio.Event()
        metrics.picture_pairs.set_function(lambda: float(self.picture.num_pairs))
        metrics.picture_bytes.set_function(lambda: float(self.picture.num_bytes))
        metrics.credit_waiting.set_function(lambda: float(self.credit.num_waiting))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for link in self._links.values():
                tasks.create_task(link.run())
            tasks.create_task(self._keep_tidy())

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
        """Open a sequence on a connected worker. Raises Overloaded when its bounds are reached."""
        return self._links[address].open(request, sink=sink, tag=tag)

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

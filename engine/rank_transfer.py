"""The rank's dealings with other workers' memory: digests of state, fetches, and the threads they take.

Made by `engine.rank_process`. Compute stays on the main thread, which takes plans out of a `PlanQueue`; a second thread
reads what the host sends (`read_host`); a third, `kvstore.transfer.owner`, is the only one to touch the engine of
transfers, and answers the host itself. None of this decides what is fetched, when a lease ends or what may be
overwritten: that is the host's business. Nothing a peer says may end this process: it is an error of one fetch.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.frames import read_frame
from engine.plan import (
    Expose,
    Fetch,
    Fetched,
    FetchOverdue,
    FromTransfer,
    PeerClose,
    PeerOpen,
    PeerOpened,
    RankSettings,
    Shutdown,
    StepPlan,
    ToTransfer,
)
from kvstore.layout import IndexSpace
from kvstore.pools import Pools
from kvstore.transfer import owner
from kvstore.transfer.contract import PeerId, Run, Transfer, TransferError
from kvstore.transfer.runs import page_runs, record_run
from rorqual.clock import Clock
from rorqual.errors import RorqualError

PLANS_MAX = 16
"""Plans that wait for the compute thread. A host sends a few ahead at most; beyond this its socket fills up."""

STOP_SECONDS_MAX = 2.0
"""How long the transfer's thread may take to end; what it is doing then ends with the process."""

_log = logging.getLogger(__name__)

PageDigest = Callable[[Tensor, Tensor], Tensor]
"""`page_digest` of `engine.kernels.digest`."""


class StateDigests:
    """Digests of pages and records where they lie, unsigned 64-bit numbers. Any thread may ask; whoever does sees to it
    that nobody writes there meanwhile."""

    def __init__(self, pools: Pools, records_RB: Tensor, *, page_digest: PageDigest) -> None:
        self._page_digest = page_digest
        self._records_RB = records_RB
        self._pages = [
            (item.component.value, pools[item.component].bytes_ulb.flatten(1))
            for item in pools.layout.descriptors
            if item.space is IndexSpace.PAGE
        ]

    @property
    def components(self) -> tuple[str, ...]:
        """The paged components, in layout order."""
        return tuple(name for name, _ in self._pages)

    def of_pages(self, pages: Sequence[int]) -> list[int]:
        """Of each page one for each paged component."""
        if not pages or not self._pages:
            return []
        ids_N = torch.tensor(pages)
        columns = [self._page_digest(bytes_UB, ids_N) for _, bytes_UB in self._pages]
        return _unsigned(torch.stack(columns, dim=1).flatten())

    def of_record(self, record: int, num_bytes: int) -> int:
        """Of a record's first `num_bytes`."""
        return _unsigned(self._page_digest(self._records_RB[:, :num_bytes], torch.tensor([record])))[0]


class RankTransfer:
    """Carries out the host's transfer commands with an engine that it owns from now on.

    `record_bytes` says how long a record of so many tokens is. `tell` sends a message to the host, whole, from any
    thread. `fail` is told once, of an exception nobody expected: no fetch is answered any more, and the process must
    end.
    """

    def __init__(
        self,
        engine: Transfer,
        digests: StateDigests,
        *,
        record_bytes: Callable[[int], int],
        tell: Callable[[FromTransfer], None],
        fail: Callable[[BaseException], None],
        clock: Clock,
    ) -> None:
        self._regions = engine.endpoint.regions
        self._digests = digests
        self._record_bytes = record_bytes
        self._tell = tell
        self._owner = owner.TransferOwner(engine, on_event=self._pass_on, on_failure=fail, clock=clock)
        self._owner.start()

    def submit(self, command: ToTransfer) -> None:
        """Does not wait for the engine. Raises OSError when the host is gone."""
        match command:
            case PeerOpen(peer=peer, endpoint=endpoint):
                self._owner.submit(owner.Connect(peer=PeerId(peer), endpoint=endpoint))
            case PeerClose(peer=peer):
                self._owner.submit(owner.Disconnect(peer=PeerId(peer)))
            case Expose(active=active):
                self._owner.submit(owner.Expose(active=active))
            case Fetch():
                self._fetch(command)

    def stop(self) -> None:
        """Open fetches are not answered."""
        self._owner.stop(seconds_max=STOP_SECONDS_MAX)

    def _fetch(self, fetch: Fetch) -> None:
        try:
            runs = self._runs(fetch)
        except TransferError as error:
            self._tell(
                Fetched(fetch=fetch.fetch, error=str(error), num_bytes=0, transfer_ms=0.0, verify_ms=0.0)
            )
            return
        self._owner.submit(
            owner.Fetch(
                fetch=fetch.fetch,
                peer=PeerId(fetch.peer),
                runs=runs,
                seconds=fetch.seconds,
                verify=lambda: self._difference(fetch),
            )
        )

    def _runs(self, fetch: Fetch) -> list[Run]:
        """Raises TransferError for what a peer has said of its state."""
        num_digests = len(fetch.source_pages) * len(self._digests.components)
        if len(fetch.digests) != num_digests:
            raise TransferError(
                f"{len(fetch.source_pages)} pages have {num_digests} digests, not {len(fetch.digests)}"
            )
        runs = page_runs(self._regions, fetch.source_pages, fetch.target_pages)
        if (record := fetch.record) is not None:
            wanted = self._record_bytes(record.num_tokens)
            if record.num_bytes != wanted:
                text = f"a record of {record.num_tokens} tokens has {wanted} bytes, not {record.num_bytes}"
                raise TransferError(text)
            runs.append(
                record_run(
                    self._regions, source=record.source, target=record.target, num_bytes=record.num_bytes
                )
            )
        return runs

    def _difference(self, fetch: Fetch) -> str:
        """What differs from its digest: one line, empty when nothing does."""
        components = self._digests.components
        found = self._digests.of_pages(fetch.target_pages)
        for number, (digest, wanted) in enumerate(zip(found, fetch.digests, strict=True)):
            if digest != wanted:
                place, component = divmod(number, len(components))
                return f"page {fetch.source_pages[place]} of {components[component]}: digest differs"
        record = fetch.record
        if record is not None and self._digests.of_record(record.target, record.num_bytes) != record.digest:
            return f"record {record.source}: digest differs"
        return ""

    def _pass_on(self, event: owner.Event) -> None:
        match event:
            case owner.Connected(peer=peer, error=error):
                message = PeerOpened(peer=peer, error=error)
            case owner.Overdue(fetch=fetch):
                message = FetchOverdue(fetch=fetch)
            case owner.Fetched():
                message = Fetched(
                    fetch=event.fetch,
                    error=event.error,
                    num_bytes=event.num_bytes,
                    transfer_ms=event.transfer_ms,
                    verify_ms=event.verify_ms,
                )
        # If the host is gone, the thread that reads from it finds the same.
        with contextlib.suppress(ConnectionError):
            self._tell(message)


class ThreadFailed(RorqualError):
    """A thread beside the compute thread has ended by an exception nobody expected."""


class PlanQueue:
    """Where the compute thread waits for what is next: a plan, or the end."""

    def __init__(self) -> None:
        self._items: queue.Queue[StepPlan | None] = queue.Queue(PLANS_MAX)
        self._failure: BaseException | None = None

    def next(self) -> StepPlan | None:
        """None: the host is done, or gone. Raises ThreadFailed."""
        plan = self._items.get()
        if self._failure is not None:
            raise ThreadFailed(f"a thread of the rank has failed: {self._failure!r}") from self._failure
        return plan

    def put(self, plan: StepPlan | None) -> None:
        """Waits for room."""
        self._items.put(plan)

    def fail(self, error: BaseException) -> None:
        """From any thread: the plans that wait are not carried out."""
        self._failure = error
        with contextlib.suppress(queue.Full):  # then nobody waits
            self._items.put_nowait(None)


def read_host(connection: socket.socket, plans: PlanQueue, transfer: RankTransfer) -> None:
    """The reading thread: until Shutdown or the end of the host, which it passes on like everything else."""
    try:
        while True:
            match read_frame(connection):
                case StepPlan() as plan:
                    plans.put(plan)
                case Shutdown() | None:
                    break
                case RankSettings():
                    raise AssertionError("settings come once")
                case command:
                    transfer.submit(command)
    except ConnectionError:
        pass
    except Exception as error:  # noqa: BLE001  the outermost loop of its thread
        _log.exception("the thread that reads from the host has failed")
        plans.fail(error)
    plans.put(None)


def _unsigned(digests_N: Tensor) -> list[int]:
    return [digest % 2**64 for digest in digests_N.tolist()]

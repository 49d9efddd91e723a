"""What a decode worker adds to its host: the state of a computed prompt is read from the worker that lends it.

Made by `decode_worker.process`, called by the host (`engine.worker.role`). A task for each sequence takes it from
admission to where the scheduler goes on with it: make the owner known, renew the lease, read what is offered, renew
again (the proof that what was read was still promised). The lease is released once a token has come of it, so that
until then another worker could read the same state. It owns no memory: pages and records are the scheduler's, and go
back to it only when the rank says that nothing writes into them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from decode_worker.loan import Loan
from decode_worker.metrics import BorrowingMetrics
from engine.plan import Fetch, Fetched, FetchOverdue, FromTransfer, PeerOpened
from engine.worker.events import Adoption, LentEvent, PagesEvent, SequenceKey
from engine.worker.role import HandlerHost
from engine.worker.sharing.lenders import LeaseEnded, Lenders, LendingFailed, LendingRefused
from engine.worker.sharing.peers import Peers
from rorqual.clock import Clock
from rorqual.errors import InvalidRequest
from rorqual.session import RENEWALS_PER_LEASE, Credit, ErrorCode, Offer, Open, Role, Take
from rorqual.telemetry import fields

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BorrowerConfig:
    wire_id: str
    num_slots: int
    num_page_components: int
    transfer_seconds_max: float = 10.0  # one read; none begins with less of its lease left
    call_seconds_max: float = 3.0  # one call to the owner
    offer_seconds_max: float = 600.0  # the next offer of a prompt that is still computed


class Borrower:
    """The role handler of a decode worker."""

    role = Role.DECODE

    def __init__(
        self, config: BorrowerConfig, *, lenders: Lenders, clock: Clock, metrics: BorrowingMetrics
    ) -> None:
        self.config = config
        self._lenders = lenders
        self._clock = clock
        self._metrics = metrics
        self._loans: dict[SequenceKey, Loan] = {}
        self._fetches: dict[int, Loan] = {}  # open on the rank, also of loans that have ended
        self._next_fetch = 1
        self._host: HandlerHost | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._peers: Peers | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        self._stepped = asyncio.Event()
        metrics.watch(
            num_fetches=lambda: len(self._fetches),
            num_peers=lambda: 0 if self._peers is None else self._peers.num_peers,
        )

    @property
    def host(self) -> HandlerHost:
        assert self._host is not None
        return self._host

    @property
    def peers(self) -> Peers:
        assert self._peers is not None
        return self._peers

    @property
    def is_idle(self) -> bool:
        return not self._loans and not self._fetches

    def attach(self, host: HandlerHost) -> None:
        self._host = host

    async def run(self) -> None:
        """Owns the tasks of all loans: an unexpected failure in one of them ends the worker."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._peers = Peers(
                lenders=self._lenders,
                send=self.host.send,
                tasks=tasks,
                seconds_max=self.config.call_seconds_max,
                metrics=self._metrics,
            )
            await asyncio.Event().wait()

    def credit(self, *, num_sessions: int, keys: Collection[SequenceKey]) -> Credit | None:
        """An equal share, less what its sequences have grown beyond what they were charged for."""
        share = max(1, num_sessions)
        scheduler = self.host.scheduler
        held = scheduler.num_pages_grown(keys)
        return Credit(
            sequences=max(1, self.config.num_slots // share),
            pages=max(0, scheduler.num_pages_usable // share - held),
        )

    def check(self, command: Open) -> None:
        if command.source is None:
            raise InvalidRequest("a decode worker needs a source of state", field="source")
        if command.source.wire_id != self.config.wire_id:
            raise InvalidRequest(
                f"state has wire id {command.source.wire_id}; this worker reads {self.config.wire_id}"
                " (model, numerics, or --drafts 0 on one side only)",
                field="source",
            )
        if command.max_tokens < 2:
            raise InvalidRequest("a sequence of one token needs no decode worker", field="max_tokens")

    def fetches(self, command: Open) -> bool:
        return False

    def opened(self, key: SequenceKey, command: Open, *, fetching: bool) -> None:
        assert command.source is not None
        self._loans[key] = Loan(
            key=key,
            request_id=command.request_id,
            source=command.source,
            num_prompt=len(command.prompt),
        )

    def take(self, key: SequenceKey, command: Take) -> None:
        loan = self._loans.get(key)
        if loan is None:
            raise InvalidRequest("an offer came for a sequence that decodes already", field="offer")
        loan.take(command, num_page_components=self.config.num_page_components)

    def lend(self, event: PagesEvent | LentEvent) -> Offer | None:
        raise AssertionError("a sequence of a decode worker was lent")

    def renew(self, key: SequenceKey) -> None:
        pass

    async def finish(self) -> None:
        while self._releasing:
            await asyncio.wait(self._releasing)

    def landed(self, key: SequenceKey) -> None:
        """The first token: nobody will have to read this state again."""
        loan = self._loans.get(key)
        if loan is not None:
            self._end(loan, "done")
            releasing = self._spawn(self._release(loan))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    def ended(self, key: SequenceKey) -> None:
        loan = self._loans.get(key)
        if loan is not None:
            self._end(loan, loan.outcome or "cancelled")

    def turned(self) -> None:
        self._stepped.set()
        self._stepped = asyncio.Event()
        if self.host.scheduler.is_starved:
            self._make_room()
        for adoption in self.host.scheduler.take_adoptions():
            loan = self._loans[adoption.key]
            loan.adoption = adoption
            loan.task = self._spawn(self._borrow(loan, adoption))

    def take_from_rank(self, message: FromTransfer) -> None:
        match message:
            case PeerOpened():
                self.peers.opened(message)
            case FetchOverdue():
                loan = self._fetches[message.fetch]
                if not loan.has_ended:
                    self._fail(loan, str(self._read_overdue(loan)))
            case Fetched():
                self._fetched(self._fetches.pop(message.fetch), message)

    async def _borrow(self, loan: Loan, adoption: Adoption) -> None:
        """From admission to the scheduler. Cancelled when the sequence ends before."""
        try:
            await self._after(adoption.after)
            loan.peer = await self.peers.get(loan.source)
            await self._renew(loan)
            self._spawn(self._keep_renewed(loan))
            self.host.enqueue(lambda: self._tell_bound(loan))
            while not loan.is_read:
                await self._fetch(loan, await self._next_takes(loan))
            await self._renew(loan)
        except LendingFailed as error:
            self._refuse(loan, error)
        else:
            self.host.enqueue(lambda: self._adopted(loan))

    async def _after(self, number: int) -> None:
        """Until no plan in flight uses the memory that will be written into."""
        while self.host.scheduler.last_applied < number:
            await self._stepped.wait()

    async def _next_takes(self, loan: Loan) -> list[Take]:
        """What has been offered and not been read yet; waits for some."""
        seconds = self.config.offer_seconds_max
        try:
            async with asyncio.timeout(seconds):
                while not loan.takes:
                    loan.news.clear()
                    loan.is_waiting = True
                    if self.host.scheduler.is_starved:
                        self.host.enqueue(lambda: None)  # `turned` sees that it could give way
                    await loan.news.wait()
        except TimeoutError:
            text = f"nothing was offered by {loan.source.address} for {seconds:g} s"
            raise self._overdue("offer", text) from None
        finally:
            loan.is_waiting = False
        takes, loan.takes = loan.takes, []
        return takes

    async def _fetch(self, loan: Loan, takes: list[Take]) -> None:
        """One read of everything in `takes` that is not here yet. Raises LendingFailed."""
        offers = [take.offer for take in takes]
        # The owner keeps its pages for its own longest read after a lease has ended, not for ours.
        seconds = min(self.config.transfer_seconds_max, *(offer.transfer_seconds for offer in offers))
        message = loan.fetch_message(self._next_fetch, offers, seconds=seconds)
        if message is not None:
            await self._read(loan, message)
        if offers[-1].record is not None:
            loan.is_read = True
            loan.token_ids = takes[-1].token_ids

    async def _read(self, loan: Loan, message: Fetch) -> None:
        """Raises LendingFailed."""
        self._next_fetch += 1
        seconds = message.seconds
        if loan.lease_end - self._clock.monotonic() < seconds:
            await self._renew(loan)
        if loan.lease_end - self._clock.monotonic() < seconds:
            raise LendingFailed(
                f"the lease at {loan.source.address} leaves less than {seconds:g} s for a read"
            )
        loan.read_seconds = seconds
        self._fetches[message.fetch] = loan
        loan.fetch = asyncio.get_running_loop().create_future()
        self.host.send(message)
        try:
            # The rank says when it is overdue. One that says nothing at all stands still.
            async with asyncio.timeout(seconds + self.config.call_seconds_max):
                failure = await loan.fetch
        except TimeoutError:
            raise self._read_overdue(loan) from None
        if failure:
            raise LendingFailed(f"a read from {loan.source.address} failed: {failure}")

    def _fetched(self, loan: Loan, message: Fetched) -> None:
        """The memory of a fetch is ours again."""
        self._metrics.bytes_read.inc(message.num_bytes)
        if not message.error:
            self._metrics.fetch_seconds.observe(message.transfer_ms / 1e3)
            self._metrics.verify_seconds.observe(message.verify_ms / 1e3)
        loan.is_broken = loan.is_broken or bool(message.error)
        if loan.has_ended:
            self._settle(loan)
        elif loan.fetch is not None and not loan.fetch.done():
            loan.fetch.set_result(message.error)

    async def _renew(self, loan: Loan) -> None:
        """Raises LendingFailed, also when the lease has ended."""
        started = self._clock.monotonic()
        try:
            remaining = await self._lenders.renew(loan.source, seconds_max=self.config.call_seconds_max)
        except LendingFailed as error:
            if error.is_overdue:
                self._metrics.stages_overdue.labels("renew").inc()
            raise
        finally:
            self._metrics.call_seconds.labels("renew").observe(self._clock.monotonic() - started)
        if remaining is None:
            raise LeaseEnded(f"the lease at {loan.source.address} has ended")
        loan.lease_end = started + remaining

    async def _keep_renewed(self, loan: Loan) -> None:
        """Until the loan ends. A call that fails is made again as long as the lease may still run."""
        while not loan.has_ended:
            left = loan.lease_end - self._clock.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, left / RENEWALS_PER_LEASE)):
                    await loan.ended.wait()
                    return
            try:
                await self._renew(loan)
            except LendingFailed as error:
                if loan.is_adopted:
                    return  # it has been read and proved: only another worker could still want it
                if isinstance(error, LendingRefused) or self._clock.monotonic() >= loan.lease_end:
                    self._refuse(loan, error)
                    return

    async def _release(self, loan: Loan) -> None:
        """When it fails the lease ends by itself a little later."""
        started = self._clock.monotonic()
        try:
            was_live = await self._lenders.release(loan.source, seconds_max=self.config.call_seconds_max)
        except LendingFailed as error:
            if error.is_overdue:
                self._metrics.stages_overdue.labels("release").inc()
            log.warning("failed to release a lease %s", fields(request=loan.request_id, error=error))
            return
        finally:
            self._metrics.call_seconds.labels("release").observe(self._clock.monotonic() - started)
        if not was_live:
            log.warning("released a lease that had ended %s", fields(request=loan.request_id))

    def _make_room(self) -> None:
        """A sequence that decodes has no page for its next token, while others hold pages for prompts that are still
        computed: the youngest of those is bound again later."""
        idle = [loan for loan in self._loans.values() if loan.is_waiting]
        if idle:
            idle[-1].outcome = "no_room"
            text = "its pages were needed by sequences that decode"
            self.host.fail(idle[-1].key, ErrorCode.OVERLOADED, text)

    def _tell_bound(self, loan: Loan) -> None:
        if not loan.has_ended:
            self.host.tell_bound(loan.key)

    def _adopted(self, loan: Loan) -> None:
        """In the host's own task: the scheduler goes on with the sequence."""
        if loan.has_ended:
            return
        try:
            self.host.scheduler.adopted(loan.key, loan.token_ids, loan.digests)
        except InvalidRequest as error:
            loan.outcome = "invalid"
            self.host.fail(loan.key, ErrorCode.INVALID, str(error))
        else:
            loan.is_adopted = True

    def _read_overdue(self, loan: Loan) -> LendingFailed:
        return self._overdue(
            "fetch", f"a read from {loan.source.address} took longer than {loan.read_seconds:g} s"
        )

    def _overdue(self, stage: str, text: str) -> LendingFailed:
        self._metrics.stages_overdue.labels(stage).inc()
        return LendingFailed(text, is_overdue=True)

    def _refuse(self, loan: Loan, error: LendingFailed) -> None:
        self.host.enqueue(lambda: self._fail(loan, str(error)))

    def _fail(self, loan: Loan, text: str) -> None:
        """In the host's own task. The router may have the same state read by another worker."""
        if loan.has_ended:
            return
        loan.outcome = "failed"
        self.host.fail(loan.key, ErrorCode.FAILED, text)

    def _end(self, loan: Loan, outcome: str) -> None:
        """The sequence has ended, or has no more use for its lease."""
        self._metrics.hand_overs.labels(outcome).inc()
        loan.has_ended = True
        loan.ended.set()
        del self._loans[loan.key]
        if loan.task is not None:
            loan.task.cancel()
        if not any(other is loan for other in self._fetches.values()):
            self._settle(loan)

    def _settle(self, loan: Loan) -> None:
        """Nothing writes into its memory any more."""
        if loan.peer is not None:
            self.peers.put(loan.peer, is_broken=loan.is_broken)
            loan.peer = None
        if loan.adoption is not None and not loan.is_adopted:
            self.host.scheduler.settle(loan.key)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work)

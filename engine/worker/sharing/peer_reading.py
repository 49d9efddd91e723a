"""Prefixes that other workers keep are read before a prompt is computed: the reader's side of reads between peers.

Made by the command of a prefill worker, called by the role handler `engine.worker.sharing.handler`. The router says
who has what (`rorqual.session.PeerFetch`); a task for each such sequence takes room for it
(`engine.worker.cache.imports`), leases the pages at their owner, has the rank read them and check their digests,
renews the lease as the proof that what was read was still promised, and puts them into the cache. Then the sequence
starts as any other. Whatever goes wrong (the owner is gone, has evicted them, lies, or takes too long) is counted, and
the prompt is computed. Bytes whose digests are not the owner's never reach the cache.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from engine.plan import Fetch, Fetched, FetchOverdue, FromTransfer, PeerOpened, RecordFetch
from engine.worker.cache.imports import Import
from engine.worker.cache.prefix_cache import Packed, PageFacts
from engine.worker.events import SequenceKey
from engine.worker.role import HandlerHost
from engine.worker.sharing.lenders import KeyLenders, LeaseEnded, LendingFailed
from engine.worker.sharing.peers import Peer, Peers
from engine.worker.wire import KEYS_MAX, LeaseKeysRequest
from kvstore.store.contract import TenantLabel, tenant_label
from rorqual.clock import Clock
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import Offer, Open, PeerFetch, Source
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReaderConfig:
    wire_id: str
    num_page_components: int
    transfer_seconds_max: float = 10.0  # one read
    call_seconds_max: float = 3.0  # one call to the owner
    reads_max: int = 16  # sequences at once; beyond it prompts are computed


class PeerReadMetrics:
    """Also what `engine.worker.sharing.peers` counts into."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reads = Counter(
            "rorqual_worker_peer_reads",
            "Prompts of which another worker was said to keep something, by what came of it.",
            ["outcome"],
            registry=registry,
        )
        self.bytes_read = Counter(
            "rorqual_worker_peer_bytes_read", "State of prefixes read from other workers.", registry=registry
        )
        self.pages_read = Counter(
            "rorqual_worker_peer_pages_read", "Pages read from other workers and kept.", registry=registry
        )
        self.seconds = Histogram(
            "rorqual_worker_peer_read_seconds",
            "From a sequence's arrival to when it need not wait for other workers any more.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.call_seconds = Histogram(
            "rorqual_worker_lending_call_seconds",
            "A call to the worker that lends, by method.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages_overdue = Counter(
            "rorqual_worker_stages_overdue",
            "Deadlines of reads from other workers missed, by stage.",
            ["stage"],
            registry=registry,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class _Read:
    """What one sequence's task has out. Its import ends with the last of it."""

    item: Import
    tenant: TenantLabel
    peer: Peer | None = None
    source: Source | None = None
    offer: Offer | None = None  # of what has been read and proved
    is_broken: bool = False  # a read from the owner failed
    has_ended: bool = False  # the task has
    call_seconds: float = 0.0  # of the call that has leased the pages
    fetch_began: float = 0.0
    fetch: asyncio.Future[Fetched] | None = None


class PeerReader:
    def __init__(
        self, config: PeerReaderConfig, *, lenders: KeyLenders, clock: Clock, metrics: PeerReadMetrics
    ) -> None:
        self.config = config
        self._lenders = lenders
        self._clock = clock
        self._metrics = metrics
        self._host: HandlerHost | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._peers: Peers | None = None
        self._waiting: set[SequenceKey] = set()  # sequences that wait for their reads
        self._fetches: dict[int, _Read] = {}  # open on the rank
        self._next_fetch = 1
        self._num_releasing = 0
        self._stepped = asyncio.Event()

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
        return not (self._waiting or self._fetches or self._num_releasing)

    def attach(self, host: HandlerHost) -> None:
        self._host = host

    async def run(self) -> None:
        """Owns the tasks of all reads: an unexpected failure in one of them ends the worker."""
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

    def wants(self, command: Open) -> bool:
        """Whether the sequence is to wait for a read; `opened` follows then."""
        if command.fetch is None or self.host.scheduler.cache is None or self._tasks is None:
            return False
        if len(self._waiting) >= self.config.reads_max:
            self._metrics.reads.labels("too_many").inc()
            return False
        return True

    def opened(self, key: SequenceKey, command: Open) -> None:
        assert self._tasks is not None
        assert command.fetch is not None
        self._waiting.add(key)
        self._tasks.create_task(self._read(key, command, command.fetch))

    def turned(self) -> None:
        self._stepped.set()
        self._stepped = asyncio.Event()

    def take_from_rank(self, message: FromTransfer) -> None:
        match message:
            case PeerOpened():
                self.peers.opened(message)
            case FetchOverdue():
                pass  # the task has a deadline of its own; the memory is the rank's until the Fetched
            case Fetched():
                read = self._fetches.pop(message.fetch)
                self._metrics.bytes_read.inc(message.num_bytes)
                read.is_broken = read.is_broken or bool(message.error)
                if not message.error:
                    self._measure(read, message.num_bytes)
                if read.has_ended:
                    self._settle(read)
                elif read.fetch is not None and not read.fetch.done():
                    read.fetch.set_result(message)

    async def _read(self, key: SequenceKey, command: Open, fetch: PeerFetch) -> None:
        started = self._clock.monotonic()
        outcome = "overdue"
        try:
            async with asyncio.timeout(fetch.seconds_max):
                outcome = await self._bring(command, fetch)
        except TimeoutError:
            self._metrics.stages_overdue.labels("peer_read").inc()
        except LendingFailed as error:
            outcome = "overdue" if error.is_overdue else "failed"
            log.info(
                "failed to read a prefix %s",
                fields(request=command.request_id, worker=fetch.address, error=error),
            )
        self._metrics.reads.labels(outcome).inc()
        self._metrics.seconds.observe(self._clock.monotonic() - started)
        self._waiting.discard(key)
        self.host.enqueue(lambda: self.host.scheduler.fetched(key))

    async def _bring(self, command: Open, fetch: PeerFetch) -> str:
        """How it ended. Raises LendingFailed."""
        cache = self.host.scheduler.cache
        assert cache is not None
        keys = cache.keys_of(command.prompt, salt=command.cache_salt)[: min(fetch.num_pages, KEYS_MAX)]
        read: _Read | None = None

        def begin() -> None:
            nonlocal read
            item = self.host.scheduler.imports.begin(keys, with_record=fetch.wants_tail)
            read = None if item is None else _Read(item=item, tenant=tenant_label(command.cache_salt))

        try:
            # Cancelled while it waits, it may have begun all the same.
            await self._in_turn(begin)
            return "no_need" if read is None else await self._bring_into(read, fetch)
        finally:
            if read is not None:
                self._give_up(read)

    async def _bring_into(self, read: _Read, fetch: PeerFetch) -> str:
        item = read.item
        request = LeaseKeysRequest(
            wire_id=self.config.wire_id,
            keys=item.keys,
            first_page=item.first,
            wants_tail=item.record is not None,
        )
        called = self._clock.monotonic()
        with self._metrics.call_seconds.labels("lease_keys").time():
            offer = await self._lenders.lease_keys(
                fetch.address, request, seconds_max=self.config.call_seconds_max
            )
        read.call_seconds = self._clock.monotonic() - called
        if offer is None:
            return "gone"
        source = read.source = Source(address=fetch.address, lease=offer.lease, wire_id=offer.wire_id)
        self._check(offer, item)
        read.peer = await self.peers.get(source)
        await self._after(item.after)
        fetched = await self._fetch(read, offer)
        if fetched.error:
            raise LendingFailed(f"a read from {fetch.address} failed: {fetched.error}")
        with self._metrics.call_seconds.labels("renew").time():
            remaining = await self._lenders.renew(source, seconds_max=self.config.call_seconds_max)
        if remaining is None:
            raise LeaseEnded(f"the lease at {fetch.address} has ended")
        read.offer = offer
        self._metrics.pages_read.inc(len(offer.pages))
        return "read"

    def _check(self, offer: Offer, item: Import) -> None:
        """What cannot be meant. Raises LendingFailed."""
        if offer.wire_id != self.config.wire_id:
            raise LendingFailed(f"state has wire id {offer.wire_id}; this worker reads {self.config.wire_id}")
        if offer.first_page != item.first or len(offer.pages) > len(item.pages):
            raise LendingFailed(f"{len(offer.pages)} pages were offered from {offer.first_page} on")
        if len(offer.digests) != len(offer.pages) * self.config.num_page_components:
            raise LendingFailed(f"{len(offer.pages)} pages came with {len(offer.digests)} digests")
        record = offer.record
        if record is not None:
            depth, rest = divmod(record.num_tokens, PAGE_TOKENS)
            if item.record is None or rest or not 0 < depth <= item.first + len(offer.pages):
                raise LendingFailed(f"a tail behind {record.num_tokens} tokens was offered")

    async def _after(self, number: int) -> None:
        """Until no plan in flight uses the memory that will be written into."""
        while self.host.scheduler.last_applied < number:
            await self._stepped.wait()

    async def _fetch(self, read: _Read, offer: Offer) -> Fetched:
        item, record = read.item, None
        assert read.peer is not None
        if offer.record is not None:
            assert item.record is not None
            record = RecordFetch(
                source=offer.record.record,
                target=item.record,
                num_tokens=offer.record.num_tokens,
                num_bytes=offer.record.num_bytes,
                digest=offer.record.digest,
            )
        message = Fetch(
            fetch=self._next_fetch,
            peer=read.peer.number,
            seconds=min(self.config.transfer_seconds_max, offer.transfer_seconds),
            source_pages=offer.pages,
            target_pages=item.pages[: len(offer.pages)],
            digests=offer.digests,
            record=record,
        )
        self._next_fetch += 1
        read.fetch = asyncio.get_running_loop().create_future()
        self._fetches[message.fetch] = read
        read.fetch_began = self._clock.monotonic()
        self.host.send(message)
        return await read.fetch

    def _measure(self, read: _Read, num_bytes: int) -> None:
        """Also of one that came too late. To connect, and to wait for steps in flight, is not of the read."""
        speeds = self.host.scheduler.speeds
        seconds = read.call_seconds + self._clock.monotonic() - read.fetch_began
        speeds.observe(speeds.peer, num_bytes, seconds)

    def _give_up(self, read: _Read) -> None:
        """Its task ends: well or badly."""
        read.has_ended = True
        if read.source is not None:
            self._release(read.source)
        if not any(other is read for other in self._fetches.values()):
            self._settle(read)

    def _settle(self, read: _Read) -> None:
        """Nothing writes into its memory any more, and its task has ended."""
        if read.peer is not None:
            self.peers.put(read.peer, is_broken=read.is_broken)
            read.peer = None
        self.host.enqueue(lambda: self._end(read))

    def _end(self, read: _Read) -> None:
        """In the host's own task."""
        imports, item, offer = self.host.scheduler.imports, read.item, read.offer
        if offer is None:
            imports.end(item)
            return
        size = self.config.num_page_components
        record = offer.record
        imports.end(
            item,
            facts=[
                PageFacts(digests=offer.digests[at : at + size], tenant=read.tenant)
                for at in range(0, len(offer.digests), size)
            ],
            tail_depth=record.num_tokens // PAGE_TOKENS if record is not None else 0,
            packed=Packed(num_bytes=record.num_bytes, digest=record.digest) if record is not None else None,
        )

    def _release(self, source: Source) -> None:
        assert self._tasks is not None
        self._num_releasing += 1
        self._tasks.create_task(self._release_now(source))

    async def _release_now(self, source: Source) -> None:
        """When it fails the lease ends by itself a little later."""
        try:
            with self._metrics.call_seconds.labels("release").time():
                await self._lenders.release(source, seconds_max=self.config.call_seconds_max)
        except LendingFailed as error:
            log.info("failed to release a lease of keys %s", fields(worker=source.address, error=error))
        finally:
            self._num_releasing -= 1

    async def _in_turn(self, effect: Callable[[], None]) -> None:
        """Until `effect` has been called in the host's own task; when it is cancelled before, it is not."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def carry_out() -> None:
            if not done.done():
                effect()
                done.set_result(None)

        self.host.enqueue(carry_out)
        await done

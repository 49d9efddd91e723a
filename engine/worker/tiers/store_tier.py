"""A store below a worker's host memory: what lands there is written to it, and what a prompt lacks is read from it.

Made by `engine.worker.process`, owned by the host (`engine.worker.host`), which calls it in its own task. It moves
bytes between the rank's host memory, which it has mapped, and the store (`kvstore.store`); what is where and what is
worth reading is decided by the scheduler's pure parts (`engine.worker.tiers.host_tier`, `engine.worker.tiers.filling`).

A read never fails: it brings what it can before its deadline, then the prompt is computed from what there is, and what
comes later still enters host memory. A write is given to the store when the copy to host memory has landed, and the
place is held until then. A value is the bytes of a page or a tail and, behind them, what their readers must know:
digests and, of a tail, why it was taken, which is what its first writer took it for.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.worker.events import SequenceKey
from engine.worker.scheduler import Scheduler
from engine.worker.tiers.filling import Lack, Wish
from engine.worker.tiers.host_tier import Room
from engine.worker.tiers.store_metrics import StoreMetrics
from kvstore.keys import PageKey
from kvstore.shadow_radix import TailKind
from kvstore.store.contract import Kind, Store, StoreKey, TenantLabel
from kvstore.tiers import HostPage, HostTail
from kvstore.transfer.contract import ByteArray
from rorqual.clock import Clock

_TAIL_FACTS = struct.Struct("<QB")
TAIL_FACTS_BYTES = _TAIL_FACTS.size
_TAIL_KINDS = frozenset(TailKind)
DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTierConfig:
    num_page_components: int
    budget_seconds: float = 0.02  # that a prompt waits beyond the time that its bytes should take
    wait_seconds_max: float = 5.0  # that a prompt waits in all
    late_seconds: float = 1.0  # that a read goes on when nobody waits for it any more
    finish_seconds_max: float = 2.0  # for the last writes
    reads_max: int = 16  # prompts at once; beyond it they are computed
    read_bytes: int = 16 << 20  # of one round trip, after which its values are in host memory
    turn_bytes_max: int = 8 << 20  # given to the store by one turn of the host: two copies of them take 2 ms


class Flush(Protocol):
    async def __call__(self, *, seconds_max: float) -> bool:
        """Until everything given to the store is written or dropped; False: not within the time."""
        ...


class StoreHost(Protocol):
    @property
    def scheduler(self) -> Scheduler: ...

    def enqueue(self, effect: Callable[[], None]) -> None:
        """Carry `effect` out in the host's own task, soon."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class _Read:
    key: SequenceKey
    lack: Lack
    began: float  # of the loop's time
    deadline: asyncio.TimerHandle | None = None
    is_waited_for: bool = True
    seconds: float = 0.0  # that the store took so far
    num_bytes: int = 0  # that it gave, or did not give in its time
    task: asyncio.Task[None] | None = field(default=None)


class StoreTier:
    """`pages` and `records` are the rank's host memory: uint8 [pages, bytes of a page], [records, bytes of the longest
    one]."""

    def __init__(
        self,
        config: StoreTierConfig,
        store: Store,
        *,
        pages: ByteArray,
        records: ByteArray,
        clock: Clock,
        metrics: StoreMetrics,
        run_store: Callable[[], Coroutine[Any, Any, None]],
        flush: Flush,
        reads: bool = True,
    ) -> None:
        """Without `reads` it writes only. `run_store` is the life of the store, which this owns."""
        self.config = config
        self._store = store
        self._pages = pages
        self._records = records
        self._clock = clock
        self._metrics = metrics
        self._run_store = run_store
        self._flush = flush
        self._does_read = reads
        self._host: StoreHost | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._reads: set[_Read] = set()
        self._stepped = asyncio.Event()
        self.num_pages_read = 0  # so far, for prompts
        self.num_pages_missed = 0  # asked for and not there, or not in time

    @property
    def host(self) -> StoreHost:
        assert self._host is not None
        return self._host

    @property
    def is_idle(self) -> bool:
        tier = self.host.scheduler.host_tier
        return not self._reads and (tier is None or not tier.num_held)

    def attach(self, host: StoreHost) -> None:
        self._host = host
        tier = host.scheduler.host_tier
        if tier is not None:
            self._metrics.not_held.set_function(lambda: float(tier.num_not_held))
            self._metrics.held.set_function(lambda: float(tier.num_held))

    async def run(self) -> None:
        """Owns all reads. Ends only by being cancelled, or with an unexpected failure of one of them."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self._run_store())
            try:
                await asyncio.Event().wait()
            finally:
                self._tasks = None
                for read in self._reads:
                    self._disarm(read)

    async def finish(self) -> None:
        """The worker is about to end: what its sequences have left behind is written, within a bound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.finish_seconds_max):
                while not (self.host.scheduler.is_idle and self.is_idle):
                    await self._stepped.wait()
                await self._flush(seconds_max=self.config.finish_seconds_max)

    def wants(self) -> bool:
        """Whether a sequence that is about to be opened waits for the store: `opened` follows then."""
        if not self._does_read or self._tasks is None or self.host.scheduler.filling is None:
            return False
        if len(self._reads) >= self.config.reads_max:
            self._metrics.reads.labels("too_many").inc()
            return False
        return True

    def opened(self, key: SequenceKey, *, num_pages_coming: int) -> None:
        """So many of its first pages are read from another worker meanwhile."""
        scheduler = self.host.scheduler
        assert scheduler.filling is not None
        assert self._tasks is not None
        lack = scheduler.filling.lack(key, num_pages_coming=num_pages_coming)
        if lack is None:
            scheduler.fetched(key)
            return
        loop = asyncio.get_running_loop()
        read = _Read(key=key, lack=lack, began=loop.time())
        seconds = self._wait_seconds(read, num_bytes=1, num_tokens=lack.num_tokens)
        read.deadline = loop.call_later(seconds, self._release, read, "overdue")
        self._reads.add(read)
        read.task = self._tasks.create_task(self._bring(read))

    def turned(self) -> None:
        """Something landed, perhaps: give it to the store, as much as one turn may."""
        self._stepped.set()
        self._stepped = asyncio.Event()
        scheduler = self.host.scheduler
        tier = scheduler.host_tier
        if tier is None:
            return
        room, has_written = self.config.turn_bytes_max, False
        while room > 0 and (item := tier.next_landed()) is not None:
            room -= self._write(item)
            tier.written(item)
            has_written = True
        # Copies may have waited for the places that are free now, and no result need be on its way that would bring
        # the next turn. Not from here: others must have theirs in between.
        if room <= 0 or (has_written and not scheduler.is_idle):
            asyncio.get_running_loop().call_soon(self.host.enqueue, _nothing)

    def _write(self, item: HostPage | HostTail) -> int:
        """Bytes copied."""
        if isinstance(item, HostPage):
            assert item.digests is not None, "a page of which nothing is known is held"
            body = self._pages[item.page].data
            facts = struct.pack(f"<{len(item.digests)}Q", *item.digests)
            kind = Kind.PAGE
        else:
            body = self._records[item.record, : item.num_bytes].data
            facts = _TAIL_FACTS.pack(item.digest, item.kind)
            kind = Kind.TAIL
        value = b"".join((body, facts))
        if not self._store.write(StoreKey(kind, item.tenant, item.key), value):
            self._metrics.not_written.labels("queue_full").inc()
        return len(value)

    async def _bring(self, read: _Read) -> None:
        outcome = "absent"
        try:
            wish = await self._ask(read)
            if wish is not None:
                self._extend(read, wish)
                outcome = await self._read(read, wish)
        finally:
            self._reads.discard(read)
            if not read.num_bytes and not read.is_waited_for:
                read.num_bytes = self._pages.shape[1]  # whatever it is that did not come in time
            speeds = self.host.scheduler.speeds
            speeds.observe(speeds.store, read.num_bytes, read.seconds)
            self._release(read, outcome)

    async def _ask(self, read: _Read) -> Wish | None:
        """What of what the store has is worth reading."""
        lack = read.lack
        pages = [StoreKey(Kind.PAGE, lack.tenant, key) for key in lack.page_keys]
        tails = [StoreKey(Kind.TAIL, lack.tenant, key) for key in lack.tail_keys]
        seconds = self._seconds_left(read) + self.config.late_seconds
        began = self._clock.monotonic()
        present = await self._store.contains([*pages, *tails], budget_seconds=seconds)
        read.seconds += self._clock.monotonic() - began
        self.num_pages_missed += sum(not is_there for is_there in present[: len(pages)])
        has = [key for key, is_there in zip([*pages, *tails], present, strict=True) if is_there]
        if not has:
            return None
        found: Wish | None = None

        def wish() -> None:
            nonlocal found
            filling = self.host.scheduler.filling
            assert filling is not None
            found = filling.wish(
                read.key,
                lack,
                pages={key.page for key in has if key.kind is Kind.PAGE},
                tails={key.page for key in has if key.kind is Kind.TAIL},
            )

        await self._in_turn(wish)
        return found

    def _extend(self, read: _Read, wish: Wish) -> None:
        """The sequence waits on: it is known now for how much."""
        if not read.is_waited_for:
            return
        num_bytes = len(wish.pages) * self._pages.shape[1] + (wish.tail is not None) * self._records.shape[1]
        seconds = self._wait_seconds(read, num_bytes=num_bytes, num_tokens=wish.num_tokens_saved)
        self._disarm(read)
        loop = asyncio.get_running_loop()
        read.deadline = loop.call_at(read.began + seconds, self._release, read, "overdue")

    def _wait_seconds(self, read: _Read, *, num_bytes: int, num_tokens: int) -> float:
        """That a sequence waits: a little longer than its bytes should take, and never longer than computing would.
        Nobody waits longer than that little for a store that is only tried."""
        config, speeds = self.config, self.host.scheduler.speeds
        if read.lack.is_probe:
            return config.budget_seconds
        return min(
            config.budget_seconds + float(speeds.store.speed.seconds(num_bytes)),
            speeds.compute_seconds(num_tokens),
            config.wait_seconds_max,
        )

    async def _read(self, read: _Read, wish: Wish) -> str:
        """Pages in their order, a bounded number of bytes at a time; the tail comes with the last of them. What is not
        here `late_seconds` after the deadline is not asked for any more."""
        each = max(1, self.config.read_bytes // self._pages.shape[1])
        parent, num_read = wish.parent, 0
        parts = [wish.pages[at : at + each] for at in range(0, len(wish.pages), each)] or [()]
        for part in parts:
            tail = wish.tail if part is parts[-1] else None
            num_wanted = len(part) + (tail is not None)
            num_got = await self._read_part(read, part, tail, parent=parent)
            num_read += num_got
            if num_got < num_wanted:
                return "part" if num_read else "missed"
            parent = part[-1] if part else parent
        if read.is_waited_for:
            self._metrics.tokens_saved.inc(wish.num_tokens_saved)
        return "read"

    async def _read_part(
        self, read: _Read, pages: Sequence[PageKey], tail: PageKey | None, *, parent: PageKey
    ) -> int:
        """How many values came, those behind a page that is missing not counted."""
        tenant = read.lack.tenant
        keys = [StoreKey(Kind.PAGE, tenant, key) for key in pages]
        keys += [StoreKey(Kind.TAIL, tenant, tail)] if tail is not None else []
        began = self._clock.monotonic()
        seconds = self._seconds_left(read) + self.config.late_seconds
        if seconds <= 0:
            self.num_pages_missed += len(pages)
            return 0
        values = await self._store.read(keys, budget_seconds=seconds)
        taken = self._clock.monotonic() - began
        read.seconds += taken
        read.num_bytes += sum(len(value) for value in values if value is not None)
        if taken >= 0.99 * seconds:
            # What has not come takes that long at least. Before its time is over, it is not there, and says nothing.
            read.num_bytes += sum(value is None for value in values) * self._pages.shape[1]
        found = [self._page(value) for value in values[: len(pages)]]
        num_pages = next((at for at, value in enumerate(found) if value is None), len(pages))
        self.num_pages_read += num_pages
        self.num_pages_missed += len(pages) - num_pages
        its_tail = self._tail(values[-1]) if tail is not None and num_pages == len(pages) else None
        if not num_pages and its_tail is None:
            return 0
        if tail is not None and not pages:
            await self._until_its_page_came(read, tail)
        room: Room | None = None

        def reserve() -> None:
            nonlocal room
            tier = self.host.scheduler.host_tier
            assert tier is not None
            room = tier.reserve(num_pages, with_record=its_tail is not None)

        try:
            await self._in_turn(reserve)
            assert room is not None
            await self._after(room.after)
        except asyncio.CancelledError:
            self._give_back(room)
            raise
        whole = [item for item in found[:num_pages] if item is not None]
        return await self._fill(room, pages, whole, tail, its_tail, parent=parent, tenant=tenant)

    async def _until_its_page_came(self, read: _Read, tail: PageKey) -> None:
        """A tail read alone may be here sooner than its page, which another worker gives: before it the tail is of no
        use. The sequence waits for that page anyway, and its reader has a deadline."""
        filling = self.host.scheduler.filling
        assert filling is not None
        while filling.awaits_page(read.key, tail, num_other_reads=int(read.is_waited_for)):
            self._disarm(read)  # what it waits for is not the store any more
            await self._stepped.wait()

    async def _fill(
        self,
        room: Room,
        keys: Sequence[PageKey],
        pages: list[_Page],
        tail_key: PageKey | None,
        tail: _Tail | None,
        *,
        parent: PageKey,
        tenant: TenantLabel,
    ) -> int:
        num_filled, is_filled = 0, False

        def fill() -> None:
            nonlocal num_filled, is_filled
            is_filled = True
            tier = self.host.scheduler.host_tier
            assert tier is not None
            cache = self.host.scheduler.cache
            assert cache is not None
            costs = cache.config.costs
            before = parent
            for number, key, (body, digests) in zip(room.pages, keys, pages, strict=False):
                self._pages[number] = body
                tier.index.admit_page(
                    HostPage(
                        key=key,
                        parent=before,
                        page=number,
                        digests=digests,
                        stamp=0,
                        hits=0,
                        worth=1.0,
                        tenant=tenant,
                    )
                )
                before = key
                num_filled += 1  # or it has come another way meanwhile
            if room.record is None or tail is None or tail_key is None:
                return
            body, digest, kind = tail
            self._records[room.record, : len(body)] = body
            tier.index.admit_tail(
                HostTail(
                    key=tail_key,
                    record=room.record,
                    kind=kind,
                    num_bytes=len(body),
                    digest=digest,
                    stamp=0,
                    hits=0,
                    worth=costs.rebuild_pages * costs.page_bytes / costs.tail_bytes,
                    tenant=tenant,
                )
            )
            num_filled += tier.index.state(tail_key)[1]

        try:
            await self._in_turn(fill)
        except asyncio.CancelledError:
            if not is_filled:
                self._give_back(room)
            raise
        return num_filled

    def _give_back(self, room: Room | None) -> None:
        """The worker ends, and nothing else does: a read is cancelled with it alone."""
        tier = self.host.scheduler.host_tier
        if room is None or tier is None:
            return
        for page in room.pages:
            tier.index.give_back_page(page)
        if room.record is not None:
            tier.index.give_back_tail(room.record)

    def _page(self, value: memoryview | None) -> _Page | None:
        """Its bytes and digests. None for what is none, though its digest is right: another version has written it."""
        num_digests, num_bytes = self.config.num_page_components, self._pages.shape[1]
        if value is None or len(value) != num_bytes + num_digests * DIGEST_BYTES:
            return None
        return value[:num_bytes], struct.unpack_from(f"<{num_digests}Q", value, num_bytes)

    def _tail(self, value: memoryview | None) -> _Tail | None:
        if value is None or not TAIL_FACTS_BYTES < len(value) <= self._records.shape[1] + TAIL_FACTS_BYTES:
            return None
        body = value[:-TAIL_FACTS_BYTES]
        digest, kind = _TAIL_FACTS.unpack_from(value, len(body))
        return (body, digest, TailKind(kind)) if kind in _TAIL_KINDS else None

    def _seconds_left(self, read: _Read) -> float:
        """Below 0: it is overdue."""
        assert read.deadline is not None
        return read.deadline.when() - asyncio.get_running_loop().time()

    def _release(self, read: _Read, outcome: str) -> None:
        """The sequence need not wait any more."""
        self._disarm(read)
        if not read.is_waited_for:
            return
        read.is_waited_for = False
        self._metrics.reads.labels(outcome).inc()
        self._metrics.wait_seconds.observe(asyncio.get_running_loop().time() - read.began)
        self.host.enqueue(lambda: self.host.scheduler.fetched(read.key))

    def _disarm(self, read: _Read) -> None:
        if read.deadline is not None:
            read.deadline.cancel()

    async def _after(self, number: int) -> None:
        """Until no plan in flight copies from or to the memory that will be written."""
        while self.host.scheduler.last_applied < number:
            await self._stepped.wait()

    async def _in_turn(self, effect: Callable[[], None]) -> None:
        """Until `effect` has been called in the host's own task; when it is cancelled before, it is not."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def carry_out() -> None:
            if not done.done():
                effect()
                done.set_result(None)

        self.host.enqueue(carry_out)
        await done


_Page = tuple[memoryview, tuple[int, ...]]
_Tail = tuple[memoryview, int, TailKind]


def _nothing() -> None:
    pass

"""Ways to have a prefix of the prompt on a rank's device and its next token: computed, or brought back from one source.

For `bench.restore`. Every way ends with the token behind the prefix, which must be the one that computing gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from bench.restore.ranks import Prefixes, Rank, copies
from engine.worker.tiers.speeds import Speeds
from kvstore.keys import PageKey
from kvstore.store.contract import NO_TENANT, Kind, StoreKey
from kvstore.store.embedded import EmbeddedServer
from kvstore.store.redis_store import RedisStore, StoreConfig
from kvstore.store.value import Form
from kvstore.transfer.contract import ByteArray
from rorqual.clock import SystemClock
from rorqual.errors import RorqualError
from rorqual.performance.sources import MeasuredSpeed

COMPUTE = "compute"
STORE_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One time. `read_seconds` are those of the source alone, without the step that goes on from there."""

    seconds: float
    read_seconds: float
    num_bytes: int
    token: int


class Way(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def speeds(self) -> Speeds:
        """Measured by these reads, as a worker does."""
        ...

    @property
    def path(self) -> tuple[MeasuredSpeed, ...]:
        """What its bytes pass; empty of computing."""
        ...

    async def take(self, num_pages: int) -> Taken: ...


class Compute:
    """In chunks, as served."""

    name = COMPUTE

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    @property
    def speeds(self) -> Speeds:
        return self._rank.speeds

    @property
    def path(self) -> tuple[MeasuredSpeed, ...]:
        return ()

    async def take(self, num_pages: int) -> Taken:
        began = time.perf_counter()
        computed = await self._rank.compute(num_pages)
        seconds = time.perf_counter() - began
        await self._rank.end()
        return Taken(seconds=seconds, read_seconds=0.0, num_bytes=0, token=computed.token)


class FromHost:
    """Copied from the rank's own host memory by a plan, which begins there."""

    name = "host"

    def __init__(self, rank: Rank, prefixes: Prefixes) -> None:
        self._rank = rank
        self._prefixes = prefixes

    @property
    def speeds(self) -> Speeds:
        return self._rank.speeds

    @property
    def path(self) -> tuple[MeasuredSpeed, ...]:
        return (self.speeds.host,)

    async def take(self, num_pages: int) -> Taken:
        tail = self._prefixes.tails[num_pages]
        began = time.perf_counter()
        wanted = copies(
            [(page, page) for page in range(num_pages)],
            tail,
            record=spare_record(self._prefixes),
            host_record=tail.record,
        )
        result = await self._rank.begin(num_pages, spare_record(self._prefixes), promote=wanted)
        seconds = time.perf_counter() - began
        await self._rank.end()
        return Taken(
            seconds=seconds,
            read_seconds=result.copy_ms / 1000,
            num_bytes=num_pages * self._rank.ready.page_bytes + tail.num_bytes,
            token=result.sampled[0].token_id,
        )


class FromPeer:
    """Read out of another rank's device memory and checked, then begun from. Without the calls between hosts that lease
    the pages: `bench.lending_calls`."""

    def __init__(self, name: str, rank: Rank, prefixes: Prefixes) -> None:
        """`prefixes` are the other rank's, to which this one is connected."""
        self.name = name
        self._rank = rank
        self._prefixes = prefixes

    @property
    def speeds(self) -> Speeds:
        return self._rank.speeds

    @property
    def path(self) -> tuple[MeasuredSpeed, ...]:
        return (self.speeds.peer,)

    async def take(self, num_pages: int) -> Taken:
        rank, tail, record = self._rank, self._prefixes.tails[num_pages], spare_record(self._prefixes)
        began = time.perf_counter()
        fetched = await rank.fetch(num_pages, tail, self._prefixes.digests, record=record)
        read = time.perf_counter() - began
        result = await rank.begin(num_pages, record)
        seconds = time.perf_counter() - began
        await rank.end()
        rank.speeds.observe(rank.speeds.peer, fetched.num_bytes, read)
        return Taken(
            seconds=seconds,
            read_seconds=read,
            num_bytes=fetched.num_bytes,
            token=result.sampled[0].token_id,
        )


class FromStore:
    """Asked for and read over the server's protocol, checked, put into host memory, then as from there."""

    name = "store"

    def __init__(
        self, rank: Rank, prefixes: Prefixes, store: RedisStore, *, memory: tuple[ByteArray, ByteArray]
    ) -> None:
        self._rank = rank
        self._prefixes = prefixes
        self._store = store
        self._pages, self._records = memory
        self._first = len(prefixes.digests) // rank.ready.num_page_components  # host page of what is read

    @property
    def speeds(self) -> Speeds:
        return self._rank.speeds

    @property
    def path(self) -> tuple[MeasuredSpeed, ...]:
        return (self.speeds.store, self.speeds.host)

    async def fill(self) -> None:
        """Write all that host memory has of the prompt. Raises RorqualError."""
        for page in range(self._first):
            self._store.write(_key(Kind.PAGE, page), self._pages[page].data)
        for tail in self._prefixes.tails.values():
            self._store.write(
                _key(Kind.TAIL, tail.num_pages), self._records[tail.record, : tail.num_bytes].data
            )
        if not await self._store.flush(seconds_max=STORE_SECONDS_MAX):
            raise RorqualError("the store did not take what was written in time")

    async def take(self, num_pages: int) -> Taken:
        rank, tail, spare = self._rank, self._prefixes.tails[num_pages], spare_record(self._prefixes)
        keys = [*(_key(Kind.PAGE, page) for page in range(num_pages)), _key(Kind.TAIL, num_pages)]
        began = time.perf_counter()
        present = await self._store.contains(keys, budget_seconds=STORE_SECONDS_MAX)
        values = await self._store.read(keys, budget_seconds=STORE_SECONDS_MAX)
        asked = time.perf_counter() - began
        found = [value for value in values if value is not None]
        if not all(present) or len(found) < len(keys):
            raise RorqualError("the store has lost what was written to it")
        for at, value in enumerate(found[:-1]):
            self._pages[self._first + at] = value
        self._records[spare, : tail.num_bytes] = found[-1]
        read = time.perf_counter() - began
        wanted = copies(
            [(page, self._first + page) for page in range(num_pages)], tail, record=spare, host_record=spare
        )
        result = await rank.begin(num_pages, spare, promote=wanted)
        seconds = time.perf_counter() - began
        await rank.end()
        num_bytes = sum(len(value) for value in found)
        rank.speeds.observe(rank.speeds.store, num_bytes, asked)
        return Taken(
            seconds=seconds, read_seconds=read, num_bytes=num_bytes, token=result.sampled[0].token_id
        )


def spare_record(prefixes: Prefixes) -> int:
    """One that holds no tail of the prompt."""
    return len(prefixes.tails)


@asynccontextmanager
async def running_store(rank: Rank) -> AsyncGenerator[RedisStore]:
    """Over a server of its own, in this machine's memory. Raises RorqualError."""
    ready = rank.ready
    with EmbeddedServer(memory_bytes=1 << 30) as server:
        config = StoreConfig(
            url=server.url,
            form=Form(ready.wire_id, ready.model_fingerprint),
            page_bytes=ready.page_bytes,
            tail_bytes_max=ready.record_bytes,
        )
        store = RedisStore(config, clock=SystemClock())
        task = asyncio.create_task(store.run())
        try:
            for _ in range(1000):
                if store.state.breakers:
                    break  # it knows its server
                await asyncio.sleep(0.01)
            yield store
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def prepare(rank: Rank, lengths: Sequence[int]) -> Prefixes:
    """The longest prompt computed, tails behind every length, and all of it in host memory too."""
    computed = await rank.compute(lengths[-1], tails=lengths, lend=True)
    await rank.end()
    prefixes = computed.prefixes()
    assert tuple(prefixes.tails) == tuple(lengths), "a tail is missing"
    for tail in prefixes.tails.values():
        pages = [(page, page) for page in range(tail.num_pages)]
        await rank.demote(copies(pages, tail, record=tail.record, host_record=tail.record))
    return prefixes


def _key(kind: Kind, number: int) -> StoreKey:
    return StoreKey(kind, NO_TENANT, PageKey(hashlib.sha256(b"%d" % number).digest()[:16]))

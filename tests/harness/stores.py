"""Stores for tests: of one wire id, over real servers; and what may be left when one is gone: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from kvstore.keys import PageKey
from kvstore.store.contract import Kind, StoreKey, tenant_label
from kvstore.store.health import HealthConfig
from kvstore.store.names import value_name
from kvstore.store.redis_store import RedisStore, StoreConfig
from kvstore.store.value import Form
from rorqual.clock import Clock, SystemClock

FORM = Form("00112233445566aa", "a-model")
PAGE_BYTES = 20_000
BUDGET = 5.0
"""Seconds: for reads that must not miss on a busy machine."""

HEALTH = HealthConfig(backoff_seconds=0.02, backoff_seconds_max=0.1, full_seconds=0.1, full_seconds_max=0.4)


def page_key(number: int, *, kind: Kind = Kind.PAGE, salt: str = "") -> StoreKey:
    return StoreKey(kind, tenant_label(salt), PageKey(hashlib.sha256(b"%d" % number).digest()[:16]))


def payload(number: int, num_bytes: int = PAGE_BYTES) -> bytes:
    return hashlib.shake_128(b"payload %d" % number).digest(num_bytes)


def name(key: StoreKey) -> bytes:
    return value_name(FORM.wire_id, key)


def make_store(url: str, *, clock: Clock | None = None, **changes: Any) -> RedisStore:
    config = StoreConfig(url=url, form=FORM, page_bytes=PAGE_BYTES, tail_bytes_max=PAGE_BYTES, health=HEALTH)
    return RedisStore(replace(config, **changes), clock=clock or SystemClock())


@contextlib.asynccontextmanager
async def running(url: str, *, is_up: bool = True, **changes: Any) -> AsyncIterator[RedisStore]:
    """A store that runs. At the end nothing of it may be left: no task, no connection, no byte in flight."""
    before = asyncio.all_tasks()
    store = make_store(url, **changes)
    task = asyncio.create_task(store.run())
    try:
        await asyncio.sleep(0.01)
        if is_up:
            await eventually(lambda: store.state.connections > 0 and bool(store.state.breakers))
        yield store
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert store.state.bytes_in_flight == 0
    assert store.state.connections == 0
    await eventually(lambda: asyncio.all_tasks() <= before)


async def write_all(store: RedisStore, keys: Sequence[StoreKey]) -> None:
    for number, key in enumerate(keys):
        assert store.write(key, payload(number))
    assert await store.flush(seconds_max=20)


async def timed_read(
    store: RedisStore, keys: Sequence[StoreKey], *, budget_seconds: float, slack_seconds: float = 0.25
) -> list[memoryview | None]:
    """A read that must keep to its budget, not counting what the machine takes away from this whole process."""
    loop = asyncio.get_running_loop()
    stolen = 0.0

    async def watch() -> None:
        nonlocal stolen
        while True:
            began, used = loop.time(), time.process_time()
            await asyncio.sleep(0.005)
            stolen += max(0.0, loop.time() - began - 0.005 - (time.process_time() - used))

    watching = asyncio.create_task(watch())
    try:
        began = loop.time()
        got = await store.read(keys, budget_seconds=budget_seconds)
        seconds = loop.time() - began
        await asyncio.sleep(0.01)  # so that the watch has seen the end of it
    finally:
        watching.cancel()
    spent = f"a read with a budget of {budget_seconds} s took {seconds:.3f} s, {stolen:.3f} of them stolen"
    assert seconds - stolen < budget_seconds + slack_seconds, spent
    return got


async def eventually(is_so: Callable[[], bool], *, seconds_max: float = 20) -> None:
    async with asyncio.timeout(seconds_max):
        while not is_so():
            await asyncio.sleep(0.005)


async def eventually_true(ask: Callable[[], Awaitable[bool]], *, seconds_max: float = 20) -> None:
    async with asyncio.timeout(seconds_max):
        while not await ask():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def client(url: str) -> AsyncIterator[Redis]:
    """redis-py's own, to look at a server and to spoil what stands there."""
    redis = Redis.from_url(url)
    try:
        yield redis
    finally:
        await redis.aclose()

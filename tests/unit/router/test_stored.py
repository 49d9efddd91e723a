"""What a store has of a prompt: searched in few questions, found in a real server, and not waited for where it is lost,
frozen or slow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from kvstore.keys import PageKey
from kvstore.store.contract import Kind, StoreKey, tenant_label
from kvstore.store.embedded import EmbeddedServer
from kvstore.store.finder import StoreFinder
from rorqual.clock import SystemClock
from router.fleet_metrics import StoreMetrics
from router.picture import Found
from router.placement.least_wait import NOTHING_STORED, Stored
from router.stored import DEADLINE_SECONDS, Search, StoreKnowledge
from tests.harness.stores import FORM, eventually, make_store, payload, running

REBUILD_PAGES = 3
SALT = "somebody"
CHAIN = tuple(PageKey(number.to_bytes(16, "big")) for number in range(1, 41))
SLACK = 0.25
"""Seconds: of a machine that does other things."""


def carry_out(search: Search, pages: set[int], tails: set[int], *, keys_max: int) -> tuple[Stored, int]:
    num_rounds = 0
    while search.found is None:
        asked = search.next_round()
        assert len(asked.pages) + len(asked.tails) <= keys_max
        num_rounds += 1
        assert num_rounds < 20, "a search does not end"
        search.take(asked, [d in pages for d in asked.pages], [d in tails for d in asked.tails])
    return search.found, num_rounds


@settings(max_examples=300)
@given(
    num_pages=st.integers(1, 3000),
    best=st.floats(0, 1),
    reach=st.floats(0, 1),
    has_front=st.booleans(),
    rebuild_pages=st.integers(1, 400),
    tails=st.sets(st.integers(1, 3000), max_size=30),
    keys_max=st.sampled_from([32, 64, 256]),
)
def test_a_search_finds_how_far_pages_go_and_the_deepest_tail_of_use(
    num_pages: int,
    best: float,
    reach: float,
    has_front: bool,
    rebuild_pages: int,
    tails: set[int],
    keys_max: int,
) -> None:
    num_best = int(best * num_pages)
    end = num_best + int(reach * (num_pages - num_best))
    pages = set(range(1 if has_front else num_best + 1, end + 1))
    search = Search(num_pages=num_pages, num_best=num_best, rebuild_pages=rebuild_pages, keys_max=keys_max)
    found, num_rounds = carry_out(search, pages, tails, keys_max=keys_max)
    first = 0 if has_front or not num_best else num_best
    of_use = {depth for depth in tails if end - min(rebuild_pages, keys_max // 2) < depth <= end}
    if found == NOTHING_STORED:
        assert end == first
        assert not of_use
    else:
        assert (found.first, found.pages) == (first, end)
        if of_use:
            assert found.tail == max(of_use)
        assert found.tail == 0 or found.tail in tails
    assert num_rounds <= (2 if keys_max == 64 and rebuild_pages <= 22 and num_pages <= 400 else 8)


def test_a_short_prompt_is_searched_in_one_round() -> None:
    search = Search(num_pages=100, num_best=20, rebuild_pages=22, keys_max=256)
    found, num_rounds = carry_out(search, set(range(1, 91)), {60, 85}, keys_max=256)
    assert (found, num_rounds) == (Stored(first=0, pages=90, tail=85), 1)


class Fleet:
    """A picture of one worker that has the first pages of everything."""

    def __init__(self, num_pages: int = 0, tail: int = 0) -> None:
        pages, tails = np.array([num_pages], np.int32), np.array([tail], np.int32)
        self._found = Found(
            pages_W=pages, tail_W=tails, device_pages_W=pages, device_tail_W=tails, num_pages=num_pages
        )

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        return self._found


@pytest.fixture
def start_server() -> Iterator[Callable[[], EmbeddedServer]]:
    with contextlib.ExitStack() as servers:
        yield lambda: servers.enter_context(EmbeddedServer(memory_bytes=64 << 20))


@contextlib.asynccontextmanager
async def asking(
    url: str, fleet: Fleet | None = None, *, is_up: bool = True, **options: Any
) -> AsyncIterator[tuple[StoreKnowledge, StoreFinder, CollectorRegistry]]:
    registry = CollectorRegistry()
    finder = StoreFinder(url, clock=SystemClock())
    knowledge = StoreKnowledge(
        finder,
        caches=fleet or Fleet(),
        rebuild_pages=REBUILD_PAGES,
        metrics=StoreMetrics(registry),
        **options,
    )
    task = asyncio.create_task(knowledge.run())
    try:
        if is_up:
            await eventually(lambda: finder.num_connections > 0)
        yield knowledge, finder, registry
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert finder.num_connections == 0


def outcomes(registry: CollectorRegistry) -> dict[str, float]:
    names = ("found", "absent", "unknown")
    counts = {
        name: registry.get_sample_value("rorqual_router_store_questions_total", {"outcome": name})
        for name in names
    }
    return {name: count for name, count in counts.items() if count}


async def fill(url: str, *, pages: range, tails: Sequence[int], salt: str = SALT) -> None:
    async with running(url) as store:
        for kind, depths in ((Kind.PAGE, pages), (Kind.TAIL, tails)):
            for depth in depths:
                key = StoreKey(kind, tenant_label(salt), CHAIN[depth - 1])
                assert store.write(key, payload(depth, 100))
        assert await store.flush(seconds_max=20)


PATIENT = {"deadline_seconds": 5.0}


async def test_what_a_workers_store_has_is_found_by_a_router(start_server) -> None:
    url = start_server().url
    await fill(url, pages=range(1, 31), tails=[12, 29])
    keys = {FORM.wire_id: CHAIN}
    async with asking(url, **PATIENT) as (store, _, registry):
        assert await store.ask(keys, salt=SALT) == Stored(first=0, pages=30, tail=29)
        assert await store.ask(keys, salt="somebody else") == NOTHING_STORED
        assert await store.ask({"0011223344556677": CHAIN}, salt=SALT) == NOTHING_STORED
        assert outcomes(registry) == {"found": 1, "absent": 2}
    async with asking(url, Fleet(num_pages=20), **PATIENT) as (store, _, _):
        assert await store.ask(keys, salt=SALT) == Stored(first=0, pages=30, tail=29)


async def test_a_store_that_has_only_what_was_evicted_says_where_it_begins(start_server) -> None:
    url = start_server().url
    await fill(url, pages=range(21, 31), tails=[30])
    async with asking(url, Fleet(num_pages=20), **PATIENT) as (store, _, _):
        assert await store.ask({FORM.wire_id: CHAIN}, salt=SALT) == Stored(first=20, pages=30, tail=30)


async def test_nothing_is_asked_where_the_fleet_has_nearly_all(start_server) -> None:
    async with asking(start_server().url, Fleet(num_pages=40, tail=37)) as (store, _, registry):
        assert await store.ask({FORM.wire_id: CHAIN}, salt=SALT) == NOTHING_STORED
        assert await store.ask({}, salt=SALT) == NOTHING_STORED
        assert outcomes(registry) == {}


async def timed(store: StoreKnowledge, count: int) -> list[float]:
    """Seconds of each question, none of which is answered."""
    seconds: list[float] = []
    for _ in range(count):
        began = time.monotonic()
        assert await store.ask({FORM.wire_id: CHAIN}, salt=SALT) == NOTHING_STORED
        seconds.append(time.monotonic() - began)
    return seconds


async def test_a_frozen_store_costs_a_few_deadlines_and_then_nothing(start_server) -> None:
    server = start_server()
    await fill(server.url, pages=range(1, 31), tails=[30])
    async with asking(server.url) as (store, finder, registry):
        os.kill(server.pid, signal.SIGSTOP)
        try:
            seconds = await timed(store, 60)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert max(seconds) < DEADLINE_SECONDS + SLACK
        assert sorted(seconds)[40] < DEADLINE_SECONDS / 2, "questions still wait for a frozen store"
        assert finder.counts.breakers_opened >= 1
        assert outcomes(registry) == {"unknown": 60}
        # And it is used again when it is back.
        async with asyncio.timeout(20):
            while not (await store.ask({FORM.wire_id: CHAIN}, salt=SALT)).pages:
                await asyncio.sleep(0.02)


async def test_a_store_that_is_not_there_costs_nothing(start_server) -> None:
    server = start_server()
    async with asking(server.url) as (store, _, registry):
        server.stop()
        seconds = await timed(store, 20)
        assert max(seconds) < DEADLINE_SECONDS + SLACK
        assert sorted(seconds)[15] < DEADLINE_SECONDS
        assert outcomes(registry) == {"unknown": 20}
    async with asking("redis://127.0.0.1:1", is_up=False) as (store, _, registry):
        await timed(store, 5)
        assert outcomes(registry) == {"unknown": 5}


async def test_before_it_runs_nothing_is_known() -> None:
    finder = StoreFinder("redis://127.0.0.1:1", clock=SystemClock())
    assert await finder.find(FORM.wire_id, [], budget_seconds=1.0) is None


def test_a_worker_and_a_router_mean_the_same_names() -> None:
    store = make_store("redis://user:secret@127.0.0.1:1")
    finder = StoreFinder("redis://user:secret@127.0.0.1:1", clock=SystemClock())
    assert store.address.shown == finder.address.shown
    assert "secret" not in f"{finder.address}{finder.address.shown}"

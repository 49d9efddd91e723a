"""A store over a server that is dead, frozen, full, locked, slow, or cut off in the middle of an answer."""

import asyncio
import contextlib
import os
import signal
import time

import pytest
from fake_proxy import FakeProxy

from kvstore.store.breaker import BreakerState
from kvstore.store.contract import Drop, Kind, Miss
from kvstore.store.embedded import EmbeddedServer
from kvstore.store.health import HealthConfig
from rorqual.clock import SystemClock
from tests.harness.stores import (
    BUDGET,
    HEALTH,
    PAGE_BYTES,
    client,
    eventually,
    eventually_true,
    page_key,
    payload,
    running,
    timed_read,
    write_all,
)

KEYS = [page_key(number) for number in range(12)]
SHORT = 0.05


def breaker(store):
    (state,) = store.state.breakers.values()
    return state


def through(proxy: FakeProxy, server: EmbeddedServer) -> str:
    return server.url.replace(f":{server.port}", f":{proxy.port}")


def num_sockets():
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(link.startswith("socket:") for link in links)


async def can_read(store, key=KEYS[0]):
    return await store.read([key], budget_seconds=1.0) == [payload(0)]


async def test_a_killed_server_costs_misses_and_is_found_again(start_server):
    server = start_server()
    async with running(server.url) as store:
        await write_all(store, KEYS)
        os.kill(server.pid, signal.SIGKILL)
        for _ in range(4):
            assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 12
        await eventually(lambda: breaker(store) is not BreakerState.CLOSED)
        assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 12
        assert store.counts.values_missed[Miss.DOWN] >= 12
        assert store.write(KEYS[0], payload(0))
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.values_dropped == {Drop.DOWN: 1}
        start_again(server)
        await eventually(lambda: breaker(store) is BreakerState.CLOSED)
        await write_all(store, KEYS[:1])
        assert await can_read(store)


def start_again(server: EmbeddedServer) -> None:
    """At the same port, with the same password, and empty."""
    server._wants_port = server.port
    server.stop()
    server.start()


class EarlyClock(SystemClock):
    """Beside it the event loop wakes too early: it passes half as fast."""

    def monotonic(self):
        return 0.5 * super().monotonic()


async def test_an_event_loop_that_wakes_too_early_harms_nobody(start_server):
    """uvloop does, by up to a millisecond."""
    server = start_server()
    async with running(server.url, clock=EarlyClock()) as store:
        await write_all(store, KEYS)
        os.kill(server.pid, signal.SIGKILL)
        while breaker(store) is BreakerState.CLOSED:
            await store.read(KEYS[:1], budget_seconds=BUDGET)
        await asyncio.sleep(0.2)  # for some probes that fail
        start_again(server)
        await eventually_true(lambda: _write_and_read(store))


async def test_no_server_at_the_start_costs_nothing_and_it_is_found_later(start_server):
    server = start_server()
    server.stop()
    async with running(server.url, is_up=False) as store:
        assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 12
        server._wants_port = server.port
        server.start()
        await eventually_true(lambda: _write_and_read(store))


async def _write_and_read(store):
    store.write(KEYS[0], payload(0))
    await store.flush(seconds_max=BUDGET)
    return await can_read(store)


async def test_a_frozen_server_costs_a_few_budgets_then_nothing(start_server):
    server = start_server()
    async with running(server.url) as store:
        await write_all(store, KEYS)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(HEALTH.failures_max):
                assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 12
            assert breaker(store) is not BreakerState.CLOSED
            began = time.monotonic()
            for _ in range(100):
                assert await store.read(KEYS, budget_seconds=SHORT) == [None] * 12
                assert await store.contains(KEYS, budget_seconds=SHORT) == [False] * 12
            assert time.monotonic() - began < 100 * SHORT / 4, "reads still wait for a frozen server"
            await eventually(lambda: store.state.bytes_in_flight == 0)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await eventually_true(lambda: can_read(store))


async def test_contains_opens_the_breaker_of_a_frozen_server_too(start_server):
    server = start_server()
    async with running(server.url) as store:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for _ in range(HEALTH.failures_max):
                assert await store.contains(KEYS, budget_seconds=SHORT) == [False] * 12
            assert breaker(store) is not BreakerState.CLOSED
        finally:
            os.kill(server.pid, signal.SIGCONT)


async def test_writes_to_a_frozen_server_are_dropped(start_server):
    server = start_server()
    health = HealthConfig(server_seconds_max=0.2, backoff_seconds=0.05, backoff_seconds_max=0.1)
    async with running(server.url, health=health, batch_bytes_max=2 * PAGE_BYTES) as store:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for number, key in enumerate(KEYS):
                store.write(key, payload(number))
            assert await store.flush(seconds_max=BUDGET)
            dropped = store.counts.values_dropped
            assert dropped[Drop.FAILED] + dropped[Drop.DOWN] == 12
            assert dropped[Drop.FAILED] <= 6, "the server was tried again and again"
            assert store.state.bytes_queued == 0
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await eventually(lambda: breaker(store) is BreakerState.CLOSED)
        await write_all(store, KEYS[:1])
        assert await can_read(store)


async def test_what_a_server_does_not_take_is_not_kept_for_it(server):
    large = 16 << 20  # more than fits into the buffers on the way
    health = HealthConfig(server_seconds_max=0.2)
    async with (
        FakeProxy(server.port) as proxy,
        running(through(proxy, server), page_bytes=large, health=health) as store,
    ):
        before = num_sockets()
        proxy.stall_on = b"\r\nSET\r\n"
        store.write(KEYS[0], payload(0, large))
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.values_dropped == {Drop.FAILED: 1}
        await eventually(lambda: num_sockets() < before)
        proxy.stall_on = None


async def test_a_full_server_pauses_writes_and_reads_go_on(start_server):
    server = start_server(settings={"maxmemory-policy": "noeviction"}, memory_bytes=4 << 20)
    keys = [page_key(number) for number in range(400)]
    async with running(server.url, batch_bytes_max=10 * PAGE_BYTES) as store:
        for number, key in enumerate(keys):
            store.write(key, payload(number))
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.error_replies["OOM"] >= 1
        assert store.counts.values_dropped[Drop.OUT_OF_MEMORY] >= 100
        assert store.counts.error_replies["OOM"] <= 20, "a full server was written to again and again"
        assert store.counts.write_pauses == 1
        assert breaker(store) is BreakerState.CLOSED
        assert await timed_read(store, keys[:2], budget_seconds=BUDGET) == [payload(0), payload(1)]
        async with client(server.url) as redis:
            await redis.flushall()

        async def is_written():
            store.write(keys[399], payload(399))
            await store.flush(seconds_max=BUDGET)
            return await store.contains([keys[399]], budget_seconds=BUDGET) == [True]

        await eventually_true(is_written)


async def test_a_server_that_evicts_takes_everything(start_server):
    server = start_server(memory_bytes=4 << 20)
    keys = [page_key(number) for number in range(400)]
    async with running(server.url) as store:
        for number, key in enumerate(keys):
            store.write(key, payload(number))
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.values_written[Kind.PAGE] == 400
        got = await store.read(keys, budget_seconds=BUDGET)
        assert got[-1] == payload(399)
        assert None in got


@pytest.mark.parametrize("secret", ["wrong", None])
async def test_a_wrong_password_is_a_miss_and_is_said(server, secret, caplog):
    credentials = f":{secret}@" if secret else ""
    url = f"redis://{credentials}127.0.0.1:{server.port}"
    async with running(url, is_up=False) as store:
        for _ in range(4):
            assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 12
        await eventually(lambda: store.counts.servers_lost["authentication"] > 0)
        assert "wrong" not in caplog.text.replace("WRONGPASS", "")
        assert "refuses the user or password" in caplog.text


async def test_a_user_who_may_not_write_reads(server):
    async with client(server.url) as redis, running(server.url) as writer:
        await write_all(writer, KEYS[:1])
        await redis.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~rorqual:*", "+get", "+ping")
        async with running(f"redis://reader:pw@127.0.0.1:{server.port}") as store:
            assert await can_read(store)
            store.write(KEYS[1], payload(1))
            assert await store.flush(seconds_max=BUDGET)
            assert store.counts.error_replies["NOPERM"] >= 1
            assert store.counts.values_dropped == {Drop.FAILED: 1}
            assert breaker(store) is BreakerState.CLOSED


@pytest.mark.parametrize("cut_after", [0, 3, 100, PAGE_BYTES, PAGE_BYTES + 200, 3 * PAGE_BYTES])
async def test_a_reset_in_the_middle_of_an_answer_gives_what_came_before(server, cut_after):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server)) as store:
            proxy.cut_after = cut_after
            got = await timed_read(store, KEYS, budget_seconds=BUDGET)
            whole = cut_after // (PAGE_BYTES + 200)
            assert [value is not None for value in got] == [number < whole for number in range(12)]
            assert all(value is None or value == payload(number) for number, value in enumerate(got))
            assert store.counts.values_missed == {Miss.FAILED: 12 - whole}
            proxy.cut_after = None
            await eventually_true(lambda: can_read(store))


NONSENSE = {
    "http": b"HTTP/1.1 200 OK\r\n\r\n",
    "empty lines": b"\r\n",
    "no number": b"$x\r\n",
    "negative length": b"$-7\r\n",
    "array": b"*2\r\n:1\r\n",
    "error without words": b"-\r\n",
    "no lines": b"\xff" * 99,
    "arrays in arrays": b"*1\r\n" * 20_000,
    "redirection to nowhere": b"-MOVED x\r\n",
}


@pytest.mark.parametrize("kind", NONSENSE)
async def test_nonsense_from_a_server_is_never_believed(server, kind):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server)) as store:
            proxy.nonsense = NONSENSE[kind]
            for _ in range(2):
                assert await timed_read(store, KEYS[:3], budget_seconds=SHORT) == [None] * 3
                assert await store.contains(KEYS[:3], budget_seconds=SHORT) == [False] * 3
            store.write(KEYS[0], payload(0))
            proxy.nonsense = None
            await eventually_true(lambda: can_read(store))


async def test_few_large_values_are_asked_for_ahead(server):
    """Otherwise a server collects all of a batch in its memory, for a reader that may be gone."""
    large = 900_000
    async with (
        FakeProxy(server.port) as proxy,
        client(server.url) as redis,
        running(through(proxy, server), page_bytes=large) as store,
    ):
        for number, key in enumerate(KEYS):
            store.write(key, payload(number, large))
        assert await store.flush(seconds_max=BUDGET)
        got = await timed_read(store, KEYS, budget_seconds=BUDGET)
        assert got == [payload(number, large) for number in range(12)]
        before = (await redis.info("commandstats"))["cmdstat_get"]["calls"]
        proxy.is_silent = True
        assert await timed_read(store, KEYS, budget_seconds=0.2) == [None] * 12
        proxy.is_silent = False
        assert (await redis.info("commandstats"))["cmdstat_get"]["calls"] - before == 2


async def test_a_slow_server_gives_what_comes_within_the_budget(server):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server)) as store:
            proxy.bytes_per_second = 12 * PAGE_BYTES / 1.0
            got = await timed_read(store, KEYS, budget_seconds=0.5)
            came = [value is not None for value in got]
            assert came[0]
            assert not came[-1]
            assert came == sorted(came, reverse=True), "later ones came, earlier ones did not"
            assert store.counts.values_missed.keys() == {Miss.OVERDUE}
            assert store.counts.reads_overdue == 1
            proxy.bytes_per_second = None
            await eventually_true(lambda: can_read(store))


async def test_a_large_read_that_ends_with_its_budget_does_not_blame_a_server_at_work(server):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server)) as store:
            proxy.bytes_per_second = 12 * PAGE_BYTES / 1.0
            for _ in range(6):
                got = await timed_read(store, KEYS, budget_seconds=0.4)
                assert got[0] is not None
            assert breaker(store) is BreakerState.CLOSED


async def test_budgets_too_small_for_any_server_do_not_open_its_breaker(server):
    async with running(server.url) as store:
        await write_all(store, KEYS)
        for _ in range(20):
            await store.read(KEYS, budget_seconds=0.0)
        assert breaker(store) is BreakerState.CLOSED
        await eventually_true(lambda: can_read(store))


async def test_idle_connections_that_the_server_closed_are_not_used(server):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server)) as store:
            assert await can_read(store)
            for _ in range(5):
                proxy.reset_all()
                await eventually(lambda: proxy.num_open == 0)
                await asyncio.sleep(0.02)
                assert await can_read(store)
            assert store.counts.servers_lost == {}


async def test_given_up_reads_leave_no_connection_behind(server):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server), connections_max=2) as store:
            proxy.is_silent = True
            for _ in range(10):
                assert await timed_read(store, KEYS, budget_seconds=0.02) == [None] * 12
            proxy.is_silent = False
            await eventually_true(lambda: can_read(store))
            await eventually(lambda: proxy.num_open <= store.state.connections)
            assert store.state.connections <= 2


@pytest.mark.slow
async def test_under_all_kinds_of_harm_at_once_reads_are_right_or_misses(server):
    async with FakeProxy(server.port) as proxy, running(server.url) as writer:
        await write_all(writer, KEYS)
        async with running(through(proxy, server), read_bytes_max=6 * PAGE_BYTES) as store:
            ends = time.monotonic() + 4

            async def read_on(offset):
                hits = 0
                while time.monotonic() < ends:
                    got = await timed_read(store, KEYS[offset:], budget_seconds=0.03)
                    for number, value in enumerate(got, start=offset):
                        assert value is None or value == payload(number)
                    hits += len(got) - got.count(None)
                    await asyncio.sleep(0.002)
                return hits

            async def harm():
                step = 0
                while time.monotonic() < ends:
                    step += 1
                    proxy.cut_after = (None, 50_000, None, 7)[step % 4]
                    proxy.is_silent = step % 5 == 0
                    proxy.nonsense = b"*1\r\n" if step % 7 == 0 else None
                    if step % 6 == 0:
                        proxy.reset_all()
                    await asyncio.sleep(0.05)
                proxy.cut_after = proxy.nonsense = None
                proxy.is_silent = False

            async with asyncio.TaskGroup() as tasks:
                reads = [tasks.create_task(read_on(offset)) for offset in range(6)]
                tasks.create_task(harm())
            assert sum(read.result() for read in reads) > 0, "no read ever succeeded"
            await eventually(lambda: store.state.bytes_in_flight == 0)
            await eventually_true(lambda: can_read(store))

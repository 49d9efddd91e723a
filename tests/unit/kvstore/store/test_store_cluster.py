"""A store over a Cluster of three masters."""

import os
import signal
import time

import pytest
from fake_proxy import FakeProxy

from kvstore.store.admin import opened
from kvstore.store.breaker import BreakerState
from kvstore.store.contract import Kind, Miss
from tests.harness.store_cluster import started_cluster
from tests.harness.stores import (
    BUDGET,
    HEALTH,
    PAGE_BYTES,
    eventually,
    eventually_true,
    name,
    page_key,
    payload,
    running,
    timed_read,
    write_all,
)

pytestmark = pytest.mark.slow

KEYS = [page_key(number) for number in range(60)]
PAYLOADS = [payload(number) for number in range(60)]
SHORT = 0.1


@pytest.fixture(scope="module")
def _shared_cluster():
    with started_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(_shared_cluster):
    _shared_cluster.flush()
    return _shared_cluster


@pytest.fixture
def own_cluster():
    """For tests that do it harm."""
    with started_cluster() as cluster:
        yield cluster


async def test_the_pages_of_a_prompt_spread_over_all_servers_and_come_back_in_order(cluster):
    async with running(cluster.url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        assert all(client.dbsize() > 5 for client in cluster.clients)
        assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS
        assert await store.contains([*KEYS, page_key(99)], budget_seconds=BUDGET) == [True] * 60 + [False]
        assert store.state.redirected == 0
        store.delete(KEYS[:30])
        assert await store.flush(seconds_max=BUDGET)
        assert sum(client.dbsize() for client in cluster.clients) == 30


async def test_accounts_of_tenants_work_over_servers(cluster):
    async with running(cluster.url, is_up=False, tenant_bytes_max=10 * (PAGE_BYTES + 1000)) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        assert store.counts.values_written[Kind.PAGE] == 10


async def test_a_slot_that_moved_is_followed_at_once_and_remembered(own_cluster):
    cluster = own_cluster
    async with running(cluster.url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        moved = name(KEYS[0])
        source = cluster.owner(moved)
        target = (source + 1) % 3
        cluster.begin_move(moved, source=source, target=target)
        assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS, "not moved yet: the source has it"
        assert store.state.redirected == 0
        cluster.move_value(moved, source=source, target=target)
        assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS, "ASK was not followed"
        assert store.state.redirected == 1
        cluster.end_move(moved, target=target)
        assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS, "MOVED was not followed"
        assert store.state.redirected == 2
        assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS
        assert store.state.redirected == 2, "MOVED was not remembered"
        store.delete(KEYS[:1])
        store.write(KEYS[0], PAYLOADS[0])
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.values_missed == {}


async def test_writes_follow_a_slot_that_moves(own_cluster):
    cluster = own_cluster
    async with running(cluster.url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        source = cluster.owner(name(KEYS[0]))
        cluster.begin_move(name(KEYS[0]), source=source, target=(source + 1) % 3)
        await write_all(store, KEYS[:1])
        assert store.counts.values_written[Kind.PAGE] == 1
        assert await store.read(KEYS[:1], budget_seconds=BUDGET) == PAYLOADS[:1]


async def test_a_lost_server_costs_its_own_pages_only(own_cluster):
    cluster = own_cluster
    async with running(cluster.url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        lost = [cluster.owner(name(key)) == 1 for key in KEYS]
        expected = [None if is_lost else PAYLOADS[number] for number, is_lost in enumerate(lost)]
        os.kill(cluster.servers[1].pid, signal.SIGKILL)
        for _ in range(HEALTH.failures_max + 1):
            assert await timed_read(store, KEYS, budget_seconds=BUDGET) == expected
        assert sorted(state.value for state in store.state.breakers.values()).count("closed") == 2
        began = time.monotonic()
        for _ in range(20):
            assert await timed_read(store, KEYS, budget_seconds=BUDGET) == expected
        assert time.monotonic() - began < BUDGET
        assert store.counts.values_missed[Miss.DOWN] > 0


async def test_a_frozen_server_costs_a_few_budgets_and_the_others_go_on(own_cluster):
    cluster = own_cluster
    async with running(cluster.url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        frozen = [cluster.owner(name(key)) == 2 for key in KEYS]
        expected = [None if is_frozen else PAYLOADS[number] for number, is_frozen in enumerate(frozen)]
        os.kill(cluster.servers[2].pid, signal.SIGSTOP)
        try:
            for _ in range(HEALTH.failures_max):
                assert await timed_read(store, KEYS, budget_seconds=SHORT * 5) == expected
            began = time.monotonic()
            assert await timed_read(store, KEYS, budget_seconds=BUDGET) == expected
            assert time.monotonic() - began < BUDGET / 2, "the frozen server is still waited for"
        finally:
            os.kill(cluster.servers[2].pid, signal.SIGCONT)

        async def is_whole():
            return await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS

        await eventually_true(is_whole)
        assert set(store.state.breakers.values()) == {BreakerState.CLOSED}


async def test_a_cluster_that_comes_back_with_other_addresses_is_found_by_the_name_in_the_url(cluster):
    with started_cluster() as first:
        async with FakeProxy(first.servers[0].port) as proxy:
            url = first.url.replace(f":{first.servers[0].port}", f":{proxy.port}")
            async with running(url, is_up=False) as store:
                await eventually(lambda: len(store.state.breakers) == 3)
                before = set(store.state.breakers)
                first.close()
                proxy.target_port = cluster.servers[0].port
                for _ in range(HEALTH.failures_max):
                    assert await timed_read(store, KEYS, budget_seconds=BUDGET) == [None] * 60
                await eventually(lambda: not before & set(store.state.breakers))
                await write_all(store, KEYS)
                assert await store.read(KEYS, budget_seconds=BUDGET) == PAYLOADS


async def test_an_operator_sees_and_flushes_all_servers(cluster):
    async with (
        running(cluster.url, is_up=False, tenant_bytes_max=1 << 30) as store,
        opened(cluster.url) as admin,
    ):
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS)
        stat = await admin.stat()
        assert len(stat.nodes) == 3
        assert sum(share.num_values for share in stat.shares.values()) == 60
        assert (await admin.verify(limit=100)).num_values == 60
        assert await admin.flush(KEYS[0].tenant) == 60
        assert sum(client.dbsize() for client in cluster.clients) == 0


async def test_any_server_of_a_cluster_tells_of_all(cluster):
    url = cluster.servers[2].url + "?cluster=true"
    async with running(url, is_up=False) as store:
        await eventually(lambda: len(store.state.breakers) == 3)
        await write_all(store, KEYS[:5])
        assert await store.read(KEYS[:5], budget_seconds=BUDGET) == PAYLOADS[:5]


async def test_a_cluster_taken_for_one_server_says_so(cluster, caplog):
    async with running(cluster.servers[0].url) as store:
        await store.read(KEYS, budget_seconds=BUDGET)
        assert store.counts.error_replies["MOVED"] > 0


async def test_one_server_taken_for_a_cluster_is_a_store_that_is_down(start_server, caplog):
    server = start_server()
    async with running(server.url + "?cluster=true", is_up=False) as store:
        assert await timed_read(store, KEYS, budget_seconds=SHORT) == [None] * 60
        await eventually(lambda: "found no store" in caplog.text)
        assert store.counts.values_missed == {Miss.DOWN: 60}

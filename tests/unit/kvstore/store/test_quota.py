"""What a tenant may have in a store, over a real server."""

import asyncio

from fake_proxy import FakeProxy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.store.contract import Drop, Kind, tenant_label
from kvstore.store.health import HealthConfig
from kvstore.store.names import account_name
from kvstore.store.quota import ADDED, COUNTED, REFUSED, Entry, charge, first_to_expire, give_back
from kvstore.store.value import HEADER_BYTES
from tests.harness.stores import (
    BUDGET,
    PAGE_BYTES,
    client,
    eventually_true,
    name,
    page_key,
    payload,
    running,
    write_all,
)

VALUE_BYTES = HEADER_BYTES + PAGE_BYTES
ONE, OTHER = "key:one", "key:other"
KEYS = [page_key(number, salt=ONE) for number in range(12)]
TENANT = tenant_label("a tenant")


async def used(redis, salt=ONE):
    """What the account says, after checking that its sum is one."""
    entries = dict(await redis.zrange(account_name(tenant_label(salt)), 0, -1, withscores=True))
    total = -entries.pop(b"total", 0.0)
    assert total == sum(int(member.rpartition(b"|")[2]) for member in entries)
    return total


async def test_a_tenant_has_its_share_and_no_more(server):
    async with running(server.url, tenant_bytes_max=5 * VALUE_BYTES) as store, client(server.url) as redis:
        await write_all(store, KEYS)
        assert await store.contains(KEYS, budget_seconds=BUDGET) == [True] * 5 + [False] * 7
        assert store.counts.values_dropped == {Drop.QUOTA: 7}
        assert await used(redis) == 5 * VALUE_BYTES


async def test_tenants_do_not_take_from_each_other(server):
    theirs = [page_key(number, salt=OTHER) for number in range(5)]
    async with running(server.url, tenant_bytes_max=5 * VALUE_BYTES) as store, client(server.url) as redis:
        await write_all(store, KEYS)
        await write_all(store, theirs)
        assert await store.contains(theirs, budget_seconds=BUDGET) == [True] * 5
        assert await used(redis, OTHER) == 5 * VALUE_BYTES


async def test_workers_share_an_account(server):
    async with (
        running(server.url, tenant_bytes_max=6 * VALUE_BYTES) as one,
        running(server.url, tenant_bytes_max=6 * VALUE_BYTES) as other,
        client(server.url) as redis,
    ):
        await asyncio.gather(write_all(one, KEYS[:6]), write_all(other, KEYS[6:]))
        assert sum(await one.contains(KEYS, budget_seconds=BUDGET)) == 6
        assert await used(redis) == 6 * VALUE_BYTES


async def test_a_value_written_twice_is_counted_once(server):
    async with (
        running(server.url, tenant_bytes_max=5 * VALUE_BYTES) as one,
        running(server.url, tenant_bytes_max=5 * VALUE_BYTES) as other,
        client(server.url) as redis,
    ):
        for store in (one, other, one):
            await write_all(store, KEYS[:5])
        assert await used(redis) == 5 * VALUE_BYTES
        assert one.counts.values_dropped == other.counts.values_dropped == {}


async def test_what_expires_makes_room(server):
    config = {"tenant_bytes_max": 5 * VALUE_BYTES, "ttl_seconds": 0.3}
    async with running(server.url, **config) as store, client(server.url) as redis:
        await write_all(store, KEYS[:5])
        await asyncio.sleep(0.4)
        await write_all(store, KEYS[5:10])
        assert store.counts.values_dropped == {}
        assert await used(redis) == 5 * VALUE_BYTES


async def test_what_was_evicted_or_deleted_makes_room_when_it_is_needed(server):
    health = HealthConfig(server_seconds_max=0.2)
    config = {"tenant_bytes_max": 5 * VALUE_BYTES, "health": health}
    async with running(server.url, **config) as store, client(server.url) as redis:
        await write_all(store, KEYS[:5])
        await redis.unlink(*(name(key) for key in KEYS[:4]))

        async def is_written():
            await write_all(store, KEYS[6:7])
            return await store.contains(KEYS[6:7], budget_seconds=BUDGET) == [True]

        assert not await is_written()
        await eventually_true(is_written)
        assert store.counts.accounts_corrected == 4
        assert await used(redis) == 2 * VALUE_BYTES


async def test_what_could_not_be_written_is_given_back(start_server):
    server = start_server(settings={"maxmemory-policy": "noeviction"}, memory_bytes=4 << 20)
    keys = [page_key(number, salt=ONE) for number in range(300)]
    async with (
        running(server.url, tenant_bytes_max=300 * VALUE_BYTES, batch_bytes_max=20 * VALUE_BYTES) as store,
        client(server.url) as redis,
    ):
        for number, key in enumerate(keys):
            store.write(key, payload(number))
        assert await store.flush(seconds_max=BUDGET)
        assert store.counts.values_dropped[Drop.OUT_OF_MEMORY] > 0
        assert await used(redis) == store.counts.values_written[Kind.PAGE] * VALUE_BYTES


async def test_what_was_lost_on_its_way_is_given_back(server):
    async with FakeProxy(server.port) as proxy, client(server.url) as redis:
        url = server.url.replace(f":{server.port}", f":{proxy.port}")
        async with running(url, tenant_bytes_max=5 * VALUE_BYTES) as store:
            proxy.cut_on = b"\r\nSET\r\n"
            await write_all(store, KEYS[:3])
            assert store.counts.values_dropped == {Drop.FAILED: 3}
            assert await used(redis) == 0


async def test_who_cannot_count_does_not_write(server):
    async with client(server.url) as redis, running(server.url):
        rights = ("on", ">pw", "~rorqual:*", "+@all", "-@scripting")
        await redis.execute_command("ACL", "SETUSER", "uncounted", *rights)
        url = f"redis://uncounted:pw@127.0.0.1:{server.port}"
        async with running(url, tenant_bytes_max=5 * VALUE_BYTES) as store:
            await write_all(store, KEYS[:2])
            assert store.counts.values_dropped == {Drop.FAILED: 2}
        async with running(url) as store:
            await write_all(store, KEYS[:2])
            assert store.counts.values_dropped == {}


async def test_without_quotas_nothing_is_counted(server):
    async with running(server.url) as store, client(server.url) as redis:
        await write_all(store, KEYS)
        assert not await redis.exists(account_name(tenant_label(ONE)))


async def test_values_of_before_the_quota_are_counted_when_they_are_written_again(server):
    async with running(server.url) as before:
        await write_all(before, KEYS[:8])
    async with running(server.url, tenant_bytes_max=5 * VALUE_BYTES) as store, client(server.url) as redis:
        await write_all(store, KEYS)
        assert store.counts.values_present[Kind.PAGE] == 8
        assert store.counts.values_dropped == {Drop.QUOTA: 4}
        assert await used(redis) == 8 * VALUE_BYTES


operations = st.lists(
    st.one_of(
        st.tuples(st.just("charge"), st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=4)),
        st.tuples(st.just("give back"), st.lists(st.integers(0, 9), max_size=4)),
    ),
    max_size=12,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations, st.integers(1, 400))
async def test_an_account_is_always_the_sum_of_what_it_counts(server, operations, quota):
    """Whatever is charged and given back, in whatever order, beside a model of it."""
    sizes = {number: 10 * number + 10 for number in range(10)}
    model: set[int] = set()
    async with client(server.url) as redis:
        await redis.flushall()
        for what, items in operations:
            if what == "charge":
                entries = [
                    Entry(name=b"%d" % number, num_bytes=sizes[number], is_present=is_present)
                    for number, is_present in items
                ]
                command = charge(TENANT, entries, bytes_max=quota, ttl_seconds=60)
                answer = await redis.execute_command(*command) if entries else []
                for (number, is_present), told in zip(items, answer, strict=True):
                    fits = sum(sizes[item] for item in model) + sizes[number] <= quota
                    expected = COUNTED if number in model else ADDED if fits or is_present else REFUSED
                    assert told == expected
                    if told == ADDED:
                        model.add(number)
            elif items:
                await redis.execute_command(
                    *give_back(TENANT, [b"%d|%d" % (item, sizes[item]) for item in items])
                )
                model -= set(items)
            total = await redis.zscore(account_name(TENANT), "total")
            assert -(total or 0) == sum(sizes[item] for item in model)
        settled = await redis.execute_command(*first_to_expire(TENANT, ttl_seconds=60, settled_seconds=1))
        assert settled == [], "what was charged a moment ago may not be written yet"

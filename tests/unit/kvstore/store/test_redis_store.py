"""A store over a real server that is well."""

import asyncio
import contextlib

import pytest

from kvstore.store.contract import Drop, Kind, Miss
from kvstore.store.value import HEADER_BYTES, Form, encode_value
from rorqual.errors import ConfigError
from tests.harness.stores import (
    BUDGET,
    FORM,
    PAGE_BYTES,
    client,
    eventually,
    make_store,
    name,
    page_key,
    payload,
    running,
    write_all,
)

KEYS = [page_key(number) for number in range(20)]


async def test_what_is_written_is_read_in_order(server):
    async with running(server.url) as store:
        await write_all(store, KEYS)
        wanted = [KEYS[7], KEYS[0], KEYS[19]]
        got = await store.read(wanted, budget_seconds=BUDGET)
        assert got == [payload(7), payload(0), payload(19)]
        assert store.counts.values_written[Kind.PAGE] == 20
        assert store.counts.bytes_written[Kind.PAGE] == 20 * PAGE_BYTES
        assert store.counts.bytes_read[Kind.PAGE] == 3 * PAGE_BYTES


async def test_what_one_worker_writes_another_reads(server):
    async with running(server.url) as one, running(server.url) as other:
        await write_all(one, KEYS[:3])
        assert await other.read(KEYS[:3], budget_seconds=BUDGET) == [payload(0), payload(1), payload(2)]


async def test_what_is_not_there_is_a_miss_among_what_is(server):
    async with running(server.url) as store:
        await write_all(store, KEYS[:2])
        got = await store.read([KEYS[1], KEYS[5], KEYS[0]], budget_seconds=BUDGET)
        assert got == [payload(1), None, payload(0)]
        assert store.counts.values_missed == {Miss.ABSENT: 1}


async def test_a_page_and_the_tail_behind_it_are_two_values(server):
    tail = page_key(0, kind=Kind.TAIL)
    async with running(server.url) as store:
        store.write(tail, b"a tail")
        store.write(KEYS[0], b"a page")
        assert await store.flush(seconds_max=BUDGET)
        assert await store.read([KEYS[0], tail], budget_seconds=BUDGET) == [b"a page", b"a tail"]


async def test_models_do_not_see_each_other(server):
    async with running(server.url) as store, running(server.url, form=Form("f" * 16, "other")) as other:
        await write_all(store, KEYS[:1])
        assert await other.read(KEYS[:1], budget_seconds=BUDGET) == [None]
        assert other.counts.values_missed == {Miss.ABSENT: 1}


async def test_contains_tells_without_moving_a_payload(server):
    async with running(server.url) as store:
        await write_all(store, KEYS[:2])
        assert await store.contains([KEYS[5], KEYS[1], KEYS[0]], budget_seconds=BUDGET) == [False, True, True]
        assert store.counts.bytes_read[Kind.PAGE] == 0


async def test_an_empty_question_has_an_empty_answer(server):
    async with running(server.url) as store:
        assert await store.read([], budget_seconds=BUDGET) == []
        assert await store.contains([], budget_seconds=BUDGET) == []


async def test_a_payload_may_change_once_it_was_given(server):
    memory = bytearray(payload(0))
    async with running(server.url) as store:
        store.write(KEYS[0], memoryview(memory))
        memory[:] = bytes(PAGE_BYTES)
        assert await store.flush(seconds_max=BUDGET)
        assert await store.read(KEYS[:1], budget_seconds=BUDGET) == [payload(0)]


async def test_what_is_deleted_is_gone_even_if_it_waits(server):
    async with running(server.url) as store:
        await write_all(store, KEYS[:2])
        store.write(KEYS[2], payload(2))
        store.delete(KEYS[1:3])
        assert await store.flush(seconds_max=BUDGET)
        assert await store.contains(KEYS[:3], budget_seconds=BUDGET) == [True, False, False]


async def test_values_expire_and_a_second_write_renews_them(server):
    async with running(server.url, ttl_seconds=1000.0) as store, client(server.url) as redis:
        await write_all(store, KEYS[:1])
        await redis.pexpire(name(KEYS[0]), 5000)
        await write_all(store, KEYS[:1])
        assert 900_000 < await redis.pttl(name(KEYS[0])) <= 1_000_000
        assert store.counts.values_written[Kind.PAGE] == 1
        assert store.counts.values_present[Kind.PAGE] == 1


async def test_reads_of_one_key_at_one_time_are_one(server):
    async with running(server.url) as store, client(server.url) as redis:
        await write_all(store, KEYS)
        before = await _gets(redis)
        reads = [store.read(KEYS[number:], budget_seconds=BUDGET) for number in range(5)]
        got = await asyncio.gather(*reads)
        for number, values in enumerate(got):
            assert values == [payload(index) for index in range(number, 20)]
        assert await _gets(redis) - before == 20
        assert store.counts.values_shared == 19 + 18 + 17 + 16


async def _gets(redis):
    return (await redis.info("commandstats")).get("cmdstat_get", {"calls": 0})["calls"]


async def test_a_key_asked_for_twice_in_one_read_is_fetched_once(server):
    async with running(server.url) as store:
        await write_all(store, KEYS[:1])
        assert await store.read([KEYS[0], KEYS[0]], budget_seconds=BUDGET) == [payload(0)] * 2


async def test_a_read_that_joined_another_survives_its_cancellation(server):
    async with running(server.url) as store:
        await write_all(store, KEYS)
        first = asyncio.create_task(store.read(KEYS, budget_seconds=BUDGET))
        second = asyncio.create_task(store.read(KEYS[3:5], budget_seconds=BUDGET))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        assert await second == [payload(3), payload(4)]
        with pytest.raises(asyncio.CancelledError):
            await first


@pytest.mark.parametrize("pauses", range(12))
async def test_a_cancelled_read_gives_back_all_it_held(server, pauses):
    async with running(server.url, connections_max=2) as store:
        await write_all(store, KEYS)
        reading = asyncio.create_task(store.read(KEYS, budget_seconds=BUDGET))
        for _ in range(pauses):
            await asyncio.sleep(0)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await eventually(lambda: store.state.bytes_in_flight == 0)
        assert store.state.connections <= 2
        # What it left behind is no answer to anybody else's question.
        for number in (3, 11):
            assert await store.read([KEYS[number]], budget_seconds=BUDGET) == [payload(number)]
        assert store.counts.breakers_opened == 0


async def test_a_read_that_begins_as_another_ends_does_not_end_with_it(server):
    async with running(server.url) as store:
        await write_all(store, KEYS)
        first = asyncio.create_task(store.read(KEYS, budget_seconds=BUDGET))
        for _ in range(3):
            await asyncio.sleep(0)
        first.cancel()
        second = asyncio.create_task(store.read(KEYS[:2], budget_seconds=BUDGET))
        assert await second == [payload(0), payload(1)]
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_bytes_in_flight_stay_within_their_bound(server):
    bound = 3 * (HEADER_BYTES + PAGE_BYTES)
    most = 0
    async with running(server.url, read_bytes_max=bound) as store:
        await write_all(store, KEYS)
        reads = [asyncio.create_task(store.read([key], budget_seconds=BUDGET)) for key in KEYS]
        while not all(read.done() for read in reads):
            most = max(most, store.state.bytes_in_flight)
            await asyncio.sleep(0)
        assert [await read for read in reads] == [[payload(number)] for number in range(20)]
    assert 0 < most <= bound


async def test_many_readers_share_a_few_connections(server):
    async with running(server.url, connections_max=3) as store:
        await write_all(store, KEYS)
        await asyncio.gather(*(store.read([key], budget_seconds=BUDGET) for key in KEYS * 5))
        assert store.state.connections <= 3


async def test_the_queue_is_bounded_and_what_it_has_no_room_for_is_dropped(server):
    room_for_three = 3 * (HEADER_BYTES + PAGE_BYTES)
    async with running(server.url, queue_bytes_max=room_for_three) as store:
        taken = [store.write(key, payload(number)) for number, key in enumerate(KEYS)]
        assert taken == [True] * 3 + [False] * 17
        assert store.state.bytes_queued == room_for_three
        assert store.counts.values_dropped == {Drop.QUEUE_FULL: 17}
        assert await store.flush(seconds_max=BUDGET)
        assert store.state.bytes_queued == 0
        assert store.write(KEYS[5], payload(5))


async def test_a_value_that_waits_already_takes_no_more_room(server):
    async with running(server.url, queue_bytes_max=2 * PAGE_BYTES) as store:
        assert store.write(KEYS[0], payload(0))
        assert store.write(KEYS[0], payload(0))
        assert store.counts.values_dropped == {}
        assert await store.flush(seconds_max=BUDGET)


SPOILED = {
    "corrupt": (Miss.CORRUPT, lambda value: value[:-1] + bytes([value[-1] ^ 1])),
    "truncated": (Miss.TRUNCATED, lambda value: value[: len(value) // 2]),
    "almost nothing": (Miss.TRUNCATED, lambda value: value[:10]),
    "longer": (Miss.CORRUPT, lambda value: value + b"!"),
    "version": (Miss.VERSION, lambda value: value[:4] + b"\x09" + value[5:]),
    "not ours": (Miss.FOREIGN, lambda value: b"what others keep"),
    "empty": (Miss.TRUNCATED, lambda value: b""),
    "another page": (
        Miss.FOREIGN,
        lambda value: encode_value(FORM, Kind.PAGE, page_key(99).page, payload(99)),
    ),
    "another model": (
        Miss.FOREIGN,
        lambda value: encode_value(Form(FORM.wire_id, "other"), Kind.PAGE, KEYS[0].page, payload(0)),
    ),
}


@pytest.mark.parametrize("harm", SPOILED)
async def test_a_spoiled_value_is_a_miss_and_goes(server, harm):
    reason, spoil = SPOILED[harm]
    async with running(server.url) as store, client(server.url) as redis:
        await write_all(store, KEYS[:2])
        value = await redis.get(name(KEYS[0]))
        await redis.set(name(KEYS[0]), spoil(value))
        assert await store.read(KEYS[:2], budget_seconds=BUDGET) == [None, payload(1)]
        assert store.counts.values_missed == {reason: 1}
        assert await store.flush(seconds_max=BUDGET)
        assert not await redis.exists(name(KEYS[0]))
        assert store.counts.values_deleted == 1
        # Then there is room for a good one.
        await write_all(store, KEYS[:1])
        assert await store.read(KEYS[:1], budget_seconds=BUDGET) == [payload(0)]


async def test_a_key_that_holds_no_value_at_all_is_a_miss_and_goes(server):
    async with running(server.url) as store, client(server.url) as redis:
        await redis.lpush(name(KEYS[0]), "a list")
        assert await store.read(KEYS[:1], budget_seconds=BUDGET) == [None]
        assert store.counts.values_missed == {Miss.FOREIGN: 1}
        assert store.counts.error_replies == {"WRONGTYPE": 1}
        assert await store.flush(seconds_max=BUDGET)
        assert not await redis.exists(name(KEYS[0]))


async def test_a_server_with_a_socket_file_serves_too(start_server, tmp_path):
    server = start_server(socket_file=tmp_path / "store.sock")
    async with running(server.url) as store:
        await write_all(store, KEYS[:2])
        assert await store.read(KEYS[:2], budget_seconds=BUDGET) == [payload(0), payload(1)]


async def test_a_store_that_does_not_run_misses(server):
    store = make_store(server.url)
    assert await store.read(KEYS[:1], budget_seconds=BUDGET) == [None]
    assert await store.contains(KEYS[:1], budget_seconds=BUDGET) == [False]
    assert store.counts.values_missed == {Miss.DOWN: 1}
    assert store.state.connections == 0


@pytest.mark.parametrize(
    "wrong", [{"page_bytes": 0}, {"ttl_seconds": 0.0}, {"read_bytes_max": 100}, {"queue_bytes_max": 100}]
)
async def test_a_wrong_configuration_is_refused_by_name(server, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_store(server.url, **wrong)

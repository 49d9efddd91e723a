import asyncio
import contextlib

import pytest

from kvstore.store.gate import ByteGate
from tests.harness.virtual import virtual


async def hold(gate, num_bytes, seconds, log=None, label=""):
    async with gate.taken(num_bytes):
        if log is not None:
            log.append(label)
        assert gate.num_bytes <= gate.capacity
        await asyncio.sleep(seconds)


@virtual
async def test_no_more_bytes_are_held_than_there_are():
    gate = ByteGate(10)
    async with asyncio.TaskGroup() as tasks:
        for size in (4, 4, 4, 10, 1, 7):
            tasks.create_task(hold(gate, size, 1.0))
    assert gate.num_bytes == 0


@virtual
async def test_a_large_one_is_not_overtaken_for_ever():
    gate, log = ByteGate(10), []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hold(gate, 5, 1.0, log, "first"))
        tasks.create_task(hold(gate, 10, 1.0, log, "large"))
        tasks.create_task(hold(gate, 1, 1.0, log, "small"))
    assert log == ["first", "large", "small"]


@virtual
async def test_one_that_gives_up_lets_those_behind_it_in():
    gate, log = ByteGate(10), []
    first = asyncio.create_task(hold(gate, 5, 100.0, log, "first"))
    large = asyncio.create_task(hold(gate, 10, 1.0, log, "large"))
    small = asyncio.create_task(hold(gate, 1, 1.0, log, "small"))
    await asyncio.sleep(1)
    large.cancel()
    async with asyncio.timeout(10):
        await small
    assert log == ["first", "small"]
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
    assert gate.num_bytes == 0


@virtual
async def test_a_turn_that_comes_as_its_taker_gives_up_is_given_back():
    gate = ByteGate(10)
    first = asyncio.create_task(hold(gate, 10, 1.0))
    second = asyncio.create_task(hold(gate, 10, 1.0))
    third = asyncio.create_task(hold(gate, 10, 1.0))
    await asyncio.sleep(0.5)
    first.cancel()
    second.cancel()
    await third
    assert gate.num_bytes == 0


@virtual
async def test_more_than_there_will_ever_be_is_a_broken_invariant():
    with pytest.raises(AssertionError):
        await hold(ByteGate(10), 11, 0)

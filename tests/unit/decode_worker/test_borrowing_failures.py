"""What becomes of a hand-over that is given up or goes wrong, at every stage of it: memory that may still be written
into is kept back, all else is free at once, and the next one goes well."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import pytest

from engine.worker.sharing.lenders import LendingFailed
from rorqual.session import Cancel, ErrorCode, FinishReason, Renew
from tests.harness.lending import (
    CALL_SECONDS,
    LEASE_SECONDS,
    TRANSFER_SECONDS,
    Computed,
    a_world,
    until,
)
from tests.harness.pairs import LENGTH, Pair
from tests.harness.virtual import virtual

NUM_PAGES = 16
HELD = LENGTH // 256 + 1


# --- given up, stage by stage: each brings a hand-over to its stage, and says how to let it go on


async def waiting_for_room(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.decode.link.gate.clear()
    for number in range(4):
        other = await pair.lent(100 + number, length=5)
        pair.bind(other)
    pair.bind(prompt)
    await until(lambda: pair.decode.host.load().sequences_waiting == 1)
    return pair.decode.link.gate.set


async def attaching(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.world.lenders.shut("attach")
    pair.bind(prompt)
    await until(lambda: pair.world.lenders.calls["attach"] == 1)
    return lambda: pair.world.lenders.open("attach")


async def becoming_known_to_the_rank(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.decode.link.gate.clear()
    pair.bind(prompt)
    await until(lambda: bool(pair.decode.link.opens))
    return pair.decode.link.gate.set


async def renewing_first(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.world.lenders.shut("renew")
    pair.bind(prompt)
    await until(lambda: pair.world.lenders.calls["renew"] == 1)
    return lambda: pair.world.lenders.open("renew")


async def waiting_for_offers(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.open(prompt)
    await until(lambda: pair.down.is_bound(1))
    return lambda: None


async def waiting_for_the_last_offer(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.open(prompt)
    pair.down.submit(prompt.takes()[0])
    await until(lambda: len(pair.decode.link.fetches) == 1 and not pair.decode.rank.fetches)
    return lambda: None


async def reading(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.decode.link.holds_reads = True
    pair.bind(prompt)
    await until(lambda: bool(pair.decode.rank.fetches))

    def go_on() -> None:
        pair.decode.link.holds_reads = False
        pair.decode.link.end_reads()

    return go_on


async def proving(pair: Pair, prompt: Computed) -> Callable[[], None]:
    go_on = await reading(pair, prompt)
    pair.world.lenders.shut("renew")
    go_on()
    await until(lambda: pair.world.lenders.calls["renew"] == 2)
    return lambda: pair.world.lenders.open("renew")


async def about_to_decode(pair: Pair, prompt: Computed) -> Callable[[], None]:
    pair.world.step_seconds = lambda: 0.2
    pair.bind(prompt)
    await until(lambda: bool(pair.decode.link.plans))

    def go_on() -> None:
        pair.world.step_seconds = lambda: 0.0

    return go_on


Stage = Callable[[Pair, Computed], Awaitable[Callable[[], None]]]
STAGES: list[Stage] = [
    waiting_for_room,
    attaching,
    becoming_known_to_the_rank,
    renewing_first,
    waiting_for_offers,
    waiting_for_the_last_offer,
    reading,
    proving,
    about_to_decode,
]


@virtual
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_a_hand_over_can_be_cancelled_at_any_stage(stage: Stage) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt, after = await pair.lent(1), await pair.lent(2)
        go_on = await stage(pair, prompt)
        pair.down.submit(Cancel(sequence_id=1))
        await pair.down.ended(1, FinishReason.CANCELLED)
        assert pair.down.tokens(1) == []
        is_read_into = bool(pair.decode.rank.fetches)
        assert pair.decode.host.load().pages_leased == (HELD if is_read_into else 0)
        go_on()
        pair.up.submit(Cancel(sequence_id=1))
        pair.bind(after)
        await pair.check_handed_over(after)
        await pair.empty()
        assert pair.decode.count("hand_overs_total", outcome="cancelled") == 1


@virtual
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_a_session_can_end_while_its_hand_overs_are_at_any_stage(stage: Stage) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt, after = await pair.lent(1), await pair.lent(2)
        go_on = await stage(pair, prompt)
        pair.down.close()
        await asyncio.sleep(0.01)
        is_read_into = bool(pair.decode.rank.fetches)
        assert pair.decode.host.load().pages_leased == (HELD if is_read_into else 0)
        go_on()
        pair.up.submit(Cancel(sequence_id=1))
        pair.down = pair.decode.connect()
        pair.bind(after)
        await pair.check_handed_over(after)
        for number in range(100, 104):  # those that another one waited for
            pair.up.submit(Cancel(sequence_id=number))
        await pair.empty()


@virtual
@pytest.mark.parametrize("stage", STAGES[1:-1], ids=lambda stage: stage.__name__)
async def test_an_owner_can_be_lost_at_any_stage(stage: Stage) -> None:
    """And come back with a new incarnation, of which nothing of the old one is asked."""
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        go_on = await stage(pair, prompt)
        world.lose("prefill")
        pair.prefill = world.start_prefill()
        pair.up = pair.prefill.connect()
        go_on()
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.FAILED
        assert "prefill" in report.error
        after = await pair.lent(2)
        pair.bind(after)
        await pair.check_handed_over(after)
        await pair.empty()
        # One owner is known, and it is the new one.
        assert list(pair.decode.rank.peers.values()) == [pair.prefill.rank.agent]
        assert pair.decode.count("peers") == 1


# --- reads that go wrong


@virtual
async def test_what_an_overdue_read_writes_into_is_kept_back_until_it_is_over() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        await reading(pair, prompt)
        began = asyncio.get_running_loop().time()
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert asyncio.get_running_loop().time() - began == pytest.approx(TRANSFER_SECONDS, abs=0.01)
        assert report.error_code is ErrorCode.FAILED
        assert report.error == f"a read from prefill took longer than {TRANSFER_SECONDS:g} s"
        assert pair.decode.count("stages_overdue_total", stage="fetch") == 1
        pair.up.submit(Cancel(sequence_id=1))
        await pair.up.ended(1, FinishReason.CANCELLED)
        # However long it takes, and others are served meanwhile.
        pair.decode.link.holds_reads = False
        for number in (2, 3, 4):
            other = await pair.lent(number)
            pair.bind(other)
            await pair.check_handed_over(other)
        load = pair.decode.host.load()
        assert (load.pages_leased, load.pages_free) == (HELD, NUM_PAGES - HELD)
        assert load.slots_free == load.slots_total
        assert not pair.decode.host.is_idle
        assert pair.decode.count("fetches_open") == 1
        assert await pair.decode.host.drain(seconds_max=0.1)  # nobody waits for an answer
        pair.decode.link.end_reads()
        await pair.empty()


@virtual
async def test_a_rank_that_says_nothing_about_a_read_is_not_waited_for_by_the_client() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        pair.decode.link.gate.clear()
        began = asyncio.get_running_loop().time()
        for take in prompt.takes():
            pair.down.submit(take)
        report = await pair.down.ended(1, FinishReason.ERROR)
        waited = asyncio.get_running_loop().time() - began
        assert waited == pytest.approx(TRANSFER_SECONDS + CALL_SECONDS, abs=0.02)
        assert "took longer" in report.error
        assert pair.decode.host.load().pages_leased == HELD
        pair.up.submit(Cancel(sequence_id=1))
        pair.decode.link.gate.set()
        await pair.empty()


@virtual
@pytest.mark.parametrize("what", ["page", "record"])
async def test_bytes_that_are_not_what_was_offered_are_an_error_and_the_owner_is_made_known_anew(
    what: str,
) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        page, record = prompt.offers[0].pages[1], prompt.offers[-1].record
        assert record is not None
        if what == "page":
            pair.prefill.rank.memory[page] = (b"another", b"content")
        else:
            pair.prefill.rank.records[record.record] = bytes(record.num_bytes)
        pair.bind(prompt)
        report = await pair.down.ended(1, FinishReason.ERROR)
        number = page if what == "page" else record.record
        assert report.error_code is ErrorCode.FAILED
        assert report.error == f"a read from prefill failed: {what} {number} is not what was offered"
        assert pair.down.tokens(1) == []
        pair.up.submit(Cancel(sequence_id=1))
        after = await pair.lent(2)
        pair.bind(after)
        await pair.check_handed_over(after)
        await pair.empty()
        assert world.lenders.calls["attach"] == 2
        assert [item.peer for item in pair.decode.link.closes] == [1]
        assert pair.decode.count("hand_overs_total", outcome="failed") == 1


@virtual
async def test_a_read_that_fails_can_be_made_again_under_the_same_lease() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.decode.link.read_error = "the link is down"
        pair.bind(prompt)
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error == "a read from prefill failed: the link is down"
        pair.decode.link.read_error = ""
        again = dataclasses.replace(
            prompt, command=dataclasses.replace(prompt.command, sequence_id=prompt.command.sequence_id + 10)
        )
        pair.bind(again)
        await pair.down.ended(11, FinishReason.LENGTH)
        await pair.up.ended(1, FinishReason.HANDED_OVER)
        await pair.empty()


@virtual
async def test_a_broken_owner_is_closed_when_its_last_reader_is_done() -> None:
    async with a_world() as world:
        pair = Pair(world)
        first, second, third = [await pair.lent(number) for number in (1, 2, 3)]
        pair.decode.link.holds_reads = True
        pair.bind(first)
        pair.bind(second)
        await until(lambda: len(pair.decode.rank.fetches) == 2)
        one, other = pair.decode.rank.fetches
        pair.decode.link.read_error = "the link is down"
        pair.decode.link.end_read(one)
        await pair.down.ended(1, FinishReason.ERROR)
        assert pair.decode.link.closes == []
        pair.decode.link.read_error = ""
        pair.decode.link.holds_reads = False
        pair.bind(third)
        await pair.check_handed_over(third)
        assert [item.peer for item in pair.decode.link.opens] == [1, 2]
        assert pair.decode.link.closes == []
        pair.decode.link.end_read(other)
        await pair.check_handed_over(second)
        assert [item.peer for item in pair.decode.link.closes] == [1]
        pair.up.submit(Cancel(sequence_id=1))
        await pair.empty()


# --- calls that go wrong


@virtual
@pytest.mark.parametrize("method", ["attach", "renew"])
@pytest.mark.parametrize("is_silent", [True, False])
async def test_an_owner_that_does_not_answer_costs_its_sequence_and_no_other(
    method: str, is_silent: bool
) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        if is_silent:
            world.lenders.shut(method)
        else:
            world.lenders.failures[method] = LendingFailed("prefill is out of order")
        pair.bind(prompt)
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.FAILED
        assert "prefill" in report.error
        assert not pair.down.is_bound(1)
        assert pair.decode.link.fetches == []
        if is_silent:
            world.lenders.open(method)
        world.lenders.failures.clear()
        pair.up.submit(Renew(sequence_ids=(1,)))
        pair.up.submit(Cancel(sequence_id=1))
        after = await pair.lent(2)
        pair.bind(after)
        await pair.check_handed_over(after)
        await pair.empty()


@virtual
async def test_memory_that_the_rank_cannot_reach_is_an_error_for_all_who_want_it() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompts = [await pair.lent(number) for number in (1, 2, 3)]
        pair.decode.link.peer_error = "no such segment"
        for prompt in prompts:
            pair.bind(prompt)
        for number in (1, 2, 3):
            report = await pair.down.ended(number, FinishReason.ERROR)
            assert report.error == "prefill: its memory cannot be read: no such segment"
        assert world.lenders.calls["attach"] == 1
        assert len(pair.decode.link.opens) == len(pair.decode.link.closes) == 1
        pair.decode.link.peer_error = ""
        for number in (1, 2, 3):
            pair.up.submit(Cancel(sequence_id=number))
        after = await pair.lent(4)
        pair.bind(after)
        await pair.check_handed_over(after)
        await pair.empty()


@virtual
async def test_a_lease_that_ends_while_offers_are_awaited_is_noticed() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        pair.up.submit(Cancel(sequence_id=1))
        began = asyncio.get_running_loop().time()
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error == "the lease at prefill has ended"
        assert asyncio.get_running_loop().time() - began <= LEASE_SECONDS / 3 + 0.01
        await pair.empty()

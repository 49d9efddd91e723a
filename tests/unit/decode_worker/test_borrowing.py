"""The borrower behind a real host, reading from a real lender: how a hand-over goes, and what credit it leaves."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest
from fake_state import PAGE_TOKENS, VOCAB_SIZE

from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS as PAGE
from rorqual.session import Cancel, Credit, ErrorCode, FinishReason, Offer, Renew, Source, Take
from tests.harness.lending import (
    CALL_SECONDS,
    LEASE_SECONDS,
    TRANSFER_SECONDS,
    Ear,
    a_world,
    an_open,
    the_answer,
    until,
)
from tests.harness.pairs import LENGTH, Pair
from tests.harness.virtual import virtual


@virtual
@pytest.mark.parametrize("length", [1, 255, 256, 257, 700, 1024])
async def test_state_is_read_and_the_answer_goes_on_where_it_was(length: int) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1, length=length)
        pair.bind(prompt)
        await pair.check_handed_over(prompt)
        await pair.empty()
        assert [report.bound for report in pair.down.of(1)].count(True) == 1
        assert pair.down.of(1)[0].bound
        assert pair.decode.rank.num_tokens_restored == length
        assert pair.decode.rank.num_tokens_computed == prompt.command.max_tokens - 1
        assert world.lenders.calls == {"attach": 1, "renew": 2, "release": 1}
        (fetch,) = pair.decode.link.fetches
        assert len(fetch.target_pages) == length // PAGE_TOKENS
        assert pair.decode.count("hand_overs_total", outcome="done") == 1
        size = sum(offer.record.num_bytes for offer in prompt.offers if offer.record is not None)
        assert pair.decode.count("state_bytes_read_total") == 4 * PAGE_TOKENS * (length // PAGE_TOKENS) + size


@virtual
async def test_the_lease_is_released_when_the_first_token_has_come_of_it_and_not_before() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        world.step_seconds = lambda: 5 * LEASE_SECONDS
        pair.bind(prompt)
        await until(lambda: bool(pair.decode.link.plans))
        await asyncio.sleep(4.9 * LEASE_SECONDS)
        # It was read long ago, and the first step is under way: others could still read the same.
        assert not pair.up.has_ended(1)
        assert world.lenders.calls["release"] == 0
        assert await world.lenders.renew(prompt.source, seconds_max=1) is not None
        world.step_seconds = lambda: 0.0
        await pair.check_handed_over(prompt)
        assert world.lenders.calls["release"] == 1
        await pair.empty()


@virtual
async def test_offers_that_come_while_the_prompt_is_computed_are_read_as_they_come() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1, length=5 * PAGE_TOKENS + 9)
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        for number, take in enumerate(prompt.takes()):
            assert len(pair.decode.link.fetches) == number
            await asyncio.sleep(2 * LEASE_SECONDS)  # it renews the lease, nobody else does
            pair.down.submit(take)
            await until(lambda number=number: len(pair.decode.link.fetches) == number + 1)
        await pair.check_handed_over(prompt)
        await pair.empty()
        assert [len(fetch.source_pages) for fetch in pair.decode.link.fetches] == [2, 2, 1, 0]
        assert [fetch.record is not None for fetch in pair.decode.link.fetches] == [False, False, False, True]
        targets = [page for fetch in pair.decode.link.fetches for page in fetch.target_pages]
        assert len(set(targets)) == 5
        assert world.lenders.calls["renew"] > 3 * 4 * 2  # three a lease


@virtual
async def test_offers_that_have_piled_up_are_read_together() -> None:
    async with a_world() as world:
        pair = Pair(world)
        world.read_seconds = lambda: 0.1
        prompt = await pair.lent(1, length=7 * PAGE_TOKENS)
        first, *others = prompt.takes()
        pair.open(prompt)
        pair.down.submit(first)
        await until(lambda: bool(pair.decode.rank.fetches))
        for take in others:
            pair.down.submit(take)
        await pair.check_handed_over(prompt)
        await pair.empty()
        assert [len(fetch.source_pages) for fetch in pair.decode.link.fetches] == [2, 5]


@virtual
async def test_nothing_is_read_into_pages_that_a_plan_in_flight_still_uses() -> None:
    async with a_world() as world:
        pair = Pair(world, num_pages=3)
        first, second = await pair.lent(1, max_tokens=60), await pair.lent(2)
        world.step_seconds = lambda: 0.2
        pair.bind(first)
        await until(lambda: len(pair.down.tokens(1)) > 3)
        pair.bind(second)
        pair.decode.link.gate.clear()
        pair.down.submit(Cancel(sequence_id=1))
        await pair.down.ended(1, FinishReason.CANCELLED)
        # Its three pages are the only ones there are.
        assert pair.decode.host.load().pages_free == 0
        num_plans = len(pair.decode.link.plans)
        await asyncio.sleep(2.0)
        assert pair.decode.rank.num_steps < num_plans
        assert len(pair.decode.link.fetches) == 1
        for _ in range(10):
            pair.up.submit(Renew(sequence_ids=(2,)))
            await asyncio.sleep(LEASE_SECONDS / 2)
        assert len(pair.decode.link.fetches) == 1
        pair.decode.link.gate.set()
        await pair.check_handed_over(second)
        assert set(pair.decode.link.fetches[1].target_pages) <= {0, 1, 2}
        await pair.empty()


@virtual
async def test_a_sequence_that_finds_no_room_waits_under_its_routers_renewals() -> None:
    async with a_world() as world:
        pair = Pair(world, num_slots=1)
        first, second = await pair.lent(1, max_tokens=100), await pair.lent(2)
        world.step_seconds = lambda: 0.1
        pair.bind(first)
        pair.bind(second)
        await until(lambda: pair.down.is_bound(1))
        while not pair.down.has_ended(1):
            assert not pair.down.is_bound(2)
            pair.up.submit(Renew(sequence_ids=(2,)))
            await asyncio.sleep(0.5)
        await pair.check_handed_over(first)
        await pair.check_handed_over(second)
        await pair.empty()
        # And with nobody's renewals it would have ended.
        assert world.lenders.calls["attach"] == 1


@virtual
async def test_a_read_that_is_done_of_a_lease_that_has_ended_is_worth_nothing() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.decode.link.holds_reads = True
        pair.bind(prompt)
        await until(lambda: bool(pair.decode.rank.fetches))
        pair.up.submit(Cancel(sequence_id=1))
        await pair.up.ended(1, FinishReason.CANCELLED)
        pair.decode.link.end_reads()
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.FAILED
        assert report.error == "the lease at prefill has ended"
        assert pair.down.tokens(1) == []
        await pair.empty()
        assert pair.decode.count("hand_overs_total", outcome="failed") == 1


@virtual
async def test_a_read_begins_only_when_enough_of_the_lease_is_left() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        world.lenders.call_seconds = lambda: 0.3
        first, last = prompt.takes()
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        world.lenders.shut("renew")  # nothing renews it from now on
        await asyncio.sleep(LEASE_SECONDS * 0.8)
        pair.down.submit(first)
        pair.down.submit(last)
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert "renew at prefill failed with DEADLINE_EXCEEDED" in report.error
        assert pair.decode.link.fetches == []
        assert pair.decode.count("stages_overdue_total", stage="renew") >= 1
        world.lenders.open("renew")
        await pair.empty()


@virtual
async def test_a_lease_that_calls_use_up_is_not_read_under() -> None:
    async with a_world() as world:
        pair = Pair(world, lease_seconds=1.2 * TRANSFER_SECONDS)
        prompt = await pair.lent(1)
        world.lenders.call_seconds = lambda: 0.3 * TRANSFER_SECONDS
        pair.bind(prompt)
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.FAILED
        assert report.error == "the lease at prefill leaves less than 1 s for a read"
        assert pair.decode.link.fetches == []
        await pair.empty()


@virtual
async def test_a_renewal_that_fails_is_made_again_as_long_as_the_lease_may_run() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        for _ in range(5):
            address = world.lenders.lenders.pop("prefill")
            await asyncio.sleep(0.6 * LEASE_SECONDS)
            world.lenders.lenders["prefill"] = address
            await asyncio.sleep(0.4 * LEASE_SECONDS)
        for take in prompt.takes():
            pair.down.submit(take)
        await pair.check_handed_over(prompt)
        await pair.empty()


@virtual
async def test_an_owner_that_is_gone_costs_the_sequences_that_still_need_it() -> None:
    async with a_world() as world:
        pair = Pair(world)
        waiting, reading = await pair.lent(1), await pair.lent(2)
        pair.open(waiting)
        pair.decode.link.holds_reads = True
        pair.bind(reading)
        await until(lambda: pair.down.is_bound(1) and bool(pair.decode.rank.fetches))
        world.lose("prefill")
        for number in (1, 2):
            report = await pair.down.ended(number, FinishReason.ERROR)
            assert report.error_code is ErrorCode.FAILED
            assert "prefill" in report.error
        pair.decode.link.end_reads()
        await pair.decode.empty()
        assert [close.peer for close in pair.decode.link.closes] == [1]


@virtual
async def test_an_owner_that_is_gone_is_not_missed_once_its_state_was_read() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        world.step_seconds = lambda: 5 * LEASE_SECONDS
        pair.bind(prompt)
        await until(lambda: bool(pair.decode.link.plans))
        world.lose("prefill")
        await asyncio.sleep(4 * LEASE_SECONDS)  # every renewal fails
        world.step_seconds = lambda: 0.0
        await pair.down.ended(1, FinishReason.LENGTH)
        assert list(prompt.tokens) + pair.down.tokens(1) == the_answer(prompt.command)
        await pair.decode.empty()


@virtual
async def test_a_release_that_fails_is_the_owners_to_get_over() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        world.lenders.shut("release")
        pair.bind(prompt)
        await pair.down.ended(1, FinishReason.LENGTH)
        await until(lambda: pair.decode.count("stages_overdue_total", stage="release") == 1)
        await pair.decode.empty()
        report = await pair.up.ended(1, FinishReason.ERROR)
        assert "expired" in report.error
        await pair.empty()


@virtual
async def test_an_offer_that_does_not_come_in_time_ends_the_sequence() -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1)
        pair.open(prompt)
        pair.down.submit(prompt.takes()[0])
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert (report.error_code, report.error) == (
            ErrorCode.FAILED,
            "nothing was offered by prefill for 20 s",
        )
        assert pair.decode.count("stages_overdue_total", stage="offer") == 1
        await pair.empty()


@virtual
async def test_a_preempted_sequence_computes_its_prompt_itself_and_needs_nobody() -> None:
    async with a_world() as world:
        pair = Pair(world, num_pages=6)
        first, second = await pair.lent(1, max_tokens=400), await pair.lent(2, max_tokens=400)
        pair.bind(first)
        pair.bind(second)
        for prompt in (first, second):
            await pair.check_handed_over(prompt)
        assert pair.decode.host.scheduler.num_preemptions > 0
        assert len(pair.decode.link.fetches) == 2
        await pair.empty()


LEASE = LeaseName(worker_id=WorkerId("prefill"), incarnation=Incarnation(1), lease_id=0, generation=1)
SOURCE = Source(address="prefill", lease=LEASE, wire_id="fake-wire")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"source": None}, "a decode worker needs a source of state"),
    "another form": (
        {"source": dataclasses.replace(SOURCE, wire_id="float32-2")},
        "state has wire id float32-2; this worker reads fake-wire"
        " (model, numerics, or --drafts 0 on one side only)",
    ),
    "one token": (
        {"source": SOURCE, "max_tokens": 1},
        "a sequence of one token needs no decode worker",
    ),
    "too long": ({"source": SOURCE, "max_tokens": 4096}, "exceed"),
}


@virtual
@pytest.mark.parametrize("case", REFUSED)
async def test_a_sequence_that_is_not_for_a_decode_worker_is_refused(case: str) -> None:
    changes, text = REFUSED[case]
    async with a_world() as world:
        worker = world.start_decode()
        ear = worker.connect()
        ear.submit(dataclasses.replace(an_open(1), **changes))
        report = await ear.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.INVALID
        assert text in report.error
        worker.check_empty()
        assert not world.lenders.calls


def spoil(take: Take, **changes: Any) -> Take:
    return dataclasses.replace(take, offer=dataclasses.replace(take.offer, **changes))


def a_record(offer: Offer, **changes: Any) -> Any:
    assert offer.record is not None
    return dataclasses.replace(offer.record, **changes)


WRONG = {
    "another lease": lambda pages, last: [
        spoil(pages, lease=dataclasses.replace(pages.offer.lease, generation=9))
    ],
    "another form": lambda pages, last: [spoil(pages, wire_id="float32-2")],
    "a gap": lambda pages, last: [spoil(pages, first_page=1)],
    "the same again": lambda pages, last: [pages, pages],
    "too many pages": lambda pages, last: [
        spoil(pages, pages=(1, 2, 3), digests=(0,) * 6),
    ],
    "too few digests": lambda pages, last: [spoil(pages, digests=pages.offer.digests[1:])],
    "nothing": lambda pages, last: [pages, spoil(last, record=None)],
    "the record before all pages": lambda pages, last: [spoil(last, first_page=0)],
    "a record of another length": lambda pages, last: [
        pages,
        spoil(last, record=a_record(last.offer, num_tokens=LENGTH + 1)),
    ],
    "no first token": lambda pages, last: [pages, dataclasses.replace(last, token_ids=())],
    "no token there is": lambda pages, last: [pages, dataclasses.replace(last, token_ids=(VOCAB_SIZE,))],
    "too many tokens": lambda pages, last: [pages, dataclasses.replace(last, token_ids=(5,) * 10)],
    "more than all": lambda pages, last: [pages, last, last],
}


@virtual
@pytest.mark.parametrize("when", ["at once", "bound"])
@pytest.mark.parametrize("case", WRONG)
async def test_an_offer_that_cannot_be_meant_ends_its_sequence_alone(case: str, when: str) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt, other = await pair.lent(1), await pair.lent(2)
        pages, last = prompt.takes()
        pair.bind(other)
        pair.open(prompt)
        if when == "bound":
            await until(lambda: pair.down.is_bound(1))
        for take in WRONG[case](pages, last):
            pair.down.submit(take)
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.INVALID
        assert pair.down.tokens(1) == []
        await pair.check_handed_over(other)
        await pair.empty()


@virtual
async def test_an_offer_for_a_sequence_that_decodes_already_ends_it() -> None:
    async with a_world() as world:
        pair = Pair(world)
        world.step_seconds = lambda: 0.01
        prompt = await pair.lent(1, max_tokens=500)
        pair.bind(prompt)
        await until(lambda: len(pair.down.tokens(1)) > 2)
        pair.down.submit(prompt.takes()[0])
        report = await pair.down.ended(1, FinishReason.ERROR)
        assert report.error == "an offer came for a sequence that decodes already"
        pair.down.submit(prompt.takes()[0])  # and for one that has ended it is passed over
        pair.down.submit(Renew(sequence_ids=(1,)))  # which is nothing to a decode worker
        await pair.empty()


@virtual
@pytest.mark.parametrize("is_reading", [False, True])
async def test_a_sequence_that_waits_for_offers_gives_way_to_one_that_decodes(is_reading: bool) -> None:
    async with a_world() as world:
        pair = Pair(world, num_pages=8)
        old = await pair.lent(1, max_tokens=2 * PAGE_TOKENS)
        young = await pair.lent(2, length=4 * PAGE_TOKENS + 9)
        pair.open(young)
        await until(lambda: pair.down.is_bound(2))
        pair.decode.link.holds_reads = is_reading
        if is_reading:
            pair.down.submit(young.takes()[0])
            await until(lambda: bool(pair.decode.rank.fetches))
        pair.decode.link.holds_reads = False
        pair.bind(old)
        if is_reading:
            # It cannot be stopped now, and gives way when it waits again.
            await until(lambda: pair.decode.host.load().pages_free == 0)
            await asyncio.sleep(0.1)
            assert not pair.down.has_ended(1)
            assert not pair.down.has_ended(2)
            pair.decode.link.end_reads()
        report = await pair.down.ended(2, FinishReason.ERROR)
        assert (report.error_code, report.error) == (
            ErrorCode.OVERLOADED,
            "its pages were needed by sequences that decode",
        )
        await pair.check_handed_over(old)
        assert pair.decode.count("hand_overs_total", outcome="no_room") == 1
        again = dataclasses.replace(
            young, command=dataclasses.replace(young.command, sequence_id=SequenceId(12))
        )
        pair.bind(again)
        await pair.down.ended(12, FinishReason.LENGTH)
        await pair.empty()


@virtual
async def test_the_shorter_of_both_workers_longest_reads_counts() -> None:
    async with a_world() as world:
        pair = Pair(world)
        first, second = await pair.lent(1), await pair.lent(2)
        quick = [spoil(take, transfer_seconds=0.25) for take in second.takes()]
        pair.bind(first)
        pair.open(second)
        for take in quick:
            pair.down.submit(take)
        for prompt in (first, second):
            await pair.check_handed_over(prompt)
        assert [fetch.seconds for fetch in pair.decode.link.fetches] == [TRANSFER_SECONDS, 0.25]
        await pair.empty()


@virtual
async def test_sessions_share_what_there_is_to_be_promised() -> None:
    async with a_world() as world:
        worker = world.start_decode(num_pages=20, num_slots=6)
        ears: list[Ear] = []
        for share in (
            Credit(sequences=6, pages=20),
            Credit(sequences=3, pages=10),
            Credit(sequences=2, pages=6),
        ):
            ears.append(worker.connect())
            for ear in ears:
                assert worker.host.credit(ear.session) == share
            assert worker.host.welcome().credit == share
            observer = worker.host.connect("an autoscaler", observes=True)
            assert worker.host.credit(ears[-1].session) == share
            observer.close()
        ears.pop().close()
        assert worker.host.credit(ears[0].session) == Credit(sequences=3, pages=10)
        many = [worker.connect() for _ in range(20)]
        assert worker.host.credit(many[0].session) == Credit(sequences=1, pages=0)


@virtual
async def test_pages_that_sequences_have_grown_into_are_not_promised_again() -> None:
    async with a_world() as world:
        pair = Pair(world, num_pages=20)
        other = pair.decode.connect()
        full = Credit(sequences=2, pages=10)
        prompt = await pair.lent(1, length=10, max_tokens=3 * PAGE)
        pair.bind(prompt)
        # It is charged two pages, for its prompt and a page of output, and holds four in the end.
        seen: list[Credit | None] = []
        while not pair.down.has_ended(1):
            seen.append(pair.decode.host.credit(pair.down.session))
            assert pair.decode.host.credit(other.session) == full
            await asyncio.sleep(0)
        assert seen[0] == full
        assert [seen[0], *[b for a, b in itertools.pairwise(seen) if a != b]] == [
            full,
            Credit(sequences=2, pages=9),
            Credit(sequences=2, pages=8),
            Credit(sequences=2, pages=9),  # its last token is on its way: full pages are still to be kept
            full,
        ]
        await pair.check_handed_over(prompt)
        assert pair.decode.host.credit(pair.down.session) == full
        await pair.empty()


@virtual
async def test_a_worker_that_drains_goes_on_with_what_it_has() -> None:
    async with a_world() as world:
        pair = Pair(world)
        world.step_seconds = lambda: 0.1
        prompt, late = await pair.lent(1, max_tokens=50), await pair.lent(2)
        pair.open(prompt)
        await until(lambda: pair.down.is_bound(1))
        draining = asyncio.create_task(pair.decode.host.drain(seconds_max=60))
        await asyncio.sleep(0)
        pair.bind(late)
        assert (await pair.down.ended(2, FinishReason.ERROR)).error_code is ErrorCode.OVERLOADED
        for take in prompt.takes():
            pair.down.submit(take)
        await pair.check_handed_over(prompt)
        assert await draining
        pair.up.submit(Cancel(sequence_id=SequenceId(2)))
        await pair.empty()


@virtual
@pytest.mark.parametrize("is_answered", [True, False])
async def test_a_worker_that_drains_says_first_what_it_has_read(is_answered: bool) -> None:
    async with a_world() as world:
        pair = Pair(world)
        prompt = await pair.lent(1, max_tokens=2)
        world.lenders.shut("release")
        pair.bind(prompt)
        await pair.down.ended(1, FinishReason.LENGTH)
        draining = asyncio.create_task(pair.decode.host.drain(seconds_max=60))
        await asyncio.sleep(CALL_SECONDS / 2)
        assert not draining.done()
        if is_answered:
            world.lenders.open("release")
        await asyncio.sleep(CALL_SECONDS / 2 + 0.01)
        assert draining.done()
        assert await draining
        if is_answered:
            await pair.up.ended(1, FinishReason.HANDED_OVER)
        else:
            await pair.up.ended(1, FinishReason.ERROR)
        await pair.empty()

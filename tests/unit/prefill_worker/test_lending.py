"""The lender behind a real host: what is offered when, how a lease lives and ends, and when its pages come back."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from fake_state import EOS, PAGE_TOKENS, answer, page_digests

from rorqual.ids import Incarnation, LeaseName, WorkerId
from rorqual.session import Cancel, ErrorCode, FinishReason, Open, Renew, Take
from tests.harness.lending import (
    LEASE_SECONDS,
    TRANSFER_SECONDS,
    Computed,
    Ear,
    PrefillWorker,
    World,
    a_world,
    an_open,
    computed,
    the_answer,
    until,
)
from tests.harness.virtual import stand_still, virtual

LENGTH = 700  # two full pages and a partial one
FULL = LENGTH // PAGE_TOKENS


def now() -> float:
    return asyncio.get_running_loop().time()


async def lent(world: World, **options: Any) -> tuple[PrefillWorker, Ear, Computed]:
    """A prompt whose record has just been offered."""
    worker = world.start_prefill(**options)
    ear = worker.connect()
    return worker, ear, await computed(worker, ear, an_open(1, length=LENGTH))


async def renewing(ear: Ear, number: int, *, seconds: float) -> None:
    """As a router does, for so long."""
    for _ in range(round(seconds * 3 / LEASE_SECONDS)):
        ear.submit(Renew(sequence_ids=(number,)))
        await asyncio.sleep(LEASE_SECONDS / 3)


@virtual
async def test_pages_are_offered_as_they_are_computed_then_the_token_then_the_record() -> None:
    async with a_world() as world:
        worker = world.start_prefill()
        ear = worker.connect()
        command = an_open(1, length=5 * PAGE_TOKENS + 9)
        prompt = await computed(worker, ear, command)
        kinds = ["".join(("t" * len(r.token_ids), "o" if r.offer else "")) for r in ear.of(1)]
        assert kinds == ["o", "o", "o", "t", "o"]  # two pages a step, the fifth with the rest
        assert [(offer.first_page, len(offer.pages)) for offer in prompt.offers] == [
            (0, 2),
            (2, 2),
            (4, 1),
            (5, 0),
        ]
        assert ear.tokens(1) == the_answer(command)[:1]
        for offer in prompt.offers:
            assert offer.lease == prompt.offers[0].lease
            assert offer.wire_id == worker.rank.ready().wire_id
            assert offer.lease_seconds == LEASE_SECONDS
            found = [page_digests(worker.rank.memory[page]) for page in offer.pages]
            assert offer.digests == tuple(item for digests in found for item in digests)
        record = prompt.offers[-1].record
        assert record is not None
        assert record.num_tokens == len(command.prompt)
        assert record.num_bytes == len(worker.rank.records[record.record])
        assert not ear.has_ended(1)
        assert worker.host.load().pages_leased == 5
        assert worker.count("leases_granted_total") == worker.count("leases") == 1
        assert worker.count("lease_pages") == 5


@virtual
async def test_a_sequence_of_one_token_is_not_lent() -> None:
    async with a_world() as world:
        worker = world.start_prefill()
        ear = worker.connect()
        command = an_open(1, length=LENGTH, max_tokens=1)
        ear.submit(command)
        await ear.ended(1, FinishReason.LENGTH)
        assert ear.tokens(1) == the_answer(command)
        assert ear.offers(1) == []
        worker.check_empty()
        assert worker.link.exposed == []
        assert worker.count("leases_granted_total") == 0


def an_open_of_one_token_by_its_own_will(length: int) -> Open:
    """It may go on and ends at once."""
    several = (
        dataclasses.replace(an_open(number, length=length), ignore_eos=False) for number in range(1000)
    )
    return next(item for item in several if answer(item.prompt.tolist(), 1, item.sampling) == [EOS])


@virtual
@pytest.mark.parametrize("has_reader", [False, True])
async def test_what_was_offered_of_a_sequence_that_ends_with_its_first_token_is_not_read_any_more(
    has_reader: bool,
) -> None:
    async with a_world() as world:
        world.step_seconds = lambda: 0.1
        worker = world.start_prefill()
        ear = worker.connect()
        command = an_open_of_one_token_by_its_own_will(LENGTH)
        number = command.sequence_id
        ear.submit(command)
        await until(lambda: bool(ear.offers(number)))
        source = _source(ear, number, worker)
        if has_reader:
            assert await world.lenders.renew(source, seconds_max=1) is not None
        await ear.ended(number, FinishReason.STOP)
        assert ear.tokens(number) == [EOS]
        assert await world.lenders.renew(source, seconds_max=1) is None
        await asyncio.sleep(0.9 * TRANSFER_SECONDS)
        assert worker.host.load().pages_leased == (FULL if has_reader else 0)
        await asyncio.sleep(0.2 * TRANSFER_SECONDS)
        worker.check_empty()


@virtual
async def test_a_lease_that_the_router_renews_lives_and_then_ends_by_its_time() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        await renewing(ear, 1, seconds=10 * LEASE_SECONDS)
        # The last renewal was a third of a lease ago.
        left = LEASE_SECONDS * 2 / 3
        await asyncio.sleep(left - 0.01)
        assert not ear.has_ended(1)
        await asyncio.sleep(0.02)
        report = await ear.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.FAILED
        assert report.error == f"the lease of the state expired: nobody renewed it for {LEASE_SECONDS:g} s"
        # Somebody who began to read in time may still be reading.
        await asyncio.sleep(TRANSFER_SECONDS - 0.05)
        assert worker.host.load().pages_leased == FULL
        assert not worker.host.is_idle
        assert worker.link.exposed == [True]
        assert await world.lenders.renew(prompt.source, seconds_max=1) is None
        await asyncio.sleep(0.1)
        worker.check_empty()
        assert worker.link.exposed == [True, False]
        assert worker.count("leases_expired_total") == 1
        assert worker.count("leases_renewed_total", by="router") == 30


@virtual
async def test_a_reader_renews_as_well_as_a_router() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        for _ in range(30):
            assert await world.lenders.renew(prompt.source, seconds_max=1) == LEASE_SECONDS
            await asyncio.sleep(0.9 * LEASE_SECONDS)
        assert not ear.has_ended(1)
        assert worker.count("leases_renewed_total", by="reader") == 30
        await asyncio.sleep(0.1 * LEASE_SECONDS + 0.01)
        await ear.ended(1, FinishReason.ERROR)
        await worker.empty()


@virtual
async def test_renewals_of_what_is_not_lent_are_passed_over() -> None:
    async with a_world() as world:
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(Renew(sequence_ids=(1, 77)))
        worker.link.gate.clear()
        ear.submit(an_open(1, length=LENGTH, max_tokens=1))
        ear.submit(Renew(sequence_ids=(1, 77)))
        worker.link.gate.set()
        await ear.ended(1, FinishReason.LENGTH)
        ear.submit(Renew(sequence_ids=(1, 77)))
        await worker.empty()


@virtual
@pytest.mark.parametrize("how", ["cancel", "session"])
async def test_what_was_lent_of_a_cancelled_sequence_cools_down_if_somebody_may_be_reading(how: str) -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        assert await world.lenders.renew(prompt.source, seconds_max=1) is not None
        if how == "cancel":
            ear.submit(Cancel(sequence_id=prompt.command.sequence_id))
            await ear.ended(1, FinishReason.CANCELLED)
        else:
            ear.close()
        await asyncio.sleep(0.9 * TRANSFER_SECONDS)
        assert await world.lenders.renew(prompt.source, seconds_max=1) is None
        assert not await world.lenders.release(prompt.source, seconds_max=1)
        assert worker.host.load().pages_leased == FULL
        assert worker.rank.lent_pages.keys() == {page for offer in prompt.offers for page in offer.pages}
        await asyncio.sleep(0.2 * TRANSFER_SECONDS)
        worker.check_empty()
        assert not worker.rank.lent_pages
        assert worker.count("leases_revoked_total") == 1
        assert worker.count("leases_renewed_total", by="refused") == 1
        assert worker.count("leases_released_total") == 0


@virtual
@pytest.mark.parametrize("how", ["cancel", "session"])
async def test_what_was_lent_of_a_cancelled_sequence_is_free_at_once_if_nobody_asked_for_it(how: str) -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        await renewing(ear, 1, seconds=2 * LEASE_SECONDS)  # the router does not read
        if how == "cancel":
            ear.submit(Cancel(sequence_id=prompt.command.sequence_id))
        else:
            ear.close()
        await asyncio.sleep(0.001)
        worker.check_empty()
        assert await world.lenders.renew(prompt.source, seconds_max=1) is None
        assert not await world.lenders.release(prompt.source, seconds_max=1)


@virtual
@pytest.mark.parametrize("has_reader", [False, True])
async def test_a_prompt_cancelled_half_way_keeps_back_what_may_be_read_and_nothing_else(
    has_reader: bool,
) -> None:
    async with a_world() as world:
        world.step_seconds = lambda: 0.2
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(an_open(1, length=8 * PAGE_TOKENS))
        await until(lambda: len(ear.offers(1)) == 2)
        if has_reader:
            assert await world.lenders.renew(_source(ear, 1, worker), seconds_max=1) is not None
        assert worker.host.load().pages_free == 16 - 8
        ear.submit(Cancel(sequence_id=1))
        await ear.ended(1, FinishReason.CANCELLED)
        await asyncio.sleep(0.5)  # the steps in flight are over
        load = worker.host.load()
        assert (load.pages_free, load.pages_leased) == ((16 - 4, 4) if has_reader else (16, 0))
        await asyncio.sleep(TRANSFER_SECONDS)
        worker.check_empty()


@virtual
async def test_a_lease_can_expire_while_its_prompt_is_computed() -> None:
    async with a_world() as world:
        world.step_seconds = lambda: LEASE_SECONDS * 0.7
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(an_open(1, length=8 * PAGE_TOKENS))
        await until(lambda: len(ear.offers(1)) == 1)
        began = now()
        report = await ear.ended(1, FinishReason.ERROR)
        assert now() - began == pytest.approx(LEASE_SECONDS, abs=0.01)
        assert report.error_code is ErrorCode.FAILED
        # Two more pages were offered in the meantime, and two are in the step in flight.
        assert len(ear.offers(1)) == 2
        assert worker.host.load().pages_leased == 4
        assert worker.host.load().pages_free == 16 - 4  # nobody has heard of the others
        await asyncio.sleep(TRANSFER_SECONDS + 0.01)
        assert worker.host.load().pages_free == 16
        await worker.empty()  # when the steps in flight are over


@virtual
@pytest.mark.parametrize("seconds", [LEASE_SECONDS, LEASE_SECONDS + TRANSFER_SECONDS, 500.0])
async def test_what_a_worker_computes_after_it_stood_still_is_not_offered_under_a_lease_that_has_ended(
    seconds: float,
) -> None:
    async with a_world() as world:
        world.step_seconds = lambda: 0.2
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(an_open(1, length=8 * PAGE_TOKENS))
        ear.submit(an_open(2, length=8, max_tokens=1))
        await until(lambda: len(ear.offers(1)) == 1)
        await asyncio.sleep(0.1)
        stand_still(seconds)
        report = await ear.ended(1, FinishReason.ERROR)
        assert "expired" in report.error
        assert len(ear.offers(1)) == 1
        await ear.ended(2, FinishReason.LENGTH)
        await worker.empty()
        assert worker.count("leases_expired_total") == 1


@virtual
async def test_a_lease_that_has_ended_while_its_worker_stood_still_is_refused_before_it_is_noticed() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        stand_still(LEASE_SECONDS)
        assert worker.lender.renew_for_reader(prompt.source.lease) is None
        assert not worker.lender.release_for_reader(prompt.source.lease)
        await ear.ended(1, FinishReason.ERROR)
        await worker.empty()


@virtual
async def test_a_record_that_is_packed_after_its_lease_has_ended_is_not_offered() -> None:
    async with a_world() as world:
        world.step_seconds = lambda: 0.2
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(an_open(1, length=2 * PAGE_TOKENS + 9))
        await until(lambda: len(ear.offers(1)) == 1)
        await asyncio.sleep(0.1)
        stand_still(LEASE_SECONDS + TRANSFER_SECONDS)
        await ear.ended(1, FinishReason.ERROR)
        assert [offer.record for offer in ear.offers(1)] == [None]
        await worker.empty()


@virtual
async def test_a_release_hands_the_sequence_over_and_its_pages_are_free_at_once() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        began = now()
        assert await world.lenders.release(prompt.source, seconds_max=1)
        await ear.ended(1, FinishReason.HANDED_OVER)
        await worker.empty()
        assert now() - began < 0.01
        assert worker.link.exposed == [True, False]
        assert worker.count("leases_released_total") == 1
        assert worker.count("sequences_ended_total", reason="handed_over") == 1
        # And its name is worth nothing any more.
        assert await world.lenders.renew(prompt.source, seconds_max=1) is None
        assert not await world.lenders.release(prompt.source, seconds_max=1)


@virtual
async def test_a_cancel_and_a_release_that_cross_end_a_sequence_once() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        ear.submit(Cancel(sequence_id=1))  # queued, when the reader's word comes
        assert worker.lender.release_for_reader(prompt.source.lease)
        await ear.ended(1, FinishReason.CANCELLED)
        await worker.empty()
        assert worker.count("leases_released_total") == 1
        assert worker.count("leases_revoked_total") == 0


@virtual
async def test_a_release_before_the_record_was_offered_is_refused_and_harms_nothing() -> None:
    async with a_world() as world:
        world.step_seconds = lambda: 0.1
        worker = world.start_prefill()
        ear = worker.connect()
        ear.submit(an_open(1, length=4 * PAGE_TOKENS))
        await until(lambda: len(ear.offers(1)) == 1)
        source = _source(ear, 1, worker)
        assert not await world.lenders.release(source, seconds_max=1)
        assert await world.lenders.renew(source, seconds_max=1) == LEASE_SECONDS
        await until(lambda: ear.offers(1)[-1].record is not None)
        assert [offer.first_page for offer in ear.offers(1)] == [0, 2, 4]
        assert await world.lenders.release(source, seconds_max=1)
        await ear.ended(1, FinishReason.HANDED_OVER)
        await worker.empty()


@virtual
async def test_stale_and_foreign_names_do_nothing_to_the_lease_that_runs() -> None:
    async with a_world() as world:
        worker, ear, old = await lent(world, num_records=1)
        assert await world.lenders.release(old.source, seconds_max=1)
        prompt = await computed(worker, ear, an_open(2, length=LENGTH))
        live = prompt.source.lease
        assert (live.lease_id, live.generation) == (old.source.lease.lease_id, 2)
        foreign = [
            old.source.lease,
            dataclasses.replace(live, generation=3),
            dataclasses.replace(live, incarnation=Incarnation(live.incarnation + 1)),
            dataclasses.replace(live, worker_id=WorkerId("another")),
            dataclasses.replace(live, lease_id=7),
            LeaseName(worker_id=live.worker_id, incarnation=live.incarnation, lease_id=2**63, generation=0),
        ]
        await asyncio.sleep(0.5 * LEASE_SECONDS)
        for name in foreign:
            source = dataclasses.replace(prompt.source, lease=name)
            assert await world.lenders.renew(source, seconds_max=1) is None
            assert not await world.lenders.release(source, seconds_max=1)
        assert worker.count("leases_renewed_total", by="refused") == len(foreign)
        await asyncio.sleep(0.4 * LEASE_SECONDS)
        assert await world.lenders.renew(prompt.source, seconds_max=1) is not None  # it runs
        await asyncio.sleep(0.4 * LEASE_SECONDS)
        assert await world.lenders.release(prompt.source, seconds_max=1)
        await ear.ended(2, FinishReason.HANDED_OVER)
        await worker.empty()


@virtual
async def test_leases_end_one_by_one_each_at_its_time() -> None:
    async with a_world() as world:
        worker = world.start_prefill()
        ear = worker.connect()
        ends: list[float] = []
        for number in (1, 2, 3):
            await computed(worker, ear, an_open(number, length=LENGTH))
            ends.append(now() + LEASE_SECONDS)
            await asyncio.sleep(0.5)
        for number, end in zip((1, 2, 3), ends, strict=True):
            await ear.ended(number, FinishReason.ERROR)
            assert now() == pytest.approx(end, abs=0.02)
        await asyncio.sleep(ends[0] + TRANSFER_SECONDS + 0.1 - now())
        assert worker.host.load().pages_leased == 2 * FULL
        await asyncio.sleep(ends[-1] + TRANSFER_SECONDS + 0.1 - now())
        worker.check_empty()
        assert worker.link.exposed == [True, False]


@virtual
async def test_a_prompt_waits_for_the_record_of_another_one() -> None:
    async with a_world() as world:
        worker, ear, first = await lent(world, num_records=1)
        second = an_open(2, length=LENGTH)
        ear.submit(second)
        await asyncio.sleep(0.5 * LEASE_SECONDS)
        assert worker.host.load().sequences_waiting == 1
        assert ear.of(2) == []
        # A read that has begun must be over before the record can be packed again.
        assert await world.lenders.renew(first.source, seconds_max=1) is not None
        ear.submit(Cancel(sequence_id=first.command.sequence_id))
        began = now()
        await until(lambda: bool(ear.tokens(2)))
        assert now() - began == pytest.approx(TRANSFER_SECONDS, abs=0.01)
        await until(lambda: ear.offers(2)[-1].record is not None)
        assert await world.lenders.release(_source(ear, 2, worker), seconds_max=1)
        await ear.ended(2, FinishReason.HANDED_OVER)
        await worker.empty()


@virtual
async def test_a_worker_that_drains_waits_until_its_state_was_read() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        draining = asyncio.create_task(worker.host.drain(seconds_max=60))
        await renewing(ear, 1, seconds=5 * LEASE_SECONDS)
        assert not draining.done()
        ear.submit(an_open(2))
        assert (await ear.ended(2, FinishReason.ERROR)).error_code is ErrorCode.OVERLOADED
        assert await world.lenders.release(prompt.source, seconds_max=1)
        assert await draining
        await ear.ended(1, FinishReason.HANDED_OVER)
        await worker.empty()


@virtual
async def test_a_drain_that_outlives_its_deadline_ends_the_leases_too() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        assert not await worker.host.drain(seconds_max=0.5)
        assert (await ear.ended(1, FinishReason.ERROR)).error == "the worker is shutting down"
        assert await world.lenders.renew(prompt.source, seconds_max=1) is None
        await asyncio.sleep(TRANSFER_SECONDS + 0.01)
        worker.check_empty()


@virtual
async def test_what_is_meant_for_a_decode_worker_is_refused() -> None:
    async with a_world() as world:
        worker, ear, prompt = await lent(world)
        ear.submit(an_open(2, source=prompt.source))
        report = await ear.ended(2, FinishReason.ERROR)
        assert (report.error_code, report.error) == (ErrorCode.INVALID, "a prefill worker reads no state")
        ear.submit(Take(sequence_id=prompt.command.sequence_id, offer=prompt.offers[0]))
        report = await ear.ended(1, FinishReason.ERROR)
        assert report.error_code is ErrorCode.INVALID
        assert worker.host.credit(ear.session) is None
        await asyncio.sleep(TRANSFER_SECONDS + 0.01)
        worker.check_empty()


@virtual
async def test_two_routers_have_each_its_own_leases() -> None:
    async with a_world() as world:
        worker, ear, first = await lent(world)
        other = worker.connect()
        command: Open = an_open(1, length=300)
        second = await computed(worker, other, command)
        assert first.source.lease != second.source.lease
        ear.close()
        await asyncio.sleep(0.1)
        assert await world.lenders.renew(first.source, seconds_max=1) is None
        assert await world.lenders.release(second.source, seconds_max=1)
        await other.ended(1, FinishReason.HANDED_OVER)
        await asyncio.sleep(TRANSFER_SECONDS)
        worker.check_empty()


def _source(ear: Ear, number: int, worker: PrefillWorker) -> Any:
    offers = ear.offers(number)
    return Computed(command=an_open(number), offers=offers, tokens=(), address=worker.address).source

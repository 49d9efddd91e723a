"""Prefixes read from other workers, by hosts over strict fake ranks: the same answers, whatever goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_rank import NUM_PAGE_COMPONENTS, FakeRank
from fake_reads import ReadingLink
from fake_state import RECORD_BYTES, answer
from prometheus_client import CollectorRegistry

from engine.worker.host import Host, HostConfig
from engine.worker.metrics import WorkerMetrics
from engine.worker.session import Session
from engine.worker.sharing.exposure import Exposure
from engine.worker.sharing.handler import SharingHandler
from engine.worker.sharing.key_lending import KeyLender, KeyLenderConfig, KeyLendingMetrics
from engine.worker.sharing.lenders import LendingFailed
from engine.worker.sharing.peer_reading import PeerReader, PeerReaderConfig, PeerReadMetrics
from engine.worker.wire import LeaseKeysRequest
from kvstore.transfer.contract import Endpoint
from prefill_worker.lending import Lender, LenderConfig
from prefill_worker.metrics import LendingMetrics
from rorqual.ids import Incarnation, SequenceId, WorkerId
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance.sources import PROBE_SECONDS, SAMPLES_MIN
from rorqual.sampling import SamplingParams
from rorqual.session import Offer, Open, PeerFetch, Source
from tests.harness.virtual import LoopClock, virtual

LEASE_SECONDS, TRANSFER_SECONDS = 3.0, 1.0


@dataclass
class Worker:
    name: str
    host: Host
    link: ReadingLink
    keys: KeyLender
    metrics: WorkerMetrics

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"rorqual_worker_{name}", labels) or 0.0


@dataclass
class Neighbours:
    """Workers that reach each other by name: `engine.worker.lenders.KeyLenders`."""

    workers: dict[str, Worker] = field(default_factory=dict)
    changes: Callable[[Offer | None], Offer | None] = lambda offer: offer
    before_renewal: Callable[[], None] = lambda: None
    call_seconds: float = 0.0

    async def _keys(self, address: str) -> KeyLender:
        await asyncio.sleep(self.call_seconds)
        if address not in self.workers:
            raise LendingFailed(f"{address}: nobody answers")
        return self.workers[address].keys

    async def attach(self, source: Source, *, seconds_max: float) -> Endpoint:
        await self._keys(source.address)
        endpoint = self.workers[source.address].link.rank.ready().endpoint
        assert endpoint is not None
        return endpoint

    async def renew(self, source: Source, *, seconds_max: float) -> float | None:
        self.before_renewal()
        return (await self._keys(source.address)).renew_for_reader(source.lease)

    async def release(self, source: Source, *, seconds_max: float) -> bool:
        return (await self._keys(source.address)).release_for_reader(source.lease)

    async def lease_keys(
        self, address: str, request: LeaseKeysRequest, *, seconds_max: float
    ) -> Offer | None:
        return self.changes(await (await self._keys(address)).lease(request))


def a_worker(
    name: str, incarnation: int, neighbours: Neighbours, ranks: dict[str, FakeRank], **pools: int
) -> Worker:
    sizes = {"num_pages": 40, "num_slots": 4, "num_records": 8} | pools
    rank = ranks[name] = FakeRank(prefill_tokens_max=512, agent=name, **sizes)
    metrics, clock, exposure = WorkerMetrics(), LoopClock(), Exposure()
    ready, names = rank.ready(), {"worker_id": WorkerId(name), "incarnation": Incarnation(incarnation)}
    seconds = {"lease_seconds": LEASE_SECONDS, "transfer_seconds_max": TRANSFER_SECONDS}
    lender = Lender(
        LenderConfig(**names, wire_id=ready.wire_id, num_records=ready.num_records, **seconds),
        clock=clock,
        metrics=LendingMetrics(CollectorRegistry()),
        exposure=exposure,
    )
    keys = KeyLender(
        KeyLenderConfig(**names, wire_id=ready.wire_id, **seconds),
        clock=clock,
        metrics=KeyLendingMetrics(metrics.registry),
        exposure=exposure,
    )
    reader = PeerReader(
        PeerReaderConfig(
            wire_id=ready.wire_id, num_page_components=NUM_PAGE_COMPONENTS, transfer_seconds_max=1.0
        ),
        lenders=neighbours,
        clock=clock,
        metrics=PeerReadMetrics(metrics.registry),
    )
    link = ReadingLink(rank, ranks)
    config = HostConfig(**names, exact=False, prefill_tokens_max=512)
    handler = SharingHandler(lender, keys=keys, reader=reader)
    host = Host(link=link, ready=ready, config=config, metrics=metrics, handler=handler)
    worker = neighbours.workers[name] = Worker(name, host, link, keys, metrics)
    return worker


@asynccontextmanager
async def two_workers(**pools: int) -> AsyncIterator[tuple[Worker, Worker, Neighbours]]:
    """The owner, and the one that reads."""
    neighbours, ranks = Neighbours(), {}
    workers = [a_worker(name, number, neighbours, ranks, **pools) for number, name in ((1, "a"), (2, "b"))]
    serving = [asyncio.create_task(worker.host.run()) for worker in workers]
    await asyncio.sleep(0.01)
    try:
        yield workers[0], workers[1], neighbours
        await asyncio.sleep(LEASE_SECONDS + TRANSFER_SECONDS + 1)
        for worker in workers:
            check_empty(worker)
        assert not any(task.done() for task in serving)
    finally:
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def check_empty(worker: Worker) -> None:
    load, scheduler = worker.host.load(), worker.host.scheduler
    scheduler.check_all()
    assert worker.host.is_idle
    assert (load.pages_free, load.slots_free, load.pages_leased) == (load.pages_total, load.slots_total, 0)
    assert scheduler.num_records_free == worker.link.rank.num_records
    assert scheduler.imports.num_open == 0
    assert worker.count("key_leases_open") == 0
    assert not worker.link.exposed or not worker.link.exposed[-1]


def a_prompt(length: int) -> list[int]:
    return [(7 * i + i // 90) % 90 for i in range(length)]


def fetch_of(num_pages: int, *, tail: bool = True, seconds: float = 1.0, address: str = "a") -> PeerFetch:
    return PeerFetch(address=address, num_pages=num_pages, wants_tail=tail, seconds_max=seconds)


async def ask(worker: Worker, length: int, fetch: PeerFetch | None = None, **options: Any) -> int:
    """Cached tokens of a prompt of one token's answer, which is checked."""
    session: Session = worker.host.connect("r")
    prompt, sampling = a_prompt(length), SamplingParams(seed=3)
    session.submit(
        Open(
            sequence_id=SequenceId(1),
            request_id="r1",
            prompt=np.array(prompt, dtype=np.int32),
            max_tokens=1,
            ignore_eos=True,
            sampling=sampling,
            fetch=fetch,
            **options,
        )
    )
    async with asyncio.timeout(60):
        while not (reports := (await session.next_report()).sequences):
            pass
    session.close()
    assert reports[0].token_ids == tuple(answer(prompt, 1, sampling, ignore_eos=True)), reports[0].error
    return reports[0].cached_tokens


@virtual
async def test_pages_and_tail_of_another_worker_are_read_and_nothing_of_them_is_computed() -> None:
    async with two_workers() as (owner, reader, _):
        await ask(owner, 1300)
        assert await ask(reader, 1400, fetch_of(5)) == 5 * PAGE_TOKENS
        assert reader.link.rank.num_tokens_computed == 1400 - 5 * PAGE_TOKENS
        assert reader.count("peer_reads_total", outcome="read") == 1
        assert reader.count("peer_pages_read_total") == 5
        assert owner.count("key_leases_ended_total", how="released") == 1
        # Now it is here: nothing is asked for any more.
        assert await ask(reader, 1300, fetch_of(5)) == 5 * PAGE_TOKENS
        assert owner.count("key_leases_total", outcome="granted") == 1


@virtual
async def test_only_pages_that_are_missing_are_read() -> None:
    async with two_workers() as (owner, reader, _):
        await ask(owner, 1300)
        await ask(reader, 600)
        assert await ask(reader, 1400, fetch_of(5)) == 5 * PAGE_TOKENS
        (fetch,) = reader.link.fetches
        assert len(fetch.source_pages) == 3
        assert fetch.record is not None


@virtual
async def test_reads_are_measured_and_told_to_routers_for_a_while() -> None:
    async with two_workers(num_pages=80) as (owner, reader, neighbours):
        neighbours.call_seconds = 0.25
        for number in range(SAMPLES_MIN):
            assert reader.host.load().peer_bytes_per_second == 0
            for worker, fetch in ((owner, None), (reader, fetch_of(5, seconds=3.0))):
                await ask(worker, 1400, fetch, cache_salt=f"salt {number}")
        load, speed = reader.host.load(), reader.host.scheduler.speeds.peer.speed
        assert load.peer_bytes_per_second == speed.bytes_per_second
        assert load.peer_latency_seconds == speed.latency_seconds > 0
        assert reader.count("source_reads_measured", source="peer") == SAMPLES_MIN
        # The call that leases is part of a read; connecting and renewing are not.
        (num_bytes,) = {5 * 4 * PAGE_TOKENS + RECORD_BYTES}
        assert 0.25 <= float(speed.seconds(num_bytes)) < 0.5
        await asyncio.sleep(PROBE_SECONDS)
        await ask(reader, 10)
        assert reader.host.load().peer_bytes_per_second == 0


@virtual
async def test_what_was_read_is_lent_on() -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)
        await ask(reader, 1300, fetch_of(5))
        request = LeaseKeysRequest(
            wire_id=reader.keys.config.wire_id,
            keys=reader.host.scheduler.cache.keys_of(np.array(a_prompt(1300), np.int32), salt=""),
            first_page=0,
            wants_tail=True,
        )
        offer = await neighbours.lease_keys("b", request, seconds_max=1.0)
        assert offer is not None
        assert (len(offer.pages), offer.record.num_tokens) == (5, 5 * PAGE_TOKENS)
        assert reader.keys.release_for_reader(offer.lease)


@virtual
async def test_bytes_that_are_not_the_owners_never_reach_the_cache() -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)

        def lie(offer: Offer | None) -> Offer | None:
            assert offer is not None
            return dataclasses.replace(offer, digests=(offer.digests[0] ^ 1, *offer.digests[1:]))

        neighbours.changes = lie
        assert await ask(reader, 1300, fetch_of(5)) == 0
        assert reader.count("peer_reads_total", outcome="failed") == 1
        assert reader.link.rank.num_tokens_computed == 1300


@pytest.mark.parametrize(
    "change",
    [
        lambda offer: dataclasses.replace(offer, wire_id="other"),
        lambda offer: dataclasses.replace(offer, first_page=1),
        lambda offer: dataclasses.replace(offer, digests=offer.digests[1:]),
        lambda offer: dataclasses.replace(offer, pages=offer.pages * 2, digests=offer.digests * 2),
        lambda offer: dataclasses.replace(
            offer, record=dataclasses.replace(offer.record, num_tokens=99 * 256)
        ),
        lambda offer: dataclasses.replace(offer, record=dataclasses.replace(offer.record, digest=1)),
    ],
    ids=["wire id", "first page", "digests", "more pages", "tail beyond", "tail digest"],
)
@virtual
async def test_an_offer_that_cannot_be_meant_is_passed_over(change: Callable[[Offer], Offer]) -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)
        neighbours.changes = lambda offer: change(offer) if offer is not None else None
        assert await ask(reader, 1300, fetch_of(5)) == 0
        assert reader.count("peer_reads_total", outcome="failed") == 1


@virtual
async def test_an_owner_that_is_gone_or_has_nothing_costs_a_count_and_no_answer() -> None:
    async with two_workers() as (owner, reader, _):
        assert await ask(reader, 700, fetch_of(2, address="nobody")) == 0
        assert reader.count("peer_reads_total", outcome="failed") == 1
        assert await ask(reader, 1300, fetch_of(5)) == 2 * PAGE_TOKENS
        assert reader.count("peer_reads_total", outcome="gone") == 1
        assert owner.count("key_leases_total", outcome="gone") == 1


@virtual
async def test_an_owner_that_dies_while_it_is_read_from_costs_time_and_no_answer() -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)
        reader.link.holds_reads = True
        asking = asyncio.create_task(ask(reader, 1300, fetch_of(5, seconds=0.5)))
        while not reader.link.rank.fetches:
            await asyncio.sleep(0.01)
        del neighbours.workers["a"]
        assert await asking == 0
        assert reader.count("peer_reads_total", outcome="overdue") == 1
        reader.link.end_reads()


@virtual
async def test_memory_stays_apart_until_a_read_that_is_overdue_has_ended() -> None:
    async with two_workers(num_pages=12) as (owner, reader, _):
        await ask(owner, 1300)
        reader.link.holds_reads = True
        assert await ask(reader, 1300, fetch_of(5, seconds=0.5)) == 0
        load = reader.host.load()
        assert load.pages_free == load.pages_total - 5
        assert not reader.host.is_idle
        for length in (
            800,
            1500,
            900,
        ):  # and nobody is given what is written into, which the fake rank asserts
            await ask(reader, length)
        reader.link.end_reads()


@virtual
async def test_nothing_is_read_into_memory_that_a_plan_in_flight_may_still_write() -> None:
    async with two_workers(num_pages=12) as (owner, reader, _):
        await ask(owner, 1300)
        await ask(reader, 300, fetch_of(1))  # the rank knows the owner from now on
        reader.link.gate.clear()
        num_plans = len(reader.link.plans)
        session = reader.host.connect("r")
        other = np.arange(11 * PAGE_TOKENS - 10, dtype=np.int32) % 50
        session.submit(
            Open(
                sequence_id=SequenceId(1),
                request_id="r1",
                prompt=other,
                max_tokens=1,
                ignore_eos=True,
                sampling=SamplingParams(seed=3),
            )
        )
        while len(reader.link.plans) == num_plans:
            await asyncio.sleep(0.01)
        session.close()  # and all its pages are free
        asking = asyncio.create_task(ask(reader, 1300, fetch_of(5, seconds=9.0)))
        await asyncio.sleep(0.5)
        assert owner.count("key_leases_total", outcome="granted") == 2
        assert len(reader.link.fetches) == 1
        reader.link.gate.set()
        assert await asking == 5 * PAGE_TOKENS
        assert len(reader.link.fetches) == 2


@virtual
async def test_a_lease_that_ended_before_the_proof_makes_what_was_read_worthless() -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)

        def end_leases() -> None:
            for name in list(owner.keys._ledger._held):
                owner.keys.release_for_reader(name)

        neighbours.before_renewal = end_leases
        assert await ask(reader, 1300, fetch_of(5)) == 0
        assert reader.count("peer_reads_total", outcome="failed") == 1


@virtual
async def test_pages_that_are_lent_are_not_evicted_and_come_free_when_the_reader_vanishes() -> None:
    async with two_workers(num_pages=12) as (owner, _, neighbours):
        await ask(owner, 1300)
        keys = owner.host.scheduler.cache.keys_of(np.array(a_prompt(1300), np.int32), salt="")
        request = LeaseKeysRequest(
            wire_id=owner.keys.config.wire_id, keys=keys, first_page=0, wants_tail=True
        )
        assert await neighbours.lease_keys("a", request, seconds_max=1.0) is not None
        assert owner.host.load().pages_free == 7
        assert owner.link.exposed[-1]
        await asyncio.sleep(LEASE_SECONDS + TRANSFER_SECONDS + 0.1)
        assert owner.host.load().pages_free == 12
        assert owner.count("key_leases_ended_total", how="expired") == 1


@virtual
async def test_an_owner_lends_no_more_than_its_bound() -> None:
    async with two_workers(num_pages=12) as (owner, _, neighbours):
        await ask(owner, 1300)
        keys = owner.host.scheduler.cache.keys_of(np.array(a_prompt(1300), np.int32), salt="")
        request = LeaseKeysRequest(
            wire_id=owner.keys.config.wire_id, keys=keys, first_page=0, wants_tail=False
        )
        assert await neighbours.lease_keys("a", request, seconds_max=1.0) is not None
        assert (
            await neighbours.lease_keys("a", request, seconds_max=1.0) is None
        )  # 10 of 12 pages would be out
        assert owner.count("key_leases_total", outcome="full") == 1


@virtual
async def test_a_sequence_cancelled_while_it_waits_leaves_what_is_read_for_the_next() -> None:
    async with two_workers() as (owner, reader, neighbours):
        await ask(owner, 1300)
        neighbours.call_seconds = 0.1
        asking = asyncio.create_task(ask(reader, 1300, fetch_of(5)))
        await asyncio.sleep(0.15)
        session = next(iter(reader.host._sessions))
        session.close()
        asking.cancel()
        await asyncio.sleep(1.0)
        assert reader.count("peer_reads_total", outcome="read") == 1
        assert await ask(reader, 1300) == 5 * PAGE_TOKENS


@virtual
async def test_under_another_salt_nothing_is_found() -> None:
    async with two_workers() as (owner, reader, _):
        await ask(owner, 1300, cache_salt="one")
        assert await ask(reader, 1300, fetch_of(5), cache_salt="two") == 0
        assert owner.count("key_leases_total", outcome="gone") == 1


@pytest.mark.parametrize("host", [{}, {"num_host_pages": 9, "num_host_records": 3}], ids=["", "host"])
@virtual
async def test_many_prompts_read_from_each_other_in_tiny_pools_and_all_comes_back(
    host: dict[str, int],
) -> None:
    async with two_workers(num_pages=14, num_records=4, **host) as (one, other, neighbours):
        neighbours.call_seconds = 0.01
        lengths = [300, 700, 1300, 1500, 900, 1100] * 4
        for at in range(0, len(lengths), 3):
            await asyncio.gather(
                *(
                    ask(worker, length, fetch_of(length // 256, address=peer))
                    for length in lengths[at : at + 3]
                    for worker, peer in ((one, "b"), (other, "a"))
                )
            )

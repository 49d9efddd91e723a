"""Which owners the rank knows: asked for once, shared by all who read from them, made anew when something broke."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from decode_worker.metrics import BorrowingMetrics
from engine.plan import PeerClose, PeerOpen, PeerOpened, ToTransfer
from engine.worker.sharing.lenders import LendingFailed
from engine.worker.sharing.peers import PEERS_MAX, Peers
from kvstore.transfer.contract import Endpoint
from rorqual.ids import Incarnation, LeaseName, WorkerId
from rorqual.session import Source
from tests.harness.virtual import virtual

SECONDS_MAX = 3.0


class Owners:
    """`engine.worker.lenders.Lenders` as far as an endpoint is asked for."""

    def __init__(self) -> None:
        self.asked: list[Source] = []
        self.failure: LendingFailed | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def attach(self, source: Source, *, seconds_max: float) -> Endpoint:
        assert seconds_max == SECONDS_MAX
        self.asked.append(source)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return Endpoint(backend="fake", agent=f"{source.address}", metadata=b"", regions=())

    async def renew(self, source: Source, *, seconds_max: float) -> float | None:
        raise NotImplementedError

    async def release(self, source: Source, *, seconds_max: float) -> bool:
        raise NotImplementedError


class Bench:
    """The rank answers at once, unless it is `silent`."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.owners = Owners()
        self.open: list[int] = []  # known to the rank
        self.sent: list[ToTransfer] = []
        self.error = ""
        self.silent = False
        self.tasks = tasks
        self.registry = CollectorRegistry()
        self.peers = Peers(
            lenders=self.owners,
            send=self._send,
            tasks=tasks,
            seconds_max=SECONDS_MAX,
            metrics=BorrowingMetrics(self.registry),
        )

    def _send(self, message: ToTransfer) -> None:
        self.sent.append(message)
        match message:
            case PeerOpen():
                assert message.peer not in self.open
                self.open.append(message.peer)
                if not self.silent:
                    answer = PeerOpened(peer=message.peer, error=self.error)
                    asyncio.get_running_loop().call_soon(self.peers.opened, answer)
            case PeerClose():
                self.open.remove(message.peer)
            case _:
                raise AssertionError(f"sent {message}")


@asynccontextmanager
async def a_bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        yield Bench(tasks)


def a_source(address: str = "a", *, incarnation: int = 1, lease: int = 0) -> Source:
    name = LeaseName(
        worker_id=WorkerId(address), incarnation=Incarnation(incarnation), lease_id=lease, generation=1
    )
    return Source(address=address, lease=name, wire_id="wire")


@virtual
async def test_an_owner_is_asked_once_for_all_leases_and_all_who_want_it_at_once() -> None:
    async with a_bench() as bench:
        bench.owners.gate.clear()
        waiting = [asyncio.create_task(bench.peers.get(a_source(lease=number))) for number in range(5)]
        await asyncio.sleep(1)
        bench.owners.gate.set()
        found = [await task for task in waiting]
        assert len(set(found)) == 1
        assert found[0].num_users == 5
        assert len(bench.owners.asked) == 1
        for peer in found:
            bench.peers.put(peer)
        assert bench.open == [1]  # it stays known
        assert await bench.peers.get(a_source(lease=9)) is found[0]
        assert len(bench.owners.asked) == bench.peers.num_peers == 1


@virtual
async def test_an_owner_that_cannot_be_asked_fails_all_who_wait_and_is_asked_anew() -> None:
    async with a_bench() as bench:
        bench.owners.failure = LendingFailed("no such owner")
        results = await asyncio.gather(
            *(bench.peers.get(a_source()) for _ in range(3)), return_exceptions=True
        )
        assert [str(result) for result in results] == ["no such owner"] * 3
        assert bench.sent == []
        bench.owners.failure = None
        assert (await bench.peers.get(a_source())).num_users == 1
        assert len(bench.owners.asked) == 2


@virtual
async def test_memory_that_the_rank_cannot_reach_is_closed_and_opened_anew() -> None:
    async with a_bench() as bench:
        bench.error = "no such segment"
        with pytest.raises(LendingFailed, match="a: its memory cannot be read: no such segment"):
            await bench.peers.get(a_source())
        assert bench.open == []
        bench.error = ""
        assert (await bench.peers.get(a_source())).number == 2
        assert bench.open == [2]


@virtual
async def test_a_rank_that_is_silent_is_waited_for_until_the_deadline_and_then_not_believed() -> None:
    async with a_bench() as bench:
        bench.silent = True
        began = asyncio.get_running_loop().time()
        with pytest.raises(LendingFailed, match="was not known to the rank within 3 s") as caught:
            await bench.peers.get(a_source())
        assert caught.value.is_overdue
        overdue = bench.registry.get_sample_value("rorqual_worker_stages_overdue_total", {"stage": "attach"})
        assert overdue == 1
        assert asyncio.get_running_loop().time() - began == pytest.approx(SECONDS_MAX)
        bench.peers.opened(PeerOpened(peer=1))  # at last
        assert bench.open == []
        bench.silent = False
        assert (await bench.peers.get(a_source())).number == 2
        bench.peers.opened(PeerOpened(peer=1, error="no"))
        bench.peers.opened(PeerOpened(peer=2, error="twice"))
        assert (await bench.peers.get(a_source())).number == 2


@virtual
async def test_who_is_cancelled_while_an_owner_becomes_known_takes_nobody_with_him() -> None:
    async with a_bench() as bench:
        bench.owners.gate.clear()
        first, second = (asyncio.create_task(bench.peers.get(a_source())) for _ in range(2))
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.sleep(1)
        bench.owners.gate.set()
        peer = await second
        assert first.cancelled()
        assert peer.num_users == 1
        bench.peers.put(peer)
        assert bench.open == [1]


@virtual
@pytest.mark.parametrize("when", ["before", "with"])
async def test_an_owner_that_nobody_waits_for_any_more_is_not_kept_as_a_failure(when: str) -> None:
    """Cancelled before the failure is known, or in the same breath."""
    async with a_bench() as bench:
        bench.error = "no such segment"
        bench.silent = True
        waiting = asyncio.create_task(bench.peers.get(a_source()))
        await asyncio.sleep(1)
        if when == "before":
            waiting.cancel()
            await asyncio.sleep(1)
            bench.peers.opened(PeerOpened(peer=1, error=bench.error))
        else:
            bench.peers.opened(PeerOpened(peer=1, error=bench.error))
            await asyncio.sleep(0)  # the failure is known, and its waiter is about to hear of it
            waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0)
        assert waiting.cancelled()
        assert bench.open == []
        assert bench.peers.num_peers == 0
        bench.silent, bench.error = False, ""
        assert (await bench.peers.get(a_source())).number == 2


@virtual
async def test_a_broken_owner_is_closed_when_its_last_user_is_done_and_known_anew_at_once() -> None:
    async with a_bench() as bench:
        old = await bench.peers.get(a_source())
        assert await bench.peers.get(a_source()) is old
        bench.peers.put(old, is_broken=True)
        new = await bench.peers.get(a_source())
        assert (old.number, new.number) == (1, 2)
        assert bench.open == [1, 2]
        bench.peers.put(old)
        assert bench.open == [2]
        bench.peers.put(new)
        assert await bench.peers.get(a_source()) is new


@virtual
async def test_an_owner_goes_when_its_successor_comes_unless_somebody_still_reads_from_it() -> None:
    async with a_bench() as bench:
        idle = await bench.peers.get(a_source("idle"))
        bench.peers.put(idle)
        first = await bench.peers.get(a_source())
        second = await bench.peers.get(a_source(incarnation=2))
        assert first is not second
        assert bench.open == [1, 2, 3]
        bench.peers.put(first)
        bench.peers.put(second)
        bench.peers.put(await bench.peers.get(a_source(incarnation=3)))
        assert bench.open == [1, 4]
        assert await bench.peers.get(a_source("idle")) is idle


@virtual
async def test_an_owner_whose_successor_comes_before_it_is_known_is_not_kept() -> None:
    async with a_bench() as bench:
        bench.owners.gate.clear()
        waiting = asyncio.create_task(bench.peers.get(a_source()))
        await asyncio.sleep(1)
        waiting.cancel()
        await asyncio.sleep(1)
        successor = asyncio.create_task(bench.peers.get(a_source(incarnation=2)))
        await asyncio.sleep(1)
        bench.owners.gate.set()
        assert (await successor).number == 2
        await asyncio.sleep(1)
        assert bench.open == [2]


@virtual
async def test_of_many_owners_those_that_were_wanted_longest_ago_go() -> None:
    async with a_bench() as bench:
        used = await bench.peers.get(a_source("used"))
        for number in range(PEERS_MAX - 1):
            bench.peers.put(await bench.peers.get(a_source(f"{number}")))
        assert bench.peers.num_peers == PEERS_MAX
        bench.peers.put(await bench.peers.get(a_source("0")))
        await bench.peers.get(a_source("one more"))
        assert bench.peers.num_peers == PEERS_MAX
        num_asked = len(bench.owners.asked)
        assert await bench.peers.get(a_source("used")) is used
        await bench.peers.get(a_source("0"))
        assert len(bench.owners.asked) == num_asked
        await bench.peers.get(a_source("1"))
        assert bench.owners.asked[-1].address == "1"
        assert bench.peers.num_peers == PEERS_MAX

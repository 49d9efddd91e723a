"""The thread that owns an engine, over an engine whose reads end when the test says so."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_transfer import ENDPOINT, FakeTransfer

from kvstore.transfer import owner as owner_module
from kvstore.transfer.contract import Endpoint, PeerId, ReadId, Run
from kvstore.transfer.owner import (
    COMMANDS_MAX,
    POST_BYTES_MAX,
    Connect,
    Connected,
    Disconnect,
    Event,
    Expose,
    Fetch,
    Fetched,
    Overdue,
    OwnerLoop,
    TransferOwner,
)
from rorqual.clock import ManualClock

PART = POST_BYTES_MAX


def fetch(number: int, *, num_bytes: int = 10, peer: int = 1, seconds: float = 5, **kwargs: Any) -> Fetch:
    runs = [Run(region="c4", source=0, target=0, num_bytes=num_bytes)] if num_bytes else []
    kwargs.setdefault("verify", lambda: "")
    return Fetch(fetch=number, peer=PeerId(peer), runs=runs, seconds=seconds, **kwargs)


class Loop:
    """An OwnerLoop by hand."""

    def __init__(self) -> None:
        self.engine = FakeTransfer()
        self.clock = ManualClock(100.0)
        self.events: list[Event] = []
        self.loop = OwnerLoop(self.engine, self.events.append, self.clock)

    def take(self, command: owner_module.Command) -> None:
        self.loop.take(command, submitted_at=self.clock.now)

    def look(self, times: int = 1) -> list[Event]:
        """What came of that many looks."""
        self.events.clear()
        for _ in range(times):
            self.loop.look()
        return list(self.events)


@pytest.fixture
def loop() -> Loop:
    return Loop()


def fetched(number: int, error: str = "", *, num_bytes: int = 0) -> Fetched:
    return Fetched(fetch=number, error=error, num_bytes=num_bytes, transfer_ms=0.0, verify_ms=0.0)


def test_a_fetch_is_answered_once_when_its_read_is_done(loop: Loop):
    loop.take(fetch(1))
    assert loop.look(5) == []
    loop.engine.done.add(ReadId(0))
    assert loop.look(5) == [fetched(1, num_bytes=10)]


def test_what_was_read_is_verified_after_it_has_come(loop: Loop):
    seen: list[set[ReadId]] = []

    def verify() -> str:
        seen.append(set(loop.engine.open))
        loop.clock.advance(0.25)
        return "page 3: digest differs"

    loop.take(fetch(1, verify=verify))
    loop.look(2)
    assert seen == []
    loop.clock.advance(0.5)
    loop.engine.done.add(ReadId(0))
    assert loop.look(2) == [
        Fetched(fetch=1, error="page 3: digest differs", num_bytes=10, transfer_ms=500.0, verify_ms=250.0)
    ]
    assert seen == [set()]


def never() -> str:
    raise AssertionError("verified although it was not read in time")


def test_a_read_that_fails_is_not_verified(loop: Loop):
    loop.take(fetch(1, verify=never))
    loop.look()
    loop.engine.failed.add(ReadId(0))
    assert loop.look(3) == [fetched(1, "lost")]


def test_a_read_that_cannot_be_posted_is_answered(loop: Loop):
    loop.take(fetch(1, peer=-1, verify=never))
    assert loop.look(3) == [fetched(1, "not posted")]


def test_an_overdue_fetch_is_told_of_once_and_polled_on(loop: Loop):
    loop.take(fetch(1, seconds=2.5, verify=never))
    loop.look()
    loop.clock.advance(2.5)
    assert loop.look(3) == []
    loop.clock.advance(0.1)
    assert loop.look(3) == [Overdue(fetch=1)]
    loop.clock.advance(1000)
    assert loop.look(3) == []
    loop.engine.done.add(ReadId(0))
    (event,) = loop.look(3)
    assert isinstance(event, Fetched)
    assert event.error == "it took longer than 2.5 s"


def test_an_overdue_fetch_that_fails_says_how(loop: Loop):
    loop.take(fetch(1, seconds=2, verify=never))
    loop.look()
    loop.clock.advance(3)
    assert loop.look() == [Overdue(fetch=1)]
    loop.engine.failed.add(ReadId(0))
    assert loop.look(2) == [fetched(1, "lost")]


def test_a_long_fetch_is_read_in_parts_one_after_the_other(loop: Loop):
    loop.take(fetch(1, num_bytes=2 * PART + 7))
    for number, size in enumerate((PART, PART, 7)):
        assert loop.look(3) == []
        assert loop.engine.posted[number:] == [(1, size)]
        loop.engine.done.add(ReadId(number))
    assert loop.look(2) == [fetched(1, num_bytes=2 * PART + 7)]


def test_the_deadline_spans_all_parts_and_no_part_is_posted_after_it(loop: Loop):
    loop.take(fetch(1, num_bytes=3 * PART, seconds=2, verify=never))
    loop.look()
    loop.clock.advance(1.5)
    loop.engine.done.add(ReadId(0))
    assert loop.look(3) == []
    loop.clock.advance(1)
    assert loop.look() == [Overdue(fetch=1)]
    loop.engine.done.add(ReadId(1))
    (event,) = loop.look(3)
    assert isinstance(event, Fetched)
    assert (event.error, event.num_bytes) == ("it took longer than 2 s", 2 * PART)
    assert len(loop.engine.posted) == 2


def test_a_fetch_is_overdue_from_when_it_was_submitted(loop: Loop):
    loop.loop.take(fetch(1, seconds=2, verify=never), submitted_at=loop.clock.now - 3)
    assert loop.look(3) == [Overdue(fetch=1), fetched(1, "it took longer than 2 s")]
    assert loop.engine.posted == []


def test_a_fetch_read_in_time_is_not_overdue_for_waiting_to_be_verified(loop: Loop):
    def slow() -> str:
        loop.clock.advance(10)
        return ""

    loop.take(fetch(1, verify=slow))
    loop.take(fetch(2))
    loop.look(2)
    loop.engine.done |= {ReadId(0), ReadId(1)}
    first, second = loop.look(3)
    assert isinstance(first, Fetched)
    assert second == fetched(2, num_bytes=10)


def test_fetches_take_turns_to_post(loop: Loop):
    loop.engine.done |= {ReadId(number) for number in range(10)}
    loop.take(fetch(1, num_bytes=3 * PART, peer=1))
    loop.take(fetch(2, num_bytes=PART, peer=2))
    loop.take(fetch(3, num_bytes=PART, peer=3))
    loop.look(20)
    assert [peer for peer, _ in loop.engine.posted] == [1, 2, 3, 1, 1]


def test_one_look_posts_once(loop: Loop):
    for number in range(5):
        loop.take(fetch(number))
    loop.look()
    assert len(loop.engine.posted) == 1
    assert loop.engine.num_progress == 1


def test_a_peer_may_not_be_closed_while_it_is_read_from(loop: Loop):
    loop.take(fetch(1, peer=4))
    loop.take(Disconnect(peer=PeerId(3)))
    assert loop.engine.forgotten == [3]
    with pytest.raises(AssertionError, match="peer 4 is closed"):
        loop.take(Disconnect(peer=PeerId(4)))


def test_looks_come_rarely_when_idle_and_ever_later_while_waiting(loop: Loop):
    assert loop.loop.look() == loop.loop.look() == 0.05
    loop.take(Expose(active=True))
    pauses = [loop.loop.look() for _ in range(20)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.0001
    loop.clock.advance(0.02)
    assert [loop.loop.look() for _ in range(20)][-1] == 0.0005
    loop.take(Expose(active=True))
    assert loop.loop.look() == 0.00005
    loop.take(Expose(active=False))
    loop.take(fetch(1))
    pauses = [loop.loop.look() for _ in range(20)]
    assert pauses[0] == 0
    assert 0 < pauses[1] <= 0.0001
    assert pauses[1:] == sorted(pauses[1:])
    assert pauses[-1] == 0.002
    loop.engine.done.add(ReadId(0))
    loop.look(2)
    assert loop.loop.look() == 0.05


def test_looks_come_often_for_a_while_after_a_connect(loop: Loop):
    loop.take(Connect(peer=PeerId(1), endpoint=ENDPOINT))
    assert max(loop.loop.look() for _ in range(20)) == 0.0005
    loop.clock.advance(0.3)
    assert loop.loop.look() == 0.05


def test_looks_come_soon_after_one_that_found_something_to_do(loop: Loop, monkeypatch: pytest.MonkeyPatch):
    loop.take(Expose(active=True))
    loop.clock.advance(0.02)
    assert [loop.loop.look() for _ in range(20)][-1] == 0.0005
    monkeypatch.setattr(loop.engine, "progress", lambda: loop.clock.advance(0.0001))
    assert loop.loop.look() == 0.00005


class Running:
    """A TransferOwner with its thread."""

    def __init__(self) -> None:
        self.engine = FakeTransfer()
        self.clock = ManualClock()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.owner = TransferOwner(
            self.engine, on_event=self.events.put, on_failure=self.failures.put, clock=self.clock
        )
        self.owner.start()

    def wait_until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.001)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.gate.set()
    running.owner.stop(seconds_max=10)


def test_commands_are_carried_out_in_order_by_one_thread(running: Running):
    good, bad = ENDPOINT, Endpoint(backend="fake", agent="bad", metadata=b"", regions=())
    running.owner.submit(Connect(peer=PeerId(1), endpoint=good))
    running.owner.submit(Connect(peer=PeerId(2), endpoint=bad))
    running.owner.submit(Disconnect(peer=PeerId(1)))
    running.owner.submit(fetch(7))
    assert running.events.get(timeout=10) == Connected(peer=PeerId(1), error="")
    assert running.events.get(timeout=10) == Connected(peer=PeerId(2), error="refused")
    running.wait_until(lambda: len(running.engine.posted) == 1)
    assert running.engine.forgotten == [1]
    running.engine.done.add(ReadId(0))
    assert running.events.get(timeout=10) == fetched(7, num_bytes=10)
    assert running.owner.stop(seconds_max=10)
    assert running.engine.is_closed
    assert len(running.engine.threads) == 1
    assert threading.get_ident() not in running.engine.threads


def test_an_idle_owner_wakes_rarely_and_an_exposed_one_often(running: Running):
    time.sleep(0.3)
    assert 1 <= running.engine.num_progress <= 10
    running.owner.submit(Expose(active=True))
    running.wait_until(lambda: running.engine.num_progress >= 60)


def test_a_submission_wakes_an_idle_owner(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(owner_module, "IDLE_SECONDS", 30.0)
    time.sleep(0.1)  # into the long sleep
    running.owner.submit(Connect(peer=PeerId(1), endpoint=ENDPOINT))
    assert running.events.get(timeout=10) == Connected(peer=PeerId(1), error="")


def test_an_unexpected_exception_is_told_and_ends_the_thread(running: Running):
    def broken() -> str:
        raise ZeroDivisionError("a bug")

    running.owner.submit(fetch(1, verify=broken))
    running.wait_until(lambda: len(running.engine.posted) == 1)
    running.engine.done.add(ReadId(0))
    assert isinstance(running.failures.get(timeout=10), ZeroDivisionError)
    assert running.owner.stop(seconds_max=10)
    assert running.failures.empty()


def test_a_stop_does_not_wait_for_ever(running: Running):
    running.engine.gate.clear()
    running.owner.submit(fetch(1))
    running.wait_until(lambda: bool(running.engine.threads))
    assert not running.owner.stop(seconds_max=0.05)


def test_a_stop_answers_no_open_fetch(running: Running):
    running.owner.submit(fetch(1))
    running.wait_until(lambda: len(running.engine.posted) == 1)
    assert running.owner.stop(seconds_max=10)
    assert running.events.empty()


def test_more_commands_than_the_bound_are_a_broken_invariant(running: Running):
    running.engine.gate.clear()
    running.owner.submit(fetch(0))
    running.wait_until(lambda: bool(running.engine.threads))
    for _ in range(COMMANDS_MAX):
        running.owner.submit(Expose(active=True))
    with pytest.raises(AssertionError, match="commands wait"):
        running.owner.submit(Expose(active=True))

"""Owners and readers that die, hang and come back: every fetch is answered once, and when nobody writes any more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvstore.transfer.contract import PeerId, Run
from kvstore.transfer.owner import Fetched, Overdue
from tests.harness.transfer import OWNER_SEED, READER_SEED, Peer, RegionSizes, Variant, filled

BIG: RegionSizes = (("c4", 1 << 20, 16), ("records", 4096, 1))
BIG_RUNS = [Run(region="c4", source=0, target=0, num_bytes=16 << 20)]
ONE_PAGE = [Run(region="c4", source=5_000, target=10_000, num_bytes=5_000)]


def connected(reader: Peer, owner: Peer) -> PeerId:
    peer, error = reader.connect(owner.endpoint)
    assert error == ""
    return peer


def works(reader: Peer, peer: PeerId) -> bool:
    reader.fill(READER_SEED)
    if reader.read(peer, ONE_PAGE).error:
        return False
    found_B = reader.memory("c4")[10_000:15_000]
    return np.array_equal(found_B, filled(OWNER_SEED)["c4"][5_000:10_000])


@pytest.fixture
def doomed(make_owner: Callable[..., Peer]) -> Iterator[Peer]:
    """An owner to be stopped or killed."""
    owner = make_owner()
    yield owner
    owner.close()


def test_an_owner_that_died_before_it_was_connected_to_is_refused(reader: Peer, doomed: Peer):
    assert doomed.endpoint
    doomed.signal(signal.SIGKILL)
    peer, error = reader.connect(doomed.endpoint)
    # UCX may find out when it connects, or only when something is to be read.
    assert error or reader.read(peer, ONE_PAGE).error
    assert reader.holds(filled(READER_SEED))


def test_an_owner_that_died_since_it_was_connected_to(
    reader: Peer, owner: Peer, doomed: Peer, variant: Variant
):
    peer = connected(reader, doomed)
    assert works(reader, peer)
    doomed.signal(signal.SIGKILL)
    # Memory that is mapped stays: whether the owner lives is then asked elsewhere.
    assert works(reader, peer) is not variant.sees_death
    if variant.sees_death:
        assert "DISCONNECT" in reader.read(peer, ONE_PAGE).error
    reader.disconnect(peer)
    assert works(reader, connected(reader, owner))


def test_an_owner_that_comes_back_under_a_new_name(
    reader: Peer, doomed: Peer, make_owner: Callable[..., Peer]
):
    old = connected(reader, doomed)
    assert works(reader, old)
    doomed.signal(signal.SIGKILL)
    assert works(reader, connected(reader, make_owner()))
    reader.disconnect(old)


def test_a_stopped_owner_makes_a_fetch_overdue_and_it_settles_when_the_owner_goes_on(
    reader: Peer, owner: Peer, doomed: Peer, variant: Variant
):
    peer = stopped(reader, doomed, variant)
    if variant.needs_owner == "never":
        assert works(reader, peer)
        return
    fetch = reader.fetch(peer, ONE_PAGE, seconds=0.2)
    assert reader.next_event() == Overdue(fetch=fetch)
    assert works(reader, connected(reader, owner)), "another owner is in its way"
    doomed.signal(signal.SIGCONT)
    event = reader.next_event()
    assert isinstance(event, Fetched)
    assert (event.fetch, event.error) == (fetch, "it took longer than 0.2 s")
    assert event.transfer_ms > 200
    assert works(reader, peer)


def test_an_owner_killed_in_the_middle_of_a_read_settles_it(
    reader: Peer, owner: Peer, doomed: Peer, variant: Variant
):
    if variant.needs_owner == "never":
        pytest.skip("a read is over before its post returns")
    peer = stopped(reader, doomed, variant)
    fetches = [reader.fetch(peer, ONE_PAGE, seconds=seconds) for seconds in (0.2, 30)]
    assert reader.next_event() == Overdue(fetch=fetches[0])
    doomed.signal(signal.SIGKILL)
    events = [reader.next_event(), reader.next_event()]
    assert {event.fetch for event in events if isinstance(event, Fetched)} == set(fetches)
    assert all(isinstance(event, Fetched) and "DISCONNECT" in event.error for event in events)
    assert not reader.has_event(seconds=0.1)
    reader.disconnect(peer)
    assert works(reader, connected(reader, owner))


def stopped(reader: Peer, doomed: Peer, variant: Variant) -> PeerId:
    """A stopped owner whose next read waits for it, if any does."""
    peer = connected(reader, doomed)
    if variant.needs_owner != "first":
        assert works(reader, peer)
    doomed.signal(signal.SIGSTOP)
    # The signal is on its way only: a thread that still ran would serve the read.
    _, status = os.waitpid(doomed.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return peer


@pytest.mark.slow
def test_an_owner_that_dies_while_bytes_flow(make_peer: Callable[..., Peer], make_owner: Callable[..., Peer]):
    reader, owner = make_peer(regions=BIG), make_owner(regions=BIG)
    reader.fill(READER_SEED)
    peer = connected(reader, owner)
    assert reader.read(peer, [Run(region="records", source=0, target=0, num_bytes=4096)]).error == ""
    fetch = reader.fetch(peer, BIG_RUNS)
    time.sleep(0.01)
    owner.signal(signal.SIGKILL)
    event = reader.next_event()
    assert isinstance(event, Fetched)
    assert event.fetch == fetch
    found_B = reader.memory("c4")
    new_B, old_B = filled(OWNER_SEED, BIG)["c4"], filled(READER_SEED, BIG)["c4"]
    if event.error:
        assert event.num_bytes == 0
        assert ((found_B == new_B) | (found_B == old_B)).all()
    else:
        assert np.array_equal(found_B, new_B)
    reader.fill(READER_SEED + 5)
    time.sleep(0.1)
    after_B = filled(READER_SEED + 5, BIG)["c4"]
    assert np.array_equal(reader.memory("c4"), after_B), "something was written after the fetch was answered"
    assert reader.stop() == 0


@pytest.mark.slow
def test_a_reader_that_dies_does_not_disturb_the_owner(
    reader: Peer, make_peer: Callable[..., Peer], make_owner: Callable[..., Peer], owner: Peer
):
    big_owner, victim = make_owner(regions=BIG), make_peer(regions=BIG)
    victim.fetch(connected(victim, big_owner), BIG_RUNS)
    time.sleep(0.03)
    victim.signal(signal.SIGKILL)
    other = make_peer(regions=BIG)
    assert other.read(connected(other, big_owner), BIG_RUNS).error == ""
    assert np.array_equal(other.memory("c4"), filled(OWNER_SEED, BIG)["c4"])
    assert big_owner.stop() == 0


def test_a_reader_stops_while_a_read_is_open(make_peer: Callable[..., Peer], doomed: Peer, variant: Variant):
    reader = make_peer()
    peer = stopped(reader, doomed, variant)
    reader.fetch(peer, ONE_PAGE)
    assert reader.has_event(seconds=0.1) is (variant.needs_owner == "never")
    assert reader.stop() == 0


@pytest.mark.slow
def test_nobody_spins(
    reader: Peer, owner: Peer, variant: Variant, record_property: Callable[[str, object], None]
):
    """Bounds with much room, for the machine is shared: a thread that spins takes 1.0."""
    assert works(reader, connected(reader, owner))
    time.sleep(0.3)  # after a connect it looks often for a while
    idle, exposed = reader.cpu_share(seconds=0.5), owner.cpu_share(seconds=0.5)
    record_property("figure", f"transfer thread: {idle:.3f} CPU-s/s idle, {exposed:.3f} exposed")
    assert idle < 0.1
    assert exposed < 0.4


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_leaving_an_owner_and_coming_back_takes_no_more_and_more_descriptors(reader: Peer, doomed: Peer):
    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{peer.process.pid}/fd")) for peer in (reader, doomed)]

    def come_and_go() -> None:
        peer = connected(reader, doomed)
        assert works(reader, peer)
        reader.disconnect(peer)

    come_and_go()
    before = descriptors()
    for _ in range(10):
        come_and_go()
    # The last disconnect is carried out by the reader's own thread.
    deadline = time.monotonic() + 5
    while any(now > then for now, then in zip(descriptors(), before, strict=True)):
        assert time.monotonic() < deadline, f"{descriptors()} descriptors, {before} before"
        time.sleep(0.01)

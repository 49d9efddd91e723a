"""What every engine promises, between real processes: the right bytes, only those, and a clear refusal otherwise."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from kvstore.transfer.contract import Endpoint, PeerId, Region, Run
from kvstore.transfer.owner import Fetched
from kvstore.transfer.runs import page_runs, record_run
from tests.harness.transfer import (
    NUM_PAGES,
    OWNER_SEED,
    READER_SEED,
    REGIONS,
    Peer,
    Variant,
    filled,
    pattern,
    read_into,
)

ALL_PAGES = list(range(NUM_PAGES))


def pages(source: list[int], target: list[int]) -> list[Run]:
    table = [Region(name=n, address=0, unit_bytes=b, num_units=u) for n, b, u in REGIONS]
    return page_runs(table, source, target)


def connected(reader: Peer, owner: Peer) -> PeerId:
    peer, error = reader.connect(owner.endpoint)
    assert error == ""
    return peer


@pytest.mark.parametrize("seed", range(4))
def test_a_read_writes_what_the_owner_holds_and_nothing_else(seed: int, owner: Peer, reader: Peer):
    chance = random.Random(seed)
    runs: list[Run] = []
    for name, unit_bytes, num_units in REGIONS:
        # Cut the targets into pieces with gaps between them, of odd sizes and at odd addresses.
        size = unit_bytes * num_units
        cuts = sorted(chance.sample(range(size), 2 * chance.randint(1, 40)))
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            source = chance.randrange(size - (end - start) + 1)
            runs.append(Run(region=name, source=source, target=start, num_bytes=end - start))
    chance.shuffle(runs)

    event = reader.read(connected(reader, owner), runs)

    assert event.error == ""
    assert event.num_bytes == sum(run.num_bytes for run in runs)
    wanted = filled(READER_SEED)
    read_into(wanted, filled(OWNER_SEED), runs)
    assert reader.holds(wanted)
    assert owner.holds(filled(OWNER_SEED))


def test_pages_and_a_record_are_read(owner: Peer, reader: Peer):
    source, target = [7, 8, 2, 23, 0], [0, 1, 5, 22, 23]
    runs = pages(source, target)
    runs.append(record_run(reader.endpoint.regions, source=2, target=1, num_bytes=69_999))

    assert reader.read(connected(reader, owner), runs).error == ""

    ours, theirs = filled(OWNER_SEED), filled(READER_SEED)
    for name, unit_bytes, _ in REGIONS[:2]:
        for there, here in zip(source, target, strict=True):
            found = ours[name][there * unit_bytes : (there + 1) * unit_bytes]
            theirs[name][here * unit_bytes : (here + 1) * unit_bytes] = found
    theirs["records"][70_004 : 70_004 + 69_999] = ours["records"][140_008 : 140_008 + 69_999]
    assert reader.holds(theirs)


def test_a_read_sees_what_the_owner_has_written_since_the_last_one(owner: Peer, reader: Peer):
    peer = connected(reader, owner)
    assert reader.read(peer, pages(ALL_PAGES, ALL_PAGES)).error == ""
    owner.fill(30)
    assert reader.read(peer, pages(ALL_PAGES, ALL_PAGES)).error == ""
    assert (reader.memory("c4_index") == pattern(31, 1_364 * NUM_PAGES)).all()
    owner.fill(OWNER_SEED)


def test_a_fetch_of_nothing_succeeds(owner: Peer, reader: Peer):
    assert reader.read(connected(reader, owner), []) == Fetched(
        fetch=reader.num_fetches, error="", num_bytes=0, transfer_ms=0.0, verify_ms=pytest.approx(0, abs=100)
    )
    assert reader.holds(filled(READER_SEED))


def test_many_reads_from_two_owners_are_open_at_once(
    owner: Peer, reader: Peer, make_owner: Callable[..., Peer]
):
    second = make_owner(seed=40)
    peers = [(connected(reader, owner), OWNER_SEED), (connected(reader, second), 40)]
    wanted = filled(READER_SEED)
    fetches: set[int] = set()
    for page in ALL_PAGES:
        peer, seed = peers[page % 2]
        runs = pages([(page * 5) % NUM_PAGES], [page])
        read_into(wanted, filled(seed), runs)
        fetches.add(reader.fetch(peer, runs))
    events = [reader.next_event() for _ in fetches]

    assert {event.fetch for event in events if isinstance(event, Fetched) and not event.error} == fetches
    assert reader.holds(wanted)
    assert not reader.has_event(seconds=0.05)


def test_two_readers_read_from_one_owner_at_once(owner: Peer, reader: Peer, make_peer: Callable[..., Peer]):
    other = make_peer()
    other.fill(READER_SEED)
    runs = pages(ALL_PAGES, ALL_PAGES[::-1])
    peers = [(each, connected(each, owner)) for each in (reader, other)]
    for _ in range(3):
        for each, peer in peers:
            each.fetch(peer, runs)
    for _ in range(3):
        for each, _ in peers:
            event = each.next_event()
            assert isinstance(event, Fetched)
            assert event.error == ""
    wanted = filled(READER_SEED)
    read_into(wanted, filled(OWNER_SEED), runs)
    assert reader.holds(wanted)
    assert other.holds(wanted)


def test_an_owner_may_be_connected_to_twice_and_be_left_once(owner: Peer, reader: Peer):
    first, second = connected(reader, owner), connected(reader, owner)
    reader.disconnect(first)
    assert reader.read(first, pages([1], [1])).error == f"peer {first} is not connected"
    assert reader.read(second, pages([1], [1])).error == ""
    reader.disconnect(second)
    assert reader.read(connected(reader, owner), pages([2], [2])).error == ""


def changed(endpoint: Endpoint, number: int, **values: object) -> Endpoint:
    regions = list(endpoint.regions)
    regions[number] = msgspec.structs.replace(regions[number], **values)
    return msgspec.structs.replace(endpoint, regions=tuple(regions))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda e: changed(e, 0, unit_bytes=5_001), "5001 bytes there, 5000 here"),
        (lambda e: changed(e, 1, name="c128"), "'c128' is unknown here"),
        (lambda e: msgspec.structs.replace(e, regions=e.regions[1:]), "'c4' is missing there"),
        (lambda e: msgspec.structs.replace(e, regions=e.regions * 2), "comes twice"),
        (lambda e: changed(e, 0, num_units=0), "cannot be"),
        (lambda e: changed(e, 0, address=-1), "cannot be"),
        (lambda e: changed(e, 0, address=2**64 - 1), "cannot be"),
        (lambda e: msgspec.structs.replace(e, backend="other"), "exports through 'other'"),
    ],
)
def test_memory_of_another_shape_is_refused(
    change: Callable[[Endpoint], Endpoint], error: str, owner: Peer, reader: Peer
):
    assert error in reader.connect(change(owner.endpoint))[1]
    assert reader.read(connected(reader, owner), pages([1], [1])).error == ""


def test_more_units_than_here_may_be_there(
    reader: Peer, make_owner: Callable[..., Peer], lasting_reader: Peer
):
    owner = make_owner(regions=[(name, size, 2 * count) for name, size, count in REGIONS])
    peer = connected(reader, owner)
    assert reader.read(peer, pages([2 * NUM_PAGES - 1], [3])).error == ""
    assert "are not in region" in reader.read(peer, pages([2 * NUM_PAGES], [3])).error


@pytest.mark.parametrize("source", [-1, 5_000 * NUM_PAGES - 99, 2**63])
def test_a_read_beyond_what_the_owner_exports_is_refused(source: int, owner: Peer, reader: Peer):
    peer = connected(reader, owner)
    runs = [*pages([1], [2]), Run(region="c4", source=source, target=0, num_bytes=100)]
    event = reader.read(peer, runs)
    assert "are not in region 'c4'" in event.error
    assert event.num_bytes == 0
    assert reader.holds(filled(READER_SEED))
    assert reader.read(peer, pages([1], [2])).error == ""


def test_an_owner_that_claims_more_than_it_exports_is_refused(owner: Peer, reader: Peer, variant: Variant):
    """Its regions are what it says; what is really there only the engine knows."""
    peer, error = reader.connect(changed(owner.endpoint, 0, num_units=10 * NUM_PAGES))
    if not error:
        run = Run(region="c4", source=9 * NUM_PAGES * 5_000, target=0, num_bytes=5_000)
        error = reader.read(peer, [run]).error
    assert ("cannot be mapped" if variant.kind == "shm" else "cannot be made") in error
    assert reader.holds(filled(READER_SEED))


@pytest.mark.parametrize("metadata", [b"", b"garbage", b"\x93\x01\x02\x03", b"nixlSerDes|" + b"\xff" * 400])
def test_garbage_for_metadata_is_refused(metadata: bytes, owner: Peer, reader: Peer):
    peer = connected(reader, owner)
    garbage = msgspec.structs.replace(owner.endpoint, agent="nobody#1", metadata=metadata)
    assert "metadata" in reader.connect(garbage)[1]
    assert reader.read(peer, pages([1], [2])).error == ""


def test_truncated_metadata_harm_no_other_owner(
    owner: Peer, reader: Peer, make_owner: Callable[..., Peer], variant: Variant
):
    peer = connected(reader, owner)
    second = make_owner(seed=40).endpoint
    error = reader.connect(msgspec.structs.replace(second, metadata=second.metadata[:-20]))[1]
    assert ("nixl refuses" if variant.kind == "nixl" else "cannot be read") in error
    assert reader.read(peer, pages([1], [2])).error == ""
    assert reader.read(connected(reader, owner), pages([3], [4])).error == ""


def test_the_metadata_of_one_owner_under_the_name_of_another_are_refused(
    owner: Peer, reader: Peer, make_owner: Callable[..., Peer]
):
    peer = connected(reader, owner)
    second = make_owner(seed=40).endpoint
    assert reader.connect(msgspec.structs.replace(owner.endpoint, metadata=second.metadata))[1]
    assert reader.connect(msgspec.structs.replace(owner.endpoint, agent=second.agent))[1]
    assert reader.read(peer, pages([1], [1])).error == ""
    wanted = filled(READER_SEED)
    read_into(wanted, filled(OWNER_SEED), pages([1], [1]))
    assert reader.holds(wanted)


def test_a_process_does_not_connect_to_itself(reader: Peer):
    assert "itself" in reader.connect(reader.endpoint)[1]


def test_a_peer_nobody_connected_to_cannot_be_read_from(reader: Peer):
    assert reader.read(PeerId(9999), pages([1], [1])).error == "peer 9999 is not connected"

"""A feed's items survive the wire inside a report, and what could not be one is an error of ours."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import WireError
from rorqual.feed import (
    CONTENT_ENTRIES_MAX,
    ITEMS_MAX,
    PART_ENTRIES_MAX,
    PARTS_MAX,
    Delta,
    Digest,
    FeedItem,
    SnapshotPart,
    Subscribe,
)
from rorqual.ids import Incarnation
from rorqual.session import Load, StepReport
from rorqual.v1 import worker_pb2 as pb
from rorqual.wire import decode_command, decode_report, encode_command, encode_report

uint64 = st.integers(0, 2**64 - 1)
incarnations = uint64.map(Incarnation)
LOAD = Load(
    sequences_running=0,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=0,
    pages_total=0,
    slots_free=0,
    slots_total=0,
    step_ms=0.0,
)


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    num = draw(st.integers(1, 20))
    return Delta(
        incarnation=draw(incarnations),
        number=draw(st.integers(1, 2**64 - 1)),
        digest=draw(uint64),
        keys=draw(st.binary(min_size=16 * num, max_size=16 * num)),
        changes=draw(st.binary(min_size=num, max_size=num)),
    )


@st.composite
def parts(draw: st.DrawFn) -> SnapshotPart:
    num = draw(st.integers(0, 20))
    num_parts = draw(st.integers(1, PARTS_MAX))
    return SnapshotPart(
        incarnation=draw(incarnations),
        number=draw(uint64),
        part=draw(st.integers(0, num_parts - 1)),
        num_parts=num_parts,
        num_entries=draw(st.integers(num, CONTENT_ENTRIES_MAX)),
        digest=draw(uint64),
        keys=draw(st.binary(min_size=16 * num, max_size=16 * num)),
        flags=draw(st.binary(min_size=num, max_size=num)),
    )


digests = st.builds(
    Digest,
    incarnation=incarnations,
    number=uint64,
    num_entries=st.integers(0, CONTENT_ENTRIES_MAX),
    digest=uint64,
)
feeds = st.lists(deltas() | parts() | digests, max_size=5).map(tuple)


def report_of(feed: tuple[FeedItem, ...]) -> StepReport:
    return StepReport(number=1, sequences=(), load=LOAD, draining=False, feed=feed)


@given(feeds)
def test_a_report_with_a_feed_survives_the_wire(feed: tuple[FeedItem, ...]) -> None:
    assert decode_report(encode_report(report_of(feed))) == report_of(feed)


@given(st.builds(Subscribe, incarnation=incarnations, number=uint64))
def test_a_subscription_survives_the_wire(command: Subscribe) -> None:
    assert decode_command(encode_command(command)) == command


@given(feeds, st.integers(0, 2**32))
def test_bytes_damaged_on_their_way_are_a_wire_error_or_another_report(
    feed: tuple[FeedItem, ...], seed: int
) -> None:
    rng = random.Random(seed)
    data = bytearray(encode_report(report_of(feed)))
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(3):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1 if len(data) > 1:
                del data[rng.randrange(len(data))]
            case _:
                data.insert(rng.randrange(len(data) + 1), rng.randrange(256))
    with contextlib.suppress(WireError):
        decode_report(bytes(data))


def delta(**fields: object) -> pb.FeedItem:
    return pb.FeedItem(delta=pb.Delta(**{"number": 1, "keys": bytes(16), "changes": b"\x01"} | fields))


def part(**fields: object) -> pb.FeedItem:
    defaults = {"num_parts": 1, "num_entries": 1, "keys": bytes(16), "flags": b"\x01"}
    return pb.FeedItem(part=pb.SnapshotPart(**defaults | fields))


TOO_MANY = PART_ENTRIES_MAX + 1


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([pb.FeedItem()], "empty or of a kind"),
        ([delta(keys=bytes(15))], "15 bytes of keys and 1 of flags"),
        ([delta(keys=bytes(32))], "32 bytes of keys and 1 of flags"),
        ([delta(keys=b"", changes=b"")], "0 changes"),
        ([delta(number=0)], "delta 0"),
        ([delta(keys=bytes(16 * TOO_MANY), changes=bytes(TOO_MANY))], f"at most {PART_ENTRIES_MAX}"),
        ([part(flags=b"")], "16 bytes of keys and 0 of flags"),
        ([part(keys=bytes(16 * TOO_MANY), flags=bytes(TOO_MANY))], f"at most {PART_ENTRIES_MAX}"),
        ([part(part=1)], "part 1 of 1"),
        ([part(num_parts=0)], "part 0 of 0"),
        ([part(num_parts=PARTS_MAX + 1)], f"of {PARTS_MAX + 1}"),
        ([part(num_entries=0)], "0 entries has 1"),
        ([part(num_entries=CONTENT_ENTRIES_MAX + 1)], f"at most {CONTENT_ENTRIES_MAX}"),
        ([pb.FeedItem(digest=pb.Digest(num_entries=CONTENT_ENTRIES_MAX + 1))], "feed claims"),
        ([delta()] * (ITEMS_MAX + 1), f"{ITEMS_MAX + 1} feed items"),
    ],
)
def test_a_feed_that_cannot_be_is_a_wire_error_that_says_why(items: list[pb.FeedItem], text: str) -> None:
    message = pb.Report(step=pb.StepReport(number=1, feed=items))
    with pytest.raises(WireError, match=text):
        decode_report(message.SerializeToString())

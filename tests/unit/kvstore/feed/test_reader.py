"""The router's side: exact or empty, and a reason for every feed that is given up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_content import FakeContent, key_of, tell

from kvstore.feed import FeedBounds, FeedReader, FeedWriter, Reason, Resubscribe
from rorqual.feed import (
    CONTENT_ENTRIES_MAX,
    PAGE,
    PART_ENTRIES_MAX,
    PARTS_MAX,
    TAIL,
    Delta,
    Digest,
    FeedItem,
    SnapshotPart,
    Subscribe,
)
from rorqual.ids import Incarnation

WORKER = Incarnation(77)


class Pair:
    """One worker of ten pages in three parts, and one router; items pass by hand. `model` is what was published."""

    def __init__(self) -> None:
        self.writer = FeedWriter(WORKER, bounds=FeedBounds(part_entries_max=4))
        tell(self.writer, pages_added=[key_of(i) for i in range(10)], tails_added=[key_of(4)])
        self.writer.publish()
        self.model = {key_of(i): PAGE for i in range(10)} | {key_of(4): PAGE | TAIL}
        self.start = self.writer.number
        self.content = FakeContent()
        self.reader = FeedReader(self.content)
        self.session = self.writer.subscribe(self.reader.welcome(WORKER))

    def items(self, *, with_digest: bool = False) -> list[FeedItem]:
        return list(self.session.take(entries_max=1000, items_max=1000, with_digest=with_digest))

    def follow(self) -> None:
        for item in self.items(with_digest=True):
            assert self.reader.take(item) is None

    def step(self, number: int) -> Delta:
        """A delta that is not sent: pages `number` and one more come, one of the first ten goes."""
        new, gone = [key_of(number), key_of(number + 1000)], key_of(number % 10)
        tell(self.writer, pages_added=new, pages_removed=[gone])
        assert self.writer.publish() == 1
        self.model |= dict.fromkeys(new, PAGE)
        del self.model[gone]
        return self.writer.since(self.writer.number - 1)


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def followed(pair: Pair) -> Pair:
    pair.follow()
    return pair


def test_a_snapshot_is_seen_when_it_is_whole_and_not_before(pair: Pair) -> None:
    *first, last = pair.items()
    for part in first:
        assert pair.reader.take(part) is None
        assert (pair.content.visible, pair.reader.number) == ({}, None)
    assert pair.reader.take(last) is None
    assert pair.reader.number == pair.writer.number
    assert pair.content.visible == pair.model


def test_deltas_are_followed_one_by_one(followed: Pair) -> None:
    for number in range(10, 20):
        delta = followed.step(number)
        assert followed.reader.take(delta) is None
        assert followed.reader.number == delta.number
        assert followed.content.visible == followed.model
        assert followed.reader.num_entries == len(followed.content.visible)


def test_a_reader_that_comes_back_to_the_same_worker_goes_on_and_keeps_its_content(followed: Pair) -> None:
    followed.step(10)
    wish = followed.reader.welcome(WORKER)
    assert wish == Subscribe(incarnation=WORKER, number=followed.start)
    assert len(followed.content.visible) == 10
    followed.session = followed.writer.subscribe(wish)
    assert [type(item) for item in followed.items()] == [Delta]


def test_a_worker_that_started_again_counts_as_empty_at_once(followed: Pair) -> None:
    assert followed.reader.welcome(Incarnation(5)) == Subscribe()
    assert (followed.content.visible, followed.reader.number) == ({}, None)


def test_a_worker_that_left_counts_as_empty_and_is_not_listened_to(followed: Pair) -> None:
    followed.reader.leave()
    assert followed.content.visible == {}
    assert followed.reader.take(followed.step(10)) is None
    assert followed.content.visible == {}


def test_a_second_snapshot_leaves_the_old_content_visible_until_it_is_whole(followed: Pair) -> None:
    before = dict(followed.content.visible)
    for number in range(10, 15):  # so many that the first snapshot is not taken for the second
        followed.step(number)
    followed.session = followed.writer.subscribe(Subscribe(incarnation=Incarnation(1), number=0))
    *first, last = [item for item in followed.items() if isinstance(item, SnapshotPart)]
    assert last.number > followed.start
    for part in first:
        assert followed.reader.take(part) is None
        assert (followed.content.visible, followed.reader.number) == (before, followed.start)
    assert followed.reader.take(last) is None
    assert followed.reader.number == followed.start + 5
    assert followed.content.visible == followed.model


def test_a_snapshot_that_starts_over_replaces_the_one_that_was_arriving(pair: Pair) -> None:
    first, *_ = pair.items()
    assert pair.reader.take(first) is None
    pair.step(10)
    pair.session = pair.writer.subscribe(Subscribe())
    pair.follow()
    assert pair.content.visible == pair.model


def lost(pair: Pair, item: FeedItem) -> Reason:
    """Why this item ends the feed; asserts that nothing of the content is left."""
    answer = pair.reader.take(item)
    assert isinstance(answer, Resubscribe)
    assert answer.detail
    assert pair.content.visible == {}
    assert pair.content.arriving is None
    assert (pair.reader.number, pair.reader.num_entries, pair.reader.is_loading) == (None, 0, False)
    assert pair.reader.faults == {answer.reason: 1}
    return answer.reason


def test_a_delta_too_far_is_a_gap(followed: Pair) -> None:
    followed.step(10)
    assert lost(followed, followed.step(11)) is Reason.GAP


def test_a_delta_that_comes_twice_is_a_duplicate(followed: Pair) -> None:
    delta = followed.step(10)
    assert followed.reader.take(delta) is None
    assert lost(followed, delta) is Reason.DUPLICATE


def test_a_snapshot_older_than_what_is_known_is_outdated(followed: Pair) -> None:
    old = followed.writer.snapshot().parts[0]
    assert followed.reader.take(followed.step(10)) is None
    assert lost(followed, old) is Reason.OUTDATED


def test_an_item_of_another_incarnation_ends_the_feed(followed: Pair) -> None:
    assert lost(followed, replace(followed.step(10), incarnation=Incarnation(3))) is Reason.INCARNATION


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": 0}, Reason.DIGEST),
        ({"keys": key_of(10) + key_of(1010) + key_of(0)[:-1] + b"?"}, Reason.DIGEST),
        ({"keys": key_of(10) + key_of(0) + key_of(1010)}, Reason.DIGEST),
        ({"keys": key_of(10) + key_of(10) + key_of(0)}, Reason.ENTRY),
        ({"changes": bytes((PAGE, TAIL, PAGE << 4))}, Reason.ENTRY),
        ({"changes": bytes((PAGE, 0, PAGE << 4))}, Reason.ENTRY),
        ({"changes": bytes((PAGE, PAGE << 4 | PAGE, PAGE << 4))}, Reason.ENTRY),
        ({"changes": bytes((PAGE, PAGE))}, Reason.COUNT),
        ({"keys": b"", "changes": b""}, Reason.COUNT),
    ],
    ids=str,
)
def test_a_delta_that_is_not_as_it_was_made_ends_the_feed(
    followed: Pair, change: dict[str, int | bytes], reason: Reason
) -> None:
    delta = followed.step(10)
    assert (delta.keys, delta.changes) == (
        key_of(10) + key_of(1010) + key_of(0),
        bytes((PAGE, PAGE, PAGE << 4)),
    )
    assert lost(followed, replace(delta, **change)) is reason


def test_a_delta_that_removes_more_than_there_is_ends_the_feed(followed: Pair) -> None:
    num = 11
    delta = Delta(
        incarnation=WORKER,
        number=followed.start + 1,
        digest=0,
        keys=b"".join(key_of(i) for i in range(num)),
        changes=bytes([PAGE << 4] * num),
    )
    assert lost(followed, delta) is Reason.COUNT


def test_a_delta_or_digest_inside_a_snapshot_is_a_gap() -> None:
    for kind in (Delta, Digest):
        pair = Pair()
        first, *_ = pair.items()
        assert pair.reader.take(first) is None
        item = pair.step(10) if kind is Delta else pair.writer.digest()
        assert lost(pair, item) is Reason.GAP


def part_at(pair: Pair, index: int) -> SnapshotPart:
    """The part that is due next, after those before it were taken."""
    parts = pair.items()
    for part in parts[:index]:
        assert pair.reader.take(part) is None
    item = parts[index]
    assert isinstance(item, SnapshotPart)
    return item


@pytest.mark.parametrize(
    ("index", "change", "reason"),
    [
        (0, {"num_parts": PARTS_MAX + 1}, Reason.COUNT),
        (0, {"num_parts": 0}, Reason.COUNT),
        (0, {"num_entries": CONTENT_ENTRIES_MAX + 1}, Reason.COUNT),
        (0, {"num_entries": 3 * PART_ENTRIES_MAX + 1}, Reason.COUNT),
        (0, {"num_entries": 2}, Reason.COUNT),
        (0, {"flags": b"\x01"}, Reason.COUNT),
        (0, {"flags": bytes((PAGE, TAIL, PAGE, PAGE))}, Reason.ENTRY),
        (0, {"flags": bytes((PAGE, 0, PAGE, PAGE))}, Reason.ENTRY),
        (0, {"keys": bytes(64)}, Reason.ENTRY),
        (0, {"keys": bytes(15) + b"\x02" + bytes(15) + b"\x01" + b"\x01" * 16 + b"\x02" * 16}, Reason.ENTRY),
        (1, {"keys": b"".join(bytes(15) + bytes([i]) for i in range(4))}, Reason.ENTRY),
        (1, {"part": 2}, Reason.GAP),
        (1, {"number": 9}, Reason.GAP),
        (1, {"digest": 9}, Reason.GAP),
        (2, {"part": 1}, Reason.DUPLICATE),
        (2, {"flags": bytes((PAGE, PAGE | TAIL))}, Reason.DIGEST),
        (2, {"keys": b"\xff" * 15 + b"\xfe" + b"\xff" * 16}, Reason.DIGEST),
        (2, {"keys": b"\xff" * 16, "flags": b"\x01"}, Reason.COUNT),
    ],
    ids=str,
)
def test_a_part_that_is_not_as_it_was_made_ends_the_feed(
    pair: Pair, index: int, change: dict[str, int | bytes], reason: Reason
) -> None:
    part = part_at(pair, index)
    if reason is Reason.DIGEST and "flags" in change:
        assert part.flags != change["flags"]
    assert lost(pair, replace(part, **change)) is reason


def test_a_digest_finds_a_last_delta_that_was_lost(followed: Pair) -> None:
    followed.step(10)
    assert lost(followed, followed.writer.digest()) is Reason.GAP


@pytest.mark.parametrize(
    ("change", "reason"), [({"digest": 1}, Reason.DIGEST), ({"num_entries": 9}, Reason.COUNT)], ids=str
)
def test_a_digest_finds_another_content(followed: Pair, change: dict[str, int], reason: Reason) -> None:
    assert lost(followed, replace(followed.writer.digest(), **change)) is reason


def test_a_content_without_room_ends_the_feed(followed: Pair) -> None:
    followed.content.has_room = False
    assert lost(followed, followed.step(10)) is Reason.ROOM
    pair = Pair()
    pair.content.has_room = False
    assert lost(pair, pair.items()[0]) is Reason.ROOM


def test_after_a_loss_nothing_counts_until_the_answer_to_the_new_wish(followed: Pair) -> None:
    followed.step(10)
    late = followed.step(11)
    assert lost(followed, late) is Reason.GAP
    assert followed.reader.take(followed.step(12)) is None  # still on its way to us
    wish = followed.reader.subscribe()
    assert wish == Subscribe()
    for item in (followed.step(13), followed.writer.digest(), part_at(Pair(), 1)):
        assert followed.reader.take(item) is None  # and these too
    assert followed.content.visible == {}
    assert followed.reader.num_passed_over == 4
    followed.session = followed.writer.subscribe(wish)
    followed.follow()
    assert followed.content.visible == followed.model
    assert followed.reader.faults.total() == 1

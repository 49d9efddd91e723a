"""The worker's side: numbers, deltas, snapshots, and what a session gets that lags behind."""

from __future__ import annotations

import pytest
from fake_content import entries, key_of, tell

from kvstore.feed import FeedBounds, FeedWriter
from kvstore.feed.digest import digest_of
from rorqual.feed import PAGE, TAIL, Delta, Digest, SnapshotPart, Subscribe
from rorqual.ids import Incarnation

NUMBER = Incarnation(77)
EVERYTHING = {"entries_max": 1 << 20, "items_max": 1000}


def writer_with(num_pages: int = 0, **bounds: int) -> FeedWriter:
    writer = FeedWriter(NUMBER, bounds=FeedBounds(**bounds))
    if num_pages:
        tell(writer, pages_added=[key_of(i) for i in range(num_pages)])
        writer.publish()
    return writer


def test_nothing_is_published_while_nothing_changes() -> None:
    writer = writer_with(3)
    assert writer.publish() == 0
    tell(writer, tails_added=[key_of(1)])
    tell(writer, tails_removed=[key_of(1)])
    tell(writer, pages_added=[key_of(9)])
    tell(writer, pages_removed=[key_of(9)])
    assert writer.publish() == 0
    assert writer.number == 1


def test_a_delta_has_the_net_change_of_each_page_once() -> None:
    writer = writer_with(2)
    tell(writer, pages_added=[key_of(5)], tails_added=[key_of(5), key_of(0)])
    tell(writer, pages_removed=[key_of(1)])
    assert writer.publish() == 1
    delta = writer.since(1)
    assert dict(entries(delta.keys, delta.changes)) == {
        key_of(5): PAGE | TAIL,
        key_of(0): PAGE << 4 | PAGE | TAIL,
        key_of(1): PAGE << 4,
    }
    writer.check()


def test_a_page_takes_its_tail_along_whether_that_is_listed_or_not() -> None:
    writer = writer_with(2)
    tell(writer, tails_added=[key_of(0), key_of(1)])
    writer.publish()
    tell(writer, pages_removed=[key_of(0), key_of(1)], tails_removed=[key_of(1)])
    writer.publish()
    assert set(writer.since(2).changes) == {(PAGE | TAIL) << 4}
    assert writer.num_entries == 0
    writer.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"pages_added": [key_of(0)]},
        {"pages_removed": [key_of(9)]},
        {"tails_added": [key_of(9)]},
        {"tails_removed": [key_of(0)]},
        {"pages_added": [b"short"]},
    ],
    ids=str,
)
def test_a_change_that_cannot_be_is_a_broken_invariant(wrong: dict[str, list[bytes]]) -> None:
    with pytest.raises(AssertionError):
        tell(writer_with(1), **wrong)


def test_a_step_that_changes_more_than_a_delta_holds_gets_several_numbers() -> None:
    writer = writer_with(part_entries_max=4)
    tell(writer, pages_added=[key_of(i) for i in range(10)])
    assert writer.publish() == 3
    assert [len(writer.since(n).changes) for n in range(3)] == [4, 4, 2]
    writer.check()


def test_a_snapshot_is_the_whole_content_sorted_and_cut() -> None:
    writer = writer_with(10, part_entries_max=4)
    tell(writer, tails_added=[key_of(3)])
    writer.publish()
    parts = writer.snapshot().parts
    assert [(part.part, part.num_parts, part.num_entries) for part in parts] == [(i, 3, 10) for i in range(3)]
    content = [entry for part in parts for entry in entries(part.keys, part.flags)]
    expected = {key_of(i): PAGE for i in range(10)} | {key_of(3): PAGE | TAIL}
    assert content == sorted(expected.items())
    assert {part.digest for part in parts} == {digest_of(b"".join(expected), bytes(expected.values()))}


def test_an_empty_content_is_one_empty_part() -> None:
    (part,) = writer_with().snapshot().parts
    assert (part.number, part.num_parts, part.num_entries, part.keys) == (0, 1, 0, b"")


def test_what_is_not_published_is_in_no_snapshot() -> None:
    writer = writer_with(2)
    tell(writer, pages_added=[key_of(7)])
    assert writer.snapshot().parts[0].num_entries == 2


def test_a_new_session_gets_a_snapshot_then_deltas_then_the_digest() -> None:
    writer = writer_with(5)
    session = writer.subscribe(Subscribe())
    assert [type(item) for item in session.take(entries_max=1, items_max=1)] == [SnapshotPart]
    tell(writer, pages_removed=[key_of(2)])
    writer.publish()
    items = session.take(**EVERYTHING, with_digest=True)
    assert [type(item) for item in items] == [Delta, Digest]
    assert session.is_current
    assert items[-1] == writer.digest()
    assert session.take(**EVERYTHING) == ()


def test_a_session_that_comes_back_gets_only_what_it_has_not_had() -> None:
    writer = writer_with(5)
    for i in range(3):
        tell(writer, pages_removed=[key_of(i)])
        writer.publish()
    items = writer.subscribe(Subscribe(incarnation=NUMBER, number=2)).take(**EVERYTHING)
    assert [item.number for item in items] == [3, 4]
    assert all(isinstance(item, Delta) for item in items)


@pytest.mark.parametrize(
    "wish",
    [
        Subscribe(incarnation=Incarnation(5), number=2),
        Subscribe(incarnation=NUMBER, number=99),
        Subscribe(incarnation=NUMBER, number=0),
    ],
    ids=["another incarnation", "a number to come", "a number forgotten"],
)
def test_a_session_that_cannot_go_on_begins_with_a_snapshot(wish: Subscribe) -> None:
    writer = writer_with(5, history_deltas_max=2)
    for i in range(3):
        tell(writer, pages_removed=[key_of(i)])
        writer.publish()
    (first, *_) = writer.subscribe(wish).take(**EVERYTHING)
    assert isinstance(first, SnapshotPart)


def test_what_is_taken_at_once_is_bounded_and_never_nothing() -> None:
    writer = writer_with(10, part_entries_max=4)
    session = writer.subscribe(Subscribe())
    sizes = []
    while items := session.take(entries_max=5, items_max=3):
        sizes.append([len(item.keys) // 16 for item in items])
    assert sizes == [[4], [4], [2]]


def test_a_session_too_slow_for_the_history_starts_over_and_holds_nothing() -> None:
    writer = writer_with(4, history_deltas_max=3, part_entries_max=2)
    session = writer.subscribe(Subscribe())
    assert session.take(entries_max=2, items_max=1)[0].part == 0
    for i in range(10, 20):
        tell(writer, pages_added=[key_of(i)])
        writer.publish()
    (first, *_) = session.take(**EVERYTHING)
    assert isinstance(first, SnapshotPart)
    assert (first.part, first.number) == (0, writer.number)
    assert session.num_snapshots == 2
    assert session.is_current


def test_history_is_bounded_by_entries_too() -> None:
    writer = writer_with(history_entries_max=8, part_entries_max=4)
    for i in range(10):
        tell(writer, pages_added=[key_of(3 * i + j) for j in range(3)])
        writer.publish()
    assert writer.number - writer.oldest == 2
    writer.check()


def test_sessions_that_begin_together_share_one_snapshot() -> None:
    writer = writer_with(4)
    for i in range(10, 14):
        tell(writer, pages_added=[key_of(i)])
        writer.publish()
    first = writer.snapshot()
    tell(writer, pages_added=[key_of(99)])
    writer.publish()
    assert writer.snapshot() is first
    assert writer.subscribe(Subscribe()).take(**EVERYTHING)[-1].number == writer.number


def test_a_content_taken_whole_is_published_as_what_differs() -> None:
    writer = writer_with(4)
    tell(writer, pages_added=[key_of(50)])
    writer.replace([(key_of(0), PAGE), (key_of(1), PAGE | TAIL), (key_of(60), PAGE)])
    writer.publish()
    delta = writer.since(1)
    assert dict(entries(delta.keys, delta.changes)) == {
        key_of(1): PAGE << 4 | PAGE | TAIL,
        key_of(60): PAGE,
        key_of(2): PAGE << 4,
        key_of(3): PAGE << 4,
    }
    writer.check()

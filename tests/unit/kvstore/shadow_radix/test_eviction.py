"""What goes first by value, seen from outside: after a flood that has taught the index how long pages stay."""

from __future__ import annotations

import itertools

import pytest
from fake_prompts import key_of, keys_of
from hypothesis import given
from hypothesis import strategies as st

from kvstore.shadow_radix import Costs, EvictionOrder, ShadowRadix, TailKind
from kvstore.shadow_radix.eviction import EvictionQueue
from kvstore.shadow_radix.node import Node
from rorqual.ids import PageId, RecordId

COSTS = Costs(page_bytes=10, tail_bytes=40, rebuild_pages=6)
IDS = itertools.count()


def write(
    index: ShadowRadix,
    prompt: str,
    *,
    tails: tuple[int, ...] = (),
    kind: TailKind = TailKind.PROMPT_END,
    resume: bool = False,
) -> None:
    """`resume`: from the last tail, which is a use of it."""
    keys = keys_of(prompt)
    match = index.match(keys)
    tail_depth = match.resumable if resume else 0
    pin = index.pin(keys, num_pages=match.num_pages, tail_depth=tail_depth)
    for depth in range(match.num_pages, len(keys)):
        index.extend(pin, keys[depth], PageId(next(IDS)))
    for depth in tails:
        index.insert_tail(keys[depth - 1], RecordId(next(IDS)), kind=kind)
    index.release(pin)


def flood(index: ShadowRadix, first: int, count: int, *, num_pages_max: int) -> None:
    """Prompts of one page that nobody asks for again."""
    for number in range(first, first + count):
        write(index, chr(0x4E00 + number))
        index.evict_pages(index.num_pages - num_pages_max)


def taught(order: EvictionOrder = EvictionOrder.VALUE) -> ShadowRadix:
    index = ShadowRadix(costs=COSTS, order=order)
    flood(index, 0, 600, num_pages_max=100)
    return index


def gone(index: ShadowRadix, prompts: list[str]) -> list[str]:
    """These prompts' tails, in the order in which they are evicted."""
    order: list[str] = []
    while index.num_tails:
        index.evict_tails(1)
        order += [
            name for name in prompts if not index.match(keys_of(name)).tail_depths and name not in order
        ]
    return order


@pytest.mark.parametrize(("order", "stays"), [(EvictionOrder.LRU, False), (EvictionOrder.VALUE, True)])
def test_what_was_used_often_outlives_a_flood_by_value_only(order: EvictionOrder, stays: bool) -> None:
    index = taught(order)
    for _ in range(20):
        write(index, "abcdefgh", tails=(8,) if not index.match(keys_of("abcdefgh")).tail_depths else ())
    flood(index, 1000, 100, num_pages_max=100)
    assert (index.match(keys_of("abcdefgh")).num_pages == 8) == stays
    index.check()


def test_nothing_stays_for_ever_because_it_was_used_often_once() -> None:
    index = taught()
    for _ in range(20):
        write(index, "abcdefgh")
    flood(index, 1000, 2000, num_pages_max=100)
    assert index.match(keys_of("abcdefgh")).num_pages == 0


def test_a_tail_that_saves_much_outlives_a_younger_one_that_saves_little() -> None:
    index = taught()
    write(index, "abcdef", tails=(6,))
    write(index, "x", tails=(1,))
    assert gone(index, ["abcdef", "x"]) == ["x", "abcdef"]


def test_by_lru_the_older_tail_goes_whatever_it_saves() -> None:
    index = taught(EvictionOrder.LRU)
    write(index, "abcdef", tails=(6,))
    write(index, "x", tails=(1,))
    assert gone(index, ["abcdef", "x"]) == ["abcdef", "x"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_tail_that_its_prompt_has_gone_on_from_goes_before_an_older_one(resume: bool) -> None:
    index = taught()
    write(index, "opqrst", tails=(6,))
    write(index, "abcdef", tails=(6,))
    write(index, "abcdefghijkl", tails=(12,), resume=resume)
    index.evict_tails(1)
    assert index.match(keys_of("abcdefghijkl")).tail_depths == (12,)
    assert index.match(keys_of("opqrst")).tail_depths == (6,)


def test_a_tail_where_prompts_part_is_worth_as_much_as_one_at_an_end() -> None:
    index = taught()
    write(index, "opqrst", tails=(6,))
    write(index, "abcdef", tails=(6,))
    write(index, "abcdefg")
    write(index, "abcdefz")
    index.evict_tails(1)
    assert index.match(keys_of("abcdef")).tail_depths == (6,)
    assert index.match(keys_of("opqrst")).tail_depths == ()


def test_that_prompts_parted_is_remembered_when_one_of_them_is_gone() -> None:
    index = taught()
    write(index, "opqrst", tails=(6,))
    write(index, "abcdef", tails=(6,))
    write(index, "abcdefz")
    write(index, "abcdefg", tails=(7,))
    index.evict_pages(index.num_pages - 13)
    assert index.match(keys_of("abcdefz")).num_pages == 6
    index.evict_tails(2)
    assert index.match(keys_of("abcdefg")).tail_depths == (6,)


@pytest.mark.parametrize("is_told_later", [True, False])
def test_a_tail_taken_for_a_branch_is_no_inner_one(is_told_later: bool) -> None:
    index = taught()
    write(index, "opqrst", tails=(6,))
    write(index, "abcdef", tails=(6,), kind=TailKind.PROMPT_END if is_told_later else TailKind.BRANCH)
    index.insert_tail(key_of("abcdef"), RecordId(next(IDS)), kind=TailKind.BRANCH)
    write(index, "abcdefg")
    index.evict_tails(1)
    assert index.match(keys_of("abcdef")).tail_depths == (6,)


def test_a_tail_resumed_from_often_outlives_a_younger_one() -> None:
    index = taught()
    write(index, "abcdef", tails=(6,))
    for _ in range(5):
        write(index, "abcdef", resume=True)
    write(index, "opqrst", tails=(6,))
    assert gone(index, ["abcdef", "opqrst"]) == ["opqrst", "abcdef"]


def test_no_tail_saves_more_than_a_rebuild_takes() -> None:
    index = taught()
    write(index, "abcdefghijkl", tails=(12,))
    write(index, "uvwxyz", tails=(6,))
    assert gone(index, ["abcdefghijkl", "uvwxyz"]) == ["abcdefghijkl", "uvwxyz"]


def left(index: ShadowRadix, prompts: tuple[str, str]) -> str:
    """Which of two prompts is whole when so many pages are gone that one is not."""
    whole = [len(prompt) for prompt in prompts]
    while True:
        found = [index.match(keys_of(prompt)).num_pages for prompt in prompts]
        if found != whole:
            return prompts[0] if found[0] == whole[0] else prompts[1]
        assert index.evict_pages(1).pages


def test_pages_used_often_outlive_younger_ones() -> None:
    index = taught()
    for _ in range(20):
        write(index, "abcdefgh")
    write(index, "opqrstuv")
    assert left(index, ("abcdefgh", "opqrstuv")) == "abcdefgh"


def test_a_leaf_whose_tail_saves_much_outlives_a_younger_one_whose_tail_saves_little() -> None:
    index = taught()
    write(index, "abcdef", tails=(6,))
    write(index, "x", tails=(1,))
    assert left(index, ("abcdef", "x")) == "abcdef"


@pytest.mark.parametrize("order", list(EvictionOrder))
def test_a_page_lasts_as_long_as_its_tail_is_used(order: EvictionOrder) -> None:
    index = taught(order)
    write(index, "abc", tails=(3,))
    write(index, "xyz", tails=(3,))
    index.insert_tail(key_of("abc"), RecordId(next(IDS)), kind=TailKind.PROMPT_END)
    assert left(index, ("abc", "xyz")) == "abc"


def test_the_last_use_of_a_page_counts_for_those_before_it() -> None:
    """The pin that ended late was of all of them, though only its last page was touched at the end."""
    index = taught()
    write(index, "abcde", tails=(5,))
    pin = index.pin(keys_of("abcde"), num_pages=5)
    index.extend(pin, key_of("abcdef"), PageId(next(IDS)))
    write(index, "opqrs", tails=(5,))
    write(index, "opqrs")
    flood(index, 1000, 20, num_pages_max=200)
    index.release(pin)
    index.evict_pages(index.num_pages - 10)
    assert index.match(keys_of("abcdef")).num_pages == 5, "its last page had nothing to resume behind it"
    assert left(index, ("abcde", "opqrs")) == "abcde"


def test_pages_with_nothing_to_resume_behind_them_go_first() -> None:
    index = taught()
    write(index, "abc", tails=(3,))
    write(index, "xyz")  # younger, but shorter than a rebuild and without a tail
    index.evict_pages(index.num_pages - 4)
    assert index.match(keys_of("abc")).num_pages == 3


def test_a_leaf_that_lost_its_tail_is_worth_less_at_once() -> None:
    index = taught()
    write(index, "vwxyz", tails=(5,))
    write(index, "opqrs", tails=(5,))
    write(index, "vwxyz")  # its pages were used last, its tail was not
    index.evict_tails(1)
    assert index.match(keys_of("vwxyz")).tail_depths == ()
    assert left(index, ("vwxyz", "opqrs")) == "opqrs"


def test_cheapest_weighs_tails_against_pages() -> None:
    """A page of computing for each page's bytes, against a tail that saves one page for the bytes of four."""
    index = taught()
    write(index, "abcdefgh", tails=(1,))
    index.evict_pages(index.num_pages - 8)
    evicted = index.evict_cheapest(1)
    assert (len(evicted.pages), len(evicted.tails)) == (0, 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.booleans()), max_size=300))
def test_the_queue_hands_out_the_lowest_and_stays_short(moves: list[tuple[int, int, bool]]) -> None:
    """Priorities rise behind its back, as those of pages do when they are used."""
    root = Node(key_of("r"), None, PageId(-1), 0)
    items = [Node(key_of(chr(97 + number)), root, PageId(number), 0) for number in range(10)]
    queue = EvictionQueue[Node](lambda node: node.stamp)
    queued: set[Node] = set()
    for number, rise, is_in in moves:
        item = items[number]
        item.stamp += rise
        if is_in:
            queue.add(item)
            queued.add(item)
        else:
            queue.remove(item)
            queued.discard(item)
        first = queue.first()
        assert len(queue) == len(queued)
        assert set(queue.items()) == queued
        if first is None:
            assert not queued
        else:
            assert first[0] == first[1].stamp == min(node.stamp for node in queued)
        assert queue.num_entries <= 2 * len(queue) + 65


def test_an_item_queued_again_and_again_takes_no_more_room() -> None:
    root = Node(key_of("r"), None, PageId(-1), 0)
    item = Node(key_of("a"), root, PageId(0), 0)
    queue = EvictionQueue[Node](lambda node: node.stamp)
    for _ in range(1000):
        queue.add(item)
        assert queue.num_entries <= 66
    assert queue.items() == [item]

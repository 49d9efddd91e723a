"""The index through its public doors: what is matched, held, taken in and given back."""

from __future__ import annotations

import itertools

import pytest
from fake_prompts import key_of, keys_of

from kvstore.keys import PageKey
from kvstore.shadow_radix import Changes, Costs, Evicted, EvictionOrder, ShadowRadix, TailKind
from rorqual.feed import ABSENT, HOST_PAGE, HOST_TAIL, PAGE, TAIL
from rorqual.ids import PageId, RecordId

COSTS = Costs(page_bytes=10, tail_bytes=40, rebuild_pages=3)


class Owner:
    """Owns ids without end and writes prompts through an index, as a scheduler does."""

    def __init__(self, order: EvictionOrder = EvictionOrder.LRU, *, num_changes_max: int = 1000) -> None:
        self.index = ShadowRadix(costs=COSTS, order=order, num_changes_max=num_changes_max)
        self.names: dict[int, str] = {}  # page or record id: its prefix
        self._ids = itertools.count()

    def write(
        self, prompt: str, *, tails: tuple[int, ...] = (), kind: TailKind = TailKind.PROMPT_END
    ) -> None:
        keys = keys_of(prompt)
        match = self.index.match(keys)
        pin = self.index.pin(keys, num_pages=match.num_pages)
        for depth in range(match.num_pages, len(keys)):
            page = PageId(self.new_id(prompt[: depth + 1]))
            assert self.index.extend(pin, keys[depth], page) == page
        for depth in tails:
            record = RecordId(self.new_id(prompt[:depth]))
            assert self.index.insert_tail(keys[depth - 1], record, kind=kind) is None
        self.index.release(pin)
        self.index.check()

    def new_id(self, name: str) -> int:
        number = next(self._ids)
        self.names[number] = name
        return number

    def gone(self, evicted: Evicted) -> tuple[list[str], list[str]]:
        """The prefixes of pages and of tails, in order."""
        self.index.check()
        return [self.names[page] for page in evicted.pages], [self.names[tail] for tail in evicted.tails]


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_an_empty_index_matches_nothing(owner: Owner) -> None:
    match = owner.index.match(keys_of("abc"))
    assert (match.num_pages, match.tail_depths, match.resumable, match.is_branch) == (0, (), 0, False)
    assert owner.index.evict_pages(5) == Evicted()
    assert owner.index.take_changes().is_empty


def test_a_match_is_the_longest_prefix_and_the_tails_on_it(owner: Owner) -> None:
    owner.write("abcdef", tails=(2, 4, 6))
    match = owner.index.match(keys_of("abcdxy"))
    assert (match.num_pages, match.tail_depths, match.resumable) == (4, (2, 4), 4)
    assert owner.index.match(keys_of("xabc")).num_pages == 0


def test_a_branch_is_seen_where_a_path_goes_on_otherwise_or_further(owner: Owner) -> None:
    owner.write("abcd")
    assert owner.index.match(keys_of("abx")).is_branch
    assert owner.index.match(keys_of("ab")).is_branch
    assert not owner.index.match(keys_of("abcdx")).is_branch
    assert not owner.index.match(keys_of("x")).is_branch, "the start is no boundary"


def test_a_pin_names_the_ids_of_its_pages_and_tail(owner: Owner) -> None:
    owner.write("abc", tails=(2,))
    pin = owner.index.pin(keys_of("abc"), num_pages=2, tail_depth=2)
    assert [owner.names[page] for page in pin.pages] == ["a", "ab"]
    assert pin.tail is not None
    assert owner.names[pin.tail] == "ab"
    assert (owner.index.num_pages_pinned, owner.index.num_pages_evictable) == (2, 1)
    assert (owner.index.num_tails_evictable, owner.index.num_pins) == (0, 1)


def test_pinned_pages_and_tails_survive_every_eviction(owner: Owner) -> None:
    owner.write("abcd", tails=(1, 3, 4))
    pin = owner.index.pin(keys_of("abcd"), num_pages=3, tail_depth=3)
    assert owner.gone(owner.index.evict_cheapest(10**6)) == (["abcd"], ["a", "abcd"])
    assert owner.index.evict_pages(9) == owner.index.evict_tails(9) == Evicted()
    owner.index.release_tail(pin)
    assert owner.gone(owner.index.evict_tails(9)) == ([], ["abc"])
    owner.index.release(pin)
    assert owner.gone(owner.index.evict_pages(9)) == (["abc", "ab", "a"], [])


def test_two_pins_of_one_page_need_two_releases(owner: Owner) -> None:
    owner.write("ab", tails=(2,))
    pins = [owner.index.pin(keys_of("ab"), num_pages=2, tail_depth=2) for _ in range(2)]
    owner.index.release(pins[0])
    assert owner.index.evict_cheapest(10**6) == Evicted()
    owner.index.release(pins[1])
    assert owner.gone(owner.index.evict_cheapest(10**6)) == (["ab", "a"], ["ab"])


def test_releasing_twice_and_extending_afterwards_are_broken_invariants(owner: Owner) -> None:
    owner.write("a")
    pin = owner.index.pin(keys_of("a"), num_pages=1)
    owner.index.release(pin)
    with pytest.raises(AssertionError, match="released twice"):
        owner.index.release(pin)
    with pytest.raises(AssertionError, match="released pin"):
        owner.index.extend(pin, key_of("ab"), PageId(9))


def test_a_key_behind_another_page_than_its_own_is_a_broken_invariant(owner: Owner) -> None:
    owner.write("ab")
    pin = owner.index.pin((), num_pages=0)
    with pytest.raises(AssertionError, match="two parents"):
        owner.index.extend(pin, key_of("ab"), PageId(9))


def test_a_tail_that_is_not_there_cannot_be_pinned(owner: Owner) -> None:
    owner.write("ab")
    with pytest.raises(AssertionError, match="no tail"):
        owner.index.pin(keys_of("ab"), num_pages=2, tail_depth=2)


def test_a_page_that_is_there_already_leaves_the_second_id_to_its_owner(owner: Owner) -> None:
    """Two sequences computed the same page at once."""
    first = owner.index.pin((), num_pages=0)
    second = owner.index.pin((), num_pages=0)
    for prompt, ids in (("a", (1, 2)), ("ab", (3, 4))):
        assert owner.index.extend(first, key_of(prompt), PageId(ids[0])) == ids[0]
        assert owner.index.extend(second, key_of(prompt), PageId(ids[1])) == ids[0]
    assert second.pages == [1, 3]
    owner.index.release(first)
    assert owner.index.num_pages_pinned == 2
    owner.index.release(second)
    owner.index.check()
    assert owner.index.num_pages_pinned == 0


def test_the_second_tail_of_a_boundary_stays_its_owners(owner: Owner) -> None:
    owner.write("ab", tails=(2,))
    assert owner.index.insert_tail(key_of("ab"), RecordId(77), kind=TailKind.BRANCH) == 77
    assert owner.index.insert_tail(key_of("xy"), RecordId(78), kind=TailKind.BRANCH) == 78, "no such page"
    assert owner.index.num_tails == 1


def test_lru_evicts_leaf_first_what_was_not_used_for_longest(owner: Owner) -> None:
    owner.write("abc")
    owner.write("xyz")
    owner.write("abd")
    assert owner.gone(owner.index.evict_pages(3)) == (["abc", "xyz", "xy"], [])
    owner.write("x")
    assert owner.gone(owner.index.evict_pages(3)) == (["abd", "ab", "a"], [])


def test_a_look_is_no_use_and_a_pin_is(owner: Owner) -> None:
    for prompt in "abc":
        owner.write(prompt)
    owner.index.match(keys_of("a"))
    assert owner.gone(owner.index.evict_pages(1)) == (["a"], [])
    owner.index.release(owner.index.pin(keys_of("b"), num_pages=1))
    assert owner.gone(owner.index.evict_pages(1)) == (["c"], [])


def test_tails_are_evicted_by_their_own_last_use(owner: Owner) -> None:
    owner.write("ab", tails=(1, 2))
    owner.write("x", tails=(1,))
    owner.index.release(owner.index.pin(keys_of("ab"), num_pages=2, tail_depth=2))
    assert owner.gone(owner.index.evict_tails(3)) == ([], ["a", "x", "ab"])
    assert owner.index.num_pages == 3


def test_bytes_of_pages_and_tails_share_a_budget(owner: Owner) -> None:
    owner.write("abc", tails=(3,))
    assert owner.index.num_bytes == 3 * 10 + 40
    evicted = owner.index.evict_cheapest(1)
    assert evicted.pages or evicted.tails
    assert owner.index.num_bytes < 70


def test_changes_are_folded_and_say_what_is_different(owner: Owner) -> None:
    owner.write("ab", tails=(2,))
    a, ab, x = key_of("a"), key_of("ab"), key_of("x")
    assert owner.index.take_changes() == Changes(entries=((a, ABSENT, PAGE), (ab, ABSENT, PAGE | TAIL)))
    owner.write("x")
    owner.index.evict_tails(1)
    owner.index.release(owner.index.pin(keys_of("x"), num_pages=1))
    owner.index.evict_pages(2)
    owner.write("ab", tails=(1,))
    changes = owner.index.take_changes()
    assert set(changes.entries) == {(x, ABSENT, PAGE), (ab, PAGE | TAIL, PAGE), (a, PAGE, PAGE | TAIL)}
    assert (changes.pages_added, changes.tails_removed, changes.tails_added) == ((x,), (ab,), (a,))
    assert owner.index.take_changes().is_empty


def test_a_tail_that_goes_with_its_page_is_told_of(owner: Owner) -> None:
    owner.write("ab", tails=(2,))
    owner.index.take_changes()
    owner.index.evict_pages(2)
    changes = owner.index.take_changes()
    assert changes.pages_removed == (key_of("ab"), key_of("a")), "children first"
    assert changes.tails_removed == (key_of("ab"),)


def test_pages_are_told_of_in_order_whatever_happened_to_them_before(owner: Owner) -> None:
    owner.write("ab")
    owner.index.take_changes()
    owner.index.insert_tail(key_of("a"), RecordId(99), kind=TailKind.BRANCH)
    owner.index.evict_pages(2)
    assert owner.index.take_changes().entries == ((key_of("ab"), PAGE, ABSENT), (key_of("a"), PAGE, ABSENT))
    owner.write("xy")
    owner.index.insert_tail(key_of("x"), RecordId(98), kind=TailKind.BRANCH)
    x, xy = keys_of("xy")
    assert owner.index.take_changes().entries == ((x, ABSENT, PAGE | TAIL), (xy, ABSENT, PAGE))


def test_more_changes_than_the_bound_ask_for_the_contents() -> None:
    owner = Owner(num_changes_max=2)
    owner.write("abc")
    assert owner.index.take_changes() == Changes(is_overflowed=True)
    assert list(owner.index.contents()) == [(key, False) for key in keys_of("abc")]
    owner.write("xy")
    assert owner.index.take_changes().entries == tuple((key, ABSENT, PAGE) for key in keys_of("xy"))


def test_what_moves_between_the_device_and_the_tier_below_changes_its_flags_and_a_copy_does_not(
    owner: Owner,
) -> None:
    below: dict[PageKey, tuple[bool, bool]] = {}

    def move(key: PageKey, page: bool, tail: bool) -> None:
        owner.index.note(key)
        below[key] = page, tail

    owner.index.join(lambda key: below.get(key, (False, False)))
    owner.write("ab", tails=(2,))
    owner.index.take_changes()
    a, ab = keys_of("ab")
    move(ab, True, True)
    assert owner.index.take_changes().is_empty
    owner.index.evict_tails(1)
    assert owner.index.take_changes().entries == ((ab, PAGE | TAIL, PAGE | TAIL | HOST_TAIL),)
    owner.index.evict_pages(2)
    host_only = PAGE | HOST_PAGE | TAIL | HOST_TAIL
    assert owner.index.take_changes().entries == ((ab, PAGE | TAIL | HOST_TAIL, host_only), (a, PAGE, ABSENT))
    move(ab, True, False)
    assert owner.index.take_changes().entries == ((ab, host_only, PAGE | HOST_PAGE),)
    owner.write("ab")
    assert set(owner.index.take_changes().entries) == {(ab, PAGE | HOST_PAGE, PAGE), (a, ABSENT, PAGE)}
    move(ab, False, True)  # a tail counts with a page in either tier
    assert owner.index.take_changes().entries == ((ab, PAGE, PAGE | TAIL | HOST_TAIL),)
    owner.index.evict_pages(1)
    assert owner.index.take_changes().entries == ((ab, PAGE | TAIL | HOST_TAIL, ABSENT),)

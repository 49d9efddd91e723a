"""Pages and tails in host memory: found by key, pinned, and given up deepest first, the least worth before others; and
in any order of calls against a model of plain dictionaries."""

from __future__ import annotations

import pytest
from fake_prompts import key_of, keys_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.keys import PageKey
from kvstore.shadow_radix import EvictedPage, EvictedTail, EvictionOrder, TailKind
from kvstore.tiers import HostIndex, HostMatch, HostPage, HostTail
from rorqual.ids import PageId, RecordId

FIRST_ID = 700


class FakeDevice:
    """The tier above: names of the pages that it has, and what it was told of changes below."""

    def __init__(self) -> None:
        self.pages: set[str] = set()
        self.noted: list[PageKey] = []

    def has_page(self, key: PageKey) -> bool:
        return key in {key_of(name) for name in self.pages}

    def note(self, key: PageKey) -> None:
        self.noted.append(key)


def page_of(name: str, *, worth: float = 1.0, hits: int = 0) -> EvictedPage:
    parent = key_of(name[:-1]) if len(name) > 1 else PageKey(b"")
    return EvictedPage(page=PageId(1), key=key_of(name), parent=parent, hits=hits, worth=worth)


def tail_of(name: str, *, worth: float = 1.0) -> EvictedTail:
    return EvictedTail(record=RecordId(1), key=key_of(name), kind=TailKind.PROMPT_END, hits=0, worth=worth)


class Below:
    """An index, and a device that has given everything up unless it is told otherwise."""

    def __init__(
        self, *, num_pages: int = 4, num_records: int = 2, order: EvictionOrder = EvictionOrder.VALUE
    ) -> None:
        self.device = FakeDevice()
        self.index = HostIndex(
            num_pages=num_pages,
            num_records=num_records,
            above=self.device,
            order=order,
            first_id=FIRST_ID,
        )

    def put(self, *names: str, worth: float = 1.0) -> list[bool]:
        """Whether each is to be copied."""
        return [self.index.put_page(page_of(name, worth=worth), (7, 8)) is not None for name in names]

    def put_tail(self, name: str, *, worth: float = 1.0) -> bool:
        return self.index.put_tail(tail_of(name, worth=worth), num_bytes=40, digest=9) is not None

    def there(self, prompt: str, first: int = 0) -> tuple[int, tuple[int, ...]]:
        found = self.index.match(keys_of(prompt), first)
        return found.num_pages, found.tail_depths


def test_a_path_may_begin_anywhere() -> None:
    below = Below()
    assert below.put("abcd", "abc") == [True, True]
    assert below.there("abcd") == (0, ())
    assert below.there("abcd", 2) == (2, ())
    assert below.there("abxd", 2) == (0, ())
    below.device.pages = {"a", "ab"}
    assert below.put_tail("a")
    assert below.put_tail("abcd")
    assert below.there("abcd", 2) == (2, (1, 4))
    assert below.there("abcd", 0) == (0, ())
    below.index.check()


def test_a_page_leaves_before_those_it_stands_on() -> None:
    below = Below(num_pages=3)
    below.put("abc", "ab", "a")
    below.put("x")
    assert [below.there(name, len(name) - 1)[0] for name in ("a", "ab", "abc")] == [1, 1, 0]
    below.put("y", "z")
    assert [below.there(name)[0] for name in ("a", "x", "y", "z")] == [0, 1, 1, 1]
    assert below.index.counts.pages_evicted == 3


def test_what_is_there_already_is_not_copied_and_counts_as_used() -> None:
    below = Below(num_pages=2)
    assert below.put("a", "b") == [True, True]
    assert below.put("a") == [False]
    assert below.put("c") == [True]
    assert [below.there(name)[0] for name in "abc"] == [1, 0, 1]
    counts = below.index.counts
    assert (counts.pages_taken, counts.pages_kept, counts.pages_evicted) == (3, 1, 1)


def test_what_is_worth_less_than_all_that_is_there_is_refused_but_not_what_others_follow_on() -> None:
    below = Below(num_pages=8, num_records=2)
    for name in map(str, range(200)):
        below.put(name)  # ages, so that worth counts
    before = below.index.counts.pages_refused
    assert below.put("x", worth=1e-9) == [False]
    assert below.index.counts.pages_refused == before + 1
    assert below.put("ab") == [True]
    assert below.put("a", worth=1e-9) == [True]
    below.index.check()


def test_pinned_ones_stay_and_with_them_those_they_stand_on() -> None:
    below = Below(num_pages=2)
    below.put("ab", "a")
    page = below.index.pin_page(key_of("ab"))
    assert below.put("x") == [False]
    below.index.unpin_page(page)
    assert below.put("x") == [True]
    assert below.there("ab") == (1, ())


def test_a_tail_goes_with_its_page_unless_the_device_has_that_or_it_is_in_use() -> None:
    below = Below(num_pages=1, num_records=3)
    below.put("a")
    assert below.put_tail("a")
    assert not below.put_tail("q"), "of a page that is nowhere"
    tail = below.index.pin_tail(key_of("a"))
    below.put("b")
    assert below.index.state(key_of("a")) == (False, True)
    below.index.unpin_tail(tail)
    assert below.index.state(key_of("a")) == (False, False)
    below.device.pages = {"c"}
    assert below.put_tail("c")
    below.device.pages = set()
    assert below.put("c") == [True]
    assert below.index.state(key_of("c")) == (True, True)
    below.index.check()


def test_a_tail_of_a_page_that_finds_no_room_goes_too() -> None:
    below = Below(num_pages=1)
    below.device.pages = {"a"}
    below.put_tail("a")
    below.put("x")
    below.index.pin_page(key_of("x"))
    below.device.pages = set()
    assert below.put("a") == [False]
    assert below.index.num_tails == 0


def test_it_says_of_each_key_that_it_is_about_to_change() -> None:
    below = Below(num_pages=1)
    below.put("a")
    below.put_tail("a")
    below.put("b")
    assert below.device.noted == [key_of(name) for name in "aaaab"]  # page, tail; both gone; and the other


@pytest.mark.parametrize("order", EvictionOrder)
def test_what_is_used_from_here_outlives_what_is_not(order: EvictionOrder) -> None:
    below = Below(num_pages=20, order=order)
    below.put("hot")
    for number in range(400):
        below.put(f"{number % 90}x")
        if number % 12 == 0:
            below.index.unpin_page(below.index.pin_page(key_of("hot")))
    assert below.index.state(key_of("hot")) == (True, False)
    below.index.check()


NUM_PAGES = 5
NUM_RECORDS = 3
NAMES = st.text(alphabet="ab", min_size=1, max_size=4)


class HostStates(RuleBasedStateMachine):
    """The model knows which names are where, never keys. What is evicted it learns from the index, and checks that it
    could be."""

    @initialize(order=st.sampled_from(EvictionOrder))
    def start(self, order: EvictionOrder) -> None:
        self.below = Below(num_pages=NUM_PAGES, num_records=NUM_RECORDS, order=order)
        self.index, self.device = self.below.index, self.below.device
        self.pages: dict[str, int] = {}
        self.tails: dict[str, int] = {}
        self.pinned_pages: list[HostPage] = []
        self.pinned_tails: list[HostTail] = []
        self.announced: dict[PageKey, tuple[bool, bool]] = {}

    @rule(name=NAMES)
    def compute(self, name: str) -> None:
        """The device has a path."""
        self.device.pages |= {name[:depth] for depth in range(1, len(name) + 1)}

    @rule(pick=st.integers(0, 50), worth=st.floats(0.01, 10), hits=st.integers(0, 3), with_tail=st.booleans())
    def give_up(self, pick: int, worth: float, hits: int, with_tail: bool) -> None:
        """The device's leaf; then perhaps its tail."""
        leaves = sorted(
            name for name in self.device.pages if not any(other[:-1] == name for other in self.device.pages)
        )
        if not leaves:
            return
        name = leaves[pick % len(leaves)]
        self.device.pages.remove(name)
        was_there = name in self.pages
        found = self.index.put_page(page_of(name, worth=worth, hits=hits), None)
        gone = self.settle()
        assert name not in gone or was_there is False
        if was_there:
            assert found is None
            assert gone == set(), "something left for a page that needed no room"
        elif found is not None:
            self.pages[name] = found
            assert len(gone) <= 1
        else:
            assert not gone
            assert len(self.pages) == NUM_PAGES
        if with_tail:
            self.offer_tail(name, worth)

    @rule(name=NAMES, worth=st.floats(0.01, 10))
    def give_up_tail(self, name: str, worth: float) -> None:
        """The page stays on the device."""
        if name in self.device.pages:
            self.offer_tail(name, worth)

    def offer_tail(self, name: str, worth: float) -> None:
        was_there, is_of_use = name in self.tails, name in self.pages or name in self.device.pages
        found = self.index.put_tail(tail_of(name, worth=worth), num_bytes=1, digest=2)
        self.settle()
        if was_there or not is_of_use:
            assert found is None
        if found is not None:
            self.tails[name] = found
        elif not was_there and is_of_use:
            assert len(self.tails) == NUM_RECORDS

    @rule(pick=st.integers(0, 50), is_tail=st.booleans())
    def pin(self, pick: int, is_tail: bool) -> None:
        names = sorted(self.tails if is_tail else self.pages)
        if not names or len(self.pinned_pages) + len(self.pinned_tails) >= 4:
            return
        name = names[pick % len(names)]
        if is_tail:
            tail = self.index.pin_tail(key_of(name))
            assert tail.record == self.tails[name]
            self.pinned_tails.append(tail)
        else:
            page = self.index.pin_page(key_of(name))
            assert page.page == self.pages[name]
            self.pinned_pages.append(page)

    @rule(pick=st.integers(0, 50))
    def unpin(self, pick: int) -> None:
        if self.pinned_pages:
            self.index.unpin_page(self.pinned_pages.pop(pick % len(self.pinned_pages)))
        elif self.pinned_tails:
            self.index.unpin_tail(self.pinned_tails.pop(pick % len(self.pinned_tails)))
            self.settle()

    @rule(name=NAMES, first=st.integers(0, 4))
    def match(self, name: str, first: int) -> None:
        first = min(first, len(name))
        end = first
        while end < len(name) and name[: end + 1] in self.pages:
            end += 1
        tails = tuple(depth for depth in range(1, end + 1) if name[:depth] in self.tails)
        assert self.index.match(keys_of(name), first) == HostMatch(num_pages=end - first, tail_depths=tails)

    @invariant()
    def everything_adds_up(self) -> None:
        self.index.check()
        assert {page.key: page.page for page in self.index.pages()} == {
            key_of(name): page for name, page in self.pages.items()
        }
        assert {tail.key: tail.record for tail in self.index.tails()} == {
            key_of(name): record for name, record in self.tails.items()
        }
        assert len(set(self.pages.values())) == len(self.pages) <= NUM_PAGES
        assert all(FIRST_ID <= page < FIRST_ID + NUM_PAGES for page in self.pages.values())
        assert dict(self.index.contents()) == {key_of(name): name in self.tails for name in self.pages}

    @invariant()
    def whoever_was_told_knows_all_that_changed(self) -> None:
        state = {key_of(name): self.index.state(key_of(name)) for name in {*self.pages, *self.tails}}
        changed = {
            key
            for key in state.keys() | self.announced.keys()
            if state.get(key, (False, False)) != self.announced.get(key, (False, False))
        }
        assert changed <= set(self.device.noted)
        self.device.noted.clear()
        self.announced = state

    def settle(self) -> set[str]:
        """Forget what the index has given up; none of it was pinned, or stood below another that stayed."""
        held = {page.key for page in self.index.pages()}
        gone = {name for name in self.pages if key_of(name) not in held}
        pinned = {page.key for page in self.pinned_pages}
        for name in gone:
            assert key_of(name) not in pinned
            del self.pages[name]
        for name in gone:
            assert not any(other[:-1] == name for other in self.pages), "left before what stands on it"
        held = {tail.key for tail in self.index.tails()}
        pinned = {tail.key for tail in self.pinned_tails}
        for name in [name for name in self.tails if key_of(name) not in held]:
            assert key_of(name) not in pinned
            del self.tails[name]
        return gone


HostStates.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestHostStates = pytest.mark.slow(HostStates.TestCase)

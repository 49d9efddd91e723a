"""Sequences that share, grow, end and evict each other in any order, against a model of plain dictionaries.

The model knows token prefixes, never keys: what it says is present must be what the index finds. Ids are few, so that
nearly every step evicts, and each is at any moment free, in the index, or with the sequence that tried to give it.
"""

from __future__ import annotations

import pytest
from fake_prompts import key_of, keys_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from kvstore.keys import PageKey
from kvstore.shadow_radix import Costs, Evicted, EvictionOrder, Pin, ShadowRadix, TailKind
from rorqual.feed import ABSENT, PAGE, TAIL
from rorqual.ids import PageId, RecordId

NUM_PAGES = 7
NUM_RECORDS = 4
COSTS = Costs(page_bytes=10, tail_bytes=25, rebuild_pages=2)
PROMPTS = st.text(alphabet="ab", max_size=6)


class Running:
    """A sequence in the middle of its prompt."""

    def __init__(self, prompt: str, depth: int, tail_depth: int, pin: Pin) -> None:
        self.prompt = prompt
        self.depth = depth
        self.tail_depth = tail_depth
        self.pin = pin

    @property
    def done(self) -> str:
        return self.prompt[: self.depth]


def prefixes(prompt: str) -> list[str]:
    return [prompt[:depth] for depth in range(1, len(prompt) + 1)]


class IndexStates(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(order=st.sampled_from(EvictionOrder), num_changes_max=st.sampled_from([0, 5, 100]))
    def start(self, order: EvictionOrder, num_changes_max: int) -> None:
        self.index = ShadowRadix(costs=COSTS, order=order, num_changes_max=num_changes_max)
        self.free_pages = [PageId(number) for number in range(NUM_PAGES)]
        self.free_records = [RecordId(number) for number in range(NUM_RECORDS)]
        self.pages: dict[str, PageId] = {}
        self.tails: dict[str, RecordId] = {}
        self.running: list[Running] = []
        self.mirror: dict[PageKey, bool] = {}

    @rule(target=sequences, prompt=PROMPTS, want_tail=st.booleans())
    def begin(self, prompt: str, want_tail: bool) -> object:
        match = self.index.match(keys_of(prompt))
        there = [prefix for prefix in prefixes(prompt) if prefix in self.pages]
        assert match.num_pages == len(there)
        assert match.tail_depths == tuple(len(prefix) for prefix in there if prefix in self.tails)
        goes_on = any(
            prefix[:-1] == there[-1] for prefix in self.pages if there and len(prefix) == len(there) + 1
        )
        assert match.is_branch == goes_on
        if len(self.running) >= 4:
            return multiple()
        tail_depth = match.resumable if want_tail else 0
        pin = self.index.pin(keys_of(prompt), num_pages=match.num_pages, tail_depth=tail_depth)
        assert pin.pages == [self.pages[prefix] for prefix in there]
        assert pin.tail == (self.tails[prompt[:tail_depth]] if tail_depth else None)
        sequence = Running(prompt, match.num_pages, tail_depth, pin)
        self.running.append(sequence)
        return sequence

    @rule(sequence=sequences)
    def grow(self, sequence: Running) -> None:
        if sequence.depth == len(sequence.prompt):
            return
        if not self.free_pages:
            self.take_back(self.index.evict_pages(1))
        if not self.free_pages:
            assert self.index.num_pages_evictable == 0
            return
        page = self.free_pages.pop()
        sequence.depth += 1
        taken = self.index.extend(sequence.pin, key_of(sequence.done), page)
        if sequence.done in self.pages:
            assert taken == self.pages[sequence.done]
            self.free_pages.append(page)
        else:
            assert taken == page
            self.pages[sequence.done] = page
        assert sequence.pin.pages == [self.pages[prefix] for prefix in prefixes(sequence.done)]

    @rule(prompt=PROMPTS.filter(bool), kind=st.sampled_from(TailKind))
    def add_tail(self, prompt: str, kind: TailKind) -> None:
        if not self.free_records:
            self.take_back(self.index.evict_tails(1))
        if not self.free_records:
            assert self.index.num_tails_evictable == 0
            return
        record = self.free_records.pop()
        back = self.index.insert_tail(key_of(prompt), record, kind=kind)
        if prompt in self.pages and prompt not in self.tails:
            assert back is None
            self.tails[prompt] = record
        else:
            assert back == record
            self.free_records.append(record)

    @rule(sequence=sequences)
    def forget_tail(self, sequence: Running) -> None:
        self.index.release_tail(sequence.pin)
        sequence.tail_depth = 0

    @rule(sequence=consumes(sequences))
    def end(self, sequence: Running) -> None:
        self.index.release(sequence.pin)
        self.running.remove(sequence)

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def evict_pages(self, count: int) -> None:
        num_free = len(self.pages) - len(self.held_pages())
        evicted = self.index.evict_pages(count)
        assert len(evicted.pages) == min(count, num_free)
        self.take_back(evicted)

    @rule(count=st.integers(0, NUM_RECORDS + 1))
    def evict_tails(self, count: int) -> None:
        num_free = len(self.tails) - len(self.held_tails())
        evicted = self.index.evict_tails(count)
        assert (len(evicted.pages), len(evicted.tails)) == (0, min(count, num_free))
        self.take_back(evicted)

    @rule(num_bytes=st.integers(0, 200))
    def evict_cheapest(self, num_bytes: int) -> None:
        before = self.index.num_bytes
        self.take_back(self.index.evict_cheapest(num_bytes))
        is_enough = before - self.index.num_bytes >= num_bytes
        assert is_enough or self.index.num_pages_evictable == self.index.num_tails_evictable == 0

    @rule()
    def follow(self) -> None:
        """A reader of changes has the same content, and never a page without the one before."""
        changes = self.index.take_changes()
        names = {key_of(name): name for name in self.all_names()}
        if changes.is_overflowed:
            self.mirror = dict(self.index.contents())
        removed = [key for key, _, now in changes.entries if not now]
        for key, before, now in changes.entries:
            assert before == (PAGE | TAIL * self.mirror[key] if key in self.mirror else ABSENT)
            if not now:
                continue
            parent = names[key][:-1]
            assert before or not parent or key_of(parent) in self.mirror, "added before its parent"
            self.mirror[key] = now == PAGE | TAIL
        for key in removed:
            del self.mirror[key]
            assert not any(key_of(names[other][:-1]) == key for other in self.mirror if len(names[other]) > 1)
        assert self.mirror == {key_of(prefix): prefix in self.tails for prefix in self.pages}

    @invariant()
    def everything_adds_up(self) -> None:
        self.index.check()
        assert sorted([*self.free_pages, *self.pages.values()]) == list(range(NUM_PAGES))
        assert sorted([*self.free_records, *self.tails.values()]) == list(range(NUM_RECORDS))
        assert (self.index.num_pages, self.index.num_tails) == (len(self.pages), len(self.tails))
        assert self.index.num_pages_pinned == len(self.held_pages())
        assert self.index.num_tails_evictable == len(self.tails) - len(self.held_tails())
        assert self.index.num_pins == len(self.running)
        assert dict(self.index.contents()) == {key_of(prefix): prefix in self.tails for prefix in self.pages}

    def teardown(self) -> None:
        """After any storm everything can be evicted, and every id is back."""
        if not hasattr(self, "index"):
            return
        for sequence in self.running:
            self.index.release(sequence.pin)
        self.running.clear()
        self.take_back(self.index.evict_pages(NUM_PAGES))
        self.index.check()
        assert (len(self.free_pages), len(self.free_records)) == (NUM_PAGES, NUM_RECORDS)
        assert (self.index.num_pages, self.index.num_tails, self.index.num_bytes) == (0, 0, 0)

    def take_back(self, evicted: Evicted) -> None:
        """Ids return to their owner; none was pinned, no page lost its parent, no tail its page."""
        held_pages, held_tails = self.held_pages(), self.held_tails()
        tail_names = {record: prefix for prefix, record in self.tails.items()}
        for record in evicted.tails:
            assert tail_names[record] not in held_tails
            del self.tails[tail_names[record]]
            self.free_records.append(record)
        page_names = {page: prefix for prefix, page in self.pages.items()}
        for page in evicted.pages:
            prefix = page_names[page]
            assert prefix not in held_pages
            assert prefix not in self.tails, "a tail is left without its page"
            del self.pages[prefix]
            assert not any(other[:-1] == prefix for other in self.pages), "a page is orphaned"
            self.free_pages.append(page)

    def held_pages(self) -> set[str]:
        return {prefix for sequence in self.running for prefix in prefixes(sequence.done)}

    def held_tails(self) -> set[str]:
        return {sequence.prompt[: sequence.tail_depth] for sequence in self.running if sequence.tail_depth}

    def all_names(self) -> list[str]:
        names = [""]
        for name in names:
            if len(name) < 6:
                names += [name + letter for letter in "ab"]
        return names[1:]


IndexStates.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestIndexStates = pytest.mark.slow(IndexStates.TestCase)

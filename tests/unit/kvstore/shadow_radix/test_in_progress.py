"""Two prompts that share pages compute them once, and nobody waits for ever."""

from __future__ import annotations

import pytest
from fake_prompts import key_of, keys_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.keys import PageKey
from kvstore.shadow_radix import InProgress, Wait


def test_who_asks_first_leads_and_an_equal_prompt_waits_for_its_last_page() -> None:
    progress = InProgress[str]()
    assert progress.ask("one", keys_of("abc")) is None
    assert progress.ask("two", keys_of("abc")) == Wait(leader="one", num_pages=3, key=key_of("abc"))
    assert [progress.completed("one", key) for key in keys_of("abc")] == [(), (), ("two",)]
    assert progress.ask("two", ()) is None, "all is there: nothing to lead"
    assert (progress.num_leaders, progress.num_waiters) == (1, 0)
    assert progress.end("one") == progress.end("two") == ()
    assert progress.num_leaders == 0


def test_a_prompt_that_parts_waits_for_what_is_shared_and_wants_a_tail_there() -> None:
    progress = InProgress[str]()
    progress.ask("one", keys_of("abcd"))
    assert progress.ask("two", keys_of("abx")) == Wait(leader="one", num_pages=2, key=key_of("ab"))
    assert progress.tails_wanted("one") == (key_of("ab"),)
    assert progress.tails_wanted("two") == ()
    progress.completed("one", key_of("a"))
    assert progress.completed("one", key_of("ab")) == ("two",)
    assert progress.tails_wanted("one") == ()
    assert progress.ask("two", keys_of("abx")[2:]) is None, "from here on both compute, each its own"


def test_when_the_leader_is_gone_one_of_the_waiting_leads_and_the_others_wait_for_it() -> None:
    progress = InProgress[str]()
    progress.ask("one", keys_of("abc"))
    for waiter in ("two", "three", "four"):
        progress.ask(waiter, keys_of("abc"))
    assert progress.end("one") == ("two", "three", "four")
    assert progress.ask("two", keys_of("abc")) is None
    for waiter in ("three", "four"):
        wait = progress.ask(waiter, keys_of("abc"))
        assert wait is not None
        assert wait.leader == "two"
    progress.check()


def test_a_waiter_that_is_cancelled_is_not_woken() -> None:
    progress = InProgress[str]()
    progress.ask("one", keys_of("a"))
    progress.ask("two", keys_of("a"))
    assert progress.end("two") == ()
    assert progress.completed("one", key_of("a")) == ()
    progress.check()


def test_prompts_that_share_nothing_do_not_wait() -> None:
    progress = InProgress[str]()
    assert progress.ask("one", keys_of("abc")) is None
    assert progress.ask("two", keys_of("xyz")) is None
    assert progress.ask("three", ()) is None


def test_with_too_many_waiting_the_next_computes_what_others_compute() -> None:
    progress = InProgress[str](num_waiters_max=1)
    progress.ask("one", keys_of("ab"))
    assert progress.ask("two", keys_of("ab")) is not None
    assert progress.ask("three", keys_of("abc")) is None
    assert progress.completed("three", key_of("a")) == (), "one has promised it, and will say so"
    assert progress.completed("one", key_of("a")) == ()
    assert progress.completed("one", key_of("ab")) == ("two",)
    progress.check()


def test_nobody_waits_more_often_than_the_bound() -> None:
    progress = InProgress[str](num_waits_max=2)
    for leader in ("one", "two"):
        progress.ask(leader, keys_of("ab"))
        assert progress.ask("late", keys_of("ab")) is not None
        assert progress.end(leader) == ("late",)
    progress.ask("three", keys_of("ab"))
    assert progress.ask("late", keys_of("ab")) is None
    progress.check()


def test_waits_are_counted_anew_after_an_end() -> None:
    """A sequence that was preempted asks again under the same name."""
    progress = InProgress[str](num_waits_max=1)
    progress.ask("one", keys_of("ab"))
    for _ in range(3):
        assert progress.ask("late", keys_of("ab")) is not None
        progress.end("late")


class Progress(RuleBasedStateMachine):
    """Sequences that come, compute page by page into one cache, and are cancelled; pages vanish from the cache."""

    @initialize(num_waiters_max=st.integers(0, 4), num_waits_max=st.integers(0, 3))
    def start(self, num_waiters_max: int, num_waits_max: int) -> None:
        self.progress = InProgress[int](num_waiters_max=num_waiters_max, num_waits_max=num_waits_max)
        self.cache: set[PageKey] = set()
        self.prompts: dict[int, str] = {}  # of those not ended
        self.computing: dict[int, list[PageKey]] = {}  # pages still to do
        self.waiting: set[int] = set()
        self.num_asked: dict[int, int] = {}
        self.num_waits_max = num_waits_max
        self.num_started = 0

    @rule(prompt=st.text(alphabet="ab", min_size=1, max_size=5))
    def come(self, prompt: str) -> None:
        owner = self.num_started
        self.num_started += 1
        self.prompts[owner] = prompt
        self.ask(owner)

    @precondition(lambda self: self.computing)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.computing)))
        key = self.computing[owner].pop(0)
        self.cache.add(key)
        woken = self.progress.completed(owner, key)
        if not self.computing[owner]:
            woken += self.end(owner)
        self.wake(woken)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.wake(self.end(data.draw(st.sampled_from(sorted(self.prompts)))))

    @rule(prompt=st.text(alphabet="ab", min_size=1, max_size=5))
    def evict(self, prompt: str) -> None:
        self.cache.discard(key_of(prompt))

    @invariant()
    def somebody_computes_what_others_wait_for(self) -> None:
        self.progress.check()
        assert self.waiting.isdisjoint(self.computing)
        assert self.progress.num_waiters == len(self.waiting)
        assert not self.waiting or self.computing, "all wait"
        assert all(count <= self.num_waits_max for count in self.num_asked.values())

    def teardown(self) -> None:
        """Whoever is left is computed to the end, in so many steps as there are pages."""
        if not hasattr(self, "progress"):
            return
        for _ in range(sum(len(prompt) for prompt in self.prompts.values())):
            if not self.computing:
                break
            owner = min(self.computing)
            key = self.computing[owner].pop(0)
            woken = self.progress.completed(owner, key)
            self.cache.add(key)
            if not self.computing[owner]:
                woken += self.end(owner)
            self.wake(woken)
        assert (self.prompts, self.waiting) == ({}, set())
        assert (self.progress.num_leaders, self.progress.num_waiters) == (0, 0)

    def ask(self, owner: int) -> None:
        keys = keys_of(self.prompts[owner])
        missing = next((depth for depth, key in enumerate(keys) if key not in self.cache), len(keys))
        wait = self.progress.ask(owner, keys[missing:])
        if wait is not None:
            assert wait.leader in self.computing
            assert wait.key == keys[missing + wait.num_pages - 1]
            assert wait.key in self.computing[wait.leader]
            self.waiting.add(owner)
            self.num_asked[owner] = self.num_asked.get(owner, 0) + 1
        elif keys[missing:]:
            self.computing[owner] = list(keys[missing:])
        else:
            self.wake(self.end(owner))

    def wake(self, woken: tuple[int, ...]) -> None:
        for owner in woken:
            self.waiting.remove(owner)
        for owner in woken:
            self.ask(owner)

    def end(self, owner: int) -> tuple[int, ...]:
        del self.prompts[owner]
        self.computing.pop(owner, None)
        self.waiting.discard(owner)
        return self.progress.end(owner)


Progress.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestProgress = pytest.mark.slow(Progress.TestCase)

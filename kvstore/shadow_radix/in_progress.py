"""Who is computing which page, so that two prompts that share a prefix compute it once. Pure; the scheduler calls it.

A sequence asks before it is admitted, with the keys of the pages it still misses. When somebody is computing the first
of them already, it waits for those they share; else it *leads*: the pages are its own to compute until they are done or
it ends. A leader never waits and a waiter leads nothing, so no two can wait for each other. Woken waiters match again
and ask again: the first goes on, and others who need the same wait for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvstore.keys import PageKey

Owner = TypeVar("Owner", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait(Generic[Owner]):
    """Computing these pages now would be work done twice."""

    leader: Owner
    num_pages: int  # leading ones of the keys asked for that the leader is computing
    key: PageKey  # of the last of them: where a tail lets the waiter go on


class InProgress(Generic[Owner]):
    """The pages being computed on one worker."""

    def __init__(self, *, num_waiters_max: int = 1024, num_waits_max: int = 4) -> None:
        """Beyond `num_waiters_max` nobody more waits, and nobody waits more than `num_waits_max` times: they go on and
        compute what others compute too, which costs time and harms nothing."""
        assert num_waiters_max >= 0
        assert num_waits_max >= 0
        self._num_waiters_max = num_waiters_max
        self._num_waits_max = num_waits_max
        self._leaders: dict[PageKey, Owner] = {}
        self._led: dict[Owner, _Led[Owner]] = {}
        self._waits: dict[Owner, Wait[Owner]] = {}
        self._num_waits: dict[Owner, int] = {}  # of those who have waited, until they end

    @property
    def num_leaders(self) -> int:
        return len(self._led)

    @property
    def num_waiters(self) -> int:
        return len(self._waits)

    def ask(self, owner: Owner, keys: Sequence[PageKey]) -> Wait[Owner] | None:
        """None: go on, and the pages that nobody computes are yours. Else wait until `completed` or `end` names you.

        `keys`: of the full pages the prompt misses, in order. Whoever has asked ends, whatever the answer was.
        """
        assert owner not in self._led, f"{owner} asks while it leads"
        assert owner not in self._waits, f"{owner} asks while it waits"
        wait = self._wait(owner, keys)
        if wait is not None:
            self._waits[owner] = wait
            self._num_waits[owner] = self._num_waits.get(owner, 0) + 1
            self._led[wait.leader].waiters[owner] = None
            return wait
        mine = {key: None for key in keys if key not in self._leaders}
        if mine:
            self._led[owner] = _Led(keys=mine)
        for key in mine:
            self._leaders[key] = owner
        return None

    def tails_wanted(self, owner: Owner) -> tuple[PageKey, ...]:
        """Boundaries where somebody who waits for this leader will go on by itself: worth a tail each."""
        led = self._led.get(owner)
        return () if led is None else tuple({self._waits[waiter].key: None for waiter in led.waiters})

    def completed(self, owner: Owner, key: PageKey) -> tuple[Owner, ...]:
        """The leader's page is in the index now. Returns who has waited for it, in order; they ask again."""
        led = self._led.get(owner)
        if led is None or key not in led.keys:
            return ()  # computed beside another leader
        del led.keys[key]
        del self._leaders[key]
        woken = tuple(waiter for waiter in led.waiters if self._waits[waiter].key == key)
        for waiter in woken:
            self._wake(waiter)
        return woken

    def end(self, owner: Owner) -> tuple[Owner, ...]:
        """It is done, cancelled or preempted, as leader or waiter. Returns who has waited for it, in order; they ask
        again. Nothing happens to those not known."""
        self._num_waits.pop(owner, None)
        if owner in self._waits:
            self._wake(owner)
            return ()
        led = self._led.get(owner)
        if led is None:
            return ()
        woken = tuple(led.waiters)
        for waiter in woken:
            self._wake(waiter)
        del self._led[owner]
        for key in led.keys:
            del self._leaders[key]
        return woken

    def check(self) -> None:
        """Assert that everything adds up: for tests."""
        assert self._leaders == {key: owner for owner, led in self._led.items() for key in led.keys}
        assert self._waits.keys() == {waiter for led in self._led.values() for waiter in led.waiters}
        assert not self._waits.keys() & self._led.keys(), "a waiter leads"
        for waiter, wait in self._waits.items():
            assert waiter in self._led[wait.leader].waiters
            assert self._leaders[wait.key] == wait.leader, "somebody waits for a page that nobody computes"
        assert len(self._waits) <= self._num_waiters_max

    def _wait(self, owner: Owner, keys: Sequence[PageKey]) -> Wait[Owner] | None:
        leader = self._leaders.get(keys[0]) if keys else None
        if leader is None or len(self._waits) >= self._num_waiters_max:
            return None
        if self._num_waits.get(owner, 0) >= self._num_waits_max:
            return None
        num_pages = 1
        while num_pages < len(keys) and self._leaders.get(keys[num_pages]) == leader:
            num_pages += 1
        return Wait(leader=leader, num_pages=num_pages, key=keys[num_pages - 1])

    def _wake(self, waiter: Owner) -> None:
        wait = self._waits.pop(waiter)
        del self._led[wait.leader].waiters[waiter]


@dataclass(slots=True, kw_only=True)
class _Led(Generic[Owner]):
    keys: dict[PageKey, None]  # not done yet, in order
    waiters: dict[Owner, None] = field(default_factory=dict[Owner, None])

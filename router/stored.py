"""What the store that all workers share has of a prompt: asked by the router before it places one. Workers read it
themselves; here it is only known, so that a prompt goes to whoever is free where reading beats computing.

Owned by `router.dispatch`. A question is asked only where the fleet keeps less than the prompt could use, takes
DEADLINE_SECONDS at most, and soon nothing while the store is lost or slow (`kvstore.store.health`): late is as good as
no store. `Search` is pure; `StoreKnowledge` carries it out. A wrong answer costs time, never a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.keys import PageKey
from kvstore.store.contract import Kind, StoreKey, tenant_label
from router.fleet_metrics import StoreMetrics
from router.placement.by_cache import Caches
from router.placement.least_wait import NOTHING_STORED, Stored
from router.prompt_keys import Keys

DEADLINE_SECONDS = 0.005
"""For all rounds together: a page takes longer to compute on most hardware."""

PAGES_MIN = 4
"""Fewer pages to compute are not worth a question."""

KEYS_MAX = 64
"""Of one round trip: 0.5 ms of a router's time on one core. A prompt that lacks more is searched in several, of 0.2 ms
each besides: 390 pages take two, 1 ms in all, where asking for all of them at once takes 4."""

FRONT_SAMPLES = 8
"""Pages asked for among those that the fleet has: whether the store has them too."""


class Finder(Protocol):
    """`kvstore.store.finder.StoreFinder`."""

    async def run(self) -> None: ...

    async def find(
        self, wire_id: str, keys: Sequence[StoreKey], *, budget_seconds: float
    ) -> list[bool] | None:
        """Whether each is there. None: not all of it is known within the budget. Never raises."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Depths to ask for in one round trip."""

    pages: tuple[int, ...]
    tails: tuple[int, ...]
    is_last: bool


class Search:
    """How far a store's pages go behind the best of the fleet, and where the deepest tail of use is, in few rounds: of
    more pages than one may ask for, some at equal distances, then all between two of them. It takes pages between two
    that are there to be there too. Tails so far before the end that a rebuild begins behind them are of no use."""

    def __init__(
        self, *, num_pages: int, num_best: int, rebuild_pages: int, keys_max: int = KEYS_MAX
    ) -> None:
        """`num_best`: leading pages that some worker has."""
        assert 0 <= num_best <= num_pages
        assert keys_max >= 4 * FRONT_SAMPLES
        self._num_best = num_best
        self._num_tails = min(rebuild_pages, keys_max // 2)  # behind this many pages before the end
        self._keys_max = keys_max
        self._end = num_best  # pages from the best on to here are there
        self._absent = num_pages + 1  # this one is not
        self.found: Stored | None = None
        """None: another round is to be asked."""

    def next_round(self) -> Round:
        front = _spread(range(1, self._num_best + 1), FRONT_SAMPLES)
        pages = range(self._end + 1, self._absent)
        tails = range(max(1, self._end - self._num_tails + 1), self._absent)
        room = self._keys_max - len(front)
        if len(pages) + len(tails) <= room:
            return Round(pages=(*front, *pages), tails=tuple(tails), is_last=True)
        return Round(pages=tuple(_spread(pages, room)), tails=(), is_last=False)

    def take(self, asked: Round, pages: Sequence[bool], tails: Sequence[bool]) -> None:
        """The answers to this round, in its order."""
        there = dict(zip(asked.pages, pages, strict=True))
        behind = sorted(depth for depth in there if depth > self._end)
        self._absent = next((depth for depth in behind if not there[depth]), self._absent)
        self._end = max((depth for depth in behind if depth < self._absent), default=self._end)
        if not asked.is_last:
            return
        answers = zip(asked.tails, tails, strict=True)
        tail = max((depth for depth, is_there in answers if is_there and depth <= self._end), default=0)
        has_front = all(is_there for depth, is_there in there.items() if depth <= self._num_best)
        first = 0 if has_front else self._num_best
        is_nothing = not tail and self._end == first
        self.found = NOTHING_STORED if is_nothing else Stored(first=first, pages=self._end, tail=tail)


class StoreKnowledge:
    """Asks for one prompt at a time, for as many at once as there are."""

    def __init__(
        self,
        finder: Finder,
        *,
        caches: Caches,
        rebuild_pages: int,
        metrics: StoreMetrics,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        self._finder = finder
        self._caches = caches
        self._rebuild_pages = rebuild_pages
        self._metrics = metrics
        self._deadline_seconds = deadline_seconds

    async def run(self) -> None:
        """Until cancelled; before and after nothing is known."""
        await self._finder.run()

    async def ask(self, keys: Keys, *, salt: str) -> Stored:
        """Of the first chain. NOTHING_STORED: there is nothing, or it is not known in time, or is of no use."""
        if not keys:
            return NOTHING_STORED
        wire_id, chain = next(iter(keys.items()))
        found = self._caches.look_up(chain)
        num_best = int(found.pages_W.max(initial=0))
        start = max(int(found.tail_W.max(initial=0)), num_best - self._rebuild_pages)
        if len(chain) - start <= PAGES_MIN:
            return NOTHING_STORED
        search = Search(num_pages=len(chain), num_best=num_best, rebuild_pages=self._rebuild_pages)
        began = asyncio.get_running_loop().time()
        stored = await self._carry_out(search, wire_id, chain, salt=salt)
        self._metrics.store_seconds.observe(asyncio.get_running_loop().time() - began)
        outcome = "unknown" if stored is None else "found" if stored.pages else "absent"
        self._metrics.store_questions.labels(outcome).inc()
        return stored or NOTHING_STORED

    async def _carry_out(
        self, search: Search, wire_id: str, chain: Sequence[PageKey], *, salt: str
    ) -> Stored | None:
        """None: not all answers came in time."""
        loop, tenant = asyncio.get_running_loop(), tenant_label(salt)
        deadline = loop.time() + self._deadline_seconds
        while search.found is None:
            asked = search.next_round()
            keys = [StoreKey(Kind.PAGE, tenant, chain[depth - 1]) for depth in asked.pages]
            keys += [StoreKey(Kind.TAIL, tenant, chain[depth - 1]) for depth in asked.tails]
            answers = await self._finder.find(wire_id, keys, budget_seconds=deadline - loop.time())
            if answers is None:
                return None
            num_pages = len(asked.pages)
            search.take(asked, answers[:num_pages], answers[num_pages:])
        return search.found


def _spread(depths: range, count: int) -> list[int]:
    """So many of them at equal distances, the last one among them; all, where there are no more."""
    num = len(depths)
    if num <= count:
        return list(depths)
    return [depths[(i + 1) * num // count - 1] for i in range(count)]

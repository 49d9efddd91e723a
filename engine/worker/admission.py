"""Who waits, and who starts next. `engine.worker.scheduler` owns it and is the only one to call it.

First come, first served: the head of the queue starts when slots, pages and records are there for it, and those behind
it wait for it. It looks at those alone; the rank hears of a sequence with its first chunk. What the prefix cache has of
a sequence it shares, and needs no pages for. A sequence whose next page another is computing follows that one: it lets
others pass meanwhile, holds nothing, and keeps its place in the queue; so does one of which pages are being read from
another worker, or come back from host memory. A preempted sequence, which was the youngest
running one, returns to the head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from engine.worker.cache.prefix_cache import Found, PrefixCache
from engine.worker.holdings import Holdings
from engine.worker.sequences import Phase, Sequence
from engine.worker.tiers.restoring import Restoring
from kvstore.shadow_radix import Match, Start
from rorqual.errors import Overloaded


class Admission:
    def __init__(
        self,
        holdings: Holdings,
        cache: PrefixCache | None,
        restoring: Restoring | None,
        *,
        sequences_waiting_max: int,
        tokens_waiting_max: int,
    ) -> None:
        self._holdings = holdings
        self._cache = cache
        self._restoring = restoring
        self._sequences_waiting_max = sequences_waiting_max
        self._tokens_waiting_max = tokens_waiting_max
        self._waiting: deque[Sequence] = deque()  # oldest first
        self._tokens_waiting = 0  # of those, prompt and generated; does not change while they wait
        self.short: Sequence | None = None  # whom `start_next` has not started last, for want of pages
        self._tokens_awaited = 0  # of those, what is computed elsewhere

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def tokens_waiting(self) -> int:
        """That will be computed here."""
        return self._tokens_waiting - self._tokens_awaited

    def first(self, count: int) -> list[Sequence]:
        """So many of those that wait, oldest first."""
        return list(islice(self._waiting, count))

    def check_room(self, num_tokens: int) -> None:
        """For a prompt of so many tokens. Raises Overloaded; a single prompt may always wait."""
        if len(self._waiting) >= self._sequences_waiting_max or (
            self._waiting and self._tokens_waiting + num_tokens > self._tokens_waiting_max
        ):
            raise Overloaded(
                f"{len(self._waiting)} sequences with {self._tokens_waiting} tokens are waiting already"
            )

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self.count(sequence, +1)

    def add_preempted(self, sequence: Sequence) -> None:
        self._waiting.appendleft(sequence)
        self.count(sequence, +1)

    def remove(self, sequence: Sequence) -> None:
        """It ends before it starts."""
        self._waiting.remove(sequence)
        self.count(sequence, -1)

    def count(self, sequence: Sequence, sign: int) -> None:
        """Take a waiting sequence's tokens out of the sums and in again: around what changes their number."""
        self._tokens_waiting += sign * sequence.num_known
        if sequence.is_adopting:
            self._tokens_awaited += sign * sequence.num_known

    def start_next(self, *, pages_reserved: int) -> Sequence | None:
        """The first sequence that waits for no pages of others, if there is room for it; it runs or adopts now."""
        self.short = None
        if not self._holdings.num_slots_free:
            return None
        for sequence in self._waiting:
            if sequence.is_following or sequence.is_fetching or sequence.is_restoring:
                continue
            if sequence.num_inflight:
                return None  # preempted: tokens it will resume from are still on their way
            found = self._cache.find(sequence) if self._cache is not None else None
            if self._restoring is not None and found is not None and self._restoring.waits(sequence, found):
                continue
            if self._cache is not None and found is not None and self._cache.follows(sequence, found):
                continue
            if not self._holdings.start(sequence, found, pages_reserved=pages_reserved):
                if not sequence.needs_record or self._holdings.num_records_free:
                    self.short = sequence
                if self._cache is not None:
                    self._cache.leave(sequence)
                return None
            if self._cache is not None and found is not None:
                self._cache.started(sequence, found, num_tails_free=self._holdings.num_records_free)
            self._take(sequence)
            return sequence
        return None

    def start_head(self, start: Callable[[Sequence], Start | None]) -> Sequence | None:
        """The sequence that found too few pages just now, by another way to start."""
        sequence, self.short = self.short, None
        found = start(sequence) if sequence is not None else None
        if sequence is None or found is None or self._cache is None:
            return None
        match = Match(num_pages=found.reuse_depth, tail_depths=(), is_branch=False)
        num_tails_free = self._holdings.num_records_free
        self._cache.started(sequence, Found(match=match, start=found), num_tails_free=num_tails_free)
        self._take(sequence)
        return sequence

    def _take(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self.count(sequence, -1)

    def check(self) -> None:
        assert not self._tokens_waiting or self._waiting, "tokens wait without a sequence"
        assert all(sequence.phase is Phase.WAITING for sequence in self._waiting)

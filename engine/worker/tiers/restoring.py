"""Pages and tails come back from host memory while sequences wait for their turn. Pure; owned by the scheduler.

Whoever is about to start is looked at, and the first few of those that cannot start yet. Where host memory goes on
from what the device has of a sequence, and starting from both computes less, room is taken as for an import
(`engine.worker.cache.imports`), copies are put into the next plans, as much into each as its bound allows, and when
the last one's result is in, all of it enters the cache, as if it had been computed here. The sequence waits meanwhile
and lets others pass; whoever wants the same waits for the same copies. A restore is of no sequence: it ends as it was
begun when those who wait are cancelled.

It takes half of the pages that are to be had at most, so that whoever runs can go on. What was brought back may be
evicted again before its sequence finds a slot: a sequence is restored a few times, and then begins from what there is,
so that none waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from engine.plan import NO_COPIES, Copies, PageCopy, RecordCopy
from engine.worker.cache.imports import PAGES_SHARE_MAX, Import, Imports
from engine.worker.cache.prefix_cache import Found, Packed, PageFacts, PrefixCache
from engine.worker.holdings import Holdings
from engine.worker.sequences import Sequence
from engine.worker.tiers.host_tier import HostTier
from engine.worker.tiers.speeds import Speeds
from kvstore.keys import PageKey
from kvstore.shadow_radix import Match, StartKind
from kvstore.tiers import HostPage, HostTail
from rorqual.model_config import PAGE_TOKENS

RESTORES_MAX = 4
"""Of one sequence until it starts: each takes half of what is free, so these take fifteen sixteenths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """Pages number first .. depth - 1 of a path, and perhaps the tail behind them."""

    first: int
    depth: int
    with_tail: bool


@dataclass(slots=True, kw_only=True, eq=False)
class _Restore:
    item: Import
    pages: tuple[HostPage, ...]
    tail: HostTail | None
    sequences: list[Sequence] = field(default_factory=list[Sequence])  # that wait for it
    num_planned: int = 0  # of the pages


class Restoring:
    def __init__(
        self, tier: HostTier, holdings: Holdings, cache: PrefixCache, imports: Imports, speeds: Speeds
    ) -> None:
        self._tier = tier
        self._holdings = holdings
        self._cache = cache
        self._imports = imports
        self._speeds = speeds
        self._queued: deque[_Restore] = deque()  # whose copies are not all planned yet
        self._planned: deque[tuple[int, _Restore]] = deque()  # with the plan that has the last copy
        self._pages: dict[PageKey, _Restore] = {}  # on their way
        self._tails: dict[PageKey, _Restore] = {}

    @property
    def num_open(self) -> int:
        return len(self._queued) + len(self._planned)

    def look(self, sequences: Iterable[Sequence]) -> None:
        """Begin to bring back what these can use, who wait and cannot start yet, in their order."""
        clock = self._tier.index.clock
        for sequence in sequences:
            # A prompt of a million tokens takes a millisecond to look up: not in every step for the same answer.
            if sequence.host_clock == clock:
                continue
            is_waiting = sequence.is_following or sequence.is_fetching or sequence.is_restoring
            # Of one that was preempted tokens may still be on their way.
            if not is_waiting and not sequence.num_inflight and self._may_restore(sequence):
                self.waits(sequence, self._cache.find(sequence))

    def waits(self, sequence: Sequence, found: Found) -> bool:
        """Whether it had better wait, since what it would compute comes back from host memory. `found`: what the device
        has of it."""
        if not self._may_restore(sequence):
            return False
        wish = self._wish(sequence, found)
        if wish is None:
            sequence.host_clock = self._tier.index.clock
            return False
        restore = self._coming(sequence.keys, wish) or self._begin(sequence.keys, wish)
        if restore is None:
            return False
        restore.sequences.append(sequence)
        sequence.is_restoring = True
        sequence.num_restores += 1
        return True

    def take_copies(self, number: int) -> Copies:
        """For plan `number`, which is being made: at least one, if any is wanted."""
        if not self._queued:
            return NO_COPIES
        pages: list[PageCopy] = []
        records: list[RecordCopy] = []
        room = self._tier.config.copy_bytes_max
        page_bytes = self._cache.config.costs.page_bytes
        while self._queued:
            restore = self._queued[0]
            while restore.num_planned < len(restore.pages):
                if (pages or records) and room < page_bytes:
                    return Copies(pages=tuple(pages), records=tuple(records))
                room -= page_bytes
                pages.append(self._plan_page(restore, number))
            tail = restore.tail
            if tail is not None:
                if (pages or records) and room < tail.num_bytes:
                    break
                room -= tail.num_bytes
                records.append(self._plan_tail(restore, tail, number))
            self._planned.append((number, self._queued.popleft()))
        return Copies(pages=tuple(pages), records=tuple(records))

    def landed(self, number: int) -> None:
        """The result of plan `number` is in."""
        while self._planned and self._planned[0][0] == number:
            self._end(self._planned.popleft()[1])

    def check(self) -> None:
        """Assert that everything adds up: for tests."""
        restores = [*self._queued, *(restore for _, restore in self._planned)]
        assert set(map(id, self._pages.values())) <= set(map(id, restores)), "a page of no restore is awaited"
        assert len(self._pages) == sum(len(restore.pages) for restore in restores)
        assert len(self._tails) == sum(restore.tail is not None for restore in restores)

    def _wish(self, sequence: Sequence, found: Found) -> _Wish | None:
        """What the cheapest start needs that device and host memory together allow, if it is worth it."""
        keys, there = sequence.keys, found.match
        below = self._tier.index.match(keys, there.num_pages)
        tails = below.tail_depths if self._holdings.num_records_free and not sequence.is_adopting else ()
        if not below.num_pages and not tails:
            return None
        together = Match(
            num_pages=there.num_pages + below.num_pages,
            tail_depths=tuple(sorted({*there.tail_depths, *tails})),
            is_branch=False,
        )
        start = self._cache.start_at(sequence, together)
        if sequence.is_adopting:
            num_saved = (start.reuse_depth - found.start.reuse_depth) * PAGE_TOKENS
        else:
            num_saved = found.start.num_tokens_computed - start.num_tokens_computed
        if num_saved <= 0:
            return None
        # Pages behind the tail would be replayed: they save memory, but no time.
        depth = start.tail_depth or start.reuse_depth
        assert start.tail_depth == 0 or start.kind in (StartKind.TAIL, StartKind.FULL)
        with_tail = start.tail_depth > 0 and start.tail_depth not in there.tail_depths
        wish = _Wish(first=min(there.num_pages, depth), depth=depth, with_tail=with_tail)
        return wish if self._is_worth_it(wish, num_saved) else None

    def _is_worth_it(self, wish: _Wish, num_tokens_saved: int) -> bool:
        costs = self._cache.config.costs
        num_bytes = (wish.depth - wish.first) * costs.page_bytes + wish.with_tail * costs.tail_bytes
        speeds = self._speeds
        return speeds.is_worth(num_bytes, num_tokens_saved, speeds.host) or speeds.probes(speeds.host)

    def _may_restore(self, sequence: Sequence) -> bool:
        index = self._tier.index
        is_empty = not (index.num_pages or index.num_tails)
        return not is_empty and sequence.can_share and sequence.num_restores < RESTORES_MAX

    def _coming(self, keys: Several[PageKey], wish: _Wish) -> _Restore | None:
        """What brings the first that is wished for already."""
        if wish.first < wish.depth:
            return self._pages.get(keys[wish.first])
        return self._tails.get(keys[wish.depth - 1])

    def _begin(self, keys: Several[PageKey], wish: _Wish) -> _Restore | None:
        """As much of it as half of what is free holds; the rest is looked for again. None: there is no room."""
        num_free = self._holdings.num_pages_free
        num_free -= self._cache.num_pages_to_hold(keys, num_pages=wish.first)
        num_pages = wish.depth - wish.first
        if num_pages > num_free:
            return None  # nor could the sequence start now
        num_taken = min(num_pages, int(PAGES_SHARE_MAX * num_free))
        if num_pages and not num_taken:
            return None
        with_tail = wish.with_tail and num_taken == num_pages
        path = tuple(keys[: wish.first + num_taken])
        # Held first: what is evicted to make room comes down here, and must not push out what is wanted.
        index = self._tier.index
        pages = tuple(index.pin_page(key) for key in path[wish.first :])
        tail = index.pin_tail(path[-1]) if with_tail else None
        item = self._imports.begin(path, with_record=with_tail)
        if item is None:
            for page in reversed(pages):
                index.unpin_page(page)
            if tail is not None:
                index.unpin_tail(tail)
            return None
        assert item.first == wish.first
        assert (item.record is None) == (tail is None)
        restore = _Restore(item=item, pages=pages, tail=tail)
        self._queued.append(restore)
        self._pages.update((page.key, restore) for page in pages)
        if tail is not None:
            self._tails[tail.key] = restore
        return restore

    def _plan_page(self, restore: _Restore, number: int) -> PageCopy:
        """From now on its place in host memory may be copied to: that is done by a later plan."""
        at = restore.num_planned
        page = restore.pages[at]
        restore.num_planned += 1
        self._tier.used(page, number)
        self._tier.index.unpin_page(page)
        return PageCopy(page=restore.item.pages[at], host_page=page.page)

    def _plan_tail(self, restore: _Restore, tail: HostTail, number: int) -> RecordCopy:
        assert restore.item.record is not None
        self._tier.used(tail, number)
        self._tier.index.unpin_tail(tail)
        return RecordCopy(record=restore.item.record, host_record=tail.record, num_bytes=tail.num_bytes)

    def _end(self, restore: _Restore) -> None:
        tail, counts = restore.tail, self._tier.index.counts
        counts.pages_hit += len(restore.pages)
        counts.tails_hit += tail is not None
        for page in restore.pages:
            del self._pages[page.key]
        if tail is not None:
            del self._tails[tail.key]
        self._imports.end(
            restore.item,
            facts=[PageFacts(digests=page.digests, tenant=page.tenant) for page in restore.pages],
            tail_depth=len(restore.item.keys) if tail is not None else 0,
            packed=Packed(num_bytes=tail.num_bytes, digest=tail.digest) if tail is not None else None,
            kind=tail.kind if tail is not None else None,
        )
        for sequence in restore.sequences:
            sequence.is_restoring = False

"""Pages and tails on their way into the prefix cache: from another worker's memory, or from this one's host memory.
Pure; owned by the scheduler.

Called by `engine.worker.sharing.peer_reading`, in the host's own task, and by `engine.worker.tiers.restoring`. An
import holds what is here already of its path, and pages and perhaps a record of its own, into which somebody reads or
a plan copies. It ends once nothing is written there any more: what was read and proved enters the cache as if it had
been computed here, the rest is free again. No sequence holds an import: what comes too late for one is there for the
next.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

from engine.worker.cache.prefix_cache import Packed, PageFacts, PrefixCache
from engine.worker.holdings import Holdings
from kvstore.keys import PageKey
from kvstore.shadow_radix import Pin, TailKind
from rorqual.ids import PageId, RecordId

PAGES_SHARE_MAX = 0.5
"""Of the pages that are free, or can be evicted, one import takes so many at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Import:
    """Room for pages number first .. first + len(pages) - 1 of a path."""

    keys: tuple[PageKey, ...]  # of the path, to its last wanted page
    first: int  # pages before this one are here, and stay while the import lasts
    pages: tuple[PageId, ...]
    record: RecordId | None
    after: int  # nothing may be written before the result of this plan is in; 0: at once
    pin: Pin


class Imports:
    """Without a cache there is nowhere to import to: none begins."""

    def __init__(self, holdings: Holdings, cache: PrefixCache | None) -> None:
        self._holdings = holdings
        self._cache = cache
        self._open: set[Import] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def begin(self, keys: tuple[PageKey, ...], *, with_record: bool) -> Import | None:
        """None when nothing of it is missing, or when there is no room."""
        if self._cache is None:
            return None
        match = self._cache.match(keys)
        first = match.num_pages
        has_tail = match.resumable == len(keys)
        num_pages = len(keys) - first
        if has_tail or (not num_pages and not with_record):
            return None
        if num_pages > PAGES_SHARE_MAX * self._holdings.num_pages_free:
            return None
        # Held first: making room must not take what it is to follow on.
        pin = self._cache.hold(keys, num_pages=first)
        taken = self._holdings.take_for_import(num_pages, with_record=with_record)
        if taken is None:
            self._cache.take_back(pin)
            return None
        pages, record, after = taken
        made = Import(keys=keys, first=first, pages=pages, record=record, after=after, pin=pin)
        self._open.add(made)
        return made

    def end(
        self,
        item: Import,
        *,
        facts: Several[PageFacts] = (),
        tail_depth: int = 0,
        packed: Packed | None = None,
        kind: TailKind | None = None,
    ) -> None:
        """Nothing is written into it any more. Its first pages, one for each of `facts`, hold what they should; and the
        record the tail behind `tail_depth` pages of the
        path, if `packed` is given. `kind` of that, where it is known."""
        assert self._cache is not None
        num_pages = len(facts)
        assert num_pages <= len(item.pages)
        self._open.remove(item)
        unused = list(item.pages[num_pages:])
        for number in range(num_pages):
            page = item.pages[number]
            if not self._cache.take_in(item.pin, item.keys[item.first + number], page, facts[number]):
                unused.append(page)
        record = item.record
        if record is not None and packed is not None and 0 < tail_depth <= item.first + num_pages:
            if kind is None:
                kind = TailKind.PROMPT_END if tail_depth == len(item.keys) else TailKind.BRANCH
            record = self._cache.take_in_tail(item.keys[tail_depth - 1], record, kind=kind, packed=packed)
        self._cache.take_back(item.pin)
        self._holdings.end_import(item.pages, item.record, unused=unused, unused_record=record)

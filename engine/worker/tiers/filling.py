"""What a store could add to what this worker has of a prompt, and where it goes in host memory. Pure; owned by the
scheduler, called by `engine.worker.tiers.store_tier` in the host's own task.

A sequence that has just been opened lacks the pages behind those that are here, on the device or in host memory, and
perhaps a tail. Once it is known which of them a store has, the cheapest start from all of them together says what is
worth reading. That goes to host memory, from where `engine.worker.tiers.restoring` brings it to the device as it does
with everything that is there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.worker.cache.prefix_cache import PrefixCache
from engine.worker.events import SequenceKey
from engine.worker.sequences import Phase, Sequence
from engine.worker.tiers.host_tier import HostTier
from engine.worker.tiers.speeds import Speeds
from kvstore.keys import PageKey
from kvstore.shadow_radix import Match, Start
from kvstore.store.contract import TenantLabel

PAGES_SHARE_MAX = 0.5
"""Of host memory, that one sequence is read into at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """Of a prompt's pages, those from number `first` on are not here; nor are tails behind other depths than these."""

    keys: tuple[PageKey, ...]  # as far as they may be read
    first: int
    tail_depths: tuple[int, ...]
    num_tokens: int  # that would be computed
    tenant: TenantLabel
    is_probe: bool = False  # the store seems too slow for it, and is asked to see

    @property
    def page_keys(self) -> tuple[PageKey, ...]:
        return self.keys[self.first :]

    @property
    def tail_keys(self) -> tuple[PageKey, ...]:
        here = {self.keys[depth - 1] for depth in self.tail_depths}
        return tuple(key for key in self.keys if key not in here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Pages number first .. first + len(pages) - 1 of a path, and perhaps the tail behind the last one."""

    parent: PageKey  # of the first; empty: it begins the prompt
    pages: tuple[PageKey, ...]
    tail: PageKey | None
    depth: int  # of the last page, or of the tail
    num_tokens_saved: int


class Filling:
    def __init__(
        self,
        tier: HostTier,
        cache: PrefixCache,
        sequences: Mapping[SequenceKey, Sequence],
        speeds: Speeds,
    ) -> None:
        """`sequences` are the scheduler's, which have been opened and have not ended."""
        self._tier = tier
        self._cache = cache
        self._sequences = sequences
        self._speeds = speeds

    def lack(self, key: SequenceKey, *, num_pages_coming: int = 0) -> Lack | None:
        """Of a sequence that waits. None: nothing that a store could add would save anything, or all of it not as much
        as reading it takes. So many first pages come from elsewhere."""
        sequence = self._sequences[key]
        if not sequence.can_share or sequence.is_adopting or not sequence.keys:
            return None
        here = self._here(sequence.keys, num_pages_coming)
        num_max = int(PAGES_SHARE_MAX * self._tier.config.num_pages)
        keys = tuple(sequence.keys[: here.num_pages + num_max])
        start = self._start(sequence, here)
        best = Match(num_pages=len(keys), tail_depths=(len(keys),), is_branch=False)
        num_saved = start.num_tokens_computed - self._start(sequence, best).num_tokens_computed
        if num_saved <= 0:
            return None
        lacks_tail = len(keys) not in here.tail_depths
        is_worth = self._is_worth(len(keys) - here.num_pages, lacks_tail, num_saved)
        if not is_worth and not self._speeds.probes(self._speeds.store):
            return None
        return Lack(
            keys=keys,
            first=here.num_pages,
            tail_depths=here.tail_depths,
            num_tokens=start.num_tokens_computed,
            tenant=sequence.tenant,
            is_probe=not is_worth,
        )

    def wish(
        self, key: SequenceKey, lack: Lack, *, pages: Collection[PageKey], tails: Collection[PageKey]
    ) -> Wish | None:
        """What is worth reading for it if a store has these. None: nothing, or it has ended or begun."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.phase is not Phase.WAITING:
            return None
        keys, end = lack.keys, lack.first
        while end < len(keys) and keys[end] in pages:
            end += 1
        depths = {depth for depth in range(1, end + 1) if keys[depth - 1] in tails}
        there = Match(
            num_pages=end, tail_depths=tuple(sorted(depths | set(lack.tail_depths))), is_branch=False
        )
        start = self._start(sequence, there)
        num_saved = lack.num_tokens - start.num_tokens_computed
        if num_saved <= 0:
            return None
        # Pages behind the tail would be replayed: they save memory, but no time.
        depth = start.tail_depth or start.reuse_depth
        first = min(lack.first, depth)
        has_tail = start.tail_depth > 0 and start.tail_depth not in lack.tail_depths
        is_worth = lack.is_probe or self._is_worth(depth - first, has_tail, num_saved)
        if not is_worth and not self._speeds.probes(self._speeds.store):
            return None
        self._tier.index.touch(keys[:first])
        return Wish(
            parent=keys[first - 1] if first else PageKey(b""),
            pages=keys[first:depth],
            tail=keys[depth - 1] if has_tail else None,
            depth=depth,
            num_tokens_saved=num_saved,
        )

    def awaits_page(self, key: SequenceKey, page: PageKey, *, num_other_reads: int) -> bool:
        """Whether a page is not here that a sequence waits for: in another read than these."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.num_fetches <= num_other_reads:
            return False
        return not (self._tier.index.state(page)[0] or self._cache.has_page(page))

    def _is_worth(self, num_pages: int, with_tail: bool, num_tokens_saved: int) -> bool:
        """What comes from a store goes through host memory."""
        costs, speeds = self._cache.config.costs, self._speeds
        num_bytes = num_pages * costs.page_bytes + with_tail * costs.tail_bytes
        return speeds.is_worth(num_bytes, num_tokens_saved, speeds.store, speeds.host)

    def _here(self, keys: list[PageKey], num_pages_coming: int) -> Match:
        device = self._cache.match(keys)
        num_first = max(device.num_pages, min(num_pages_coming, len(keys)))
        below = self._tier.index.match(keys, num_first)
        tails = tuple(sorted({*device.tail_depths, *below.tail_depths}))
        return Match(num_pages=num_first + below.num_pages, tail_depths=tails, is_branch=False)

    def _start(self, sequence: Sequence, match: Match) -> Start:
        return self._cache.start_at(sequence, match)

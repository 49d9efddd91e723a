"""What a sequence leaves behind goes to host memory as its turn ends, so that it can be written to a store. Pure;
owned by the scheduler.

The pages and tails stay on the device, too: these are copies, made by the next plans, a bounded number of bytes by
each. What host memory has already is passed over: it was written when it came there. Pages go deepest first, as if
they were evicted, so that a prompt longer than host memory passes through it and leaves its first pages there. What the
device has evicted meanwhile has gone down by itself.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.worker.cache.prefix_cache import Departed, PrefixCache
from engine.worker.sequences import Sequence
from engine.worker.tiers.host_tier import HostTier
from kvstore.keys import PageKey
from rorqual.model_config import PAGE_TOKENS

PATHS_MAX = 1024
"""Of sequences that have ended and wait for their copies: beyond it the oldest is left out."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Path:
    sequence: Sequence  # whose last tail may still be on its way
    keys: list[PageKey]  # still to be copied, of which the last comes next


class TurnEnds:
    def __init__(self, tier: HostTier, cache: PrefixCache) -> None:
        self._tier = tier
        self._cache = cache
        self._paths: deque[_Path] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._paths

    def ended(self, sequence: Sequence) -> None:
        """It was running, and its results that are in are in the cache."""
        num_pages = sequence.num_landed // PAGE_TOKENS
        if sequence.root is None or not num_pages:
            return
        if len(self._paths) >= PATHS_MAX:
            self._tier.num_not_held += len(self._paths.popleft().keys)
        self._paths.append(_Path(sequence=sequence, keys=sequence.keys[:num_pages]))

    def feed(self) -> None:
        """Give the tier what the plan that is being made can copy: all that is here stays until then."""
        room, costs = self._tier.config.turn_bytes_max, self._cache.config.costs
        # One whose tail is still on its way lets others pass.
        for _ in range(len(self._paths)):
            path = self._paths[0]
            if path.sequence.num_inflight:
                self._paths.rotate(-1)
                continue
            while path.keys:
                if room <= 0 or not self._tier.may_hold:
                    return
                left = self._left(path.keys.pop())
                if left is not None and self._tier.take(left):
                    room -= len(left.pages) * costs.page_bytes + len(left.tails) * costs.tail_bytes
            self._paths.popleft()

    def _left(self, key: PageKey) -> Departed | None:
        """What the device has of it and host memory has not."""
        has_page, has_tail = self._tier.index.state(key)
        if has_page and has_tail:
            return None
        return self._cache.look(key, page=not has_page, tail=not has_tail)

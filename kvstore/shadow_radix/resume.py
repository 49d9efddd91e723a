"""Where computing a prompt starts: the cheapest exact start that the index allows. Pure; the scheduler and the router's
placement call it, so that what is predicted is what is done.

From a tail at depth t computing goes on as if the sequence had never stopped. Pages between t and the end of the match
are *replayed*: their tokens are computed for the sake of the windows, their compressed rows are read from the pages and
not written, so the pages stay shared. Without a tail near enough, the last `rebuild_pages` pages of the match are
replayed with an empty window before them: so far do the stacked windows reach, and what comes out is exact again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvstore.shadow_radix.node import Match
from rorqual.model_config import PAGE_TOKENS


class StartKind(Enum):
    COLD = "cold"  # from the first token
    TAIL = "tail"  # from a tail
    REBUILD = "rebuild"  # from an empty window, rebuild_pages before the end of the match
    FULL = "full"  # the tail is at the prompt's end: its first token is sampled, nothing is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Depths are in pages from the start of the prompt."""

    kind: StartKind
    tail_depth: int  # of the tail to restore; 0: none
    from_depth: int  # computing starts behind this page
    reuse_depth: int  # so many leading pages are shared: read, and not written
    num_tokens_computed: int

    @property
    def exact_depth(self) -> int:
        """The first boundary at which the state of every layer is exact: from here on tails may be taken."""
        return self.reuse_depth if self.kind is StartKind.REBUILD else self.from_depth


def cheapest_start(match: Match, *, num_tokens: int, rebuild_pages: int, allow_full: bool = True) -> Start:
    """The start that computes the fewest tokens; among equals a tail, since a rebuild is approximate until its end.

    `num_tokens`: of the prompt, at least 1. `rebuild_pages`: the reach of the stacked windows, in pages, rounded up.
    Unless the tail is at the very end the last token is computed, as its logits are needed; `allow_full` False computes
    it always.
    """
    assert num_tokens >= 1
    assert rebuild_pages >= 1
    num_pages = min(match.num_pages, num_tokens // PAGE_TOKENS)
    tail_depth = 0
    for depth in reversed(match.tail_depths):
        if depth > num_pages:
            continue
        if depth * PAGE_TOKENS == num_tokens and not allow_full:
            continue
        tail_depth = depth
        break
    if tail_depth * PAGE_TOKENS == num_tokens:
        kind = StartKind.FULL
    elif num_pages - rebuild_pages > tail_depth:
        kind, tail_depth = StartKind.REBUILD, 0
    else:
        kind = StartKind.TAIL if tail_depth else StartKind.COLD
    from_depth = num_pages - rebuild_pages if kind is StartKind.REBUILD else tail_depth
    return Start(
        kind=kind,
        tail_depth=tail_depth,
        from_depth=from_depth,
        reuse_depth=num_pages,
        num_tokens_computed=num_tokens - from_depth * PAGE_TOKENS,
    )

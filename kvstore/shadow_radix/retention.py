"""Which tails are worth taking: where a prompt ends, where prompts part, and now and then on a long way. Pure.

The scheduler asks when it admits a prompt and puts the answer into the plan; the router's simulation asks the same. A
tail costs as much memory as several pages (four, with Flash), so they are chosen, and never more than a bound each.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.shadow_radix.node import Match, TailKind
from kvstore.shadow_radix.resume import Start
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPolicy:
    """How many tails a prompt may leave behind, and where."""

    num_tails_max: int = 4  # of one prompt
    take_branches: bool = True
    every_pages: int = 0  # between tails on the way; 0: none
    end_multiple: int = (
        1  # the end's tail is at a multiple of so many pages, for prompts whose next turn rewrites the last
    )
    pages_apart_min: int = (
        1  # nearer to one that is there, or to the start, none is taken on the way or at a branch
    )

    def __post_init__(self) -> None:
        assert self.num_tails_max >= 0
        assert self.every_pages >= 0
        assert self.end_multiple >= 1
        assert self.pages_apart_min >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPlan:
    depth: int  # in pages from the start of the prompt
    kind: TailKind


def plan_tails(
    *, num_pages: int, match: Match, start: Start, policy: TailPolicy, num_tails_free: int
) -> tuple[TailPlan, ...]:
    """Tails to take while a prompt of `num_pages` full pages is computed from `start`, in order of depth.

    `num_tails_free`: how many records its owner can give it, by freeing others if need be. When that or the policy
    allows fewer than there are reasons, the end of the prompt comes first, then the branch, then the deepest.
    """
    num_max = min(policy.num_tails_max, num_tails_free)
    there = [depth for depth in match.tail_depths if depth <= num_pages]
    chosen: dict[int, TailKind] = {}

    def choose(depth: int, kind: TailKind, apart: int) -> None:
        if len(chosen) >= num_max or depth < start.exact_depth:
            return
        if all(abs(depth - other) >= apart for other in (0, *there, *chosen)):
            chosen[depth] = kind

    choose(num_pages - num_pages % policy.end_multiple, TailKind.PROMPT_END, 1)
    if policy.take_branches and match.is_branch and match.num_pages <= num_pages:
        choose(match.num_pages, TailKind.BRANCH, policy.pages_apart_min)
    if policy.every_pages:
        for depth in range(num_pages // policy.every_pages * policy.every_pages, 0, -policy.every_pages):
            choose(depth, TailKind.EVERY_K, policy.pages_apart_min)
    return tuple(TailPlan(depth=depth, kind=chosen[depth]) for depth in sorted(chosen))


def turn_end(*, num_prompt_tokens: int, num_computed: int) -> int:
    """The depth, in pages, of the last boundary that generated tokens have crossed; 0 when they have crossed none."""
    depth = num_computed // PAGE_TOKENS
    return depth if depth > num_prompt_tokens // PAGE_TOKENS else 0

"""How the prompts of one step share its tokens. `engine.worker.scheduler` asks; a pure function of lengths.

Prompts share the tokens of a step so that a long one does not hold up the short ones behind it, and is not held up by
them either: half of the budget, in whole pages, is kept for the oldest unfinished prompt; the rest goes to the others,
the shortest remainder first; what they leave is the oldest one's again. With an odd number of pages the half is
rounded up in every second step, so with a budget of one page the oldest and the others take turns. The oldest is thus
done after twice its own time at most, however many come after it, and every prompt is the oldest one day. Each chunk
ends at a page boundary or the prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.model_config import PAGE_TOKENS


def chunk_counts(remaining: Sequence[int], *, budget: int, step_number: int) -> list[int]:
    """Tokens the step computes of each unfinished prompt, by what remains of them, oldest first."""
    if not remaining:
        return []
    counts = [0] * len(remaining)
    half = (budget // PAGE_TOKENS + step_number % 2) // 2 * PAGE_TOKENS
    kept = min(remaining[0], half)
    budget -= kept
    for index in sorted(range(1, len(remaining)), key=remaining.__getitem__):
        counts[index] = _chunk_tokens(remaining[index], budget)
        budget -= counts[index]
    counts[0] = _chunk_tokens(remaining[0], budget + kept)
    return counts


def _chunk_tokens(num_remaining: int, budget: int) -> int:
    """The rest if it fits the budget, else as many whole pages as do."""
    return num_remaining if num_remaining <= budget else budget // PAGE_TOKENS * PAGE_TOKENS

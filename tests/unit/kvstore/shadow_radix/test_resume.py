"""Where computing starts: never later than is exact, and no later start is cheaper."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.shadow_radix import Match, StartKind, cheapest_start
from rorqual.model_config import PAGE_TOKENS


def match(num_pages: int, *tail_depths: int) -> Match:
    return Match(num_pages=num_pages, tail_depths=tail_depths, is_branch=False)


def start_of(found: Match, num_tokens: int, *, rebuild_pages: int = 22, allow_full: bool = True):
    start = cheapest_start(found, num_tokens=num_tokens, rebuild_pages=rebuild_pages, allow_full=allow_full)
    return start.kind, start.tail_depth, start.from_depth, start.reuse_depth, start.num_tokens_computed


def test_nothing_there_is_a_cold_start() -> None:
    assert start_of(match(0), 700) == (StartKind.COLD, 0, 0, 0, 700)


def test_pages_alone_and_short_are_shared_though_all_is_computed() -> None:
    assert start_of(match(5), 2000) == (StartKind.COLD, 0, 0, 5, 2000)


def test_a_tail_at_the_end_of_the_match_computes_the_rest() -> None:
    assert start_of(match(5, 2, 5), 1500) == (StartKind.TAIL, 5, 5, 5, 1500 - 1280)


def test_pages_behind_the_last_tail_are_replayed_and_shared() -> None:
    assert start_of(match(5, 2), 1500) == (StartKind.TAIL, 2, 2, 5, 1500 - 512)


def test_a_rebuild_is_taken_when_the_last_tail_is_further_back() -> None:
    assert start_of(match(40, 3), 41 * 256) == (StartKind.REBUILD, 0, 18, 40, 23 * 256)
    assert start_of(match(40, 19), 41 * 256) == (StartKind.TAIL, 19, 19, 40, 22 * 256)


def test_between_equals_the_tail_is_taken() -> None:
    assert start_of(match(40, 18), 41 * 256)[0] is StartKind.TAIL


def test_a_tail_at_the_prompts_end_computes_nothing() -> None:
    assert start_of(match(4, 2, 4), 4 * 256) == (StartKind.FULL, 4, 4, 4, 0)


def test_without_full_the_last_token_is_computed_from_the_tail_before() -> None:
    assert start_of(match(4, 2, 4), 4 * 256, allow_full=False) == (StartKind.TAIL, 2, 2, 4, 512)


def test_pages_and_tails_beyond_the_prompt_do_not_count() -> None:
    """The match was of a longer path than this prompt's full pages."""
    assert start_of(match(6, 2, 6), 3 * 256 + 1) == (StartKind.TAIL, 2, 2, 3, 257)


@given(
    st.integers(0, 30),
    st.sets(st.integers(1, 30)),
    st.integers(1, 31 * PAGE_TOKENS),
    st.integers(1, 10),
    st.booleans(),
)
def test_the_start_is_the_cheapest_of_all_exact_ones(
    num_pages: int, tails: set[int], num_tokens: int, rebuild_pages: int, allow_full: bool
) -> None:
    found = match(num_pages, *sorted(depth for depth in tails if depth <= num_pages))
    start = cheapest_start(found, num_tokens=num_tokens, rebuild_pages=rebuild_pages, allow_full=allow_full)
    shared = min(num_pages, num_tokens // PAGE_TOKENS)
    last = num_tokens if allow_full else num_tokens - 1
    exact = {0, max(0, shared - rebuild_pages)}
    exact |= {depth for depth in found.tail_depths if depth <= shared and depth * PAGE_TOKENS <= last}
    assert start.from_depth == max(exact)
    assert start.num_tokens_computed == num_tokens - PAGE_TOKENS * start.from_depth
    assert start.reuse_depth == shared
    assert start.tail_depth in (0, start.from_depth)
    assert (start.num_tokens_computed == 0) == (start.kind is StartKind.FULL)
    assert start.from_depth <= start.exact_depth <= start.reuse_depth
    assert (start.kind is StartKind.COLD) == (start.from_depth == 0)

"""A scheduler whose cache has host memory below it, against a rank that knows what every page and record must hold,
here and there: what goes down, what comes back, who waits for it, and what is computed."""

from __future__ import annotations

from fake_state import PAGE_TOKENS, answer

from tests.harness.benches import Bench, a_cache, a_host_tier, a_prompt


def tiered(**options) -> Bench:
    return Bench(
        **{
            "num_pages": 8,
            "num_records": 4,
            "cache": a_cache(),
            "host_tier": a_host_tier(),
            **options,
        }
    )


def computed(bench: Bench, key: int, prompt: list[int], max_tokens: int = 1, **options) -> int:
    """Tokens that the rank has computed for one answer, which is checked."""
    before = bench.rank.num_tokens_computed
    params = bench.open(key, prompt, max_tokens, ignore_eos=True, **options)
    bench.run()
    assert bench.tokens(key) == answer(prompt, max_tokens, params, ignore_eos=True)
    return bench.rank.num_tokens_computed - before


def test_what_was_evicted_comes_back_and_is_not_computed_again() -> None:
    bench = tiered()
    first, second = a_prompt(1, 4 * PAGE_TOKENS + 9), a_prompt(2, 7 * PAGE_TOKENS + 9)
    assert computed(bench, 1, first) == len(first)
    assert computed(bench, 2, second) == len(second)
    assert bench.rank.host_memory.num_pages_demoted == 4
    assert computed(bench, 3, [*first, 5]) == 10
    assert bench.events[3][0].cached_tokens == 4 * PAGE_TOKENS
    assert bench.rank.host_memory.num_pages_promoted == 4

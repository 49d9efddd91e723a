"""Promises beside what they say in so many words: pages of a prompt that workers will have."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.keys import PageKey
from router.placement.cache import Found
from router.placement.promises import ENDS, Promises
from tests.unit.router.placement.pictures import keys

WORKERS = 11
PROMPTS_MAX = 6

prompts = st.builds(keys, st.text("ab", min_size=1, max_size=3), st.integers(0, 7))
given_out = st.tuples(prompts, st.sampled_from([0, 1, 9]), st.integers(0, 4))  # worker, pages present
there = st.lists(st.integers(0, 7), min_size=WORKERS, max_size=WORKERS)


@settings(max_examples=300)
@given(st.lists(given_out, max_size=12), st.sets(st.integers(0, 11)), prompts, there, there)
def test_pages_promised_behind_those_that_are_there_count_and_so_do_the_ends_of_prompts(
    given_out: list[tuple[tuple[PageKey, ...], int, int]],
    forgotten: set[int],
    prompt: tuple[PageKey, ...],
    pages: list[int],
    tails: list[int],
) -> None:
    promises = Promises(prompts_max=PROMPTS_MAX)
    kept: dict[int, tuple[tuple[PageKey, ...], int]] = {}
    for number, (promised, worker, num_present) in enumerate(given_out):
        promises.promise(number, worker=worker, keys=promised, num_present=num_present)
        if num_present < len(promised):
            if len(kept) == PROMPTS_MAX:
                del kept[min(kept)]
            kept[number] = promised[num_present:], worker
    for number in forgotten:
        promises.forget(number)
        kept.pop(number, None)

    found = Found(
        pages_W=np.array(pages, np.int32), tail_W=np.array(tails, np.int32), store_pages=5, store_tail=3
    )
    after = promises.added_to(found, prompt)

    assert (after.store_pages, after.store_tail) == (5, 3), "the store was promised nothing"
    assert len(promises) == len(kept)
    assert (found.pages_W.tolist(), found.tail_W.tolist()) == (pages, tails), "what is there is not changed"
    for worker in range(WORKERS):
        mine = [promised for promised, other in kept.values() if other == worker]
        coming = {key for promised in mine for key in promised}
        ends = {key for promised in mine for key in promised[-ENDS:]}
        depth = pages[worker]
        while depth < len(prompt) and prompt[depth] in coming:
            depth += 1
        assert after.pages_W[worker] == depth
        boundaries = [at for at, key in enumerate(prompt, start=1) if key in ends and at <= depth]
        assert after.tail_W[worker] == max([tails[worker], *boundaries])
    for number in kept:
        promises.forget(number)
    assert promises.added_to(found, prompt).pages_W.tolist() == pages

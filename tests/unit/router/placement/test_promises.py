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
@given(
    st.lists(given_out, max_size=12), st.sets(st.integers(0, 11)), prompts, there, there, there, st.booleans()
)
def test_pages_promised_behind_those_that_are_there_count_and_so_do_the_ends_of_prompts(
    given_out: list[tuple[tuple[PageKey, ...], int, int]],
    forgotten: set[int],
    prompt: tuple[PageKey, ...],
    pages: list[int],
    tails: list[int],
    device: list[int],
    has_host: bool,
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

    on_device = [min(pair) for pair in zip(pages, device, strict=True)] if has_host else pages
    tails_on_device = [min(pair) for pair in zip(tails, device, strict=True)] if has_host else tails
    found = Found(
        pages_W=np.array(pages, np.int32),
        tail_W=np.array(tails, np.int32),
        device_pages_W=np.array(on_device, np.int32) if has_host else None,
        device_tail_W=np.array(tails_on_device, np.int32) if has_host else None,
        store_pages=5,
        store_tail=3,
    )
    after = promises.added_to(found, prompt)

    assert (after.store_pages, after.store_tail) == (5, 3), "the store was promised nothing"
    assert len(promises) == len(kept)
    assert (found.pages_W.tolist(), found.tail_W.tolist()) == (pages, tails), "what is there is not changed"
    for worker in range(WORKERS):
        mine = [promised for promised, other in kept.values() if other == worker]
        coming = {key for promised in mine for key in promised}
        ends = {key for promised in mine for key in promised[-ENDS:]}
        for first, tail, got, got_tail in (
            (pages[worker], tails[worker], after.pages_W, after.tail_W),
            (on_device[worker], tails_on_device[worker], *after.on_device),
        ):
            depth = first
            while depth < len(prompt) and prompt[depth] in coming:
                depth += 1
            assert got[worker] == depth
            boundaries = [at for at, key in enumerate(prompt, start=1) if key in ends and at <= depth]
            assert got_tail[worker] == max([tail, *boundaries])
    for number in kept:
        promises.forget(number)
    assert promises.added_to(found, prompt).pages_W.tolist() == pages

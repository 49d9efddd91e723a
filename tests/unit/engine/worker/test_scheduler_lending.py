"""A prefill worker's scheduler: what is lent, what is free at once, and what stays out until it is taken back."""

from __future__ import annotations

import msgspec
import pytest
from fake_state import EOS, answer, digest, logprob_of, page_digests
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.events import LentEvent, PagesEvent, ScoresEvent, TokenEvent
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason
from tests.harness.benches import Bench, a_prompt, lending


def an_ending_seed(prompt: list[int]) -> int:
    """With which the first token ends the sequence."""
    return next(seed for seed in range(10_000) if answer(prompt, 1, SamplingParams(seed=seed)) == [EOS])


@pytest.mark.parametrize("length", [1, 255, 256, 257, 511, 512, 700, 1025])
@pytest.mark.parametrize("inflight", [1, 2])
def test_a_prompt_is_told_page_by_page_then_its_token_then_its_record(length: int, inflight: int) -> None:
    bench = lending(plans_inflight_max=inflight)
    prompt = a_prompt(length, length)
    params = bench.open(1, prompt, 300, ignore_eos=True)
    bench.drain()
    assert bench.tokens(1) == answer(prompt, 1, params, ignore_eos=True)
    assert bench.events[1][0].finish_reason is None
    pages = [page for event in bench.pages[1] for page in event.pages]
    assert len(pages) == length // 256
    digests = [item for event in bench.pages[1] for item in event.digests]
    assert digests == [item for page in pages for item in page_digests(bench.rank.memory[page])]
    lent = bench.lent[1]
    record = bench.rank.records[lent.record]
    assert record is not None
    assert (lent.num_tokens, lent.record_bytes, lent.record_digest) == (length, len(record), digest(record))
    assert {event.record for event in bench.pages[1]} <= {lent.record}
    assert bench.rank.num_tokens_computed == length
    # It has left; what it lends has not.
    assert bench.scheduler.num_sequences == 0
    assert bench.rank.slots == {}
    assert not bench.scheduler.is_idle
    load = bench.scheduler.load()
    assert (
        load.pages_leased
        == bench.scheduler.num_lent_pages
        == load.pages_total - load.pages_free
        == len(pages)
    )
    assert load.slots_free == load.slots_total
    assert bench.scheduler.num_records_free == 3
    bench.take_back(1)
    bench.run()


def test_all_segments_lend_and_the_sampling_one_packs_the_record() -> None:
    bench = lending(prefill_tokens_max=256)
    bench.open(1, a_prompt(1, 600), 10)
    bench.drain()
    segments = [segment for plan in bench.plans for segment in plan.segments]
    assert [item.lend for item in segments] == [True] * 3
    assert [item.record for item in segments] == [-1, -1, bench.lent[1].record]
    bench.take_back(1)
    bench.run()


def test_one_step_tells_scores_pages_token_and_record_in_this_order() -> None:
    bench = lending()
    prompt = a_prompt(1, 300)
    bench.open(1, prompt, 10, ignore_eos=True, prompt_logprobs=0)
    bench.send()
    events = bench.receive()
    assert [type(event) for event in events] == [ScoresEvent, PagesEvent, TokenEvent, LentEvent]
    assert bench.scores[1] == [logprob_of(prompt[position], position) for position in range(1, 300)]
    bench.take_back(1)
    bench.run()


def test_pages_can_be_read_long_before_the_prompt_is_done() -> None:
    bench = lending(num_pages=32, prefill_tokens_max=512)
    bench.open(1, a_prompt(1, 2000), 10)
    told = []
    while not bench.lent:
        bench.step()
        told.append(sum(len(event.pages) for event in bench.pages[1]))
    assert told == [2, 4, 6, 7]
    bench.take_back(1)
    bench.run()


def test_lent_pages_are_not_given_to_others_until_they_are_taken_back() -> None:
    bench = lending(num_pages=4)
    bench.open(1, a_prompt(1, 3 * 256), 10, ignore_eos=True)
    bench.open(2, a_prompt(2, 3 * 256), 10, ignore_eos=True)
    bench.drain()
    assert bench.tokens(2) == []
    assert bench.scheduler.load().sequences_waiting == 1
    bench.take_back(1)
    bench.drain()
    assert len(bench.tokens(2)) == 1
    bench.take_back(2)
    bench.run()


def test_the_page_that_is_not_full_is_free_as_soon_as_the_last_chunk_is_planned() -> None:
    bench = lending(num_pages=2)
    bench.open(1, a_prompt(1, 300), 10, ignore_eos=True)
    bench.open(2, a_prompt(2, 200), 10, ignore_eos=True)
    first, second = bench.send(), bench.send()
    assert first is not None
    assert second is not None
    assert second.segments[0].pages == first.segments[0].pages[1:]
    bench.drain()
    assert set(bench.lent) == {1, 2}
    for key in (1, 2):
        bench.take_back(key)
    bench.run()


def test_records_bound_how_many_are_lent_at_once() -> None:
    bench = lending(num_records=2)
    for key in (1, 2, 3):
        bench.open(key, a_prompt(key, 10), 10, ignore_eos=True)
    bench.drain()
    assert set(bench.lent) == {1, 2}
    assert bench.scheduler.load().slots_free == 4
    bench.take_back(2)
    bench.drain()
    assert bench.lent[3].record == bench.lent[2].record
    bench.take_back(1)
    bench.take_back(3)
    bench.run()


def test_a_sequence_of_one_token_lends_nothing_and_needs_no_record() -> None:
    bench = lending(num_records=1)
    bench.open(1, a_prompt(1, 300), 10, ignore_eos=True)
    params = bench.open(2, a_prompt(2, 600), 1)
    bench.drain()
    assert bench.tokens(2) == answer(a_prompt(2, 600), 1, params)
    assert bench.events[2][0].finish_reason is FinishReason.LENGTH
    assert bench.pages[2] == []
    assert set(bench.surrendered) == {1}
    bench.take_back(1)
    bench.run()


@pytest.mark.parametrize("length", [100, 300])
def test_an_end_token_at_once_ends_it_here_and_gives_up_what_was_told(length: int) -> None:
    prompt = a_prompt(7, length)
    seed = an_ending_seed(prompt)
    bench = lending()
    bench.open(seed, prompt, 10)
    bench.drain()
    assert bench.tokens(seed) == [EOS]
    assert bench.events[seed][0].finish_reason is FinishReason.STOP
    assert bench.lent == {}
    if length > 256:
        assert len(bench.surrendered[seed].pages) == 1
        bench.take_back(seed)
    bench.run()


def test_a_waiting_one_is_cancelled_and_leaves_nothing() -> None:
    bench = lending(num_slots=1)
    bench.open(1, a_prompt(1, 300), 10, ignore_eos=True)
    assert bench.cancel(1)
    assert bench.surrendered == {}
    bench.run()


def test_what_nobody_was_told_of_is_free_at_once_when_it_is_cancelled() -> None:
    bench = lending(num_pages=4, prefill_tokens_max=256)
    bench.open(1, a_prompt(1, 1000), 10)
    bench.send()
    assert bench.cancel(1)
    assert bench.surrendered == {}
    assert bench.scheduler.load().pages_free == 4
    bench.open(2, a_prompt(2, 1000), 10, ignore_eos=True)
    bench.drain()
    assert bench.pages[1] == []
    bench.take_back(2)
    bench.run()


def test_cancelled_within_its_prompt_it_gives_up_what_was_told_and_frees_the_rest() -> None:
    bench = lending(num_pages=8, prefill_tokens_max=256)
    bench.open(1, a_prompt(1, 1024 + 10), 10)
    bench.step()
    bench.send()  # a page more, which nobody is told of any more
    assert bench.cancel(1)
    item = bench.surrendered[1]
    assert item.pages == bench.pages[1][0].pages
    assert item.record == bench.pages[1][0].record
    assert len(item.pages) == 1
    assert bench.scheduler.load().pages_free == 7
    bench.open(2, a_prompt(2, 7 * 256), 10, ignore_eos=True)
    bench.drain()
    assert len(bench.pages[1]) == 1
    assert bench.lent[2].record != item.record
    for key in (1, 2):
        bench.take_back(key)
    bench.run()


def test_cancelled_while_its_token_is_on_its_way_it_yields_nothing_more() -> None:
    bench = lending(prefill_tokens_max=256)
    bench.open(1, a_prompt(1, 400), 10, ignore_eos=True)
    bench.step()
    bench.send()
    assert bench.cancel(1)
    assert not bench.cancel(1)
    bench.drain()
    assert bench.tokens(1) == []
    assert bench.lent == {}
    assert len(bench.surrendered[1].pages) == 1
    bench.take_back(1)
    bench.run()


def test_a_lending_sequence_keeps_no_page_from_others() -> None:
    bench = lending(num_pages=2)
    # Whole, it would soon ask for a second page; but it ends here with its first token.
    bench.open(1, a_prompt(1, 250), 100, ignore_eos=True)
    bench.open(2, a_prompt(2, 250), 100, ignore_eos=True)
    plan = bench.send()
    assert plan is not None
    assert len(plan.opens) == 2
    bench.drain()
    for key in (1, 2):
        bench.take_back(key)
    bench.run()


def test_taking_back_what_is_not_lent_is_a_broken_invariant() -> None:
    bench = lending()
    bench.open(1, a_prompt(1, 300), 10, ignore_eos=True)
    bench.drain()
    item = bench.surrendered[1]
    bench.take_back(1)
    with pytest.raises(AssertionError, match="not lent"):
        bench.scheduler.take_back(item.record)


def test_a_result_that_lends_other_than_planned_is_a_broken_invariant() -> None:
    def a_result() -> tuple[Bench, msgspec.Struct]:
        bench = lending()
        bench.open(1, a_prompt(1, 300), 10)
        bench.send()
        return bench, bench.rank.step(bench.pipe[0])

    bench, result = a_result()
    (lent,) = result.lent
    with pytest.raises(AssertionError, match="slots lent"):
        bench.scheduler.apply(msgspec.structs.replace(result, lent=()))
    bench, result = a_result()
    with pytest.raises(AssertionError, match="lent twice"):
        bench.scheduler.apply(msgspec.structs.replace(result, lent=(lent, lent)))
    bench, result = a_result()
    wrong = msgspec.structs.replace(lent, page_digests=lent.page_digests[:1])
    with pytest.raises(AssertionError, match="1 digests, not 2"):
        bench.scheduler.apply(msgspec.structs.replace(result, lent=(wrong,)))
    bench, result = a_result()
    wrong = msgspec.structs.replace(lent, record_bytes=0)
    with pytest.raises(AssertionError, match="record"):
        bench.scheduler.apply(msgspec.structs.replace(result, lent=(wrong,)))


# A request: prompt length, max_tokens, ignore_eos.
requests = st.tuples(st.integers(1, 1200), st.integers(1, 3), st.booleans())
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("send"), st.integers(1, 4)),
    st.tuples(st.just("receive"), st.integers(1, 4)),
    st.tuples(st.just("turn"), st.integers(1, 10)),
    st.tuples(st.just("take back"), st.integers(0, 30)),
)


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(5, 12),
    num_slots=st.integers(1, 6),
    num_records=st.integers(1, 5),
    budget=st.sampled_from([256, 512, 1024]),
    inflight=st.integers(1, 3),
    story=st.lists(moves, min_size=1, max_size=40),
)
def test_any_storm_of_lending_ends_with_first_tokens_and_nothing_in_use(
    num_pages: int, num_slots: int, num_records: int, budget: int, inflight: int, story: list
) -> None:
    bench = lending(
        num_pages=num_pages,
        num_slots=num_slots,
        num_records=num_records,
        prefill_tokens_max=budget,
        plans_inflight_max=inflight,
    )
    opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
    cancelled: set[int] = set()
    for move, value in story:
        if move == "open":
            length, max_tokens, ignore_eos = value
            key, prompt = len(opened), a_prompt(len(opened), length)
            params = bench.open(key, prompt, max_tokens, ignore_eos=ignore_eos)
            opened[key] = (prompt, max_tokens, ignore_eos, params)
        elif move == "cancel" and opened and bench.cancel(value % len(opened)):
            cancelled.add(value % len(opened))
        elif move == "take back" and bench.surrendered:
            bench.take_back(list(bench.surrendered)[value % len(bench.surrendered)])
        elif move in ("send", "receive", "turn"):
            for _ in range(value):
                if move != "receive":
                    bench.send()
                if move != "send":
                    bench.receive()
    bench.drain()
    while bench.surrendered:
        bench.take_back(next(iter(bench.surrendered)))
        bench.drain()
    bench.run()
    for key, (prompt, max_tokens, ignore_eos, params) in opened.items():
        expected = answer(prompt, 1, params, ignore_eos=ignore_eos)
        ends_here = max_tokens == 1 or (expected == [EOS] and not ignore_eos)
        if key in cancelled:
            assert bench.tokens(key) == []
            assert key not in bench.lent
        else:
            assert bench.tokens(key) == expected
            assert (bench.events[key][0].finish_reason is not None) == ends_here
            assert (key in bench.lent) == (not ends_here)

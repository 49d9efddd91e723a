"""A decode worker's scheduler: room for state that is read from elsewhere, outside the order of plans, and what becomes
of it. The state comes from a prefill worker's scheduler; both ranks are strict."""

from __future__ import annotations

import pytest
from fake_state import answer

from engine.plan import Fetch, Restore
from engine.worker.events import SequenceKey
from rorqual.errors import InvalidRequest
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason
from tests.harness.benches import Bench, Pair, a_prompt, adopting, lending


def a_pair(**options: int) -> Pair:
    return Pair(prefill=lending(num_pages=64, num_slots=8, num_records=8), decode=adopting(**options))


def prefill(pair: Pair, key: int, length: int, max_tokens: int, **sampling: int) -> SamplingParams:
    params = pair.prefill.open(key, a_prompt(key, length), max_tokens, ignore_eos=True, **sampling)
    pair.prefill.drain()
    return params


def hand_over(pair: Pair, key: int, length: int, max_tokens: int, **sampling: int) -> SamplingParams:
    """Up to where the decode worker goes on by itself."""
    params = prefill(pair, key, length, max_tokens, **sampling)
    pair.bind(key, a_prompt(key, length), max_tokens, ignore_eos=True, **sampling)
    pair.hand_over(key)
    return params


def tokens(pair: Pair, key: int) -> list[int]:
    return pair.prefill.tokens(key) + pair.decode.tokens(key)


def occupied(bench: Bench, *lengths: int) -> list[int]:
    """Sequences that compute their prompts themselves, running, with keys 100, 101, ..."""
    keys = list(range(100, 100 + len(lengths)))
    for key, length in zip(keys, lengths, strict=True):
        num_left = bench.scheduler.config.sequence_tokens_max - length
        bench.open(key, a_prompt(key, length), min(600, num_left), ignore_eos=True)
    while not all(bench.events[key] for key in keys):
        bench.step()
    return keys


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 512, 700, 1025])
@pytest.mark.parametrize("inflight", [1, 2])
def test_a_sequence_goes_on_with_the_sequential_answer_and_computes_no_prompt(
    length: int, inflight: int
) -> None:
    pair = a_pair(plans_inflight_max=inflight)
    params = hand_over(pair, 1, length, 300, logprobs=1)
    pair.decode.run()
    pair.prefill.run()
    assert tokens(pair, 1) == answer(a_prompt(1, length), 300, params, ignore_eos=True)
    assert pair.decode.events[1][0].index == 1
    assert pair.decode.events[1][-1].finish_reason is FinishReason.LENGTH
    assert pair.decode.rank.num_tokens_computed == 300 - 1
    assert pair.decode.rank.num_tokens_restored == length


def test_the_slot_opens_with_the_pages_of_the_prompt_and_segments_bring_the_others() -> None:
    pair = a_pair()
    prefill(pair, 1, 512, 10)
    pair.bind(1, a_prompt(1, 512), 10, ignore_eos=True)
    pair.hand_over(1)
    adoption = pair.decode.adoptions[1]
    assert len(adoption.pages) == 3
    plan = pair.decode.send()
    assert plan is not None
    (item,), (segment,) = plan.opens, plan.segments
    assert item.restore == Restore(num_computed=512, pages=adoption.pages[:2], record=adoption.record)
    assert (item.slot, item.num_prompt, len(item.tokens)) == (adoption.slot, 512, 4 * 513)
    assert (segment.start, segment.count, segment.pages) == (512, 1, adoption.pages[2:])
    assert (segment.lend, segment.record) == (False, -1)
    pair.decode.run()


def test_room_is_given_while_the_plan_pipeline_is_full() -> None:
    pair = a_pair()
    occupied(pair.decode, 5)
    while pair.decode.send():
        pass
    pair.bind(1, a_prompt(1, 300), 10)
    (adoption,) = pair.decode.take_adoptions()
    assert (adoption.key, len(adoption.pages)) == (1, 2)
    assert pair.decode.take_adoptions() == []
    assert pair.decode.cancel(1)
    pair.decode.scheduler.settle(SequenceKey(1))
    pair.decode.cancel(100)
    pair.decode.run()


def test_pages_that_a_plan_in_flight_may_use_are_not_written_before_it_is_done() -> None:
    bench = adopting(num_pages=4)
    occupied(bench, 600)
    plan = bench.send()
    assert plan is not None
    assert bench.cancel(100)
    bench.open(1, a_prompt(1, 600), 10, adopt=True)
    (adoption,) = bench.take_adoptions()
    assert adoption.after == plan.number > bench.scheduler.last_applied
    bench.receive()
    assert adoption.after == bench.scheduler.last_applied
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    # All of it is at rest by now.
    bench.open(2, a_prompt(2, 600), 10, adopt=True)
    (adoption,) = bench.take_adoptions()
    assert adoption.after == 0
    bench.cancel(2)
    bench.scheduler.settle(SequenceKey(2))
    bench.run()


def test_pages_of_one_that_lands_are_not_written_before_its_last_plan_is_done() -> None:
    bench = adopting(num_pages=2)
    bench.open(100, a_prompt(100, 300), 1, ignore_eos=True)
    last = bench.send()
    bench.open(1, a_prompt(1, 300), 10, adopt=True)
    (adoption,) = bench.take_adoptions()
    assert last is not None
    assert adoption.after == last.number
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    bench.run()


def test_pages_of_one_that_was_preempted_are_not_written_before_its_last_plan_is_done() -> None:
    bench = adopting(num_pages=3)
    bench.open(100, a_prompt(100, 180), 100, ignore_eos=True)
    bench.open(101, a_prompt(101, 300), 400, ignore_eos=True)
    while bench.scheduler.num_preemptions == 0:
        plan = bench.send()
        if plan is None:
            bench.receive()
    assert plan is not None
    assert [item.number for item in bench.pipe] == [plan.number - 1, plan.number]
    assert bench.cancel(101)
    bench.open(1, a_prompt(1, 100), 10, adopt=True)
    (adoption,) = bench.take_adoptions()
    assert adoption.after == plan.number - 1
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    bench.run()


def test_an_adoption_takes_the_coldest_pages_so_that_it_rarely_waits() -> None:
    bench = adopting(num_pages=8)
    occupied(bench, 600)
    bench.send()
    assert bench.cancel(100)
    bench.open(1, a_prompt(1, 1000), 10, adopt=True)
    (adoption,) = bench.take_adoptions()
    assert adoption.after == 0
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    bench.run()


def test_settled_pages_still_know_the_plan_that_used_them_before() -> None:
    bench = adopting(num_pages=3)
    occupied(bench, 300)
    plan = bench.send()
    bench.cancel(100)
    for key in (1, 2):
        bench.open(key, a_prompt(key, 600), 10, adopt=True)
        (adoption,) = bench.take_adoptions()
        assert plan is not None
        assert adoption.after == plan.number
        bench.cancel(key)
        bench.scheduler.settle(SequenceKey(key))
    bench.run()


def test_the_record_is_in_use_until_the_plan_that_restores_from_it_is_done() -> None:
    pair = a_pair(num_records=1)
    hand_over(pair, 1, 100, 10)
    decode = pair.decode
    assert decode.scheduler.num_records_free == 0
    decode.send()
    decode.open(2, a_prompt(2, 100), 10, adopt=True)
    assert decode.take_adoptions() == []
    decode.receive()
    (adoption,) = decode.take_adoptions()
    assert (adoption.key, adoption.after) == (2, 0)
    decode.cancel(2)
    decode.scheduler.settle(SequenceKey(2))
    decode.run()


def test_the_record_of_one_that_is_cancelled_while_it_restores_is_in_use_until_then() -> None:
    pair = a_pair(num_records=1)
    hand_over(pair, 1, 100, 10)
    pair.decode.send()
    assert pair.decode.cancel(1)
    assert pair.decode.scheduler.num_records_free == 0
    pair.decode.receive()
    assert pair.decode.scheduler.num_records_free == 1
    pair.decode.run()


def test_one_that_is_cancelled_before_it_restores_frees_everything_at_once() -> None:
    pair = a_pair(num_pages=4, num_records=1)
    hand_over(pair, 1, 700, 10)
    assert pair.decode.cancel(1)
    assert pair.decode.scheduler.is_idle
    pair.decode.check_empty()


def test_cancelled_while_state_is_read_it_keeps_pages_and_record_until_that_is_over() -> None:
    pair = a_pair(num_pages=4, num_slots=1, num_records=1)
    prefill(pair, 1, 700, 10)
    pair.bind(1, a_prompt(1, 700), 10)
    assert pair.begin(1)
    assert pair.cancel_decode(1)
    load = pair.decode.scheduler.load()
    assert (load.pages_leased, load.pages_free, load.slots_free) == (3, 1, 1)
    assert pair.decode.scheduler.num_records_free == 0
    assert pair.decode.scheduler.num_sequences == 0
    assert not pair.decode.scheduler.is_idle
    # The slot is free, and a page: enough for a sequence that computes its prompt itself.
    pair.decode.open(2, a_prompt(2, 100), 10, ignore_eos=True)
    pair.decode.drain()
    assert len(pair.decode.tokens(2)) == 10
    assert pair.end(1)
    pair.prefill.take_back(1)
    pair.decode.run()
    pair.prefill.run()


def test_an_adoption_that_nobody_has_heard_of_leaves_nothing_to_settle() -> None:
    bench = adopting()
    bench.open(1, a_prompt(1, 300), 10, adopt=True)
    assert bench.send() is None  # admits it
    assert bench.scheduler.load().slots_free == 3
    assert bench.cancel(1)
    assert bench.take_adoptions() == []
    bench.run()
    bench.open(2, a_prompt(2, 300), 10, adopt=True)
    assert bench.cancel(2)
    bench.run()


def test_settling_what_is_not_in_quarantine_is_a_broken_invariant() -> None:
    bench = adopting()
    bench.open(1, a_prompt(1, 300), 10, adopt=True)
    bench.take_adoptions()
    with pytest.raises(AssertionError, match="not in quarantine"):
        bench.scheduler.settle(SequenceKey(1))
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    with pytest.raises(AssertionError, match="not in quarantine"):
        bench.scheduler.settle(SequenceKey(1))
    with pytest.raises(AssertionError, match="not adopting"):
        bench.scheduler.adopted(SequenceKey(1), (5,))
    bench.run()


@pytest.mark.parametrize("token_ids", [(), (5,) * 10, (97,), (-1,), (5,) * 300])
def test_tokens_it_cannot_go_on_from_are_refused_and_nothing_has_changed(token_ids: tuple[int, ...]) -> None:
    pair = a_pair()
    max_tokens = 1000 if len(token_ids) == 300 else 10
    params = prefill(pair, 1, 100, max_tokens)
    pair.bind(1, a_prompt(1, 100), max_tokens, ignore_eos=True)
    assert pair.begin(1)
    with pytest.raises(InvalidRequest) as caught:
        pair.decode.scheduler.adopted(SequenceKey(1), token_ids)
    assert caught.value.field == "token_ids"
    assert pair.end(1)
    pair.decode.run()
    assert tokens(pair, 1) == answer(a_prompt(1, 100), max_tokens, params, ignore_eos=True)


def test_a_sequence_of_one_token_is_not_adopted() -> None:
    bench = adopting()
    with pytest.raises(InvalidRequest) as caught:
        bench.open(1, a_prompt(1, 100), 1, adopt=True)
    assert caught.value.field == "max_tokens"
    assert bench.scheduler.is_idle


@pytest.mark.parametrize("num_known", [2, 56, 57, 256])
@pytest.mark.parametrize("budget", [256, 1024])
def test_more_tokens_than_one_may_come_with_the_state(num_known: int, budget: int) -> None:
    pair = a_pair(prefill_tokens_max=budget)
    prompt = a_prompt(1, 200)
    params = prefill(pair, 1, 200, 300)
    # Something else competes for the budget of the step.
    pair.decode.open(7, a_prompt(7, 1500), 3, ignore_eos=True)
    pair.decode.step()
    pair.bind(1, prompt, 300, ignore_eos=True)
    assert pair.begin(1)
    expected = answer(prompt, 300, params, ignore_eos=True)
    pair.decode.rank.end_fetch(1, pair.prefill.rank)
    pair.decode.scheduler.adopted(SequenceKey(1), tuple(expected[:num_known]))
    pair.decode.first_index[1] = num_known
    pair.decode.run()
    assert pair.decode.tokens(1) == expected[num_known:]


def test_preempted_it_computes_its_prompt_itself_and_asks_for_no_scores() -> None:
    pair = a_pair(num_pages=4, num_records=1)
    (older,) = occupied(pair.decode, 300)
    params = hand_over(pair, 1, 300, 400, prompt_logprobs=0)
    while pair.decode.scheduler.num_preemptions == 0:
        pair.decode.step()
    # All of it is an ordinary sequence's by now: it needs no record.
    assert pair.decode.scheduler.num_records_free == 1
    assert pair.decode.scheduler.load().tokens_waiting > 300
    pair.decode.cancel(older)
    pair.decode.run()
    assert tokens(pair, 1) == answer(a_prompt(1, 300), 400, params, ignore_eos=True)
    assert pair.decode.scores[1] == []
    assert len(pair.prefill.scores[1]) == 299
    opens = [item for plan in pair.decode.plans for item in plan.opens if item.sampling.seed == 1]
    assert [item.restore is not None for item in opens] == [True, False]
    assert all(item.sampling.prompt_logprobs is None for item in opens)


def test_preempted_before_its_slot_was_opened_it_gives_the_record_back() -> None:
    pair = a_pair(num_pages=4, num_records=1)
    occupied(pair.decode, 256 + 150)
    prefill(pair, 1, 500, 100)
    pair.bind(1, a_prompt(1, 500), 100, ignore_eos=True)
    assert pair.begin(1)
    # The older one comes to the end of its second page, and waits for a third.
    pair.decode.drain()
    assert len(pair.decode.tokens(100)) == 512 - 256 - 150 + 1
    assert pair.end(1)
    assert pair.decode.send() is not None
    assert pair.decode.scheduler.num_preemptions == 1
    assert pair.decode.scheduler.num_records_free == 1
    pair.decode.cancel(100)
    pair.decode.run()
    assert len(tokens(pair, 1)) == 100
    assert pair.decode.rank.num_tokens_restored == 0


def test_one_without_a_page_waits_with_what_it_has_while_pages_are_in_quarantine() -> None:
    pair = a_pair(num_pages=4, num_records=1)
    params = pair.decode.open(100, a_prompt(100, 256 + 150), 400, ignore_eos=True)
    pair.decode.step()
    prefill(pair, 1, 500, 100)
    pair.bind(1, a_prompt(1, 500), 100, ignore_eos=True)
    assert pair.begin(1)
    assert pair.cancel_decode(1)
    pair.decode.drain()
    assert len(pair.decode.tokens(100)) == 512 - 256 - 150 + 1
    # Nor does a newcomer get the page that it waits for.
    pair.decode.open(2, a_prompt(2, 300), 10, adopt=True, ignore_eos=True)
    assert pair.end(1)
    assert pair.decode.take_adoptions() == []
    assert pair.decode.send() is not None
    assert pair.decode.cancel(2)
    pair.decode.run()
    assert pair.decode.scheduler.num_preemptions == 0
    assert pair.decode.tokens(100) == answer(a_prompt(100, 406), 400, params, ignore_eos=True)


def test_the_oldest_goes_on_at_the_cost_of_the_youngest_even_while_others_adopt() -> None:
    bench = adopting(num_pages=5, num_records=1)
    params = [bench.open(key, a_prompt(key, 200), 100, ignore_eos=True) for key in (10, 11)]
    bench.step()
    bench.open(1, a_prompt(1, 3 * 256 - 1), 10, adopt=True)
    assert bench.take_adoptions() == []  # two pages are kept for the two that will ask for them
    bench.cancel(1)
    bench = adopting(num_pages=5, num_records=1)
    params = [bench.open(key, a_prompt(key, 180), 120, ignore_eos=True) for key in (10, 11)]
    bench.step()
    bench.open(1, a_prompt(1, 3 * 256 - 1), 10, adopt=True)
    assert len(bench.take_adoptions()) == 1
    bench.drain()
    assert bench.scheduler.num_preemptions == 1
    assert bench.tokens(10) == answer(a_prompt(10, 180), 120, params[0], ignore_eos=True)
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    bench.run()
    assert bench.tokens(11) == answer(a_prompt(11, 180), 120, params[1], ignore_eos=True)


def test_room_is_given_first_come_first_served() -> None:
    bench = adopting(num_pages=4)
    for key, length in ((1, 700), (2, 600), (3, 10)):
        bench.open(key, a_prompt(key, length), 10, adopt=True)
    assert [item.key for item in bench.take_adoptions()] == [1]
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    assert [item.key for item in bench.take_adoptions()] == [2, 3]
    for key in (2, 3):
        bench.cancel(key)
        bench.scheduler.settle(SequenceKey(key))
    bench.run()


def test_a_newcomer_does_not_take_the_page_that_an_adopting_one_is_about_to_need() -> None:
    bench = adopting(num_pages=4)
    bench.open(1, a_prompt(1, 250), 100, adopt=True)
    assert len(bench.take_adoptions()) == 1
    bench.open(2, a_prompt(2, 700), 10, adopt=True)
    assert bench.take_adoptions() == []
    bench.cancel(1)
    bench.scheduler.settle(SequenceKey(1))
    assert len(bench.take_adoptions()) == 1
    bench.cancel(2)
    bench.scheduler.settle(SequenceKey(2))
    bench.run()


def test_prompts_that_are_computed_elsewhere_are_no_work_here() -> None:
    bench = adopting(num_slots=1)
    for key in (1, 2):
        bench.open(key, a_prompt(key, 700), 10, adopt=True)
    bench.take_adoptions()
    load = bench.scheduler.load()
    assert (load.sequences_running, load.sequences_waiting, load.tokens_waiting) == (1, 1, 0)
    assert load.pages_leased == 0
    assert bench.cancel(1)
    assert bench.scheduler.load().pages_leased == 3
    bench.scheduler.settle(SequenceKey(1))
    assert bench.cancel(2)
    bench.run()


def test_pages_beyond_what_a_sequence_is_charged_for_are_counted() -> None:
    pair = a_pair()
    hand_over(pair, 1, 250, 800)
    keys = [SequenceKey(1), SequenceKey(9)]
    assert pair.decode.scheduler.num_pages_grown(keys) == 0
    while len(pair.decode.tokens(1)) < 600:
        pair.decode.step()
    # 850 tokens are on four pages; charged were two.
    assert pair.decode.scheduler.num_pages_grown(keys) == 2
    pair.decode.run()
    assert pair.decode.scheduler.num_pages_grown(keys) == 0


def test_the_strict_rank_finds_a_page_that_is_read_into_while_a_plan_uses_it() -> None:
    bench = adopting(num_pages=4)
    occupied(bench, 300)
    (page, _) = bench.rank.slots[0].pages
    bench.rank.begin_fetch(
        Fetch(fetch=1, peer=1, seconds=1.0, source_pages=(0,), target_pages=(page,), digests=(0, 0))
    )
    bench.send()
    with pytest.raises(AssertionError, match="used while it is read into"):
        bench.receive()

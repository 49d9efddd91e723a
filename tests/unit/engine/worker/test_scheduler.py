"""The scheduler against a fake rank that checks every plan: any storm of opens and cancels ends with the sequential
answer and with nothing in use."""

from __future__ import annotations

import msgspec
import pytest
from fake_state import EOS, answer, logprob_of
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import StepPlan
from engine.worker.events import SequenceKey
from rorqual.errors import InvalidRequest, Overloaded
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason
from tests.harness.benches import Bench, a_prompt


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 512, 513, 1025])
@pytest.mark.parametrize("inflight", [1, 2])
def test_one_sequence_gets_the_sequential_answer_at_any_prompt_length(length: int, inflight: int) -> None:
    bench = Bench(plans_inflight_max=inflight)
    prompt = a_prompt(length, length)
    params = bench.open(1, prompt, 300, ignore_eos=True)
    bench.run()
    assert bench.tokens(1) == answer(prompt, 300, params, ignore_eos=True)
    assert bench.events[1][-1].finish_reason is FinishReason.LENGTH
    assert all(event.finish_reason is None for event in bench.events[1][:-1])


def test_a_sequence_ends_at_its_end_token_with_one_token_of_overlap_at_most() -> None:
    seed = next(s for s in range(1000) if len(answer([5], 50, SamplingParams(seed=s))) in range(3, 20))
    bench = Bench()
    params = bench.open(seed, [5], 50)
    bench.run()
    expected = answer([5], 50, params)
    assert bench.tokens(seed) == expected
    assert expected[-1] == EOS
    assert bench.events[seed][-1].finish_reason is FinishReason.STOP
    assert bench.rank.num_tokens_computed <= len(expected) + 1


def test_the_end_by_length_is_known_ahead_and_nothing_is_computed_beyond_it() -> None:
    bench = Bench()
    bench.open(1, [5, 6, 7], 10, ignore_eos=True)
    bench.run()
    assert bench.rank.num_tokens_computed == 3 + 10 - 1


def test_the_next_plan_is_made_before_the_result_is_back() -> None:
    bench = Bench()
    bench.open(1, [5], 10, ignore_eos=True)
    first, second = bench.send(), bench.send()
    assert first is not None
    assert second is not None
    assert (second.segments[0].start, second.segments[0].count, second.segments[0].sample) == (1, 1, True)
    assert bench.send() is None
    bench.run()


def test_decode_goes_on_in_every_step_while_a_long_prompt_is_computed_in_chunks() -> None:
    bench = Bench(num_pages=32, prefill_tokens_max=512)
    bench.open(1, [5], 40, ignore_eos=True)
    bench.send()
    bench.receive()
    bench.open(2, a_prompt(2, 2000), 1)
    for _ in range(4):
        plan = bench.send()
        assert plan is not None
        assert plan.segments[0].count == 1
        assert plan.segments[1].count in (512, 2000 - 3 * 512)
        bench.receive()
    assert len(bench.events[2]) == 1
    bench.run()


def test_the_rest_of_the_budget_goes_to_the_next_prompt() -> None:
    bench = Bench(prefill_tokens_max=512)
    for key, length in ((1, 100), (2, 300), (3, 50)):
        bench.open(key, a_prompt(key, length), 4)
    plan = bench.send()
    assert plan is not None
    assert [segment.count for segment in plan.segments] == [100, 300, 50]
    bench.run()


def counts_of(plan: StepPlan | None, bench: Bench) -> dict[int, int]:
    """Tokens of each sequence in a plan, by its key, which is its seed."""
    assert plan is not None
    return {bench.rank.slots[item.slot].sampling.seed: item.count for item in plan.segments}


def step(bench: Bench) -> dict[int, int]:
    plan = bench.send()
    bench.receive()
    return counts_of(plan, bench)


def test_a_short_prompt_behind_a_long_one_is_answered_in_the_next_step() -> None:
    bench = Bench(num_pages=64, prefill_tokens_max=1024)
    bench.open(1, a_prompt(1, 4000), 3, ignore_eos=True)
    assert step(bench) == {1: 1024}
    bench.open(2, a_prompt(2, 10), 3, ignore_eos=True)
    # What the short one leaves is the long one's again, in whole pages.
    assert step(bench) == {1: 768, 2: 10}
    assert len(bench.tokens(2)) == 1
    bench.run()


def test_the_half_that_is_not_kept_for_the_oldest_goes_to_the_shortest() -> None:
    bench = Bench(num_pages=64, prefill_tokens_max=1024)
    for key, length in ((1, 4000), (2, 3000), (3, 300)):
        bench.open(key, a_prompt(key, length), 1)
    assert step(bench) == {1: 512, 3: 300}
    assert step(bench) == {1: 512, 2: 512}
    bench.open(4, a_prompt(4, 200), 3, ignore_eos=True)
    assert step(bench) == {1: 512, 2: 256, 4: 200}
    bench.run()


def test_with_a_budget_of_one_page_the_oldest_and_the_others_take_turns() -> None:
    bench = Bench(num_pages=64, prefill_tokens_max=256)
    for key in (1, 2):
        bench.open(key, a_prompt(key, 1000), 3, ignore_eos=True)
    assert [step(bench) for _ in range(4)] == [{1: 256}, {2: 256}, {1: 256}, {2: 256}]
    bench.run()


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(1, 6).map(lambda pages: pages * 256),
    lengths=st.lists(st.integers(2, 600), min_size=1, max_size=40),
)
def test_a_long_prompt_keeps_half_of_the_budget_however_many_come_after_it(
    budget: int, lengths: list[int]
) -> None:
    bench = Bench(num_pages=256, num_slots=8, prefill_tokens_max=budget, sequence_tokens_max=4096)
    bench.open(1, a_prompt(1, 4000), 1)
    for key, length in enumerate(lengths, start=2):
        bench.open(key, a_prompt(key, length), 1)
    num_steps = 0
    while not bench.events[1]:
        bench.send()
        bench.receive()
        num_steps += 1
    num_pages = budget // 256
    assert num_steps <= -(-2 * 16 // num_pages) + 1
    bench.run()


def test_a_sequence_cancelled_before_its_first_chunk_is_never_heard_of_by_the_rank() -> None:
    bench = Bench(num_pages=64, prefill_tokens_max=256)
    for key in (1, 2):
        bench.open(key, a_prompt(key, 1000), 3, ignore_eos=True)
    step(bench)
    assert bench.scheduler.load().sequences_running == 2
    assert bench.scheduler.cancel(SequenceKey(2))
    bench.run()
    assert sum(len(plan.opens) for plan in bench.plans) == 1


def test_several_are_cancelled_at_once_and_those_that_have_ended_do_not_count() -> None:
    bench = Bench()
    for key in (1, 2, 3):
        bench.open(key, [5], 50, ignore_eos=True)
    step(bench)
    assert bench.scheduler.cancel(SequenceKey(1))
    assert bench.scheduler.cancel_all([SequenceKey(1), SequenceKey(2), SequenceKey(3), SequenceKey(9)]) == 2
    bench.run()


def test_admission_takes_the_pages_really_needed_not_those_of_max_tokens() -> None:
    bench = Bench(num_pages=8, num_slots=8)
    for key in range(6):
        bench.open(key, a_prompt(key, 10), 256 * 7)
    plan = bench.send()
    assert plan is not None
    assert len(plan.opens) == 6
    for key in range(6):
        bench.scheduler.cancel(SequenceKey(key))
    bench.run()


def test_pages_running_out_preempts_the_youngest_and_its_answer_is_unchanged() -> None:
    bench = Bench(num_pages=4, num_slots=4)
    params = [bench.open(key, a_prompt(key, 200), 500, ignore_eos=True) for key in range(3)]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for key in range(3):
        assert bench.tokens(key) == answer(a_prompt(key, 200), 500, params[key], ignore_eos=True)


def test_a_cancelled_sequence_gives_its_pages_to_the_very_next_plan() -> None:
    bench = Bench(num_pages=2, num_slots=1)
    bench.open(1, a_prompt(1, 400), 50)
    first = bench.send()
    bench.open(2, a_prompt(2, 400), 50)
    assert bench.scheduler.cancel(SequenceKey(1))
    assert not bench.scheduler.cancel(SequenceKey(1))
    second = bench.send()
    assert first is not None
    assert second is not None
    assert second.closes == (first.segments[0].slot,)
    assert second.opens[0].slot == first.segments[0].slot
    assert set(second.segments[0].pages) == set(first.segments[0].pages)
    bench.run()
    assert bench.tokens(1) == []
    assert len(bench.tokens(2)) > 0


@pytest.mark.parametrize("length", [1, 2, 256, 257, 700])
def test_prompt_logprobs_come_chunk_by_chunk_before_the_first_token(length: int) -> None:
    bench = Bench(prefill_tokens_max=256)
    prompt = a_prompt(3, length)
    bench.open(3, prompt, 5, ignore_eos=True, prompt_logprobs=2, logprobs=1)
    bench.run()
    assert bench.scores[3] == [logprob_of(prompt[position], position) for position in range(1, length)]
    first = bench.events[3][0]
    assert first.logprob == logprob_of(first.token_id, length)


@pytest.mark.parametrize(
    ("num_pages", "older", "length", "max_tokens", "num_tokens_before"),
    [(71, 190, 70 * 256, 3, 0), (6, 250, 450, 700, 100)],
    ids=["within the prompt", "after it"],
)
def test_prompt_logprobs_survive_a_preemption(
    num_pages: int, older: int, length: int, max_tokens: int, num_tokens_before: int
) -> None:
    bench = Bench(num_pages=num_pages, num_slots=2, prefill_tokens_max=256)
    bench.open(1, a_prompt(1, older), 1200, ignore_eos=True)
    prompt = a_prompt(2, length)
    params = bench.open(2, prompt, max_tokens, ignore_eos=True, prompt_logprobs=0)
    while bench.scheduler.num_preemptions == 0:
        bench.send()
        bench.receive()
    assert (len(bench.tokens(2)) > num_tokens_before) == (num_tokens_before > 0)
    bench.run()
    assert bench.tokens(2) == answer(prompt, max_tokens, params, ignore_eos=True)
    assert bench.scores[2] == [logprob_of(prompt[position], position) for position in range(1, length)]
    # Once they are out they are not paid for again.
    *_, last_open = [item for plan in bench.plans for item in plan.opens if item.num_prompt == length]
    assert (last_open.sampling.prompt_logprobs is None) == (num_tokens_before > 0)


def until_preempted(bench: Bench) -> None:
    while bench.scheduler.num_preemptions == 0:
        while bench.scheduler.num_preemptions == 0 and bench.send():
            pass
        if bench.scheduler.num_preemptions == 0:
            bench.receive()


def test_a_preempted_sequence_resumes_only_when_its_tokens_in_flight_have_landed() -> None:
    bench = Bench(num_pages=2, num_slots=2, plans_inflight_max=3)
    bench.open(1, a_prompt(1, 190), 200, ignore_eos=True)
    params = bench.open(2, a_prompt(2, 190), 200, ignore_eos=True)
    until_preempted(bench)
    assert len(bench.pipe) == 3
    # Room enough now; but the last token of sequence 2 is still on its way.
    bench.scheduler.cancel(SequenceKey(1))
    bench.receive()
    plan = bench.send()
    assert plan is None or plan.opens == ()
    bench.run()
    assert bench.tokens(2) == answer(a_prompt(2, 190), 200, params, ignore_eos=True)


def test_a_preempted_sequence_goes_before_those_that_came_after_it() -> None:
    bench = Bench(num_pages=2, num_slots=2)
    for key in (1, 2, 3):
        bench.open(key, a_prompt(key, 190), 200, ignore_eos=True)
    bench.run()
    assert bench.scheduler.num_preemptions == 1
    ends = sorted((plan.number, item.sampling.seed) for plan in bench.plans for item in plan.opens)
    assert [key for _, key in ends] == [1, 2, 2, 3]


def test_a_newcomer_does_not_take_the_page_that_a_running_sequence_is_about_to_need() -> None:
    bench = Bench(num_pages=2, num_slots=2)
    bench.open(1, a_prompt(1, 200), 100, ignore_eos=True)
    bench.open(2, a_prompt(2, 10), 100, ignore_eos=True)
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    # One that ends before the boundary keeps nothing from anybody.
    bench = Bench(num_pages=2, num_slots=2)
    bench.open(1, a_prompt(1, 200), 50, ignore_eos=True)
    bench.open(2, a_prompt(2, 10), 10, ignore_eos=True)
    plan = bench.send()
    assert plan is not None
    assert len(plan.opens) == 2
    bench.run()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sampling", "field"),
    [
        ([], 1, {}, "prompt"),
        ([97], 1, {}, "prompt"),
        ([-1], 1, {}, "prompt"),
        ([1], 0, {}, "max_tokens"),
        ([1] * 1024, 1, {}, "prompt"),
        ([1] * 1000, 25, {}, "max_tokens"),
        ([1], 1, {"top_k": -1}, "top_k"),
        ([1] * 13_000, 1, {"prompt_logprobs": 20}, "logprobs"),
    ],
)
def test_a_sequence_that_can_never_be_served_is_refused_by_field(
    prompt: list[int], max_tokens: int, sampling: dict[str, int], field: str
) -> None:
    bench = Bench(num_pages=64 if "prompt_logprobs" in sampling else 4)
    with pytest.raises(InvalidRequest) as caught:
        bench.open(1, prompt, max_tokens, **sampling)
    assert caught.value.field == field
    assert bench.scheduler.is_idle


def test_the_largest_sequence_that_fits_is_served() -> None:
    bench = Bench(num_pages=4)
    bench.open(1, a_prompt(1, 1000), 24, ignore_eos=True)
    bench.run()
    assert len(bench.tokens(1)) == 24


def test_a_full_queue_refuses_by_count_and_by_tokens() -> None:
    bench = Bench(num_pages=64, sequences_waiting_max=2)
    bench.open(1, [1], 1)
    bench.open(2, [1], 1)
    with pytest.raises(Overloaded):
        bench.open(3, [1], 1)
    bench.run()
    bench = Bench(num_pages=64, tokens_waiting_max=100)
    bench.open(1, [1] * 200, 1)
    with pytest.raises(Overloaded):
        bench.open(2, [1], 1)
    bench.run()


def test_a_result_that_does_not_answer_its_plan_is_a_broken_invariant() -> None:
    bench = Bench()
    bench.open(1, [5], 5)
    bench.send()
    result = bench.rank.step(bench.pipe[0])
    with pytest.raises(AssertionError, match="came for plan"):
        bench.scheduler.apply(msgspec.structs.replace(result, number=2))
    bench = Bench()
    bench.open(1, [5], 5)
    bench.send()
    with pytest.raises(AssertionError, match="slots sampled"):
        bench.scheduler.apply(msgspec.structs.replace(bench.rank.step(bench.pipe[0]), sampled=()))


# A request: prompt length, max_tokens, ignore_eos, prompt logprobs.
requests = st.tuples(st.integers(1, 900), st.integers(1, 400), st.booleans(), st.booleans())
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("send"), st.integers(1, 8)),
    st.tuples(st.just("receive"), st.integers(1, 8)),
    st.tuples(st.just("turn"), st.integers(1, 200)),
)


@settings(max_examples=120, deadline=None)
@given(
    num_pages=st.integers(6, 12),
    num_slots=st.integers(1, 6),
    budget=st.sampled_from([256, 512, 1024]),
    inflight=st.integers(1, 3),
    story=st.lists(moves, min_size=1, max_size=40),
)
def test_any_storm_ends_with_the_sequential_answers_and_nothing_in_use(
    num_pages: int, num_slots: int, budget: int, inflight: int, story: list
) -> None:
    bench = Bench(
        num_pages=num_pages, num_slots=num_slots, prefill_tokens_max=budget, plans_inflight_max=inflight
    )
    opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
    cancelled: set[int] = set()
    for move, value in story:
        if move == "open":
            length, max_tokens, ignore_eos, scores = value
            key = len(opened)
            prompt = a_prompt(key, length)
            extra = {"prompt_logprobs": 0} if scores else {}
            params = bench.open(key, prompt, max_tokens, ignore_eos=ignore_eos, **extra)
            opened[key] = (prompt, max_tokens, ignore_eos, params)
        elif move == "cancel" and opened:
            key = value % len(opened)
            if bench.scheduler.cancel(SequenceKey(key)):
                cancelled.add(key)
        elif move == "send":
            for _ in range(value):
                bench.send()
        elif move == "receive":
            for _ in range(value):
                bench.receive()
        elif move == "turn":
            for _ in range(value):
                bench.send()
                bench.receive()
    # Every step computes at least one token; a preemption costs at most one sequence's recomputation.
    work = sum(len(prompt) + max_tokens for prompt, max_tokens, _, _ in opened.values())
    bench.run(steps_max=10 * work + 100)
    for key, (prompt, max_tokens, ignore_eos, params) in opened.items():
        expected = answer(prompt, max_tokens, params, ignore_eos=ignore_eos)
        got = bench.tokens(key)
        if key in cancelled:
            assert got == expected[: len(got)]
            assert all(event.finish_reason is None for event in bench.events[key])
        else:
            assert got == expected
            assert bench.events[key][-1].finish_reason is not None
        wants_scores = params.prompt_logprobs is not None
        scores = [logprob_of(prompt[index], index) for index in range(1, len(prompt)) if wants_scores]
        assert bench.scores[key] == (scores if got else scores[: len(bench.scores[key])])


def test_recomputation_after_preemption_stays_within_a_small_part_of_the_work() -> None:
    bench = Bench(num_pages=12, num_slots=8)
    work = 0
    for key in range(24):
        bench.open(key, a_prompt(key, 150 + key), 400, ignore_eos=True)
        work += 150 + key + 399
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert bench.rank.num_tokens_computed < 1.6 * work

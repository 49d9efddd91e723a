"""The scheduler with drafts, against a fake rank that accepts some of them and checks every plan: the answers are the
sequential ones whatever is drafted and accepted, and pages cover whatever is computed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from fake_state import EOS, answer, is_drafted_well
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import Sampled, StepPlan, Verified
from engine.worker.drafts.policy import DraftRoom, FixedDrafts, Outcome
from engine.worker.events import SequenceKey
from rorqual.sampling import SamplingParams
from rorqual.session import FinishReason
from tests.harness.benches import Bench, Pair, a_prompt, adopting, lending


class AnyDrafts:
    """Another number for every sequence in every step, drawn; and what it was told."""

    def __init__(self, seed: int, *, most: int = 4) -> None:
        self.outcomes: list[Outcome] = []
        self.timed: list[tuple[int, float | None]] = []
        self.forgotten: list[int] = []
        self._random = random.Random(seed)
        self._most = most

    def choose(self, rooms: Sequence[DraftRoom], *, rows_max: int) -> list[int]:
        counts: list[int] = []
        for room in rooms:
            most = min(room.drafts_max, self._most, rows_max - sum(counts))
            counts.append(self._random.randint(0, most))
        return counts

    def learn(self, outcomes: Sequence[Outcome], *, num_sequences: int, step_ms: float | None) -> None:
        self.outcomes.extend(outcomes)
        self.timed.append((num_sequences, step_ms))

    def forget(self, key: SequenceKey) -> None:
        self.forgotten.append(key)


def well(position: int, sampling: SamplingParams) -> bool:
    return True


def badly(position: int, sampling: SamplingParams) -> bool:
    return False


def drafting(drafts: int = 4, **options) -> Bench:
    return Bench(**{"drafts_max": 4, "policy": FixedDrafts(drafts), **options})


def drafts_of(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [segment.drafts for segment in plan.segments]


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("inflight", [1, 2, 3])
@pytest.mark.parametrize("accepts", [well, badly, is_drafted_well])
def test_the_answer_is_the_sequential_one_whatever_is_drafted_and_accepted(
    drafts: int, inflight: int, accepts
) -> None:
    bench = drafting(drafts, plans_inflight_max=inflight)
    bench.rank.drafts_well = accepts
    lengths = {1: 1, 2: 250, 3: 256, 4: 511}
    params = {
        key: bench.open(key, a_prompt(key, length), 300, ignore_eos=True) for key, length in lengths.items()
    }
    bench.run()
    for key, length in lengths.items():
        assert bench.tokens(key) == answer(a_prompt(key, length), 300, params[key], ignore_eos=True)
        assert bench.events[key][-1].finish_reason is FinishReason.LENGTH


def test_a_step_gives_all_accepted_drafts_and_one_token_more() -> None:
    bench = drafting(3, plans_inflight_max=1)
    bench.rank.drafts_well = well
    bench.open(1, [5, 6], 20, ignore_eos=True)
    numbers: list[int] = []
    while not bench.scheduler.is_idle:
        before = len(bench.tokens(1))
        bench.step()
        numbers.append(len(bench.tokens(1)) - before)
    # The last decode has four tokens to give and room for three; then the slot is closed.
    assert numbers == [1, 4, 4, 4, 4, 3, 0]


def test_the_step_after_a_prompt_verifies_drafts_and_the_prompt_itself_has_none() -> None:
    for length in (1, 2, 257):
        bench = drafting(4, prefill_tokens_max=256)
        bench.open(1, a_prompt(1, length), 20, ignore_eos=True)
        drafts = [drafts_of(bench.step()) for _ in range(-(-length // 256))]
        assert drafts == [[0]] * len(drafts)
        assert drafts_of(bench.send()) == [4]
        bench.run()


def test_plans_ahead_hold_pages_for_everything_that_may_be_accepted() -> None:
    bench = drafting(4, plans_inflight_max=3)
    bench.rank.drafts_well = well
    bench.open(1, a_prompt(1, 246), 50, ignore_eos=True)
    plans = [bench.send() for _ in range(3)]
    assert all(plan is not None for plan in plans)
    # 247 tokens are known behind the first plan; the second may compute 251 of them, the third 256.
    assert [len(plan.segments[0].pages) for plan in plans if plan] == [1, 0, 0]
    bench.receive()
    # 247 + 2 x 5 are known at most behind those two, and 261 would be computed.
    plan = bench.send()
    assert plan is not None
    assert len(plan.segments[0].pages) == 1
    assert plan.segments[0].start == 246 + 2
    bench.run()


def test_no_draft_is_planned_beyond_the_last_token() -> None:
    bench = drafting(4, plans_inflight_max=1)
    bench.rank.drafts_well = badly
    bench.open(1, [5], 6, ignore_eos=True)
    planned: list[list[int]] = []
    while not bench.scheduler.is_idle:
        plan = bench.step()
        planned.append(drafts_of(plan))
    assert planned == [[0], [4], [3], [2], [1], [0], []]  # the last one closes the slot


def test_a_sequence_that_is_sure_to_end_gives_its_room_back_before_its_last_token_is_here() -> None:
    bench = drafting(4, plans_inflight_max=2)
    bench.rank.drafts_well = well
    bench.open(1, [5], 7, ignore_eos=True)
    for _ in range(2):
        bench.send()
    bench.receive()  # 1 of 7; one in flight
    bench.send()  # 3 known at least
    bench.receive()  # 6 of 7; one in flight gives the last
    assert len(bench.tokens(1)) == 6
    assert bench.scheduler.load().slots_free == bench.scheduler.load().slots_total
    plan = bench.send()
    assert plan is None or not plan.segments
    bench.run()
    assert len(bench.tokens(1)) == 7


def test_tokens_behind_an_end_token_among_accepted_drafts_are_dropped() -> None:
    seed = next(s for s in range(1000) if len(answer([5], 50, SamplingParams(seed=s))) == 4)
    bench = drafting(4)
    bench.rank.drafts_well = well
    params = bench.open(seed, [5], 50)
    bench.run()
    assert bench.tokens(seed) == answer([5], 50, params)
    assert bench.tokens(seed)[-1] == EOS
    assert bench.events[seed][-1].finish_reason is FinishReason.STOP
    assert bench.rank.num_tokens_computed > 5


def test_nobody_is_preempted_for_drafts() -> None:
    # Two pages each for what they know at last, and none to spare: a third one for drafts is not to be had.
    bench = drafting(4, num_pages=4, num_slots=2)
    bench.rank.drafts_well = badly
    params = [bench.open(key, a_prompt(key, 400), 112, ignore_eos=True) for key in range(2)]
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    for key in range(2):
        assert bench.tokens(key) == answer(a_prompt(key, 400), 112, params[key], ignore_eos=True)


def test_drafts_that_find_no_free_page_are_fewer_until_there_are_none() -> None:
    bench = drafting(4, num_pages=2, num_slots=2, plans_inflight_max=1)
    bench.rank.drafts_well = badly
    bench.open(1, a_prompt(1, 200), 300, ignore_eos=True)
    bench.open(2, a_prompt(2, 250), 6, ignore_eos=True)
    drafts: list[int] = []
    while not bench.events[2] or bench.events[2][-1].finish_reason is None:
        plan = bench.step()
        assert plan is not None
        drafts += [item.drafts for item in plan.segments if bench.rank.slots[item.slot].sampling.seed == 2]
    # Behind 250 tokens there is room for the newest one and, at first, four drafts.
    assert drafts == [0, 4, 3, 2, 1, 0]
    assert bench.scheduler.num_preemptions == 0
    bench.run()
    bench = drafting(4, num_pages=2, num_slots=2, plans_inflight_max=1)
    bench.rank.drafts_well = badly
    bench.open(1, a_prompt(1, 200), 50, ignore_eos=True)
    bench.open(2, a_prompt(2, 250), 40, ignore_eos=True)
    bench.run()
    assert bench.scheduler.num_preemptions == 1


def test_a_sequence_whose_upper_bound_alone_wants_a_page_waits_for_its_results() -> None:
    bench = drafting(4, num_pages=2, num_slots=2, plans_inflight_max=8)
    bench.rank.drafts_well = badly
    bench.open(1, a_prompt(1, 100), 100, ignore_eos=True)
    bench.open(2, a_prompt(2, 240), 60, ignore_eos=True)
    drafts = [[item.drafts for item in plan.segments] for _ in range(8) if (plan := bench.send())]
    # 240 + 1 + 3 x 5 tokens may be known behind the fourth, which fills the page; one more behind the fifth.
    assert drafts == [[0, 0], [4, 4], [4, 4], [4, 4], [4, 0], [4], [4], [4]]
    assert bench.scheduler.num_preemptions == 0
    for _ in range(3):
        bench.receive()
    # 245 tokens are known for sure by now, and 249 at most: one plan with drafts is out.
    plan = bench.send()
    assert plan is not None
    assert len(plan.segments) == 2
    bench.run()


def test_no_page_is_held_for_positions_beyond_the_last_token() -> None:
    bench = drafting(4, num_pages=1, plans_inflight_max=6)
    bench.rank.drafts_well = badly
    bench.open(1, a_prompt(1, 240), 16, ignore_eos=True)
    # 240 + 1 + 5 x 5 may be known behind all of them, but never more than 256.
    assert [drafts_of(bench.send()) for _ in range(6)] == [[0], [4], [4], [4], [4], [4]]
    bench.run()
    assert len(bench.tokens(1)) == 16


def test_all_drafts_of_a_step_are_bounded() -> None:
    bench = drafting(4, num_slots=4, draft_rows_max=9)
    for key in range(4):
        bench.open(key, a_prompt(key, 10), 100, ignore_eos=True)
    bench.step()
    assert drafts_of(bench.send()) == [2, 2, 2, 2]
    bench.run()


def test_the_policy_hears_of_every_outcome_and_of_the_time_of_plain_decodes() -> None:
    policy = AnyDrafts(1)
    bench = Bench(drafts_max=4, policy=policy, plans_inflight_max=1)
    bench.open(1, a_prompt(1, 10), 30, ignore_eos=True)
    bench.step()
    bench.step()
    bench.open(2, a_prompt(2, 600), 30, ignore_eos=True)
    bench.run()
    assert policy.timed[:3] == [(1, None), (1, 1.0), (1, None)]
    assert policy.forgotten == [1, 2]
    assert {outcome.key for outcome in policy.outcomes} == {1, 2}
    accepted = sum(outcome.num_accepted for outcome in policy.outcomes)
    num_sampling = sum(segment.sample for plan in bench.plans for segment in plan.segments)
    assert num_sampling + accepted == 60
    assert all(0 <= item.num_accepted <= item.num_drafts <= 4 for item in policy.outcomes)


def test_the_policy_does_not_hear_of_the_time_of_a_step_that_had_nothing_left_to_compute() -> None:
    """It takes next to none. Were it learned as a decode's, every plain decode would seem to be cheap."""
    policy = AnyDrafts(1)
    bench = Bench(drafts_max=4, policy=policy, plans_inflight_max=2)
    bench.rank.drafts_well = well
    for key, max_tokens in enumerate((9, 14, 23, 30)):
        computed: list[int] = []
        policy.timed.clear()
        bench.open(key, [5], max_tokens, ignore_eos=True)
        while not bench.scheduler.is_idle:
            before = bench.rank.num_tokens_computed
            bench.send()
            bench.send()
            bench.receive()
            computed.append(bench.rank.num_tokens_computed - before)
        # The first computes the prompt as it opens the slot.
        assert [ms is not None for _, ms in policy.timed[1:]] == [rows > 0 for rows in computed[1:]]
        assert [number for number, _ in policy.timed[1:]] == [int(rows > 0) for rows in computed[1:]]
    assert 0 in computed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled": ()}, "slots sampled"),
        ({"verified": ()}, "sampled 5 times"),
        ({"verified": (Verified(slot=3, num_drafts=4, num_accepted=4),)}, "nobody asked for"),
        ({"sampled": (Sampled(slot=0, token_id=3, logprob=None, alternatives=()),) * 6}, "sampled 6 times"),
    ],
)
def test_a_result_that_does_not_fit_its_drafts_is_a_broken_invariant(changes: dict, message: str) -> None:
    bench = drafting(4)
    bench.rank.drafts_well = well
    bench.open(1, a_prompt(1, 10), 100, ignore_eos=True)
    bench.step()
    bench.send()
    result = bench.rank.step(bench.pipe[0])
    with pytest.raises(AssertionError, match=message):
        bench.scheduler.apply(msgspec.structs.replace(result, **changes))


def test_a_decode_worker_drafts_from_its_first_step_on() -> None:
    pair = Pair(prefill=lending(), decode=adopting(drafts_max=4, policy=FixedDrafts(4)))
    prompt = a_prompt(1, 300)
    params = pair.prefill.open(1, prompt, 60, ignore_eos=True)
    pair.bind(1, prompt, 60, ignore_eos=True)
    pair.prefill.drain()
    pair.hand_over(1)
    plan = pair.decode.send()
    assert plan is not None
    assert (plan.segments[0].drafts, plan.opens[0].tokens_max) == (4, 360)
    assert all(segment.drafts == 0 for item in pair.prefill.plans for segment in item.segments)
    pair.drain()
    assert pair.prefill.tokens(1) + pair.decode.tokens(1) == answer(prompt, 60, params, ignore_eos=True)
    pair.prefill.run()
    pair.decode.run()


# A request: prompt length, max_tokens, ignore_eos, prompt logprobs.
requests = st.tuples(
    st.one_of(st.integers(1, 900), st.sampled_from([250, 255, 256, 257, 508])),
    st.one_of(st.integers(1, 12), st.integers(1, 400)),
    st.booleans(),
    st.booleans(),
)
moves = st.one_of(
    st.tuples(st.just("open"), requests),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("send"), st.integers(1, 8)),
    st.tuples(st.just("receive"), st.integers(1, 8)),
    st.tuples(st.just("turn"), st.integers(1, 120)),
)


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(5, 12),
    num_slots=st.integers(1, 6),
    inflight=st.integers(1, 3),
    accepts=st.sampled_from([well, badly, is_drafted_well]),
    seed=st.integers(0, 1000),
    story=st.lists(moves, min_size=1, max_size=40),
)
def test_any_storm_with_drafts_ends_with_the_sequential_answers_and_nothing_in_use(
    num_pages: int, num_slots: int, inflight: int, accepts, seed: int, story: list
) -> None:
    bench = Bench(
        num_pages=num_pages,
        num_slots=num_slots,
        plans_inflight_max=inflight,
        drafts_max=4,
        draft_rows_max=13,
        policy=AnyDrafts(seed),
    )
    bench.rank.drafts_well = accepts
    opened: dict[int, tuple[list[int], int, bool, SamplingParams]] = {}
    cancelled: set[int] = set()
    for move, value in story:
        match move:
            case "open":
                length, max_tokens, ignore_eos, scores = value
                key = len(opened)
                prompt = a_prompt(key, min(length, num_pages * 256 - max_tokens))
                extra = {"prompt_logprobs": 0} if scores else {}
                params = bench.open(key, prompt, max_tokens, ignore_eos=ignore_eos, **extra)
                opened[key] = (prompt, max_tokens, ignore_eos, params)
            case "cancel":
                if bench.scheduler.cancel(SequenceKey(value)):
                    cancelled.add(value)
            case _:
                for _ in range(value):
                    if move != "receive":
                        bench.send()
                    if move != "send":
                        bench.receive()
    bench.run(steps_max=50_000)
    assert all(sum(drafts_of(plan)) <= 13 for plan in bench.plans)
    for key, (prompt, max_tokens, ignore_eos, params) in opened.items():
        expected = answer(prompt, max_tokens, params, ignore_eos=ignore_eos)
        got = bench.tokens(key)
        assert got == (expected[: len(got)] if key in cancelled else expected)
        assert key in cancelled or bench.events[key][-1].finish_reason is not None


@pytest.mark.parametrize("seed", range(12))
def test_crowded_decode_workers_with_drafts_give_the_sequential_answers(seed: int) -> None:
    """Handed over, preempted and cancelled with plans out."""
    rng = random.Random(seed)
    decode = adopting(
        num_pages=rng.randint(4, 8),
        num_slots=rng.randint(3, 6),
        plans_inflight_max=rng.randint(1, 3),
        drafts_max=4,
        policy=AnyDrafts(seed),
    )
    pair = Pair(prefill=lending(num_pages=24, num_slots=6, num_records=12), decode=decode)
    opened: dict[int, tuple[list[int], int, SamplingParams]] = {}
    cancelled: set[int] = set()
    for key in range(12):
        prompt = a_prompt(key, rng.choice([180, 250, 256, 400, 505]))
        max_tokens = rng.randint(2, 300)
        opened[key] = (prompt, max_tokens, pair.prefill.open(key, prompt, max_tokens, ignore_eos=True))
        pair.prefill.drain()
        pair.bind(key, prompt, max_tokens, ignore_eos=True)
        for _ in range(rng.randint(0, 150)):
            rng.choice([decode.send, decode.receive, lambda: any(map(pair.begin, opened)), decode.step])()
            any(map(pair.end, opened))
        if rng.random() < 0.2 and pair.cancel_decode(victim := rng.randrange(key + 1)):
            cancelled.add(victim)
    pair.drain()
    for key, (prompt, max_tokens, params) in opened.items():
        expected = answer(prompt, max_tokens, params, ignore_eos=True)[1:]
        got = decode.tokens(key)
        assert got == (expected[: len(got)] if key in cancelled else expected)
    assert decode.scheduler.num_sequences == 0

"""What the policies draft, against a rank whose acceptance and times are simple formulas."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.drafts.costs import StepCosts
from engine.worker.drafts.policy import (
    GAIN_MIN,
    AdaptiveDrafts,
    DraftPolicy,
    DraftRoom,
    FixedDrafts,
    Outcome,
    best_counts,
    make_policy,
)
from engine.worker.events import SequenceKey

Cost = Callable[[int, int, int], float]
"""Milliseconds of a step of so many sequences, rounds of drafting, and drafts."""


def linear(c0: float, c1: float, c2: float, c3: float) -> Cost:
    """Of a step, each row of the main forward, each round, each drafted row."""
    return lambda batch, rounds, drafts: c0 + c1 * (batch + drafts) + c2 * rounds + c3 * drafts


CHEAP = linear(10, 0.1, 0.5, 0.02)  # a device that is hardly busy
MIDDLE = linear(10, 0.5, 1.5, 0.1)
ROUNDS = linear(10, 0.2, 4, 0.02)  # rounds cost, rows do not
ROWS = linear(5, 2, 1, 0.3)
DEAR = linear(3, 3, 5, 3)  # nothing ever pays


def padded(batch: int, rounds: int, drafts: int) -> float:
    """Up to four rows cost what four do: nothing linear."""
    return 8 + 0.5 * max(4, batch + drafts) + rounds


COSTS = {
    "cheap": CHEAP,
    "middle": MIDDLE,
    "rounds": ROUNDS,
    "rows": ROWS,
    "dear": DEAR,
    "padded": padded,
}


@dataclass
class Ride:
    """A run of steps: how many tokens they give on average, and what they take."""

    speeds: list[tuple[float, float]]
    counts: list[list[int]]

    def speed(self, first: int = 0) -> float:
        return sum(tokens for tokens, _ in self.speeds[first:]) / sum(ms for _, ms in self.speeds[first:])


def ride(
    policy: DraftPolicy,
    *,
    batch: int,
    rate: Callable[[int, int], float],
    cost: Cost,
    steps: int,
    seed: int = 0,
    noise: float = 0.03,
) -> Ride:
    """`rate` of a step and a sequence. Results come one step late, as with two plans in flight."""
    rng = random.Random(seed)
    pipe: deque[tuple[list[Outcome], float]] = deque()
    found = Ride(speeds=[], counts=[])
    rooms = [DraftRoom(key=SequenceKey(index), drafts_max=4) for index in range(batch)]
    for step in range(steps):
        counts = policy.choose(rooms, rows_max=256)
        outcomes: list[Outcome] = []
        tokens = 0.0
        for index, count in enumerate(counts):
            accepts = rate(step, index)
            tokens += expected(accepts, count)
            hits = list(itertools.takewhile(lambda _, a=accepts: rng.random() < a, range(count)))
            if count:
                outcomes.append(Outcome(key=rooms[index].key, num_drafts=count, num_accepted=len(hits)))
        ms = cost(batch, max(counts), sum(counts))
        found.speeds.append((tokens, ms))
        found.counts.append(counts)
        pipe.append((outcomes, ms * max(0.1, 1 + noise * rng.gauss(0, 1))))
        if len(pipe) > 1:
            outcomes, seen_ms = pipe.popleft()
            policy.learn(outcomes, num_sequences=batch, step_ms=seen_ms)
    return found


def expected(rate: float, count: int) -> float:
    return sum(rate**depth for depth in range(count + 1))


def best_fixed(batch: int, rate: float, cost: Cost) -> float:
    return max(batch * expected(rate, k) / cost(batch, k, batch * k) for k in range(5))


def test_a_fixed_policy_drafts_as_many_as_there_is_room_for() -> None:
    rooms = [DraftRoom(key=SequenceKey(key), drafts_max=room) for key, room in enumerate((4, 2, 0, 4))]
    assert FixedDrafts(3).choose(rooms, rows_max=256) == [3, 2, 0, 3]
    assert FixedDrafts(3).choose(rooms, rows_max=8) == [2, 2, 0, 2]
    assert FixedDrafts(3).choose(rooms, rows_max=3) == [0, 0, 0, 0]


def test_a_policy_is_made_as_the_option_and_the_rank_say() -> None:
    assert isinstance(make_policy("auto", drafts_max=4), AdaptiveDrafts)
    for option in ("auto", 0):
        policy = make_policy(option, drafts_max=0)
        assert policy.choose([DraftRoom(key=SequenceKey(1), drafts_max=4)], rows_max=256) == [0]
    policy = make_policy(3, drafts_max=3)
    assert policy.choose([DraftRoom(key=SequenceKey(1), drafts_max=4)], rows_max=256) == [3]


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(
    ("batch", "steps"),
    [
        (1, 1500),
        (16, 600),
        *(pytest.param(*case, marks=pytest.mark.minutes) for case in ((4, 1000), (64, 400))),
    ],
)
def test_adaptive_drafts_come_close_to_the_best_fixed_number(name: str, batch: int, steps: int) -> None:
    for rate in (0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95):
        speed = ride(
            AdaptiveDrafts(4), batch=batch, rate=lambda *_, a=rate: a, cost=COSTS[name], steps=steps
        ).speed(first=50)
        assert speed >= 0.97 * best_fixed(batch, rate, COSTS[name]), f"acceptance {rate}"


@settings(max_examples=15, deadline=None)
@given(
    rate=st.floats(0, 0.95),
    batch=st.sampled_from([1, 2, 3, 7, 20, 50]),
    costs=st.tuples(st.floats(1, 50), st.floats(0.01, 3), st.floats(0.1, 8), st.floats(0.01, 1)),
    seed=st.integers(0, 100),
)
def test_with_any_costs_they_lose_no_more_than_the_gain_that_is_left_alone(
    rate: float, batch: int, costs: tuple[float, float, float, float], seed: int
) -> None:
    cost = linear(*costs)
    found = ride(
        AdaptiveDrafts(4), batch=batch, rate=lambda *_: rate, cost=cost, steps=700, seed=seed, noise=0.02
    )
    # A gain of less than GAIN_MIN over no drafts is left alone on purpose.
    plain, best = batch / cost(batch, 0, 0), best_fixed(batch, rate, cost)
    assert found.speed(first=100) >= 0.97 * max(plain, best / (1 + GAIN_MIN))


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("cost", "first"), [(DEAR, 10), (linear(1, 0.5, 6, 1), 40)])
def test_where_nothing_pays_finding_that_out_costs_less_than_two_percent(
    batch: int, rate: float, cost: Cost, first: int
) -> None:
    found = ride(AdaptiveDrafts(4), batch=batch, rate=lambda *_: rate, cost=cost, steps=1500)
    assert found.speed(first=first) >= 0.98 * best_fixed(batch, rate, cost)
    assert any(sum(counts) for counts in found.counts[100:]), "it never tries again"


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("before", "after"), [(0.02, 0.9), (0.9, 0.02)])
@pytest.mark.parametrize("cost", [MIDDLE, ROUNDS, padded])
def test_they_follow_a_change_of_acceptance_within_a_hundred_steps(
    batch: int, before: float, after: float, cost: Cost
) -> None:
    found = ride(
        AdaptiveDrafts(4),
        batch=batch,
        rate=lambda step, _: before if step < 300 else after,
        cost=cost,
        steps=500,
        seed=1,
    )
    assert found.speed(first=400) >= 0.95 * best_fixed(batch, after, cost)


def test_they_follow_a_change_of_the_batch() -> None:
    policy = AdaptiveDrafts(4)
    for batch in (1, 40, 1):
        found = ride(policy, batch=batch, rate=lambda *_: 0.6, cost=MIDDLE, steps=300)
        assert found.speed(first=100) >= 0.96 * best_fixed(batch, 0.6, MIDDLE)


def test_sequences_whose_drafts_are_accepted_get_more_of_them_than_others() -> None:
    found = ride(
        AdaptiveDrafts(4), batch=8, rate=lambda _, index: 0.95 if index < 4 else 0.05, cost=MIDDLE, steps=400
    )
    late = found.counts[200:]
    assert sum(sum(counts[:4]) for counts in late) > 5 * sum(sum(counts[4:]) for counts in late)


class Hiccup:
    """One step takes a hundred times what such a step takes."""

    def __init__(self, number: int) -> None:
        self._inner = AdaptiveDrafts(4)
        self._left = number

    def choose(self, rooms: Sequence[DraftRoom], *, rows_max: int) -> list[int]:
        return self._inner.choose(rooms, rows_max=rows_max)

    def learn(self, outcomes: Sequence[Outcome], *, num_sequences: int, step_ms: float | None) -> None:
        assert step_ms is not None
        self._left -= 1
        self._inner.learn(
            outcomes, num_sequences=num_sequences, step_ms=step_ms * (100 if self._left == 0 else 1)
        )

    def forget(self, key: SequenceKey) -> None:
        self._inner.forget(key)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 9, 17, 40])
@pytest.mark.parametrize(("cost", "rate"), [(CHEAP, 0.9), (MIDDLE, 0.7), (DEAR, 0.7)])
def test_one_very_slow_step_spoils_nothing_and_be_it_the_first(number: int, cost: Cost, rate: float) -> None:
    """As a first step is that touches memory for the first time."""
    found = ride(Hiccup(number), batch=8, rate=lambda *_: rate, cost=cost, steps=200)
    assert found.speed(first=60) >= 0.95 * best_fixed(8, rate, cost)


def test_the_choice_does_not_flap() -> None:
    """At a rate where one draft more gives as much as it takes."""
    even = linear(9, 1, 0.5, 0.5)
    rate = next(a / 1000 for a in range(1000) if (1 + a / 1000) / 12 >= 1 / 10)
    found = ride(AdaptiveDrafts(4), batch=1, rate=lambda *_: rate, cost=even, steps=1000)
    changes = sum(first != second for first, second in itertools.pairwise(found.counts[100:]))
    assert changes < 200


@pytest.mark.parametrize(("rate", "least", "most"), [(0.05, 0, 1), (0.95, 16, 32)])
def test_where_no_step_is_ever_timed_the_rates_alone_decide_after_a_while(
    rate: float, least: int, most: int
) -> None:
    """As on a worker that computes prompts in every step."""
    policy = AdaptiveDrafts(4)
    rooms = [DraftRoom(key=SequenceKey(key), drafts_max=4) for key in range(8)]
    rng = random.Random(0)
    totals: list[int] = []
    for _ in range(400):
        counts = policy.choose(rooms, rows_max=256)
        totals.append(sum(counts))
        outcomes: list[Outcome] = []
        for room, count in zip(rooms, counts, strict=True):
            hits = len(list(itertools.takewhile(lambda _: rng.random() < rate, range(count))))
            outcomes.append(Outcome(key=room.key, num_drafts=count, num_accepted=hits))
        policy.learn(outcomes, num_sequences=8, step_ms=None)
    assert least <= sum(totals[100:]) / 300 <= most
    # And once some are timed, what they took counts.
    dear = ride(policy, batch=8, rate=lambda *_: rate, cost=DEAR, steps=300)
    assert dear.speed(first=150) >= 0.97 * best_fixed(8, rate, DEAR)


def test_a_sequence_that_has_ended_is_forgotten_and_what_comes_of_it_later_counts_for_all() -> None:
    policy = AdaptiveDrafts(4)
    for number in range(200):
        key = SequenceKey(number)
        counts = policy.choose([DraftRoom(key=key, drafts_max=4)], rows_max=256)
        policy.forget(key)
        outcome = Outcome(key=key, num_drafts=counts[0], num_accepted=counts[0])
        policy.learn([outcome] if counts[0] else [], num_sequences=1, step_ms=10.0 + counts[0])
    assert policy.num_tracked == 0
    assert policy.choose([DraftRoom(key=SequenceKey(999), drafts_max=4)], rows_max=256)[0] >= 3


def test_the_rate_of_all_survives_any_pause() -> None:
    policy = AdaptiveDrafts(4)
    ride(policy, batch=1, rate=lambda *_: 0.9, cost=CHEAP, steps=100)
    for _ in range(60_000):
        policy.choose([DraftRoom(key=SequenceKey(0), drafts_max=0)], rows_max=256)
    policy.learn([Outcome(key=SequenceKey(0), num_drafts=0, num_accepted=0)], num_sequences=1, step_ms=None)
    assert policy.choose([DraftRoom(key=SequenceKey(7), drafts_max=4)], rows_max=256)[0] >= 2


def test_bounds_hold_in_every_step() -> None:
    policy = AdaptiveDrafts(3)
    rng = random.Random(1)
    for _ in range(400):
        rooms = [
            DraftRoom(key=SequenceKey(key), drafts_max=rng.randint(0, 4))
            for key in rng.sample(range(40), rng.randint(1, 30))
        ]
        rows_max = rng.choice([1, 7, 50, 256])
        counts = policy.choose(rooms, rows_max=rows_max)
        assert sum(counts) <= rows_max
        assert all(0 <= n <= min(3, room.drafts_max) for n, room in zip(counts, rooms, strict=True))
        outcomes = [
            Outcome(key=room.key, num_drafts=n, num_accepted=rng.randint(0, n))
            for n, room in zip(counts, rooms, strict=True)
            if n
        ]
        step_ms = rng.choice([None, 0.0, rng.uniform(1, 100)])
        policy.learn(outcomes, num_sequences=len(rooms), step_ms=step_ms)


@settings(max_examples=50, deadline=None)
@given(
    rates=st.lists(st.floats(0, 0.99), min_size=1, max_size=4),
    costs=st.tuples(st.floats(1, 20), st.floats(0, 3), st.floats(0, 5), st.floats(0.01, 4)),
    rows_max=st.integers(0, 12),
)
def test_the_best_choice_is_as_good_as_any(
    rates: list[float], costs: tuple[float, float, float, float], rows_max: int
) -> None:
    model = costs_of(*costs)
    limits = [3] * len(rates)

    def speed(counts: tuple[int, ...] | list[int]) -> float:
        tokens = sum(expected(rate, count) for rate, count in zip(rates, counts, strict=True))
        return tokens / model.step_ms(len(rates), max(counts), sum(counts))

    found = best_counts(rates, limits, [0] * len(rates), model, rows_max=rows_max)
    every = itertools.product(range(4), repeat=len(rates))
    # Where the factors of rounds differ, a draft that nobody wants can make a step seem shorter.
    best = max(speed(counts) for counts in every if sum(counts) <= rows_max)
    plain = speed([0] * len(rates))
    # What is better by a little only is left.
    assert speed(found) >= (0.98 * best if any(found) or best > 1.08 * plain else plain)


@pytest.mark.parametrize(("gain", "begins", "goes_on"), [(1.01, 0, 0), (1.035, 0, 1), (1.08, 1, 1)])
def test_drafting_must_promise_more_to_be_begun_than_to_go_on(gain: float, begins: int, goes_on: int) -> None:
    model = costs_of(8, 1, 0.5, 0.5)
    rate = gain * 10 / 9 - 1  # one draft makes 9 ms into 10
    assert best_counts([rate], [1], [0], model, rows_max=8) == [begins]
    assert best_counts([rate], [1], [1], model, rows_max=8) == [goes_on]


def test_costs_that_grow_with_the_batch_are_told_apart_in_bursts() -> None:
    """Among few rows drafts are cheap, among many as dear as tokens: as where a device is busy from some size on."""

    def cost(batch: int, rounds: int, drafts: int) -> float:
        return 10 + rounds + 0.1 * (batch + drafts) + 1.2 * max(0, batch + drafts - 12)

    policy = AdaptiveDrafts(4)
    speeds: dict[int, list[Ride]] = {1: [], 4: [], 16: []}
    for burst in range(6):
        for batch, rides in speeds.items():
            rides.append(ride(policy, batch=batch, rate=lambda *_: 0.7, cost=cost, steps=60, seed=burst))
    for batch, rides in speeds.items():
        found = sum(item.speed() for item in rides[1:]) / len(rides[1:])
        assert found >= 0.97 * best_fixed(batch, 0.7, cost), f"batch {batch}"


def costs_of(c0: float, c1: float, c2: float, c3: float) -> StepCosts:
    """That has seen enough to know."""
    found = StepCosts(rounds_max=4)
    rng = random.Random(0)
    for _ in range(300):
        batch, rounds = rng.randint(1, 8), rng.randint(0, 4)
        drafts = rng.randint(1, batch) * rounds
        step_ms = c0 + c1 * batch + c2 * rounds + c3 * drafts
        found.learn(num_sequences=batch, rounds=rounds, num_drafts=drafts, step_ms=step_ms)
    return found


def test_costs_are_found_from_steps_of_all_kinds() -> None:
    found = costs_of(7, 1.5, 2, 0.25)
    for batch, rounds, drafts in ((1, 0, 0), (5, 2, 10), (8, 4, 4), (30, 1, 30)):
        step_ms = 7 + 1.5 * batch + 2 * rounds + 0.25 * drafts
        assert found.step_ms(batch, rounds, drafts) == pytest.approx(step_ms, rel=0.03)


def test_one_step_that_took_very_long_changes_little() -> None:
    found = costs_of(7, 1.5, 2, 0.25)
    before = found.step_ms(4, 2, 8)
    found.learn(num_sequences=4, rounds=2, num_drafts=8, step_ms=100 * before)
    assert found.step_ms(4, 2, 8) < 1.1 * before


def test_that_all_steps_take_ten_times_as_long_from_now_on_is_believed() -> None:
    found = costs_of(7, 1.5, 2, 0.25)
    before = found.step_ms(4, 2, 8)
    for _ in range(20):
        found.learn(num_sequences=4, rounds=2, num_drafts=8, step_ms=10 * before)
    assert found.step_ms(4, 2, 8) > 1.15 * before
    for _ in range(500):
        found.learn(num_sequences=4, rounds=2, num_drafts=8, step_ms=10 * before)
    assert found.step_ms(4, 2, 8) > 6 * before


def test_no_cost_is_ever_below_nothing() -> None:
    found = StepCosts(rounds_max=4)
    for rounds in (0, 4, 1, 0, 4, 2):
        found.learn(num_sequences=2, rounds=rounds, num_drafts=2 * rounds, step_ms=50 - 10 * rounds)
        assert found.draft_ms(rounds) >= 0
        assert found.base_ms(2, 4) >= found.base_ms(2, 0) * found.factor(4) / found.factor(0) * 0.999

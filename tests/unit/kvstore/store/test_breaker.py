import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.store.breaker import Breaker, BreakerState


def make(failures_max=3):
    return Breaker(failures_max=failures_max, backoff_seconds=1.0, backoff_seconds_max=8.0)


def fail(breaker, *times):
    return [breaker.failed(now, now) for now in times]


def test_it_opens_at_the_last_failure_in_a_row():
    breaker = make()
    assert fail(breaker, 1.0, 2.0) == [False, False]
    assert breaker.is_closed
    assert fail(breaker, 3.0) == [True]
    assert breaker.state is BreakerState.OPEN
    assert breaker.probe_at == 4.0


def test_what_works_in_between_begins_the_count_anew():
    breaker = make()
    fail(breaker, 1.0, 2.0)
    breaker.worked(2.5)
    assert fail(breaker, 3.0, 4.0) == [False, False]
    assert breaker.is_closed


def test_failures_of_one_moment_are_one():
    breaker = make()
    assert [breaker.failed(began=0.0, now=1.0 + number / 1000) for number in range(100)] == [False] * 100
    assert breaker.is_closed


def test_a_failure_that_began_before_something_worked_is_none():
    breaker = make(failures_max=1)
    breaker.worked(5.0)
    assert not breaker.failed(began=4.0, now=6.0)
    assert breaker.failed(began=5.5, now=6.5)


def test_a_probe_that_ends_well_closes_it_and_one_that_does_not_doubles_the_wait():
    breaker = make()
    fail(breaker, 0.0, 0.1, 0.2)
    waits = []
    for _ in range(6):
        now = breaker.probe_at
        breaker.begin_probe(now)
        assert breaker.state is BreakerState.HALF_OPEN
        breaker.probe_ended(now, is_well=False)
        waits.append(breaker.probe_at - now)
    assert waits == pytest.approx([2.0, 4.0, 8.0, 8.0, 8.0, 8.0])
    breaker.begin_probe(breaker.probe_at)
    breaker.probe_ended(100.0, is_well=True)
    assert breaker.is_closed


def test_a_server_that_answers_probes_only_is_asked_ever_less_often():
    breaker = make()
    fail(breaker, 0.0, 0.1, 0.2)
    waits = []
    for _ in range(5):
        now = breaker.probe_at
        breaker.begin_probe(now)
        breaker.probe_ended(now, is_well=True)
        assert fail(breaker, now + 0.01) == [True], "the first failure after a probe is enough"
        waits.append(round(breaker.probe_at - now, 2))
    assert waits == [2.01, 4.01, 8.01, 8.01, 8.01]


def test_real_work_after_a_probe_forgets_the_past():
    breaker = make()
    fail(breaker, 0.0, 0.1, 0.2)
    breaker.begin_probe(breaker.probe_at)
    breaker.probe_ended(2.0, is_well=True)
    breaker.worked(2.1)
    assert fail(breaker, 3.0, 4.0, 5.0) == [False, False, True]
    assert breaker.probe_at == 6.0


@pytest.mark.parametrize("call", [lambda b: b.begin_probe(0.0), lambda b: b.probe_ended(0.0, is_well=True)])
def test_a_probe_out_of_turn_is_a_broken_invariant(call):
    with pytest.raises(AssertionError):
        call(make())


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens: a lost server is found again, a well one is not given up, waits stay within their bounds."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.breaker = make()
        self.failures = 0  # upper bound of those in a row

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def work(self):
        self.breaker.worked(self.now)
        if self.breaker.is_closed:
            self.failures = 0

    @rule(age=st.floats(0, 5))
    def fail(self, age):
        was_closed = self.breaker.is_closed
        self.failures += 1
        if self.breaker.failed(self.now - age, self.now):
            assert was_closed
            assert self.failures >= 3
            self.failures = 2  # until something works, one more is enough

    @precondition(lambda self: self.breaker.state is BreakerState.OPEN)
    @rule(is_well=st.booleans())
    def probe(self, is_well):
        self.now = max(self.now, self.breaker.probe_at)
        self.breaker.begin_probe(self.now)
        self.breaker.probe_ended(self.now, is_well=is_well)
        assert self.breaker.is_closed == is_well

    @invariant()
    def next_probe_is_near_or_not_needed(self):
        if self.breaker.state is BreakerState.OPEN:
            assert self.breaker.probe_at <= self.now + 8.0
        else:
            assert self.breaker.probe_at == float("inf") or self.breaker.is_closed


TestAnyHistory = AnyHistory.TestCase

"""The price of reading kept state beside computing it: its shape, its break-even, and how it is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rorqual.performance.sources import (
    PROBE_SECONDS,
    SAMPLES_MIN,
    MeasuredSpeed,
    SourceSpeed,
    break_even_tokens,
    is_worth_reading,
    read_seconds,
)

RATES = st.floats(1e3, 1e12)
LATENCIES = st.floats(0.0, 10.0)
SIZES = st.floats(1.0, 1e12)
SPEEDS = st.builds(SourceSpeed, bytes_per_second=RATES, latency_seconds=LATENCIES)
FACTORS = st.floats(1.0, 1e3)
SAMPLES = st.lists(st.tuples(st.floats(1.0, 1e9), st.floats(1e-6, 1e3)), min_size=SAMPLES_MIN, max_size=40)


def measured(samples: list[tuple[float, float]], assumed: SourceSpeed | None = None) -> MeasuredSpeed:
    source = MeasuredSpeed(assumed or SourceSpeed(bytes_per_second=1e9, latency_seconds=0.001))
    for number, (num_bytes, seconds) in enumerate(samples):
        source.observe(num_bytes, seconds, now=float(number))
    return source


def test_a_read_takes_its_latency_and_its_bytes_and_nothing_when_there_is_nothing_to_read() -> None:
    speed = SourceSpeed(bytes_per_second=100.0, latency_seconds=2.0)
    assert speed.seconds(50.0) == 2.5
    assert speed.seconds(np.array([0.0, 100.0])).tolist() == [0.0, 3.0]
    each = read_seconds(np.array([10.0, 10.0]), latency_seconds=np.array([0, 1]), bytes_per_second=10.0)
    assert each.tolist() == [1.0, 2.0]


@given(speed=SPEEDS, faster=FACTORS, size=SIZES, tokens=st.floats(0, 1e7), each=st.floats(1e-9, 1.0))
def test_more_bandwidth_or_less_latency_never_makes_reading_less_attractive(
    speed: SourceSpeed, faster: float, size: float, tokens: float, each: float
) -> None:
    assume(is_worth_reading(size, [speed], num_tokens=tokens, seconds_per_token=each))
    for better in (
        SourceSpeed(bytes_per_second=speed.bytes_per_second * faster, latency_seconds=speed.latency_seconds),
        SourceSpeed(bytes_per_second=speed.bytes_per_second, latency_seconds=speed.latency_seconds / faster),
    ):
        assert is_worth_reading(size, [better], num_tokens=tokens, seconds_per_token=each)


@given(
    way=st.lists(SPEEDS, min_size=1, max_size=2),
    fixed=SIZES,
    each=st.floats(1.0, 1e6),
    cost=st.floats(1e-7, 1),
)
def test_the_break_even_is_where_the_decision_changes(
    way: list[SourceSpeed], fixed: float, each: float, cost: float
) -> None:
    def is_worth(tokens: float) -> bool:
        return is_worth_reading(fixed + tokens * each, way, num_tokens=tokens, seconds_per_token=cost)

    found = break_even_tokens(way, bytes_fixed=fixed, bytes_per_token=each, seconds_per_token=cost)
    if math.isinf(found):
        assert not any(is_worth(tokens) for tokens in (1.0, 1e3, 1e6))
        return
    # Where both sides are nearly parallel, rounding moves the point.
    saved = cost - sum(each / speed.bytes_per_second for speed in way)
    assume(saved > 1e-6 * cost)
    assert is_worth(found * 1.01 + 1e-9)
    assert not is_worth(found * 0.99 - 1e-9)


@given(fixed=SIZES, rate=RATES, faster=FACTORS)
def test_a_break_even_falls_with_bandwidth(fixed: float, rate: float, faster: float) -> None:
    slow, fast = (
        break_even_tokens(
            [SourceSpeed(bytes_per_second=item)],
            bytes_fixed=fixed,
            bytes_per_token=100,
            seconds_per_token=1e-4,
        )
        for item in (rate, rate * faster)
    )
    assert fast <= slow


@given(assumed=SPEEDS, samples=st.lists(st.tuples(SIZES, st.floats(1e-6, 1e3)), max_size=SAMPLES_MIN - 1))
def test_until_enough_reads_are_done_the_assumed_speed_holds(
    assumed: SourceSpeed, samples: list[tuple[float, float]]
) -> None:
    source = measured(samples, assumed)
    assert source.speed == assumed
    assert not source.is_measured


def test_latency_and_bandwidth_are_found_again_when_sizes_differ() -> None:
    true = SourceSpeed(bytes_per_second=2e8, latency_seconds=0.004)
    sizes = [1e5 * 2**power for power in (0, 5, 1, 6, 2, 4, 3)] * 5
    found = measured([(size, float(true.seconds(size))) for size in sizes]).speed
    assert found.bytes_per_second == pytest.approx(2e8, rel=0.1)
    assert found.latency_seconds == pytest.approx(0.004, rel=0.2)


def test_reads_of_one_size_are_split_as_was_assumed() -> None:
    assumed = SourceSpeed(bytes_per_second=1e6, latency_seconds=1.0)  # 2 s for a megabyte
    found = measured([(1e6, 6.0)] * 10, assumed).speed
    assert found.latency_seconds == pytest.approx(3.0)
    assert found.bytes_per_second == pytest.approx(1e6 / 3.0)


def test_newer_reads_count_more() -> None:
    source = measured([(1e6, 1.0)] * 20 + [(1e6, 0.1)] * 20)
    assert float(source.speed.seconds(1e6)) == pytest.approx(0.1, rel=2.0)
    assert float(source.speed.seconds(1e6)) < 0.25


@given(samples=SAMPLES, factor=FACTORS, size=st.floats(1.0, 1e10))
def test_reads_that_are_all_faster_never_cost_more(
    samples: list[tuple[float, float]], factor: float, size: float
) -> None:
    slow, fast = (
        measured([(num_bytes, seconds / by) for num_bytes, seconds in samples]) for by in (1.0, factor)
    )
    assert float(fast.speed.seconds(size)) <= float(slow.speed.seconds(size)) * (1 + 1e-6)


@given(samples=SAMPLES, size=st.floats(1.0, 1e10))
def test_whatever_was_measured_bytes_take_time_and_more_take_longer(
    samples: list[tuple[float, float]], size: float
) -> None:
    speed = measured(samples).speed
    assert 0 < float(speed.seconds(size)) <= float(speed.seconds(2 * size)) < math.inf


def test_nothing_is_learned_from_a_read_of_nothing() -> None:
    source = measured([(0, 1.0), (100.0, 0.0), (100.0, -1.0), (100.0, math.inf), (100.0, math.nan)] * 3)
    assert source.num_samples == 0


def test_a_source_that_is_not_worth_it_is_probed_once_in_a_while() -> None:
    source = MeasuredSpeed(SourceSpeed(bytes_per_second=1.0))
    asked = [now for now in range(int(10 * PROBE_SECONDS)) if source.probe(now=float(now))]
    assert asked == [int(PROBE_SECONDS * turn) for turn in range(1, 10)]
    assert source.num_refused == 10 * PROBE_SECONDS - 9


def test_a_source_that_was_read_from_lately_is_not_probed() -> None:
    source = MeasuredSpeed(SourceSpeed(bytes_per_second=1.0))
    source.observe(10, 10.0, now=PROBE_SECONDS - 1)
    assert not source.probe(now=PROBE_SECONDS + 1)
    assert source.probe(now=2 * PROBE_SECONDS - 1)

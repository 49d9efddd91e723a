"""The roofline model: figures known from the released models, and laws that hold for any."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.performance import (
    FLASH,
    HARDWARE,
    PRO,
    Corrections,
    Efficiency,
    PerformanceModel,
    SourceSpeed,
    model_costs,
)
from rorqual.performance.correction import RATIO_MAX

IDEAL = Efficiency(memory=1.0, arithmetic=1.0, network=1.0, step_seconds=0.0)


def a_model(devices: int = 8, hardware: str = "h200", efficiency: Efficiency = IDEAL) -> PerformanceModel:
    return PerformanceModel(
        hardware=HARDWARE[hardware], costs=model_costs(FLASH), num_devices=devices, efficiency=efficiency
    )


def test_costs_are_those_of_the_released_models() -> None:
    flash, pro = model_costs(FLASH), model_costs(PRO)
    assert flash.active_params == pytest.approx(13.3e9, rel=0.01)
    assert pro.active_params == pytest.approx(48.9e9, rel=0.01)
    assert (flash.page_bytes, flash.rebuild_tokens, flash.rebuild_pages) == (899_648, 5_589, 22)
    assert flash.expert_bytes == pytest.approx(13.4e6, rel=0.01)
    assert pro.expert_bytes == pytest.approx(35.1e6, rel=0.01)


@pytest.mark.parametrize(("context", "megabytes"), [(8192, 13), (32768, 24), (131072, 68), (1 << 20, 480)])
def test_a_decoded_token_reads_the_rows_it_can_see(context: int, megabytes: float) -> None:
    assert a_model().state_bytes_read(context) == pytest.approx(megabytes * 1e6, rel=0.02)


def test_a_long_prompt_takes_its_arithmetic() -> None:
    # Twice the active weights per token, at the FP8 peak of eight devices; attention adds a share.
    gemm = 2 * model_costs(FLASH).active_params * 8192 / (8 * HARDWARE["h200"].fp8_flops)
    assert gemm < a_model().prefill_seconds(8192) < 1.5 * gemm


def test_a_short_prompt_takes_the_reading_of_the_weights() -> None:
    costs, hardware = model_costs(FLASH), HARDWARE["h200"]
    resident = costs.resident_bytes / hardware.memory_bytes_per_second
    assert a_model().prefill_seconds(1) == pytest.approx(
        resident + 43 * 6 / 8 * costs.expert_bytes / hardware.memory_bytes_per_second
    )
    assert a_model().work_seconds(1) < resident / 10


def test_attention_is_added_up_exactly_over_positions() -> None:
    model = a_model()
    each = sum(float(model.arithmetic_seconds(at, at + 1)) for at in range(1000, 4000))
    assert model.arithmetic_seconds(1000, 4000) == pytest.approx(each, rel=1e-9)


def test_every_step_costs_its_overhead() -> None:
    slow = a_model(efficiency=dataclasses.replace(IDEAL, step_seconds=1.0))
    for tokens, steps in ((0, 0), (1, 1), (8192, 1), (8193, 2), (20_000, 3)):
        assert slow.prefill_seconds(tokens) - a_model().prefill_seconds(tokens) == pytest.approx(steps)


def test_half_the_efficiency_takes_twice_the_time() -> None:
    half = Efficiency(memory=0.5, arithmetic=0.5, network=0.5, step_seconds=0.0)
    for call in (lambda m: m.prefill_seconds(9000, 500), lambda m: m.decode_step_seconds(64, 32768)):
        assert call(a_model(efficiency=half)) == pytest.approx(2 * call(a_model()))
    assert a_model(efficiency=half).fetch_seconds(1e9) == pytest.approx(2 * a_model().fetch_seconds(1e9))


def test_all_interfaces_of_a_worker_read_at_once() -> None:
    assert a_model(8).fetch_seconds(400e9) == pytest.approx(1.0)  # 8 x 400 Gbit/s


def test_a_read_from_the_store_takes_its_latency_and_its_bytes_and_no_read_takes_nothing() -> None:
    model = dataclasses.replace(a_model(), store=SourceSpeed(bytes_per_second=1e9, latency_seconds=0.5))
    assert model.store_seconds(np.array([0.0, 1.0, 2e9])) == pytest.approx([0.0, 0.5, 2.5], abs=1e-6)


def test_a_small_batch_decodes_for_the_price_of_one_and_a_large_one_does_not() -> None:
    model = a_model()
    assert model.decode_step_seconds(2, 1000) < 1.6 * model.decode_step_seconds(1, 1000)
    assert model.decode_step_seconds(100_000, 1000) > 1.9 * model.decode_step_seconds(50_000, 1000)


def test_arrays_give_what_numbers_give() -> None:
    model = a_model()
    tokens = np.array([0.0, 1.0, 9000.0])
    together = model.prefill_seconds(tokens, 512.0)
    assert together.tolist() == [float(model.prefill_seconds(count, 512.0)) for count in tokens]


@given(st.integers(0, 200_000), st.integers(0, 200_000), st.integers(1, 5000))
def test_more_tokens_or_more_context_never_take_less_time(tokens: int, context: int, more: int) -> None:
    model = a_model()
    base = model.prefill_seconds(tokens, context)
    assert model.prefill_seconds(tokens + more, context) >= base - 1e-9
    assert model.prefill_seconds(tokens, context + more) >= base - 1e-9
    assert model.decode_step_seconds(1 + tokens, context + more) >= model.decode_step_seconds(
        1 + tokens, context
    )


def observe(corrections: Corrections, predicted: float, measured: float, *, row: int = 0) -> None:
    corrections.observe(np.array([row]), predicted=predicted, measured=np.array([measured]))


def test_a_correction_comes_to_the_measured_ratio_and_moves_nobody_elses() -> None:
    corrections = Corrections(2, weight=0.2)
    for _ in range(60):
        observe(corrections, 2.0, 3.0, row=1)
    assert corrections.factors == pytest.approx([1.0, 1.5], rel=1e-3)
    corrections.grow(3)
    assert corrections.factors == pytest.approx([1.0, 1.5, 1.0], rel=1e-3)
    corrections.forget(np.array([1]))
    assert corrections.factors.tolist() == [1.0, 1.0, 1.0]


@given(st.lists(st.floats(0.2, 5.0), min_size=1, max_size=10))
def test_a_correction_is_at_first_the_mean_of_what_was_measured(ratios: list[float]) -> None:
    corrections = Corrections(1)
    for ratio in ratios:
        observe(corrections, 2.0, 2.0 * ratio)
    assert corrections.factors[0] == pytest.approx(sum(ratios) / len(ratios))


@given(st.lists(st.tuples(st.floats(-1, 1e9), st.floats(-1, 1e9))))
def test_a_correction_stays_within_its_bounds(pairs: list[tuple[float, float]]) -> None:
    corrections = Corrections(1)
    for predicted, measured in pairs:
        observe(corrections, predicted, measured)
        assert 1 / RATIO_MAX <= corrections.factors[0] <= RATIO_MAX


def test_nothing_is_learned_from_what_was_not_measured() -> None:
    corrections = Corrections(1)
    observe(corrections, 0.0, 1.0)
    observe(corrections, 1.0, 0.0)
    assert corrections.factors[0] == 1.0

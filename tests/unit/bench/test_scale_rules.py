"""Rules that `rorqual bench scale` races, against cases worked out by hand, and what is said of a race."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest

from autoscaler.observation import Observation, PoolState, Traffic, WorkerState
from bench.scale import report
from bench.scale.race import Figures, Order, Series, count_flaps, hidden_factors
from bench.scale.rules import ENTRANTS, DynamoLoad, DynamoSla, HorizontalPodAutoscaler, RuleConfig
from bench.scale.world import Sums
from rorqual.performance import FLASH, HARDWARE, PerformanceModel, model_costs
from rorqual.session import Load, Role

MODEL = PerformanceModel(hardware=HARDWARE["h200"], costs=model_costs(FLASH), num_devices=8)
CONFIG = RuleConfig(model=MODEL, hardware="h200", model_name="flash", slots=256)
QUIET = Sums(
    num_arrived=0,
    num_prompts=0,
    prompt_tokens=0.0,
    cached_tokens=0.0,
    ttft_seconds=0.0,
    num_streams=0,
    output_tokens=0.0,
    itl_seconds=0.0,
    num_itl=0,
    prefill_busy=0.0,
    prefill_queued=0,
    decode_used=0.0,
    num_retried=0,
)


def pool(role: Role, wanted: int, *, ready: int | None = None, running: int = 0) -> PoolState:
    load = Load(
        sequences_running=running,
        sequences_waiting=0,
        tokens_waiting=0,
        pages_free=0,
        pages_total=0,
        slots_free=0,
        slots_total=256,
        step_ms=0.0,
    )
    there = wanted if ready is None else ready
    workers = tuple(WorkerState(address=f"{role.value}-{number}", load=load) for number in range(there))
    return PoolState(
        role=role, replicas_wanted=wanted, workers=workers, starting_seconds=(1.0,) * (wanted - there)
    )


def look(
    seconds: float,
    prefill: int,
    decode: int,
    *,
    ready: int | None = None,
    running: int = 0,
) -> Observation:
    pools = {
        "prefill": pool(Role.PREFILL, prefill, ready=ready),
        "decode": pool(Role.DECODE, decode, running=running),
    }
    return Observation(seconds=seconds, interval_seconds=15.0, pools=pools, traffic=Traffic())


def test_utilisation_over_its_target_asks_for_the_ratio_of_both() -> None:
    rule = HorizontalPodAutoscaler(0.5, CONFIG)
    sums = replace(QUIET, prefill_busy=0.9, decode_used=0.54)
    # 4 x 0.9 / 0.5 = 7.2; 0.54 / 0.5 = 1.08 is within the tolerance.
    assert rule.decide(look(15.0, 4, 6), sums) == {"prefill": 8, "decode": 6}


def test_utilisation_brings_no_more_than_twice_as_many_or_four_at_once() -> None:
    rule = HorizontalPodAutoscaler(0.1, CONFIG)
    sums = replace(QUIET, prefill_busy=1.0, decode_used=1.0)
    assert rule.decide(look(15.0, 1, 10), sums) == {"prefill": 5, "decode": 20}


def test_utilisation_takes_away_what_no_look_of_five_minutes_has_asked_for() -> None:
    rule = HorizontalPodAutoscaler(0.5, CONFIG)
    idle = replace(QUIET, prefill_busy=0.25, decode_used=0.5)
    assert rule.decide(look(0.0, 8, 4), replace(idle, prefill_busy=0.5))["prefill"] == 8
    for seconds in range(15, 301, 15):
        assert rule.decide(look(float(seconds), 8, 4), idle)["prefill"] == 8
    assert rule.decide(look(315.0, 8, 4), idle)["prefill"] == 4


def test_pods_that_are_not_ready_count_as_using_nothing_when_more_are_asked_for() -> None:
    rule = HorizontalPodAutoscaler(0.5, CONFIG)
    # 3 ready at 0.9 of 6 wanted: 1.8 x 3 / 6 = 0.9 turns the other way, so nothing changes.
    assert rule.desired(6, 3, 0.9) == 6
    # 5 ready of 6: 1.8 x 5 / 6 = 1.5, of 6 are 9.
    assert rule.desired(6, 5, 0.9) == 9
    assert rule.desired(6, 0, 0.0) == 6


def test_dynamo_sla_sizes_prefill_by_tokens_and_the_smaller_of_one_and_its_correction() -> None:
    rule = DynamoSla(CONFIG, interval_seconds=60.0)
    each = float(MODEL.prefill_seconds(6000.0, 2000.0))
    for p, factor in ((3.0, 1.0), (0.5, 0.5)):
        found = rule.replicas(6000.0, prompt=8000.0, cached=2000.0, output=100.0, p=p, d=1.0)
        assert found["prefill"] == math.ceil(6000 * each / 60 * factor)
    assert math.ceil(6000 * each / 60) > math.ceil(6000 * each / 120)


def test_dynamo_sla_sizes_decode_by_its_best_batch_within_the_corrected_objective() -> None:
    tight = replace(CONFIG, itl_seconds=0.0085)
    rule = DynamoSla(tight, interval_seconds=60.0)
    batches = np.arange(1.0, 257.0)
    steps = MODEL.decode_step_seconds(batches, np.full(256, 8050.0))
    answers: list[int] = []
    for d in (1.0, 1.3):
        best = max(
            float(batch / step) for batch, step in zip(batches, steps, strict=True) if step <= 0.0085 / d
        )
        found = rule.replicas(3000.0, prompt=8000.0, cached=0.0, output=100.0, p=1.0, d=d)["decode"]
        assert found == math.ceil(3000 * 100 / 60 / best)
        answers.append(found)
    assert answers[0] < answers[1]


def test_dynamo_sla_reads_its_corrections_from_what_was_seen() -> None:
    rule = DynamoSla(CONFIG, interval_seconds=60.0)
    step = float(MODEL.decode_step_seconds(100.0, 8050.0))
    ttft = float(MODEL.prefill_seconds(6000.0, 2000.0))
    sums = replace(
        QUIET,
        num_arrived=6000,
        num_prompts=5000,
        prompt_tokens=5000 * 8000.0,
        cached_tokens=5000 * 2000.0,
        ttft_seconds=5000 * ttft * 0.6,
        num_streams=4000,
        output_tokens=4000 * 100.0,
        itl_seconds=4000 * step,
        num_itl=4000,
    )
    expected = rule.replicas(6000.0, prompt=8000.0, cached=2000.0, output=100.0, p=0.6, d=1.0)
    assert rule.decide(look(60.0, 9, 9, running=100), sums) == expected
    assert rule.decide(look(60.0, 9, 9), QUIET) == {"prefill": 9, "decode": 9}


def test_dynamo_sla_with_a_line_sees_the_next_interval_of_a_rise() -> None:
    rule = DynamoSla(CONFIG, interval_seconds=60.0, window=5)
    asked: list[int] = []
    for count in (1000, 2000, 3000, 4000, 5000):
        sums = replace(
            QUIET,
            num_arrived=count,
            num_prompts=count,
            prompt_tokens=count * 8000.0,
            ttft_seconds=count * 1.0,
            num_streams=count,
            output_tokens=count * 100.0,
            itl_seconds=count * 0.01,
            num_itl=count,
        )
        asked.append(rule.decide(look(60.0, 1, 1, running=50), sums)["prefill"])
    expected = DynamoSla(CONFIG, interval_seconds=60.0).replicas(
        6000.0, prompt=8000.0, cached=0.0, output=100.0, p=1.0, d=1.0
    )
    assert asked[-1] == expected["prefill"]


def test_dynamo_load_moves_by_one_at_its_thresholds_and_not_while_a_start_is_under_way() -> None:
    rule = DynamoLoad(CONFIG)
    crowded = replace(QUIET, prefill_queued=3, decode_used=0.95)
    assert rule.decide(look(10.0, 4, 4), crowded) == {"prefill": 5, "decode": 5}
    assert rule.decide(look(20.0, 5, 5, ready=4), crowded) == {"prefill": 5, "decode": 5}
    calm = replace(QUIET, prefill_queued=1, decode_used=0.7)
    assert rule.decide(look(30.0, 4, 4), calm) == {"prefill": 4, "decode": 4}


def test_dynamo_load_spares_decode_for_a_while_after_it_has_grown() -> None:
    rule = DynamoLoad(CONFIG)
    assert rule.decide(look(10.0, 4, 4), replace(QUIET, decode_used=0.95))["decode"] == 5
    idle = replace(QUIET, decode_used=0.1)
    answers = [rule.decide(look(10.0 * time, 4, 5), idle)["decode"] for time in range(2, 6)]
    assert answers == [5, 5, 4, 4]
    assert rule.decide(look(60.0, 1, 1), idle) == {"prefill": 1, "decode": 1}


def test_a_flap_is_a_reversal_soon_after_without_a_change_of_load() -> None:
    up, down = Order(100.0, 2, 5.0), Order(400.0, -1, 5.2)
    assert count_flaps([up, down]) == 1
    assert count_flaps([up, replace(down, seconds=701.0)]) == 0
    assert count_flaps([up, replace(down, load=4.2)]) == 0
    assert count_flaps([up, replace(down, change=1)]) == 0
    assert count_flaps([up, down, replace(up, seconds=500.0)]) == 2
    assert count_flaps([]) == 0


def test_hidden_factors_are_of_the_seed_and_stay_within_their_bounds() -> None:
    drawn = [hidden_factors(seed) for seed in range(50)]
    assert drawn[1] == hidden_factors(1)
    assert len(set(drawn)) == 50
    assert 0.8 <= min(map(min, drawn)) < 0.85
    assert 1.2 < max(map(max, drawn)) <= 1.25


def figures(attainment: float, gpu_hours: float, *, flaps: int = 0) -> Figures:
    return Figures(
        attainment=attainment,
        gpu_hours=gpu_hours,
        flaps=flaps,
        ttft_p90=0.1,
        itl_p90=0.01,
        backlog_max=1,
        num_requests=10,
        num_lost=0,
        num_retried=0,
        num_changes=0,
        prefill_mean=1.0,
        decode_mean=1.0,
        series=Series(seconds=[60.0], load=[1.0], replicas={"prefill": [1], "decode": [1]}),
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ((0.999, 90.0), "beaten on both by hpa-50; no cheaper than hpa-50"),
        ((0.985, 90.0), "beaten on both by none; no cheaper than hpa-50"),
        ((0.985, 125.0), "beaten on both by none; 20 % cheaper than the cheapest of 1 within a point"),
        ((0.97, 90.0), "beaten on both by none; no rule comes within a point of it"),
    ],
)
def test_verdicts_say_who_beats_ours_and_who_is_cheaper(other: tuple[float, float], words: str) -> None:
    results = {
        "constant": {
            "rorqual": [figures(0.99, 99.0), figures(0.99, 101.0, flaps=1)],
            "hpa-50": [figures(*other)] * 2,
            "static": [figures(1.0, 1.0)] * 2,
        }
    }
    found = report.rows(results)["constant"]
    lines = report.verdicts("constant", found)
    assert lines == [f"constant: rorqual: {words}", "constant: rorqual: 0.5 flaps (most in a seed 1)"]
    assert "99-   101" in report.table("constant", found)
    content = report.as_json(results)["constant"]["rorqual"]
    assert content["over_seeds"]["gpu_hours"] == {"mean": 100.0, "low": 99.0, "high": 101.0}
    assert [run["flaps"] for run in content["runs"]] == [0, 1]


def test_every_entrant_is_named_as_it_is_called() -> None:
    assert all(name == entrant.name and entrant.summary for name, entrant in ENTRANTS.items())
    for name in ENTRANTS:
        assert ENTRANTS[name].make(CONFIG).interval_seconds % 5 == 0
    assert dataclasses.is_dataclass(CONFIG)

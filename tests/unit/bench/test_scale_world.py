"""The simulated fleet of `rorqual bench scale`: nothing is lost on the way, runs repeat themselves, hours add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.scale import steps, workloads
from bench.scale.workloads import Workload
from bench.scale.world import World, WorldConfig
from rorqual.performance import FLASH, HARDWARE, PerformanceModel, model_costs

pytestmark = pytest.mark.slow  # the events are compiled when the first test asks for them

MODEL = PerformanceModel(hardware=HARDWARE["h200"], costs=model_costs(FLASH), num_devices=8)
CONFIG = WorldConfig(model=MODEL, failures_per_hour=0.0, replicas_max=8, start_seconds=100.0)


def workload_of(rows: list[tuple[float, float, float, float]], seconds: float = 600.0) -> Workload:
    """Of (arrival, prompt, cached, output)."""
    arrive, prompt, cached, output = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return Workload(
        name="rows", seconds=seconds, arrive_N=arrive, prompt_N=prompt, cached_N=cached, output_N=output
    )


def busy_load(seed: int = 3, *, per_second: float = 20.0, seconds: float = 600.0) -> Workload:
    random = np.random.default_rng(seed)
    count = int(per_second * seconds)
    at = np.sort(random.uniform(0, seconds, count))
    prompt = random.integers(100, 30_000, count)
    return workload_of(
        [
            (float(time), float(tokens), float(tokens // 2), float(random.integers(1, 900)))
            for time, tokens in zip(at, prompt, strict=True)
        ],
        seconds,
    )


def run_out(world: World, *, until: float = 4000.0) -> None:
    while not world.is_done and world.now < until:
        world.advance(world.now + 10.0)


def outcome(world: World) -> tuple[bytes, bytes, int]:
    return world.state.first_N.tobytes(), world.state.end_N.tobytes(), world.num_retried


def test_a_request_alone_takes_what_the_model_says() -> None:
    world = World(workload_of([(5.0, 8000.0, 2000.0, 101.0)]), CONFIG)
    world.begin({"prefill": 1, "decode": 1})
    world.advance(60.0)
    prefill = float(MODEL.prefill_seconds(6000.0, 2000.0))
    assert world.state.first_N[0] - 5.0 == pytest.approx(prefill, rel=1e-6)
    step = float(MODEL.decode_step_seconds(1.0, 8001.0))
    assert world.state.end_N[0] - world.state.first_N[0] == pytest.approx(100 * step, rel=1e-3)


def test_prompts_of_one_worker_are_computed_in_the_order_they_came_in_shared_steps() -> None:
    world = World(workload_of([(1.0, 500.0, 0.0, 1.0)] * 5), CONFIG)
    world.begin({"prefill": 1, "decode": 1})
    world.advance(10.0)
    alone, together = float(MODEL.prefill_seconds(500.0)), float(MODEL.prefill_seconds(2000.0))
    assert world.state.first_N[0] - 1.0 == pytest.approx(alone, rel=1e-4)
    assert world.state.first_N[1:] - 1.0 == pytest.approx([alone + together] * 4, rel=1e-2)


def test_streams_of_one_worker_slow_each_other_down() -> None:
    rows = [(1.0, 300.0, 0.0, 1000.0)] * 64
    world = World(workload_of(rows), CONFIG)
    world.begin({"prefill": 1, "decode": 1})
    world.advance(100.0)
    took = world.state.end_N - world.state.first_N
    full = float(MODEL.decode_step_seconds(64.0, 800.0))
    assert float(np.median(took)) == pytest.approx(999 * full, rel=0.05)
    assert full > 1.5 * float(MODEL.decode_step_seconds(1.0, 800.0))


def test_hidden_factors_slow_what_they_are_of() -> None:
    slow = replace(CONFIG, prefill_factor=1.2, decode_factor=1.1)
    load = workload_of([(5.0, 8000.0, 2000.0, 101.0)])
    plain, slowed = World(load, CONFIG), World(load, slow)
    for world in (plain, slowed):
        world.begin({"prefill": 1, "decode": 1})
        world.advance(60.0)
    ttft = [float(world.state.first_N[0]) - 5.0 for world in (plain, slowed)]
    stream = [float(world.state.end_N[0] - world.state.first_N[0]) for world in (plain, slowed)]
    assert ttft[1] / ttft[0] == pytest.approx(1.2)
    assert stream[1] / stream[0] == pytest.approx(1.1)


@pytest.mark.parametrize("failures", [0.0, 20.0])
def test_all_that_arrived_has_ended_or_was_lost_and_nothing_stays_charged(failures: float) -> None:
    load = busy_load()
    world = World(load, replace(CONFIG, failures_per_hour=failures, slots=64))
    world.begin({"prefill": 2, "decode": 2})
    for count in (1, 3, 1, 2):
        world.advance(world.now + 150.0)
        world.set_replicas("decode", count)
        world.set_replicas("prefill", count)
    run_out(world)
    s = world.state
    ended, lost = int(s.counts[steps.NUM_ENDED]), int(s.counts[steps.NUM_LOST])
    assert world.is_done
    assert ended + lost == len(load)
    assert int(np.count_nonzero(~np.isnan(s.end_N))) == ended
    assert (world.num_died > 0) == (failures > 0)
    assert (world.num_retried > 0) == (failures > 0)
    for left in (s.d_charged_W, s.d_pages_W, s.d_running_W, s.p_queued_W):
        assert not left.any()
    assert s.p_seconds_W == pytest.approx(np.zeros_like(s.p_seconds_W), abs=1e-9)
    has_end = ~np.isnan(s.end_N)
    assert (s.end_N[has_end] >= s.first_N[has_end]).all()
    assert (s.first_N[has_end] > load.arrive_N[has_end]).all()


def test_a_run_repeats_itself_by_its_seed() -> None:
    def ran(seed: int) -> tuple[bytes, bytes, int]:
        world = World(busy_load(), replace(CONFIG, failures_per_hour=20.0, seed=seed))
        world.begin({"prefill": 2, "decode": 3})
        run_out(world)
        return outcome(world)

    assert ran(1) == ran(1)
    assert ran(1) != ran(2)


def test_a_constant_fleet_costs_its_replicas_times_the_time() -> None:
    world = World(busy_load(), CONFIG)
    world.begin({"prefill": 2, "decode": 3})
    world.advance(600.0)
    assert world.pools["prefill"].replica_seconds(600.0) == 1200.0
    assert world.pools["decode"].replica_seconds(600.0) == 1800.0


def test_a_replica_costs_from_its_order_and_serves_after_its_start() -> None:
    world = World(busy_load(), CONFIG)
    world.begin({"prefill": 1, "decode": 1})
    world.advance(50.0)
    world.set_replicas("prefill", 2)
    world.advance(140.0)
    (starting,) = world.look()[0].pools["prefill"].starting_seconds
    assert starting == 90.0
    world.advance(160.0)
    pool = world.look()[0].pools["prefill"]
    assert (len(pool.workers), pool.starting_seconds) == (2, ())
    assert world.pools["prefill"].replica_seconds(160.0) == 160.0 + 110.0


def test_a_worker_taken_away_ends_its_streams_first_and_costs_until_then() -> None:
    rows = [(1.0, 300.0, 0.0, 3000.0)] * 2
    world = World(workload_of(rows), CONFIG)
    world.begin({"prefill": 1, "decode": 2})
    world.advance(2.0)
    world.set_replicas("decode", 1)
    world.advance(3.0)
    drains = [item.is_draining for item in world.look()[0].pools["decode"].workers]
    assert sorted(drains) == [False, True]
    world.advance(60.0)
    assert len(world.look()[0].pools["decode"].workers) == 1
    end = float(world.state.end_N.max())
    assert 5.0 < end < 60.0
    assert world.pools["decode"].replica_seconds(60.0) == pytest.approx(60.0 + end, abs=0.1)


def test_an_idle_worker_taken_away_costs_until_it_was_taken() -> None:
    world = World(workload_of([(590.0, 300.0, 0.0, 2.0)]), CONFIG)
    world.begin({"prefill": 2, "decode": 1})
    world.advance(100.0)
    world.set_replicas("prefill", 1)
    world.advance(200.0)
    assert world.pools["prefill"].replica_seconds(200.0) == 300.0


def test_starts_wait_for_credit_and_are_lost_when_none_comes() -> None:
    rows = [(1.0, 300.0, 0.0, 100_000.0), (1.5, 300.0, 0.0, 10.0)]
    world = World(workload_of(rows), replace(CONFIG, slots=1))
    world.begin({"prefill": 1, "decode": 1})
    world.advance(50.0)
    traffic = world.look()[0].traffic
    assert (traffic.num_prompts, traffic.num_waiting, traffic.num_unserved) == (1, 1, 0)
    world.advance(70.0)
    traffic = world.look()[0].traffic
    assert (traffic.num_waiting, traffic.num_unserved) == (0, 1)


def test_pages_bound_a_decode_worker_as_slots_do() -> None:
    rows = [(1.0, 25_500.0, 0.0, 50.0)] * 2  # 100 pages each
    world = World(workload_of(rows), replace(CONFIG, pages=150))
    world.begin({"prefill": 1, "decode": 1})
    world.advance(30.0)
    assert world.state.first_N[1] > world.state.end_N[0]


def test_a_look_counts_what_came_since_the_last_one() -> None:
    load = busy_load()
    world = World(load, CONFIG)
    world.begin({"prefill": 2, "decode": 2})
    seen = streams = arrived = 0
    while not world.is_done:
        world.advance(world.now + 30.0)
        observation, sums = world.look()
        seen += observation.traffic.num_prompts
        streams += observation.traffic.num_streams
        arrived += sums.num_arrived
        assert len(observation.traffic.prompts) <= observation.traffic.num_prompts
        assert 0 <= sums.prefill_busy <= 1
    assert seen == streams == arrived == len(load)


@pytest.mark.parametrize("name", workloads.NAMES)
def test_made_loads_come_in_order_and_repeat_themselves(name: str) -> None:
    load = workloads.made(name, model=MODEL, peak_workers=0.3, seed=2)
    again = workloads.made(name, model=MODEL, peak_workers=0.3, seed=2)
    other = workloads.made(name, model=MODEL, peak_workers=0.3, seed=3)
    assert (np.diff(load.arrive_N) >= 0).all()
    assert 0 <= load.arrive_N[0] <= load.arrive_N[-1] <= load.seconds
    assert (load.cached_N <= load.prompt_N - 1).all()
    assert (load.output_N >= 1).all()
    assert np.array_equal(load.arrive_N, again.arrive_N)
    assert not np.array_equal(load.arrive_N, other.arrive_N)


def test_a_trace_is_stretched_to_two_hours_and_brought_to_its_peak() -> None:
    load = workloads.from_trace("synthetic:400", model=MODEL, peak_workers=1.0, seed=1)
    assert 7200 <= load.seconds < 7300
    work = MODEL.work_seconds(load.prompt_N - load.cached_N, load.cached_N)
    busiest = max(
        float(work[(load.arrive_N >= begin) & (load.arrive_N < begin + 300)].sum()) / 300
        for begin in np.arange(0.0, load.seconds, 300.0)
    )
    assert busiest == pytest.approx(1.0, rel=0.2)

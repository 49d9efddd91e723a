"""What a worker measures of its sources and of its computing, and what it then reads or computes."""

from __future__ import annotations

import pytest
from fake_state import PAGE_TOKENS, answer

from engine.plan import Copies, PageCopy, RecordCopy, Segment, StepPlan, StepResult
from engine.worker.events import SequenceKey
from engine.worker.metrics import WorkerMetrics
from engine.worker.tiers.speeds import Speeds, SpeedsConfig
from kvstore.keys import PageKey
from rorqual.performance.sources import PROBE_SECONDS, SAMPLES_MIN
from tests.harness.benches import Bench, a_cache, a_host_tier, a_prompt

PAGE_BYTES = 1000
COPIES = Copies(
    pages=(PageCopy(page=1, host_page=2), PageCopy(page=3, host_page=4)),
    records=(RecordCopy(record=1, host_record=2, num_bytes=500),),
)


def a_plan(*counts: int, demote: Copies | None = None, promote: Copies | None = None) -> StepPlan:
    segments = [
        Segment(slot=slot, start=0, count=count, pages=(), sample=True) for slot, count in enumerate(counts)
    ]
    return StepPlan(
        number=1,
        closes=(),
        opens=(),
        segments=tuple(segments),
        demote=demote or Copies(),
        promote=promote or Copies(),
    )


def a_result(step_ms: float, copy_ms: float = 0.0) -> StepResult:
    return StepResult(number=1, sampled=(), prompt_scores=(), step_ms=step_ms, copy_ms=copy_ms)


def step(speeds: Speeds, plan: StepPlan, result: StepResult) -> None:
    speeds.planned(plan, page_bytes=PAGE_BYTES)
    speeds.landed(result)


def test_computing_is_measured_without_copies_and_without_decodes() -> None:
    speeds = Speeds(SpeedsConfig(tokens_per_second=500.0))
    assert speeds.prefill_tokens_per_second == 0
    assert speeds.compute_seconds(1000) == 2.0
    step(speeds, a_plan(1, 512, 1, 488, promote=COPIES), a_result(step_ms=300, copy_ms=50))
    assert speeds.prefill_tokens_per_second == pytest.approx(4000)
    assert speeds.compute_seconds(1000) == pytest.approx(0.25)


def test_copies_are_measured_by_plans_that_bring_something_back() -> None:
    speeds = Speeds(SpeedsConfig())
    for _ in range(2 * SAMPLES_MIN):
        step(speeds, a_plan(1), a_result(step_ms=9))
        step(speeds, a_plan(1, demote=COPIES), a_result(step_ms=9, copy_ms=5))
    assert speeds.host.num_samples == 0
    for _ in range(2 * SAMPLES_MIN):
        step(speeds, a_plan(1, demote=COPIES, promote=COPIES), a_result(step_ms=9, copy_ms=5))
    assert speeds.host.num_samples == 2 * SAMPLES_MIN
    assert float(speeds.host.speed.seconds(2 * (2 * PAGE_BYTES + 500))) == pytest.approx(0.005)


def test_routers_are_told_of_peers_while_it_was_measured_lately() -> None:
    speeds = Speeds(SpeedsConfig())
    speeds.turned(100.0)
    assert speeds.told(speeds.peer) is None
    for _ in range(SAMPLES_MIN):
        speeds.observe(speeds.peer, 1e6, 0.5)
    assert speeds.told(speeds.peer) == speeds.peer.speed
    speeds.turned(100.0 + PROBE_SECONDS - 1)
    assert speeds.told(speeds.peer) is not None
    speeds.turned(100.0 + PROBE_SECONDS)
    assert speeds.told(speeds.peer) is None  # so that somebody tries


def test_what_is_measured_is_exported() -> None:
    metrics, speeds = WorkerMetrics(), Speeds(SpeedsConfig(tokens_per_second=100.0))
    metrics.watch_speeds(speeds, page_bytes=PAGE_TOKENS * 10, tail_bytes=5000)
    for _ in range(SAMPLES_MIN):
        speeds.observe(speeds.store, 1e4, 10.0)

    def value(name: str, source: str) -> float | None:
        return metrics.registry.get_sample_value(f"rorqual_worker_source_{name}", {"source": source})

    assert value("bytes_per_second", "host") == speeds.host.assumed.bytes_per_second
    assert value("reads_measured", "store") == SAMPLES_MIN
    assert value("latency_seconds", "store") == speeds.store.speed.latency_seconds > 0
    # 0.01 s of a token against 10 bytes of one at less than 1e5 B/s, and a tail.
    assert 0 < value("break_even_tokens", "host") < 1 < value("break_even_tokens", "store")
    assert value("reads_refused", "store") == 0


def tiered(**options) -> Bench:
    return Bench(
        **{"num_pages": 8, "num_records": 4, "cache": a_cache(), "host_tier": a_host_tier(), **options}
    )


def computed(bench: Bench, key: int, prompt: list[int]) -> int:
    before = bench.rank.num_tokens_computed
    params = bench.open(key, prompt, 1, ignore_eos=True)
    bench.run()
    assert bench.tokens(key) == answer(prompt, 1, params, ignore_eos=True)
    return bench.rank.num_tokens_computed - before


def test_host_memory_found_slow_is_left_alone_and_tried_again_after_a_while() -> None:
    bench = tiered()
    speeds, prompt = bench.scheduler.speeds, a_prompt(1, 3 * PAGE_TOKENS)
    computed(bench, 1, prompt)
    computed(bench, 2, a_prompt(2, 8 * PAGE_TOKENS - 1))  # pushes it out
    for _ in range(SAMPLES_MIN):
        speeds.observe(speeds.host, 1000, 1000.0)
    assert computed(bench, 3, [*prompt, 4]) == len(prompt) + 1
    assert speeds.host.num_refused == 1
    computed(bench, 4, a_prompt(4, 8 * PAGE_TOKENS - 1))
    speeds.turned(PROBE_SECONDS)
    assert computed(bench, 5, [*prompt, 4]) == 1
    computed(bench, 6, a_prompt(6, 8 * PAGE_TOKENS - 1))
    assert computed(bench, 7, [*prompt, 4]) == len(prompt) + 1


def a_lack(bench: Bench, key: int, num_pages: int):
    bench.open(key, a_prompt(key, num_pages * PAGE_TOKENS + 9), 1)
    assert bench.scheduler.filling is not None
    return bench.scheduler.filling.lack(SequenceKey(key))


def test_a_slow_store_is_not_asked_for_short_prompts_and_probed_now_and_then() -> None:
    """1,000 tokens a second: a page is a quarter of a second of computing."""
    bench = tiered(num_pages=64)
    speeds = bench.scheduler.speeds
    assert a_lack(bench, 1, 1) is not None
    for size in (1e4, 1e5, 1e4):
        speeds.observe(speeds.store, size, 2.0)  # whatever is read
    assert speeds.store.speed.latency_seconds > 1
    assert a_lack(bench, 2, 1) is None
    long = a_lack(bench, 3, 32)
    assert long is not None
    assert not long.is_probe
    speeds.turned(PROBE_SECONDS)
    probe = a_lack(bench, 4, 1)
    assert probe is not None
    assert probe.is_probe
    assert a_lack(bench, 5, 1) is None
    assert speeds.store.num_refused == 2


def test_a_part_that_is_not_worth_reading_is_left_in_the_store() -> None:
    bench = tiered(num_pages=64)
    speeds, filling = bench.scheduler.speeds, bench.scheduler.filling
    assert filling is not None
    for size in (1e4, 1e5, 1e4):
        speeds.observe(speeds.store, size, 2.0)
    lack = a_lack(bench, 1, 32)
    assert lack is not None

    def wished(num_pages: int) -> int:
        pages: set[PageKey] = set(lack.keys[:num_pages])
        wish = filling.wish(SequenceKey(1), lack, pages=pages, tails={lack.keys[num_pages - 1]})
        return 0 if wish is None else len(wish.pages)

    assert [wished(count) for count in (1, 4, 16, 32)] == [0, 0, 16, 32]

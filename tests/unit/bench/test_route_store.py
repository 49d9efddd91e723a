"""The store that all simulated workers share: what it keeps, what reading it is worth, and what the race says of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.route import trace
from bench.route.fleet import Simulation
from bench.route.picture import ExactPicture
from bench.route.store import (
    STAGED_SECONDS_MAX,
    SharedStore,
    StoreConfig,
    StoreLink,
    StoreWrite,
    lru_hit_rate,
    page_item,
    tail_item,
)
from bench.route.worker import Job, StoreRead, Worker, WorkerConfig
from kvstore.keys import PageKey
from rorqual import cli
from rorqual.ids import PageId
from rorqual.performance import STORE_SPEED, SourceSpeed
from tests.unit.bench.races import CONFIG, MODEL, requests_of, run

PAGE_BYTES = MODEL.costs.page_bytes
SMALL = dataclasses.replace(CONFIG, budget_bytes=250 * PAGE_BYTES)
"""Workers that keep one of the longest prompts, and little of what they will be asked for again."""


def key(number: int) -> PageKey:
    return PageKey(number.to_bytes(16, "little"))


def with_store(
    num_pages: int,
    config: WorkerConfig = SMALL,
    *,
    write: StoreWrite = StoreWrite.PROMPT_END,
    speed: SourceSpeed | None = None,
) -> WorkerConfig:
    store = StoreConfig(budget_bytes=num_pages * PAGE_BYTES, write=write)
    model = dataclasses.replace(config.model, store=speed or STORE_SPEED)
    return dataclasses.replace(config, store=store, model=model)


def num_reused(simulation: Simulation) -> int:
    return sum(item.num_reused for item in simulation.outcomes)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=6))),
    st.integers(1, 20),
)
def test_the_store_keeps_what_was_used_last_and_never_more_than_its_budget(
    calls: list[tuple[bool, list[tuple[int, bool]]]], num_pages: int
) -> None:
    store = SharedStore(budget_bytes=num_pages * PAGE_BYTES, costs=CONFIG.costs)
    kept: list[tuple[bytes, int]] = []  # the naive one: items and their bytes, least recently used first
    for is_put, row in calls:
        items = [tail_item(key(number)) if is_tail else page_item(key(number)) for number, is_tail in row]
        if is_put:
            store.put(items)
        else:
            there = {item for item, _ in kept}
            assert store.touch(items) == [item for item in items if item not in there]
        for item in items:
            num_bytes = CONFIG.tail_bytes if len(item) == 17 else PAGE_BYTES
            is_there = (item, num_bytes) in kept
            if is_there:
                kept.remove((item, num_bytes))
            if is_there or (is_put and num_bytes <= num_pages * PAGE_BYTES):
                kept.append((item, num_bytes))
            while sum(size for _, size in kept) > num_pages * PAGE_BYTES:
                kept.pop(0)
        assert store.num_bytes == sum(size for _, size in kept) <= num_pages * PAGE_BYTES
        path = [key(number) for number in range(9)]
        depth = next((at for at in range(9) if (key(at), PAGE_BYTES) not in kept), 9)
        assert store.reach(path) == depth
        tails = [at + 1 for at in range(depth) if (key(at) + b"t", CONFIG.tail_bytes) in kept]
        assert store.deepest_tail(path[:depth]) == max(tails, default=0)


@given(st.lists(st.lists(st.integers(0, 9), max_size=6)), st.integers(1, 8))
def test_the_figure_to_compare_with_is_that_of_a_naive_lru_cache(prompts: list[list[int]], size: int) -> None:
    cache: list[int] = []
    num_hits = 0
    for prompt in prompts:
        for page in prompt:
            num_hits += page in cache
            cache = ([other for other in cache if other != page] + [page])[-size:]
    requests = [a_request(number, prompt) for number, prompt in enumerate(prompts)]
    num_pages = sum(map(len, prompts))
    assert lru_hit_rate(requests, num_pages=size) == num_hits / max(num_pages, 1)


def test_an_endless_lru_cache_has_what_was_ever_there() -> None:
    requests = requests_of()
    ideal = sum(item.ideal_pages for item in requests) / sum(item.num_pages for item in requests)
    assert lru_hit_rate(requests, num_pages=1 << 30) == pytest.approx(ideal)


def a_request(number: int, pages: Sequence[int]) -> trace.Request:
    return trace.Request(
        number=number,
        seconds=float(number),
        num_tokens=256 * len(pages) + 1,
        keys=tuple(key(page) for page in pages),
        session="",
        ideal_pages=0,
    )


@pytest.mark.parametrize("write", StoreWrite)
@pytest.mark.parametrize("name", ["rorqual", "session_affinity", "least_loaded"])
def test_a_store_gives_hits_and_leaves_nothing_pinned(name: str, write: StoreWrite) -> None:
    requests = requests_of(200)
    simulation = run(name, requests, with_store(3000, write=write))
    without = run(name, requests, SMALL)
    assert num_reused(simulation) > 1.05 * num_reused(without)
    assert sum(item.num_stored for item in simulation.outcomes) > 0
    by_number = {item.number: item for item in requests}
    for outcome in simulation.outcomes:
        request = by_number[outcome.number]
        assert 0 <= outcome.num_reused <= outcome.num_present <= request.num_pages
        assert outcome.num_reused <= request.ideal_pages, "nobody reuses what nobody had computed"
        assert outcome.num_stored <= request.ideal_pages
    for worker in simulation.workers:
        worker.radix.check()
        assert (worker.radix.num_pins, worker.radix.num_pages_pinned) == (0, 0)
        assert (worker.queued_tokens, worker.active_pages, len(worker.queue)) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_pages", [20, 300, 3000])
def test_a_store_of_any_size_costs_no_hits(seed: int, num_pages: int) -> None:
    requests = requests_of(200, seed=seed)
    configs = (with_store(num_pages, CONFIG), CONFIG)
    with_it, without = (run("session_affinity", requests, each) for each in configs)
    assert num_reused(with_it) >= 0.98 * num_reused(without)


def test_a_large_store_comes_near_one_lru_cache_of_its_size() -> None:
    requests = requests_of(400)
    simulation = run("rorqual", requests, with_store(4000, CONFIG))
    rate = num_reused(simulation) / sum(item.num_pages for item in requests)
    assert rate > 0.85 * lru_hit_rate(requests, num_pages=4000)


def test_a_run_with_a_store_repeats_itself() -> None:
    requests, config = requests_of(), with_store(500)
    assert run("rorqual", requests, config).outcomes == run("rorqual", requests, config).outcomes


def twins(seconds: float) -> list[trace.Request]:
    """A prompt, and the same once more so much later."""
    first = next(item for item in requests_of() if item.num_pages > 20)
    return [dataclasses.replace(first, number=number, seconds=seconds * number) for number in (0, 1)]


def test_what_one_worker_computed_another_reads() -> None:
    requests = twins(10.0)
    outcomes = run("round_robin", requests, with_store(3000), workers=2).outcomes
    assert [item.worker for item in outcomes] == [0, 1]
    end = requests[0].num_pages - requests[0].num_pages % 2
    assert (outcomes[1].num_stored, outcomes[1].num_reused) == (end, end)
    read = float(MODEL.store_seconds(end * PAGE_BYTES + CONFIG.tail_bytes))
    assert read < outcomes[1].ttft_seconds < outcomes[0].ttft_seconds


@pytest.mark.parametrize("name", ["round_robin", "rorqual"])
@pytest.mark.parametrize(
    "speed",
    [
        SourceSpeed(bytes_per_second=3e8, latency_seconds=0.002),
        SourceSpeed(bytes_per_second=2e9, latency_seconds=1.0),
    ],
)
def test_a_store_slower_than_computing_is_not_read_from(name: str, speed: SourceSpeed) -> None:
    requests = twins(100.0)
    # The first pages have to be the store's alone: their worker forgets them before the second prompt comes.
    between = a_request(2, range(10_000, 10_240))
    requests.insert(1, dataclasses.replace(between, seconds=50.0))
    simulation = run(name, requests, with_store(3000, speed=speed), workers=1)
    assert simulation.store is not None
    assert simulation.store.reach(requests[0].keys) == requests[0].num_pages
    assert not any(item.num_stored for item in simulation.outcomes)
    assert any(item.num_stored for item in run(name, requests, with_store(3000), workers=1).outcomes)


def test_pages_read_behind_pages_that_have_gone_meanwhile_are_of_no_use() -> None:
    request = twins(1.0)[0]
    config = with_store(3000)
    assert config.store is not None
    store = SharedStore(budget_bytes=config.store.budget_bytes, costs=config.costs)
    store.put([tail_item(request.keys[19]), *(page_item(key) for key in request.keys[:20])])
    for is_evicted in (False, True):
        worker = Worker(0, config, StoreLink(store, config.store, config.model))
        pin = worker.radix.pin((), num_pages=0)
        for number, page in enumerate(request.keys[:5], start=1_000_000):
            worker.radix.extend(pin, page, PageId(number))
        worker.radix.release(pin)
        job = Job(request=request, arrived=0.0, ready=0.0)
        worker.enqueue(job, 0.0)
        assert job.read == StoreRead(first=5, depth=20, tail_depth=20)
        if is_evicted:
            worker.radix.evict_pages(2)
        worker.receive_from_store(job)
        match = worker.radix.match(request.keys)
        assert (match.num_pages, match.resumable) == ((3, 0) if is_evicted else (20, 20))


def test_only_what_leaves_a_cache_is_written_when_evictions_are() -> None:
    requests = requests_of(40)
    large = dataclasses.replace(CONFIG, budget_bytes=100_000 * PAGE_BYTES)
    store = run("round_robin", requests, with_store(3000, large, write=StoreWrite.EVICTION)).store
    assert store is not None
    assert store.num_bytes == 0


def test_the_picture_shows_what_the_store_has() -> None:
    simulation = run("rorqual", requests_of(), with_store(500))
    store = simulation.store
    assert store is not None
    found = [simulation.picture.look_up(item.keys) for item in requests_of()]
    for item, request in zip(found, requests_of(), strict=True):
        assert item.store_pages == store.reach(request.keys)
        assert item.store_tail == store.deepest_tail(request.keys[: item.store_pages])
    assert any(item.store_tail for item in found)


def test_a_tail_behind_a_page_that_the_store_has_lost_does_not_count() -> None:
    store = SharedStore(budget_bytes=100 * PAGE_BYTES, costs=CONFIG.costs)
    store.put([page_item(key(0)), page_item(key(2)), tail_item(key(2))])
    found = ExactPicture(1, store).look_up([key(0), key(1), key(2)])
    assert (found.store_pages, found.store_tail) == (1, 0)


def test_reads_and_writes_have_a_bound_and_what_is_beyond_is_counted() -> None:
    config = with_store(100_000)
    assert config.store is not None
    store = SharedStore(budget_bytes=config.store.budget_bytes, costs=config.costs)
    link = StoreLink(store, config.store, config.model)
    count = int(STAGED_SECONDS_MAX * 2e9 / PAGE_BYTES) + 2
    pages = [page_item(key(number)) for number in range(count)]
    written = link.begin_write(0.0, pages)
    assert written is not None
    assert written[0] == pytest.approx(0.002 + count * PAGE_BYTES / 2e9)
    assert link.begin_write(0.0, pages) is None, "it is being written already"
    assert link.num_refused == 0
    assert link.begin_write(0.0, [tail_item(key(0))]) is None
    assert link.num_refused == 1
    store.put(pages)
    link.begin_read(0.0, pages, seconds=link.read_seconds(0.0, count * PAGE_BYTES))
    assert link.read_seconds(0.0, PAGE_BYTES) == float("inf")
    assert link.num_refused == 2
    later = STAGED_SECONDS_MAX + 1
    assert link.read_seconds(later, PAGE_BYTES) == pytest.approx(float(MODEL.store_seconds(PAGE_BYTES)))


def test_tails_for_the_store_alone_are_one_block_before_the_end_and_then_evenly_apart() -> None:
    assert StoreConfig(budget_bytes=1).extra_tails(50) == (48, 34, 18, 2)
    assert StoreConfig(budget_bytes=1, tails_every=0).extra_tails(50) == (48,)
    assert StoreConfig(budget_bytes=1).extra_tails(2) == ()


def test_the_command_tells_of_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "race.json"
    options = ["--trace", "synthetic:150", "--workers", "2", "--pages-per-worker", "150", "--no-bounds"]
    options += ["--policy", "rorqual", "session_affinity", "--json", str(file)]
    store = ["--store-pages", "1000", "--store-bandwidth", "4e9", "--store-latency-ms", "1"]
    assert cli.main(["bench", "route", *options, *store, "--store-write", "eviction"]) == 0
    content = json.loads(file.read_text())
    assert (content["store_pages"], content["store_bandwidth"], content["store_latency_ms"]) == (1000, 4e9, 1)
    assert content["store_write"] == "eviction"
    assert 0 < content["store_lru_hit_rate"] <= content["ideal_hit_rate"]
    out = capsys.readouterr().out
    assert f"would have {100 * content['store_lru_hit_rate']:.2f} %" in out
    for row in content["policies"].values():
        assert row["stored_rate"] > 0
        assert f"{100 * row['stored_rate']:5.1f}%" in out

    assert cli.main(["bench", "route", *options]) == 0
    content = json.loads(file.read_text())
    assert content["store_lru_hit_rate"] is None
    assert not any(row["stored_rate"] for row in content["policies"].values())
    assert "LRU cache" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--store-pages", "-1"), ("--store-bandwidth", "nan"), ("--store-write", "never")]
)
def test_an_option_of_the_store_out_of_range_is_refused(option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "route", *option])

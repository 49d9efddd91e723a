"""`rorqual bench route` on small made traces: what it prints adds up, repeats itself, and is true."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from bench.route import command, trace
from bench.route.picture import ExactPicture
from bench.route.policies import ENTRANTS
from bench.route.report import deep_bytes
from rorqual import cli
from rorqual.errors import RorqualError
from tests.unit.bench.races import CONFIG, MODEL, requests_of, run


@pytest.mark.parametrize("name", ENTRANTS)
def test_every_page_is_either_reused_or_computed_and_nothing_stays_pinned(name: str) -> None:
    requests = requests_of()
    simulation = run(name, requests)
    by_number = {item.number: item for item in requests}
    assert sorted(by_number) == sorted(item.number for item in simulation.outcomes)
    for outcome in simulation.outcomes:
        request = by_number[outcome.number]
        assert outcome.num_pages == request.num_pages
        assert 0 <= outcome.num_reused <= outcome.num_present <= request.num_pages
        assert outcome.num_reused <= request.ideal_pages, "nobody reuses what nobody had computed"
        assert outcome.ttft_seconds > 0
        assert outcome.num_fetched == 0 or name == "rorqual"
    for worker in simulation.workers:
        worker.radix.check()
        assert (worker.radix.num_pins, worker.radix.num_pages_pinned) == (0, 0)
        assert (worker.queued_tokens, worker.active_pages, len(worker.queue)) == (0, 0, 0)
        assert worker.queued_seconds == pytest.approx(0, abs=1e-6)


def test_the_picture_is_what_the_workers_have_and_empties_with_them() -> None:
    simulation = run("rorqual", requests_of())
    for request in requests_of():
        found = simulation.picture.look_up(request.keys)
        for worker in simulation.workers:
            match = worker.radix.match(request.keys)
            assert (found.pages_W[worker.number], found.tail_W[worker.number]) == (
                match.num_pages,
                match.resumable,
            )
    for worker in simulation.workers:
        worker.radix.evict_pages(worker.radix.num_pages)
        simulation.picture.apply(worker.number, worker.take_changes())
    assert simulation.picture.memory_bytes() < 1_000_000
    assert not simulation.picture.look_up(requests_of()[0].keys).pages_W.any()


def test_a_run_repeats_itself() -> None:
    requests = requests_of()
    assert run("rorqual", requests).outcomes == run("rorqual", requests).outcomes


def test_an_endless_cache_of_one_worker_comes_near_the_ideal() -> None:
    requests = requests_of(workers=1, load=0.3)
    simulation = run("rorqual", requests, dataclasses.replace(CONFIG, budget_bytes=1 << 45), workers=1)
    reused = sum(item.num_reused for item in simulation.outcomes)
    ideal = sum(item.ideal_pages for item in requests)
    assert 0.85 * ideal < reused <= ideal


def test_reads_from_peers_save_computing() -> None:
    requests = requests_of(400, load=0.9)
    with_reads, without = (run(name, requests) for name in ("rorqual", "rorqual-nofetch"))
    assert sum(item.num_fetched for item in with_reads.outcomes) > 0
    reused = [sum(item.num_reused for item in each.outcomes) for each in (with_reads, without)]
    assert reused[0] > reused[1]


def test_two_prompts_that_arrive_together_are_computed_once() -> None:
    first = next(item for item in requests_of() if item.num_pages > 10)
    twins = [dataclasses.replace(first, number=number, seconds=float(number) / 1e6) for number in (0, 1)]
    config = dataclasses.replace(CONFIG, budget_bytes=2000 * MODEL.costs.page_bytes)
    outcomes = run("rorqual", twins, config, workers=1).outcomes
    assert [item.num_reused for item in outcomes] == [
        0,
        first.num_pages,
    ]  # the first leaves a tail where the second waits


def test_a_prompt_larger_than_the_cache_is_computed_all_the_same() -> None:
    config = dataclasses.replace(CONFIG, budget_bytes=8 * MODEL.costs.page_bytes)
    simulation = run("rorqual", requests_of(40), config)
    assert len(simulation.outcomes) == 40


def test_load_is_work_over_what_the_workers_can_do() -> None:
    requests = requests_of(load=0.5, workers=4)
    seconds = trace.ideal_seconds(
        requests, lambda tokens, context: float(MODEL.work_seconds(tokens, context))
    )
    assert seconds / 4 / requests[-1].seconds == pytest.approx(0.5)


def test_smeared_arrivals_stay_in_their_step_and_in_order() -> None:
    requests = trace.load_trace("synthetic:200", seed=3)
    smeared = trace.smear(requests, seed=3)
    assert [item.number for item in smeared] == [item.number for item in requests]
    for before, after in zip(requests, smeared, strict=True):
        assert before.seconds // 3 == after.seconds // 3
    times = [item.seconds for item in smeared]
    assert times == sorted(times)
    assert times != [item.seconds for item in requests]
    assert smeared == trace.smear(requests, seed=3)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_trace_is_read_in_pages_of_its_blocks(tmp_path: Path, suffix: str) -> None:
    rows = [(0, 1100, [0, 1, 2]), (3000, 1500, [0, 1, 7]), (6000, 100, [9]), (9000, 1100, [0, 1, 2])]
    lines = [
        json.dumps({"timestamp": at, "input_length": length, "output_length": 1, "hash_ids": blocks})
        for at, length, blocks in rows
    ]
    file = tmp_path / f"trace{suffix}"
    content = "\n".join(lines).encode()
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    found = trace.load_trace(str(file), seed=0)
    assert [item.num_pages for item in found] == [4, 5, 0, 4]
    assert [item.ideal_pages for item in found] == [0, 4, 0, 4]
    assert [item.session for item in found] == ["0", "0", "2", "0"]
    assert found[0].keys[:4] == found[1].keys[:4]
    assert len({*found[0].keys, *found[1].keys}) == 5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "timestamp"),
        ("[", "line 1"),
        ('{"timestamp": 0, "input_length": 600, "hash_ids": [1]}', "2 integer hash_ids"),
        ('{"timestamp": 0, "input_length": 5, "hash_ids": ["1"]}', "1 integer hash_ids"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(line)
    with pytest.raises(RorqualError, match=said):
        trace.load_trace(str(file), seed=0)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "race.json", tmp_path / "race.png"
    options = ["--trace", "synthetic:60", "--workers", "2", "--pages-per-worker", "300"]
    policies = ["--policy", "rorqual", "round_robin", "--json", str(file), "--plot", str(picture)]
    assert cli.main(["bench", "route", *options, *policies]) == 0
    content = json.loads(file.read_text())
    assert set(content["policies"]) == {"rorqual", "round_robin"}
    wanted = {"hit_rate", "work_max_over_mean", "ttft_p50", "ttft_p90", "ttft_p99", "goodput"}
    for row in content["policies"].values():
        assert wanted | {"decisions_per_s", "memory_bytes"} <= set(row)
        assert 0 <= row["hit_rate"] <= content["ideal_hit_rate"] <= 1
        assert row["work_max_over_mean"] >= 1
        assert row["ttft_p50"] <= row["ttft_p90"] <= row["ttft_p99"]
    out = capsys.readouterr().out
    assert f"{100 * content['policies']['rorqual']['hit_rate']:.1f}%" in out
    assert "Only rorqual reads pages and tails from peers" in out
    assert picture.stat().st_size > 1000


def test_a_trace_that_is_missing_is_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "route", "--trace", "nowhere.jsonl"]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--load", "0"), ("--workers", "x"), ("--policy", "best")])
def test_an_option_out_of_range_is_refused(option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([*option])


def test_memory_is_counted_through_slots_and_containers() -> None:
    small, large = ExactPicture(2), ExactPicture(2)
    assert deep_bytes(small) < deep_bytes([small, large])
    assert deep_bytes({"key": list(range(10_000, 20_000))}) > 10_000 * 28

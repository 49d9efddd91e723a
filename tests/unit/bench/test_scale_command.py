"""`rorqual bench scale` from options to files, on a small fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.scale import command
from rorqual.performance import FLASH, HARDWARE, PerformanceModel, model_costs


@pytest.mark.slow
def test_a_race_prints_its_table_and_verdicts_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    arguments = ["scale", "--workload", "constant", "--trace", "synthetic:300", "--seeds", "1", "2"]
    arguments += ["--rules", "rorqual", "hpa-80", "dynamo-sla", "dynamo-load", "--peak-workers", "0.4"]
    arguments += ["--workers-max", "4", "--jobs", "1", "--json", str(figures), "--plot", str(picture)]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "4 of 4: synthetic:300, seed 2" in printed
    assert "verdict: constant: rorqual: " in printed
    content = json.loads(figures.read_text())["workloads"]
    assert set(content) == {"constant", "synthetic:300"}
    for by_rule in content.values():
        assert set(by_rule) == {"rorqual", "hpa-80", "dynamo-sla", "dynamo-load"}
        for found in by_rule.values():
            assert len(found["runs"]) == 2
            assert 0 <= found["over_seeds"]["attainment"]["mean"] <= 1
            assert found["over_seeds"]["gpu_hours"]["mean"] > 0
    assert content["constant"]["rorqual"]["over_seeds"]["attainment"]["mean"] > 0.95
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments", [["--seeds", "0"], ["--ttft", "nan"], ["--rules", "nobody"], ["--workload", "nothing"]]
)
def test_options_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)


def test_what_weights_leave_of_eight_devices_is_some_hundred_thousand_pages() -> None:
    model = PerformanceModel(hardware=HARDWARE["h200"], costs=model_costs(FLASH), num_devices=8)
    weights = model.costs.resident_bytes + 256 / 8 * model.costs.num_layers * model.costs.expert_bytes
    expected = 0.8 * (141e9 - weights) * 8 / model.costs.page_bytes
    assert command.pages_of(model) == pytest.approx(expected, rel=1e-6)

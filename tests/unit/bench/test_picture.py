"""The measurement of the picture runs at a size nobody waits for, and counts what it made."""

from __future__ import annotations

import json

from bench import picture


def test_a_small_picture_is_measured_and_its_pairs_are_those_that_were_made() -> None:
    figures = picture.measure(3, 500, seed=1, num_deltas=7, num_look_ups=3, num_decisions=20)
    assert (figures.workers, figures.pages, figures.pairs) == (3, 500, 1500)
    assert 0 < figures.different_pages < figures.pairs
    assert 0 < figures.look_up_ms_p50 <= figures.look_up_ms_p99
    assert 0 < figures.decision_ms_p50 <= figures.decision_ms_p99
    assert figures.bytes_per_pair > 12


def test_figures_are_written_as_json(tmp_path, capsys) -> None:
    target = tmp_path / "figures.json"
    assert picture.main(["--workers", "2", "--pages", "400", "--decisions", "20", "--json", str(target)]) == 0
    (row,) = json.loads(target.read_text())
    assert (row["workers"], row["pairs"]) == (2, 800)
    assert 0 < row["decision_ms_p50"] <= row["decision_ms_p99"]
    assert row["decision_ms_p99_clock"] > 0
    assert "800" in capsys.readouterr().out

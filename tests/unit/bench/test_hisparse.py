"""`python -m bench hisparse` in small: what fits is what the formula says, and every part gives its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.hisparse.command import Figures, as_json, plot
from bench.hisparse.fits import Load, measure_fits
from bench.hisparse.resident import Work
from bench.hisparse.spilled import measure_spilled, texts, trained_model
from bench.hisparse.worker import random_model


@pytest.mark.minutes
@pytest.mark.parametrize("tokens_before", [64, -128], ids=["turning a page", "amid a page"])
def test_as_many_requests_run_as_the_formula_says(tokens_before: int) -> None:
    found = measure_fits(
        random_model(num_pages=10), Load(num_pages=10, tokens_before=tokens_before), num_spilled=4
    )
    assert (found.formula.num_resident, found.formula.num_spilled) == (3, 4)
    assert (found.without.num_running, found.spilling.num_running) == (3, 4)
    assert found.spilling.num_spilled >= 2
    assert found.of_formula == 1
    assert max(found.without.device_bytes, found.spilling.device_bytes) <= found.device_bytes


@pytest.mark.minutes
def test_spilled_requests_answer_as_resident_ones_and_miss_less_with_more_hot_rows(tmp_path: Path) -> None:
    work = Work(prompts=texts(2, 1300), num_generated=160)
    found = measure_spilled(trained_model(exact=True), work, (64, 128), num_pairs=6, num_steps=4)
    fewer, more = found
    assert (fewer.num_hot, more.num_hot) == (64, 128)
    assert 0 < more.rows_missed < fewer.rows_missed < fewer.rows_wanted <= 64
    assert more.useful > 0.5
    figures = Figures(spilled=tuple(found))
    assert json.loads(json.dumps(as_json(figures)))["spilled"][1]["hit_rate"] == more.hit_rate
    plot(figures, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000

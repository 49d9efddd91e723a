"""The bench of restoring against computing: its figures from written times, and one short run of the real thing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.restore import command
from bench.restore.released import computed
from bench.restore.report import crossing, summarise, table
from bench.restore.sources import COMPUTE, Taken
from rorqual.model_config import PAGE_TOKENS


def a_time(seconds: float, *, num_bytes: int = 0) -> Taken:
    return Taken(seconds=seconds, read_seconds=seconds / 2, num_bytes=num_bytes, token=1)


def test_the_crossing_is_between_two_lengths_on_a_line_of_logarithms() -> None:
    assert crossing([(256, 0.5), (1024, 2.0)]) == pytest.approx(512)
    assert crossing([(256, 0.5), (512, 1.0), (1024, 0.9)]) == pytest.approx(512)
    assert crossing([(256, 1.5), (512, 3.0)]) == 0.0
    assert crossing([(256, 0.2), (512, 0.4)]) == math.inf


def test_ratios_are_of_the_same_round() -> None:
    taken = {
        (COMPUTE, 1): [a_time(1.0), a_time(2.0), a_time(9.0)],
        ("host", 1): [a_time(0.5, num_bytes=7), a_time(0.5, num_bytes=7), a_time(9.0, num_bytes=7)],
    }
    base, host = summarise(taken)
    assert (base.ratio, base.seconds, base.seconds_least, base.seconds_most) == (1.0, 2.0, 1.0, 9.0)
    assert (host.ratio_least, host.ratio, host.ratio_most) == (1.0, 2.0, 4.0)
    assert (host.num_bytes, host.num_tokens, host.read_seconds) == (7, PAGE_TOKENS, 0.25)
    assert "2.0x" in table([base, host])


def test_computed_break_evens_are_where_reading_takes_as_long_as_computing_so_many_tokens() -> None:
    for item in computed("h200"):
        assert item.read_seconds.keys() == item.compute_seconds.keys()
        longest = max(item.num_bytes)
        assert item.num_bytes[longest] > 0
        if item.source == "peer":
            assert item.break_even_tokens < PAGE_TOKENS


@pytest.mark.minutes
def test_a_short_run_leaves_figures_and_a_plot(tmp_path: Path) -> None:
    """Every way is checked inside to give the token that computing gives."""
    assert command.main(["--pages", "1", "3", "--rounds", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "restore.json").read_text())
    ways = {row["way"] for row in content["measured"]}
    assert {COMPUTE, "host", "peer, shm", "store"} <= ways
    assert {row["num_tokens"] for row in content["measured"]} == {PAGE_TOKENS, 3 * PAGE_TOKENS}
    assert {item["way"] for item in content["break_even"]} == ways - {COMPUTE}
    assert (tmp_path / "restore.png").stat().st_size > 10_000

"""Runs are arithmetic over bytes: compared with moving the bytes one unit at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transfer.contract import Region, Run, TransferError
from kvstore.transfer.runs import check_runs, cut_runs, match_regions, page_runs, record_run, region_table

NUM_UNITS = 12


def region(name: str, unit_bytes: int, num_units: int = NUM_UNITS, address: int = 4096) -> Region:
    return Region(name=name, address=address, unit_bytes=unit_bytes, num_units=num_units)


REGIONS = (region("c4", 7), region("c4_index", 1), region("records", 30, 3), region("c128", 5))


@st.composite
def page_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Source pages, which may repeat, and target pages, which may not; often in rows."""
    target = draw(st.permutations(range(NUM_UNITS)))[: draw(st.integers(0, NUM_UNITS))]
    if draw(st.booleans()):
        target = sorted(target)
        shift = draw(st.integers(0, NUM_UNITS))
        return [(page + shift) % NUM_UNITS for page in target], target
    return [draw(st.integers(0, NUM_UNITS - 1)) for _ in target], target


@given(page_pairs())
def test_page_runs_read_exactly_the_pages_of_every_paged_region(pairs: tuple[list[int], list[int]]):
    source_pages, target_pages = pairs
    runs = page_runs(REGIONS, source_pages, target_pages)
    for item in REGIONS:
        source_U = np.arange(item.unit_bytes * item.num_units, dtype=np.int64)
        wanted_U, found_U = np.full_like(source_U, -1), np.full_like(source_U, -1)
        if item.name != "records":
            for source, target in zip(source_pages, target_pages, strict=True):
                wanted_U.reshape(-1, item.unit_bytes)[target] = source_U.reshape(-1, item.unit_bytes)[source]
        for run in runs:
            if run.region == item.name:
                place = slice(run.target, run.target + run.num_bytes)
                assert (found_U[place] == -1).all(), "two runs write the same byte"
                found_U[place] = source_U[run.source : run.source + run.num_bytes]
        assert np.array_equal(found_U, wanted_U)


@given(page_pairs())
def test_page_runs_are_as_few_as_can_be(pairs: tuple[list[int], list[int]]):
    """One for each page whose predecessor here is not read from the predecessor there."""
    source_of = {target: source for source, target in zip(*pairs, strict=True)}
    starts = [
        target for target, source in source_of.items() if source_of.get(target - 1, source) != source - 1
    ]
    assert len(page_runs(REGIONS, *pairs)) == 3 * len(starts)


def test_two_pages_are_not_read_into_one():
    with pytest.raises(AssertionError, match="two pages"):
        page_runs(REGIONS, [1, 2], [3, 3])


def test_a_record_run_reads_the_beginning_of_a_record():
    assert record_run(REGIONS, source=2, target=1, num_bytes=29) == Run(
        region="records", source=60, target=30, num_bytes=29
    )


@pytest.mark.parametrize("num_bytes", [-1, 0, 31])
def test_a_record_run_of_no_record_is_refused(num_bytes: int):
    with pytest.raises(TransferError, match="does not fit"):
        record_run(REGIONS, source=0, target=0, num_bytes=num_bytes)


a_run = st.builds(
    Run,
    region=st.sampled_from(["c4", "c128"]),
    source=st.integers(0, 50),
    target=st.integers(0, 50),
    num_bytes=st.integers(1, 40),
)


@given(st.lists(a_run, max_size=8), st.integers(1, 50))
def test_cut_runs_move_the_same_bytes_in_the_same_order(runs: list[Run], bytes_max: int):
    parts = cut_runs(runs, bytes_max)

    def moves(some: list[Run]) -> list[tuple[str, int, int]]:
        return [(run.region, run.source + i, run.target + i) for run in some for i in range(run.num_bytes)]

    assert [move for part in parts for move in moves(part)] == moves(runs)
    sizes = [sum(run.num_bytes for run in part) for part in parts]
    assert all(size == bytes_max for size in sizes[:-1])
    assert all(0 < size <= bytes_max for size in sizes)
    assert all(run.num_bytes > 0 for part in parts for run in part)


def test_regions_that_cannot_be_are_refused():
    for bad in (
        region("c4", 0),
        region("c4", -7),
        region("c4", 7, 0),
        region("c4", 7, address=-1),
        region("c4", 1 << 40, 1 << 30),
        region("c4", 1, 2, address=2**64 - 1),
    ):
        with pytest.raises(TransferError, match="cannot be"):
            region_table([bad])
    with pytest.raises(TransferError, match="twice"):
        region_table([region("c4", 7), region("c4", 7)])
    assert region_table([region("c4", 1, 2, address=2**64 - 2)])


def test_regions_match_when_names_and_units_do():
    ours = region_table(REGIONS)
    match_regions(ours, region_table(region(item.name, item.unit_bytes, 99) for item in REGIONS))
    with pytest.raises(TransferError, match="'c128' is missing there"):
        match_regions(ours, region_table(REGIONS[:3]))
    with pytest.raises(TransferError, match="'other' is unknown here"):
        match_regions(ours, region_table((*REGIONS, region("other", 1))))
    with pytest.raises(TransferError, match="8 bytes there, 7 here"):
        match_regions(ours, region_table((region("c4", 8), *REGIONS[1:])))


def test_a_run_is_checked_at_both_ends():
    ours, theirs = region_table([region("c4", 10, 4)]), region_table([region("c4", 10, 6)])

    def check(source: int, target: int, num_bytes: int = 10) -> None:
        first = Run(region="c4", source=0, target=0, num_bytes=1)
        run = Run(region="c4", source=source, target=target, num_bytes=num_bytes)
        check_runs([first, run], ours=ours, theirs=theirs)

    check(50, 30)
    for source in (-1, 51, 60, 2**70):
        with pytest.raises(TransferError, match="not in region 'c4'"):
            check(source, 0)
    for target in (-1, 31, 40):
        with pytest.raises(AssertionError, match="beyond region 'c4' here"):
            check(0, target)
    with pytest.raises(AssertionError, match="at least one byte"):
        check(0, 0, 0)
    with pytest.raises(AssertionError, match="at least one run"):
        check_runs([], ours=ours, theirs=theirs)

"""Which bytes a read moves: runs over regions, grouped, cut and checked. Pure arithmetic, called by the rank to say
what it wants and by the engines before they touch memory. It never sees a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.transfer.contract import Endpoint, Region, Run, TransferError

RECORDS = "records"
"""The region of hand-over records. Every other region holds pages, one unit a page id."""

ADDRESS_MAX = 1 << 64


def page_runs(
    regions: Iterable[Region], source_pages: Sequence[int], target_pages: Sequence[int]
) -> list[Run]:
    """The fewest runs that read the pages of every paged region, `source_pages[i]` into `target_pages[i]`. Pages that
    follow each other on both sides travel as one."""
    assert len(set(target_pages)) == len(target_pages), "two pages would be read into one"
    pairs = sorted(zip(target_pages, source_pages, strict=True))
    spans: list[tuple[int, int, int]] = []  # target, source, count
    for target, source in pairs:
        if spans:
            first_target, first_source, count = spans[-1]
            if (target, source) == (first_target + count, first_source + count):
                spans[-1] = (first_target, first_source, count + 1)
                continue
        spans.append((target, source, 1))
    return [
        Run(
            region=region.name,
            source=source * region.unit_bytes,
            target=target * region.unit_bytes,
            num_bytes=count * region.unit_bytes,
        )
        for region in regions
        if region.name != RECORDS
        for target, source, count in spans
    ]


def record_run(regions: Iterable[Region], *, source: int, target: int, num_bytes: int) -> Run:
    """The run that reads the first `num_bytes` of a record. Raises TransferError: no record is that long."""
    region = region_table(regions)[RECORDS]
    if not 0 < num_bytes <= region.unit_bytes:
        raise TransferError(f"a record of {num_bytes} bytes does not fit one of {region.unit_bytes}")
    return Run(
        region=RECORDS,
        source=source * region.unit_bytes,
        target=target * region.unit_bytes,
        num_bytes=num_bytes,
    )


def cut_runs(runs: Iterable[Run], bytes_max: int) -> list[list[Run]]:
    """The same bytes in the same order, in parts of `bytes_max` bytes each, the last of what is left."""
    assert bytes_max > 0
    parts: list[list[Run]] = []
    room = 0
    for run in runs:
        done = 0
        while done < run.num_bytes:
            if room == 0:
                parts.append([])
                room = bytes_max
            size = min(room, run.num_bytes - done)
            is_whole = size == run.num_bytes
            parts[-1].append(
                run
                if is_whole
                else Run(
                    region=run.region, source=run.source + done, target=run.target + done, num_bytes=size
                )
            )
            done += size
            room -= size
    return parts


def region_table(regions: Iterable[Region]) -> dict[str, Region]:
    """By name. Raises TransferError for a table that describes no memory: another process may have sent it."""
    table: dict[str, Region] = {}
    for item in regions:
        if item.name in table:
            raise TransferError(f"region {item.name!r} comes twice")
        size = item.unit_bytes * item.num_units
        is_sized = item.unit_bytes > 0 and item.num_units > 0 and size <= ADDRESS_MAX
        if not is_sized or not 0 <= item.address <= ADDRESS_MAX - size:
            raise TransferError(
                f"region {item.name!r} cannot be: {item.num_units} units of {item.unit_bytes} bytes"
                f" at {item.address}"
            )
        table[item.name] = item
    return table


def match_endpoints(ours: Endpoint, theirs: Endpoint) -> dict[str, Region]:
    """The peer's regions by name, if this engine can read from them. Raises TransferError."""
    if theirs.backend != ours.backend:
        raise TransferError(f"{theirs.agent} exports through {theirs.backend!r}, not {ours.backend!r}")
    if theirs.agent == ours.agent:
        raise TransferError(f"{theirs.agent} is this agent itself")
    found = region_table(theirs.regions)
    match_regions(region_table(ours.regions), found)
    return found


def match_regions(ours: dict[str, Region], theirs: dict[str, Region]) -> None:
    """Raises TransferError unless both hold the same regions with units of the same size, however many of them."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise TransferError(f"region {name!r} is {'missing there' if name in ours else 'unknown here'}")
    for name, region in ours.items():
        if theirs[name].unit_bytes != region.unit_bytes:
            raise TransferError(
                f"a unit of region {name!r} has {theirs[name].unit_bytes} bytes there, {region.unit_bytes} here"
            )


def check_runs(runs: Sequence[Run], *, ours: dict[str, Region], theirs: dict[str, Region]) -> None:
    """What is read must lie within the peer's regions, else TransferError: the peer has named it. Where it goes to we
    have chosen ourselves, so that a wrong target is a broken invariant."""
    assert runs, "a read has at least one run"
    for run in runs:
        assert run.num_bytes > 0, "a run has at least one byte"
        target = ours[run.region]
        assert 0 <= run.target <= target.unit_bytes * target.num_units - run.num_bytes, (
            f"a run would be written beyond region {run.region!r} here"
        )
        source = theirs[run.region]
        if not 0 <= run.source <= source.unit_bytes * source.num_units - run.num_bytes:
            raise TransferError(
                f"bytes {run.source} to {run.source + run.num_bytes} are not in region {run.region!r} of the"
                f" peer, which has {source.unit_bytes * source.num_units}"
            )

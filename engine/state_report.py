"""What a step has made of state that others may want: full pages, records for who reads them, tails.

Called by the rank (`engine.rank`) when a step's tokens are computed and sampled, so that nothing is reported that
stands on a draft which was not accepted. Packs the records that are packed after a step (`engine.tails` has packed
those inside a chunk), and digests all; changes no state of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from engine.plan import Completed, Lent, Segment, Tailed, TailPoint
from engine.rank_transfer import StateDigests
from engine.runner import Runner
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A segment has taken its sequence from `start` computed tokens to `end`, all of them accepted."""

    segment: Segment
    start: int
    end: int

    @property
    def is_reported(self) -> bool:
        return self.segment.lend or self.segment.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReport:
    lent: tuple[Lent, ...]
    completed: tuple[Completed, ...]
    tailed: tuple[Tailed, ...]


NOTHING = StateReport(lent=(), completed=(), tailed=())


def report_state(runner: Runner, digests: StateDigests, reached: Sequence[Reached]) -> StateReport:
    """Of every segment of a step, in order."""
    reported = [item for item in reached if item.is_reported]
    passed = [_pages_passed(runner, item) for item in reported]
    found = iter(digests.of_pages([page for pages in passed for page in pages]))
    lent: list[Lent] = []
    completed: list[Completed] = []
    for item, pages in zip(reported, passed, strict=True):
        segment = item.segment
        page_digests = tuple(islice(found, len(pages) * len(digests.components)))
        if segment.digest and pages:
            first = item.end // PAGE_TOKENS - len(pages)
            completed.append(Completed(slot=segment.slot, first=first, page_digests=page_digests))
        if segment.lend:
            lent.append(_lend(runner, digests, segment, page_digests))
    tailed = [found for item in reached for found in _tails(runner, digests, item)]
    return StateReport(lent=tuple(lent), completed=tuple(completed), tailed=tuple(tailed))


def _pages_passed(runner: Runner, item: Reached) -> list[int]:
    """The pages whose ends have been passed. Of one that is spilled nothing is to be told: it was here before."""
    spilled = runner.tables.spilled
    first = spilled.num_pages(item.segment.slot) if spilled is not None else 0
    numbers = slice(max(item.start // PAGE_TOKENS, first), item.end // PAGE_TOKENS)
    return runner.tables.pages_SP[item.segment.slot, numbers].tolist()


def _lend(runner: Runner, digests: StateDigests, segment: Segment, page_digests: tuple[int, ...]) -> Lent:
    num_bytes = digest = 0
    if segment.record >= 0:
        num_bytes = runner.pack(segment.slot, segment.start + segment.count, segment.record)
        digest = digests.of_record(segment.record, num_bytes)
    return Lent(slot=segment.slot, page_digests=page_digests, record_bytes=num_bytes, record_digest=digest)


def _tails(runner: Runner, digests: StateDigests, item: Reached) -> list[Tailed]:
    """Those of a chunk have been packed on the way; that of a decode is packed here, if it has reached one."""
    segment = item.segment
    found = [point for point in segment.tails if point.num_tokens <= item.end]
    boundary = item.end // PAGE_TOKENS * PAGE_TOKENS
    if segment.tail_record >= 0 and item.start < boundary:
        runner.pack(segment.slot, boundary, segment.tail_record)
        found.append(TailPoint(num_tokens=boundary, record=segment.tail_record))
    tailed: list[Tailed] = []
    for point in found:
        num_bytes = runner.record_bytes(point.num_tokens)
        digest = digests.of_record(point.record, num_bytes)
        tailed.append(
            Tailed(slot=segment.slot, num_tokens=point.num_tokens, num_bytes=num_bytes, digest=digest)
        )
    return tailed

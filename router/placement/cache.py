"""The interface of placement that knows caches: what a policy sees, what it is asked, what it answers. Pure.

Called by whoever places sequences: the simulation of `rorqual bench route`, and the router's dispatch. Arrays have one
entry for each worker, by worker index; their names end in _W. Depths are in pages of 256 tokens from the start of the
prompt. A worker's pages of a prompt are always its leading ones: an index gives up leaves first.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import PageKey
from rorqual.performance.sources import SourceSpeed, read_seconds

Int32s = NDArray[np.int32]
Float64s = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Source(enum.Enum):
    """Where a leading page comes from."""

    OWN = "own"  # the prefill worker has it
    PEER = "peer"  # read out of another worker's memory
    HOST = "host"  # host memory of the prefill worker
    STORE = "store"  # a store that all workers share
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Pages first .. first + count - 1 of the prompt, all from one source."""

    source: Source
    first: int
    count: int
    worker: int = -1  # of PEER


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """Every full page of the prompt, in order, and where the tail to resume from comes from."""

    spans: tuple[Span, ...]
    tail_source: Source = Source.COMPUTE  # COMPUTE: no tail is used, the windows are filled by computing
    tail_worker: int = -1  # of PEER

    @property
    def peer(self) -> int:
        """The worker that is read from, -1 for none. A plan reads from one at most."""
        found = {span.worker for span in self.spans if span.source is Source.PEER}
        found |= {self.tail_worker} if self.tail_source is Source.PEER else set()
        assert len(found) <= 1, "a plan reads from one peer"
        return found.pop() if found else -1

    @property
    def num_fetched(self) -> int:
        return sum(span.count for span in self.spans if span.source is Source.PEER)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeeds:
    """How fast each worker has read from one source lately."""

    rate_W: Float64s  # bytes a second; 0: it has measured nothing
    latency_W: Float64s  # seconds of a read, however short

    def seconds_W(self, num_bytes_W: Float64s, *, assumed: SourceSpeed) -> Float64s:
        """To read so many bytes; `assumed` of those that have measured nothing."""
        is_known_W = self.rate_W > 0
        return read_seconds(
            num_bytes_W,
            latency_seconds=np.where(is_known_W, self.latency_W, assumed.latency_seconds),
            bytes_per_second=np.where(is_known_W, self.rate_W, assumed.bytes_per_second),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the caches have of one prompt, and what the store has that all workers share."""

    pages_W: Int32s  # leading pages present, on the device or in host memory
    tail_W: Int32s  # deepest boundary with a live tail among them, 0 for none
    device_pages_W: Int32s | None = None  # the same of what is on the device; None: all of it is
    device_tail_W: Int32s | None = None
    store_first: int = 0  # pages before this one are not known to be in the store
    store_pages: int = 0  # it has those from there up to this depth; 0 without one
    store_tail: int = 0  # deepest boundary with a tail there, up to that depth; 0 for none

    @property
    def has_host(self) -> bool:
        """Somebody may have something in host memory only."""
        return self.device_pages_W is not None and self.device_pages_W is not self.pages_W

    @property
    def on_device(self) -> tuple[Int32s, Int32s]:
        """Leading pages and deepest tail there: others can read them."""
        if self.device_pages_W is None or self.device_tail_W is None:
            return self.pages_W, self.tail_W
        return self.device_pages_W, self.device_tail_W


class CacheView(Protocol):
    """What every worker keeps, as the router knows it. A wrong answer costs time, never a wrong token: workers match
    for themselves."""

    def look_up(self, keys: Sequence[PageKey]) -> Found:
        """Looks only. The arrays are the caller's. Workers that are not known have zeros."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPicture:
    """All workers at one moment, the router's own promises counted. Policies only read it.

    Arrays may be views of the caller's own, valid during one `choose`.
    """

    caches: CacheView
    can_prefill_W: Bools
    can_decode_W: Bools
    draining_W: Bools
    wait_seconds_W: Float64s  # of prompts ahead: queued there, or promised by this router
    queued_tokens_W: Float64s  # the same in tokens still to be computed
    sequences_W: Int32s  # prompts queued or computed there
    active_pages_W: Int32s  # full pages of those prompts
    pages_free_W: Int32s
    tree_pages_W: Int32s  # pages kept
    decode_sequences_W: Int32s
    work_seconds_W: Float64s  # computed there so far, or lately
    slowness_W: Float64s | None = None  # what predicted seconds of computing are multiplied with; None: 1
    readable_W: Bools | None = None  # who reads from others, and they from it; None: everybody
    speeds: Mapping[Source, MeasuredSpeeds] = field(
        default_factory=dict[Source, MeasuredSpeeds]
    )  # of PEER, HOST and STORE; without an entry as modelled

    def __post_init__(self) -> None:
        assert self.can_prefill_W.any(), "somebody computes prompts"

    @property
    def num_workers(self) -> int:
        return len(self.can_prefill_W)

    def corrected(self, seconds_W: Float64s) -> Float64s:
        """Predicted seconds of computing, by what each worker has measured."""
        return seconds_W if self.slowness_W is None else seconds_W * self.slowness_W

    def read_seconds_W(self, source: Source, num_bytes_W: Float64s, *, assumed: SourceSpeed) -> Float64s:
        """To read so many bytes from there, by what each worker has measured; `assumed` of those that have not."""
        measured = self.speeds.get(source)
        if measured is None:
            return assumed.seconds(num_bytes_W)
        return measured.seconds_W(num_bytes_W, assumed=assumed)

    @property
    def prefill_W(self) -> Bools:
        """Who may be given a prompt now. When all of them are draining, all of them."""
        able = self.can_prefill_W & ~self.draining_W
        return able if able.any() else self.can_prefill_W

    def decode_worker(self) -> int:
        """Of those that decode, the one with the fewest sequences; -1 without one."""
        able = self.can_decode_W & ~self.draining_W
        if not able.any():
            return -1
        return int(np.where(able, self.decode_sequences_W, np.iinfo(np.int32).max).argmin())


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDemand:
    """The sequence to be placed."""

    number: int  # names it: the same in `finished`
    keys: tuple[PageKey, ...]  # of its full pages
    num_tokens: int
    session: str = ""  # said by the client; "" without one

    @property
    def num_pages(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Who computes the prompt, from where, and who decodes. `fetch` is empty of peers for policies that never read
    from one; a worker that finds more than was planned uses it."""

    prefill: int
    decode: int
    resume: int  # depth at which computing starts, as predicted
    fetch: FetchPlan
    predicted_seconds: float  # to the first token; 0 of policies that predict nothing


class CachePlacement(Protocol):
    """A policy. It may remember what it was asked and what it answered, in bounded memory; the same calls in the same
    order give the same answers."""

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision: ...

    def finished(self, number: int) -> None:
        """The prompt of this request has been computed, or given up."""
        ...


def own_plan(*, num_own: int, num_pages: int, tail: int) -> FetchPlan:
    """A plan that reads from nobody: `num_own` leading pages are there, the rest is computed."""
    spans: list[Span] = []
    if num_own:
        spans.append(Span(source=Source.OWN, first=0, count=num_own))
    if num_pages > num_own:
        spans.append(Span(source=Source.COMPUTE, first=num_own, count=num_pages - num_own))
    return FetchPlan(spans=tuple(spans), tail_source=Source.OWN if tail else Source.COMPUTE)


def plain_decision(
    fleet: FleetPicture, request: CacheDemand, *, worker: int, found: Found | None
) -> Decision:
    """The decision of a policy that chooses a worker and nothing else."""
    num_own = int(found.pages_W[worker]) if found is not None else 0
    tail = int(found.tail_W[worker]) if found is not None else 0
    return Decision(
        prefill=worker,
        decode=fleet.decode_worker(),
        resume=tail,
        fetch=own_plan(num_own=num_own, num_pages=request.num_pages, tail=tail),
        predicted_seconds=0.0,
    )

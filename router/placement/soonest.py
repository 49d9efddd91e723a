"""Our placement that knows caches: whoever gives the first token soonest, what a copy costs others counted. Pure.

For every worker the predicted time to the first token is

    max(wait, fetch) + compute

`wait` is the work ahead of it, this router's promises counted; `compute` what is left behind the cheapest start there:
the deepest tail, or a rebuild of the windows from pages alone. What a worker has in host memory only it copies to its
device first. Where a peer has more on its device, reading from it is another choice, and reading from the store that
all workers share one more: pages and a tail come while the worker still computes others. Each source is priced by what
the worker has measured of it lately (`rorqual.performance.sources`). Two terms more make it a score:

- a copy of pages that another worker keeps pushes out others. That is charged as `copy_share` of what the pages take
  to compute: it keeps a conversation where it is until the wait there is longer, and lets the short heads that many
  prompts share spread over all workers, since they cost little. Of pages that the store has, `stored_share` is charged
  no more than reading takes: with a large store what was pushed out is read again, with a small one it is gone there
  too. On Mooncake's conversation trace a share of 1 instead of 0.5 loses 0.3 points of hits with a store as large as
  all caches together, and gives first tokens 2 % sooner at p90 with larger ones.
- `balance_share` of the work that a worker has done more than the least busy one, so that of workers as good as
  equal the one is taken that has worked less.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel
from router.placement.cache import (
    CacheDemand,
    Decision,
    FetchPlan,
    FleetPicture,
    Float64s,
    Found,
    Int32s,
    Source,
    Span,
)
from router.placement.promises import Promises
from router.placement.simple import least


@dataclass(frozen=True, slots=True, kw_only=True)
class SoonestConfig:
    """Weights of the score, and whether peers are read from."""

    copy_share: float = 3.0
    stored_share: float = (
        0.5  # of what a copy pushes out, as much is believed to be in the store, if the copied is
    )
    balance_share: float = 0.01
    session_seconds: float = 0.005  # a worker that has had the session counts as so much sooner
    sessions_max: int = 1_000_000
    fetches: bool = True
    fetch_pages_min: int = 1  # fewer pages less to compute are not worth a read

    def __post_init__(self) -> None:
        assert self.copy_share >= 0, "a copy is no gain"
        assert 0 <= self.stored_share <= 1, "it is a share"
        assert self.balance_share >= 0, "work done is no reason for more"


@dataclass(frozen=True, slots=True)
class _Starts:
    """One way to begin, on every worker."""

    depth_W: Int32s
    seconds_W: Float64s  # max(wait, fetch) + compute
    source: Source = Source.OWN  # where what a worker lacks is read; OWN: nothing is
    peer: int = -1  # of PEER
    reach: int = 0  # pages that are read up to, from the first on
    reads_tail: bool = False
    host_reach_W: Int32s | None = None  # pages copied from host memory up to; None: no further than `reach`

    def host_end(self, worker: int, *, num_device: int, num_own: int) -> int:
        """Pages from `num_device` up to here come from its host memory, where it has `num_own` pages in all."""
        reach = self.reach if self.host_reach_W is None else int(self.host_reach_W[worker])
        return max(num_device, min(num_own, reach))


@dataclass(frozen=True, slots=True)
class _Own:
    """What workers have of the prompt once all promises are kept."""

    pages_W: Int32s
    tail_W: Int32s
    device_pages_W: Int32s
    device_tail_W: Int32s
    is_on_device: bool  # all of it is, on every worker


class SoonestFirstToken:
    """Keeps promises and sessions, both bounded. Takes a few dozen numpy calls over the workers, and a dict look-up
    or two per page."""

    def __init__(
        self, *, model: PerformanceModel, tail_bytes: float, config: SoonestConfig | None = None
    ) -> None:
        self._model = model
        self._tail_bytes = tail_bytes
        self._page_bytes = model.costs.page_bytes
        self._rebuild_pages = model.costs.rebuild_pages
        self._config = config if config is not None else SoonestConfig()
        self._promises = Promises()
        self._sessions: OrderedDict[str, int] = OrderedDict()
        chunk = model.chunk_tokens
        self._page_seconds = float(model.work_seconds(chunk)) * PAGE_TOKENS / chunk
        read = model.costs.page_bytes / model.store.bytes_per_second
        # Less for a copy of a page that the store has.
        self._page_seconds_off = self._config.stored_share * max(self._page_seconds - read, 0.0)

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        found = fleet.caches.look_up(request.keys)
        promised = self._promises.added_to(found, request.keys)
        own = _own(promised)
        compute_D = self._compute(request)
        ways = self._from_own(fleet, compute_D, own)
        own_W = ways[-1].depth_W
        if self._config.fetches:
            ways += self._from_peers(fleet, compute_D, found, own, own_W)
        ways += self._from_store(fleet, compute_D, found, own, own_W)
        seconds_W = np.minimum.reduce([way.seconds_W for way in ways])
        score_W = self._score(fleet, request, seconds_W, own.pages_W, found)
        worker = least(score_W, fleet.prefill_W)
        way = min(ways, key=lambda item: float(item.seconds_W[worker]))
        self._remember(request, worker, num_present=int(own.device_pages_W[worker]))
        depth = int(way.depth_W[worker])
        tokens = max(request.num_tokens - depth * PAGE_TOKENS, 1)
        alone = float(self._model.prefill_seconds(tokens, depth * PAGE_TOKENS)) - float(compute_D[depth])
        slowness = 1.0 if fleet.slowness_W is None else float(fleet.slowness_W[worker])
        return Decision(
            prefill=worker,
            decode=fleet.decode_worker(),
            resume=depth,
            fetch=_plan(way, own, worker, num_pages=request.num_pages),
            predicted_seconds=float(seconds_W[worker]) + alone * slowness,
        )

    def finished(self, number: int) -> None:
        self._promises.forget(number)

    def _from_own(self, fleet: FleetPicture, compute_D: Float64s, own: _Own) -> list[_Starts]:
        """From what is on the device; and, where host memory has more, from both. The latter goes as far at least."""
        depth_W = np.maximum(own.device_tail_W, own.device_pages_W - self._rebuild_pages)
        seconds_W = fleet.wait_seconds_W + fleet.corrected(compute_D[depth_W])
        ways = [_Starts(depth_W, seconds_W)]
        if own.is_on_device:
            return ways
        rebuilt_W = own.pages_W - self._rebuild_pages
        uses_tail_W = (own.tail_W >= rebuilt_W) & (own.tail_W > 0)
        depth_W = np.maximum(own.tail_W, rebuilt_W)
        # Without a tail and with fewer pages than a rebuild reaches back, none is worth a copy.
        reach_W = np.where(uses_tail_W, own.tail_W, np.where(depth_W > 0, own.pages_W, 0))
        num_bytes_W = self._host_bytes_W(own, reach_W)
        num_bytes_W += self._tail_bytes * (uses_tail_W & (own.device_tail_W != own.tail_W))
        read_W = fleet.read_seconds_W(Source.HOST, num_bytes_W, assumed=self._model.host)
        seconds_W = np.maximum(fleet.wait_seconds_W, read_W) + fleet.corrected(compute_D[depth_W])
        return [*ways, _Starts(depth_W, seconds_W, host_reach_W=reach_W)]

    def _host_bytes_W(self, own: _Own, reach_W: Int32s | int) -> Float64s:
        """Of each worker's own pages up to there, those that are not on its device."""
        missing_W = np.maximum(np.minimum(own.pages_W, reach_W) - own.device_pages_W, 0)
        return missing_W * float(self._page_bytes)

    def _from_peers(
        self, fleet: FleetPicture, compute_D: Float64s, found: Found, own: _Own, own_W: Int32s
    ) -> list[_Starts]:
        """Two ways: with the deepest tail of all workers' devices, and with the most pages there and a rebuild."""
        ways: list[_Starts] = []
        held_W, held_tail_W = found.on_device
        if fleet.readable_W is not None:
            held_W, held_tail_W = held_W * fleet.readable_W, held_tail_W * fleet.readable_W
        tail_peer, pages_peer = int(held_tail_W.argmax()), int(held_W.argmax())
        tail, pages = int(held_tail_W[tail_peer]), int(held_W[pages_peer])
        least_own = int(own_W.min())
        if tail >= least_own + self._config.fetch_pages_min:
            ways.append(
                self._from_peer(fleet, compute_D, own, peer=tail_peer, depth=tail, reach=tail, has_tail=True)
            )
        rebuilt = pages - self._rebuild_pages
        if rebuilt >= max(tail, least_own) + self._config.fetch_pages_min:
            ways.append(
                self._from_peer(
                    fleet, compute_D, own, peer=pages_peer, depth=rebuilt, reach=pages, has_tail=False
                )
            )
        return ways

    def _from_store(
        self, fleet: FleetPicture, compute_D: Float64s, found: Found, own: _Own, own_W: Int32s
    ) -> list[_Starts]:
        """The deeper one of two: with the store's deepest tail, or with all its pages and a rebuild; for those who have
        the pages before those of the store. It gives them through host memory, which is so much faster that it does not
        count."""
        rebuilt = found.store_pages - self._rebuild_pages
        reads_tail = found.store_tail >= rebuilt
        depth, reach = (found.store_tail,) * 2 if reads_tail else (rebuilt, found.store_pages)
        if depth < int(own_W.min()) + self._config.fetch_pages_min:
            return []
        num_bytes_W = self._bytes_to_read(own.pages_W, reach, reads_tail)
        read_W = fleet.read_seconds_W(Source.STORE, num_bytes_W, assumed=self._model.store)
        read_W = read_W + self._copy_seconds_W(fleet, own, reach)
        depth_W = np.full(fleet.num_workers, depth, np.int32)
        seconds_W = np.maximum(fleet.wait_seconds_W, read_W) + fleet.corrected(compute_D[depth_W])
        if found.store_first:
            seconds_W[own.pages_W < found.store_first] = np.inf
        return [
            _Starts(depth_W, seconds_W, source=Source.STORE, reach=reach, reads_tail=reads_tail),
        ]

    def _bytes_to_read(self, pages_W: Int32s, reach: int, reads_tail: bool) -> Float64s:
        missing_W = np.maximum(reach - pages_W, 0)
        return missing_W * float(self._page_bytes) + (self._tail_bytes if reads_tail else 0.0)

    def _copy_seconds_W(self, fleet: FleetPicture, own: _Own, reach: int) -> Float64s | float:
        """Of own pages from host memory, beside what is read from elsewhere behind them."""
        if own.is_on_device:
            return 0.0
        return fleet.read_seconds_W(Source.HOST, self._host_bytes_W(own, reach), assumed=self._model.host)

    def _from_peer(
        self,
        fleet: FleetPicture,
        compute_D: Float64s,
        own: _Own,
        *,
        peer: int,
        depth: int,
        reach: int,
        has_tail: bool,
    ) -> _Starts:
        num_bytes_W = self._bytes_to_read(own.pages_W, reach, has_tail)
        fetch_W = fleet.read_seconds_W(Source.PEER, num_bytes_W, assumed=self._model.peer_speed)
        fetch_W = fetch_W + self._copy_seconds_W(fleet, own, reach)
        seconds_W = np.maximum(fleet.wait_seconds_W, fetch_W)
        depth_W = np.full(fleet.num_workers, depth, np.int32)
        seconds_W = seconds_W + fleet.corrected(compute_D[depth_W])
        seconds_W[peer] = np.inf  # nobody reads from itself
        if fleet.readable_W is not None:
            seconds_W[~fleet.readable_W] = np.inf
        return _Starts(depth_W, seconds_W, source=Source.PEER, peer=peer, reach=reach, reads_tail=has_tail)

    def _compute(self, request: CacheDemand) -> Float64s:
        """Of each depth a worker may begin at: all workers and ways have some of them."""
        context_D = np.arange(request.num_pages + 1, dtype=np.float64) * PAGE_TOKENS
        return self._model.work_seconds(np.maximum(request.num_tokens - context_D, 1.0), context_D)

    def _score(
        self,
        fleet: FleetPicture,
        request: CacheDemand,
        seconds_W: Float64s,
        pages_W: Int32s,
        found: Found,
    ) -> Float64s:
        config = self._config
        deepest = int(pages_W.max())
        copies_W = (deepest - pages_W).astype(np.float64)
        stored_W = np.maximum(min(found.store_pages, deepest) - np.maximum(pages_W, found.store_first), 0)
        charge_W = copies_W * (config.copy_share * self._page_seconds)
        charge_W -= stored_W * (config.copy_share * self._page_seconds_off)
        score_W = seconds_W + fleet.corrected(charge_W)
        work_W = fleet.work_seconds_W
        score_W += config.balance_share * (work_W - work_W.min())
        home = self._sessions.get(request.session, -1) if request.session else -1
        if 0 <= home < fleet.num_workers:
            score_W[home] -= config.session_seconds
        return score_W

    def _remember(self, request: CacheDemand, worker: int, *, num_present: int) -> None:
        self._promises.promise(request.number, worker=worker, keys=request.keys, num_present=num_present)
        if request.session:
            self._sessions[request.session] = worker
            self._sessions.move_to_end(request.session)
            if len(self._sessions) > self._config.sessions_max:
                self._sessions.popitem(last=False)


def _own(promised: Found) -> _Own:
    device_pages_W, device_tail_W = promised.on_device
    is_on_device = not promised.has_host or (
        np.array_equal(device_pages_W, promised.pages_W) and np.array_equal(device_tail_W, promised.tail_W)
    )
    return _Own(promised.pages_W, promised.tail_W, device_pages_W, device_tail_W, is_on_device)


def _plan(way: _Starts, own: _Own, worker: int, *, num_pages: int) -> FetchPlan:
    num_device = int(own.device_pages_W[worker])
    host_end = way.host_end(worker, num_device=num_device, num_own=int(own.pages_W[worker]))
    reach = max(host_end, way.reach)
    parts = [
        (Source.OWN, 0, num_device, -1),
        (Source.HOST, num_device, host_end, -1),
        (way.source, host_end, reach, way.peer),
        (Source.COMPUTE, reach, num_pages, -1),
    ]
    spans = [
        Span(source=source, first=first, count=end - first, worker=peer)
        for source, first, end, peer in parts
        if end > first
    ]
    if way.reads_tail:
        return FetchPlan(spans=tuple(spans), tail_source=way.source, tail_worker=way.peer)
    return FetchPlan(spans=tuple(spans), tail_source=_own_tail_source(way, own, worker))


def _own_tail_source(way: _Starts, own: _Own, worker: int) -> Source:
    depth = way.depth_W[worker]
    if way.source is not Source.OWN or not depth:
        return Source.COMPUTE
    if depth == own.device_tail_W[worker]:
        return Source.OWN
    return Source.HOST if depth == own.tail_W[worker] and way.host_reach_W is not None else Source.COMPUTE

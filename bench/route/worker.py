"""A simulated prefill worker: the real index, a queue, and steps that take as long as the performance model says.

Called by `bench.route.fleet`, which owns the clock. A step packs prompts from the queue, in the order they came, up to
a number of tokens; a prompt that waits for a read from a peer or from the store, or for pages that another prompt is
computing, lets others pass. Pages and tails share one budget of bytes. The pages of a prompt are there for others as
soon as the step that computes them has ended.

Whether the store is read from the worker decides, whatever the policy: when the first token comes sooner by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.route.store import StoreConfig, StoreItem, StoreLink, StoreWrite, page_item, tail_item
from bench.route.trace import BLOCK_PAGES, Request
from kvstore.keys import PageKey
from kvstore.shadow_radix import (
    Changes,
    Costs,
    EvictionOrder,
    InProgress,
    Match,
    Pin,
    ShadowRadix,
    Start,
    StartKind,
    TailKind,
    TailPlan,
    TailPolicy,
    cheapest_start,
    plan_tails,
)
from rorqual.ids import PageId, RecordId
from rorqual.model_config import PAGE_TOKENS
from rorqual.performance import PerformanceModel
from router.placement.cache import Found
from router.placement.promises import Promises

WHOLE_BLOCKS = TailPolicy(end_multiple=BLOCK_PAGES)
"""Where prompts end and where they part. A trace names whole blocks: behind the last one of a prompt nothing can match,
but for a prompt that is the same to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """The same for every worker and policy of a race."""

    model: PerformanceModel
    tail_bytes: int
    budget_bytes: int
    order: EvictionOrder = EvictionOrder.VALUE
    tails: TailPolicy = WHOLE_BLOCKS
    store: StoreConfig | None = None

    @property
    def costs(self) -> Costs:
        costs = self.model.costs
        return Costs(
            page_bytes=costs.page_bytes, tail_bytes=self.tail_bytes, rebuild_pages=costs.rebuild_pages
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRead:
    """Pages first .. depth - 1 and the tail at `tail_depth` (0: none), on their way."""

    first: int
    depth: int
    tail_depth: int


@dataclass(slots=True, kw_only=True)
class Job:
    """A prompt on a worker. Depths in pages, the rest in tokens."""

    request: Request
    arrived: float
    ready: float  # when what is read from a peer or from the store has come
    read: StoreRead | None = None  # from the store
    is_fetched: bool = False
    tokens_left: int = 0  # to be computed, as far as is known
    seconds_left: float = 0.0
    position: int = 0  # tokens computed or not needed to be
    start: Start | None = None  # None: has not begun
    num_matched: int = 0  # pages there when it began
    pin: Pin | None = None
    plans: tuple[TailPlan, ...] = ()
    tails_taken: tuple[int, ...] = ()  # depths
    keeps_pages: bool = True  # False: there was no room for them


class Worker:
    """Not a process and without a clock: `begin_step` says how long it takes, `end_step` is called that much later."""

    def __init__(self, number: int, config: WorkerConfig, link: StoreLink | None = None) -> None:
        self.number = number
        self.config = config
        self.radix = ShadowRadix(costs=config.costs, order=config.order, num_changes_max=1 << 22)
        self.queue: deque[Job] = deque()
        self.in_progress = InProgress[int](num_waits_max=1 << 20)
        self.waiting: set[int] = set()  # requests that wait for pages others are computing
        self.step: list[tuple[Job, int]] = []  # prompts and tokens being computed
        self.busy_until = 0.0
        self.work_seconds = 0.0
        self.queued_tokens = 0
        self.queued_seconds = 0.0
        self.active_pages = 0
        self.link = link
        self._to_store: list[
            StoreItem
        ] = []  # deepest first, so that of one prompt the first pages stay longest
        self._coming_from_store: set[PageKey] = set()
        self._coming = Promises(prompts_max=1 << 20)  # of prompts queued here
        self._page_bytes = config.costs.page_bytes
        self._next_id = 0

    def enqueue(self, job: Job, now: float) -> None:
        """`job.read` says afterwards what is read from the store, until `job.ready`."""
        request = job.request
        match = self._match_to_come(request)
        start = self._start(request, match)
        if self.link is not None and job.ready <= now:
            start = self._read_store(self.link, job, now, match, start)
        self._expect(job, start)
        self.queue.append(job)
        self.active_pages += request.num_pages
        self._coming.promise(request.number, worker=0, keys=request.keys, num_present=match.num_pages)

    def wait_seconds(self, now: float) -> float:
        """Work ahead of a prompt that came now."""
        return self.queued_seconds + max(self.busy_until - now, 0.0) if self.step else self.queued_seconds

    def begin_step(self, now: float) -> float:
        """Seconds of the step that begins; 0 when nothing can be computed."""
        assert not self.step, "a worker computes one step at a time"
        room = self.config.model.chunk_tokens
        arithmetic, num_tokens = 0.0, 0
        for job in self.queue:
            if room <= 0:
                break
            if job.ready > now or job.request.number in self.waiting:
                continue
            if job.start is None and not self._begin(job):
                continue
            count = min(room, job.request.num_tokens - job.position)
            self.step.append((job, count))
            room -= count
            num_tokens += count
            arithmetic += float(self.config.model.arithmetic_seconds(job.position, job.position + count))
        if not self.step:
            return 0.0
        model = self.config.model
        seconds = model.efficiency.step_seconds
        if num_tokens:
            seconds += max(arithmetic, float(model.weights_seconds(num_tokens)))
        for job, count in self.step:
            share = job.seconds_left * count / max(job.tokens_left, 1)
            self._forget(job, tokens=count, seconds=share)
        self.busy_until = now + seconds
        self.work_seconds += seconds
        return seconds

    def end_step(self) -> list[Job]:
        """Prompts that are computed with the step that ends now."""
        step, self.step = self.step, []
        done: list[Job] = []
        for job, count in step:
            self._advance(job, count)
            if job.position == job.request.num_tokens:
                done.append(job)
                self._finish(job)
        return done

    def receive(self, job: Job, *, depth: int, tail_depth: int) -> None:
        """Pages up to `depth` and the tail at `tail_depth` (0: none) have been read from elsewhere. All stay
        pinned until the prompt begins."""
        keys = job.request.keys
        num_own = min(self.radix.match(keys).num_pages, depth)
        pin = self.radix.pin(keys, num_pages=num_own)
        if not self._extend(pin, keys[num_own:depth]):
            self.radix.release(pin)
            return
        if tail_depth and tail_depth not in self.radix.match(keys[:tail_depth]).tail_depths:
            self._keep_tail(
                keys[tail_depth - 1], TailKind.BRANCH if tail_depth < depth else TailKind.PROMPT_END
            )
        has_tail = tail_depth in self.radix.match(keys[:tail_depth]).tail_depths
        job.pin = self.radix.pin(keys, num_pages=depth, tail_depth=tail_depth if has_tail else 0)
        self.radix.release(pin)
        if job.start is None:
            start = self._start(job.request, self.radix.match(keys))
            if start.num_tokens_computed < job.tokens_left:
                self._expect(job, start)

    def receive_from_store(self, job: Job) -> None:
        """What is read has come: it is of use unless pages before it have been evicted meanwhile."""
        read, keys = job.read, job.request.keys
        assert read is not None
        self._coming_from_store.difference_update(keys[read.first : read.depth])
        if self.radix.match(keys).num_pages >= read.first:
            self.receive(job, depth=read.depth, tail_depth=read.tail_depth)

    def take_changes(self) -> Changes:
        changes = self.radix.take_changes()
        if self.link is not None and self.link.config.write is StoreWrite.EVICTION:
            self._to_store += map(tail_item, changes.tails_removed)
            self._to_store += map(page_item, changes.pages_removed)
        return changes

    def begin_writes(self, now: float) -> tuple[float, list[StoreItem]] | None:
        """What is being written to the store from now on, and when it will be there."""
        items, self._to_store = self._to_store, []
        return self.link.begin_write(now, items) if self.link is not None and items else None

    def _read_store(self, link: StoreLink, job: Job, now: float, match: Match, start: Start) -> Start:
        """The start that the prompt is expected to have: with a read from the store, which begins here, if the first
        token comes sooner by it. `match` and `start`: what is here, or will be."""
        request, keys, store = job.request, job.request.keys, link.store
        # Behind pages that are here or will have been read: pages to be computed may come later than those read.
        first = self.radix.match(keys).num_pages
        while first < len(keys) and keys[first] in self._coming_from_store:
            first += 1
        depth = store.reach(keys, first=first)
        tail_depth = store.deepest_tail(keys[:depth])
        if tail_depth <= match.resumable:
            tail_depth = 0
        tails = (*match.tail_depths, tail_depth) if tail_depth else match.tail_depths
        num_pages = max(match.num_pages, depth)
        stored = self._start(request, replace(match, num_pages=num_pages, tail_depths=tails))
        if stored.num_tokens_computed >= start.num_tokens_computed:
            return start
        depth = depth if stored.kind is StartKind.REBUILD else max(stored.tail_depth, first)
        tail_depth = tail_depth if stored.tail_depth == tail_depth else 0
        num_bytes = (depth - first) * self._page_bytes + (self.config.tail_bytes if tail_depth else 0)
        seconds = link.read_seconds(now, num_bytes)
        wait = self.wait_seconds(now)
        if max(wait, seconds) + self._work(request, stored) >= wait + self._work(request, start):
            return start
        items = [page_item(key) for key in reversed(keys[first:depth])]
        if tail_depth:
            items.append(tail_item(keys[tail_depth - 1]))
        job.ready = link.begin_read(now, items, seconds=seconds)
        job.read = StoreRead(first=first, depth=depth, tail_depth=tail_depth)
        self._coming_from_store.update(keys[first:depth])
        return stored

    def _work(self, request: Request, start: Start) -> float:
        tokens = start.num_tokens_computed
        return float(self.config.model.work_seconds(tokens, request.num_tokens - tokens))

    def _match_to_come(self, request: Request) -> Match:
        """What will be there once the prompts queued before have been computed."""
        match = self.radix.match(request.keys)
        now = Found(
            pages_W=np.array([match.num_pages], np.int32), tail_W=np.array([match.resumable], np.int32)
        )
        coming = self._coming.added_to(now, request.keys)
        num_pages, tail = int(coming.pages_W[0]), int(coming.tail_W[0])
        tails = match.tail_depths if tail <= match.resumable else (*match.tail_depths, tail)
        return replace(match, num_pages=num_pages, tail_depths=tails)

    def _start(self, request: Request, match: Match) -> Start:
        rebuild_pages = self.config.model.costs.rebuild_pages
        return cheapest_start(match, num_tokens=request.num_tokens, rebuild_pages=rebuild_pages)

    def _expect(self, job: Job, start: Start) -> None:
        """Count the prompt, or count it anew, by what would have to be computed now."""
        self._forget(job, tokens=job.tokens_left, seconds=job.seconds_left)
        num_tokens = job.request.num_tokens
        job.tokens_left = start.num_tokens_computed
        job.seconds_left = float(
            self.config.model.work_seconds(job.tokens_left, num_tokens - job.tokens_left)
        )
        self.queued_tokens += job.tokens_left
        self.queued_seconds += job.seconds_left

    def _forget(self, job: Job, *, tokens: int, seconds: float) -> None:
        job.tokens_left -= tokens
        job.seconds_left -= seconds
        self.queued_tokens -= tokens
        self.queued_seconds = max(self.queued_seconds - seconds, 0.0)

    def _begin(self, job: Job) -> bool:
        """False when it waits for pages that another prompt is computing."""
        request = job.request
        match = self.radix.match(request.keys)
        if self.in_progress.ask(request.number, request.keys[match.num_pages :]) is not None:
            self.waiting.add(request.number)
            return False
        start = self._start(request, match)
        pin = self.radix.pin(request.keys, num_pages=start.reuse_depth, tail_depth=start.tail_depth)
        if job.pin is not None:
            self.radix.release(job.pin)
        job.pin, job.start, job.num_matched = pin, start, match.num_pages
        job.position = start.from_depth * PAGE_TOKENS
        job.plans = plan_tails(
            num_pages=request.num_pages,
            match=match,
            start=start,
            policy=self.config.tails,
            num_tails_free=1 << 30,
        )
        self._expect(job, start)
        return True

    def _advance(self, job: Job, count: int) -> None:
        assert job.start is not None
        assert job.pin is not None
        job.position += count
        keys = job.request.keys
        depth = job.position // PAGE_TOKENS
        first = job.pin.num_pages
        if depth > first and job.keeps_pages:
            job.keeps_pages = self._extend(job.pin, keys[first:depth])
            wanted = set(self.in_progress.tails_wanted(job.request.number))
            job.plans += tuple(
                TailPlan(depth=place, kind=TailKind.BRANCH)
                for place in range(first + 1, depth + 1)
                if keys[place - 1] in wanted and place <= job.pin.num_pages
            )
        for plan in job.plans:
            if plan.depth <= min(depth, job.pin.num_pages) and self._keep_tail(
                keys[plan.depth - 1], plan.kind
            ):
                job.tails_taken += (plan.depth,)
        job.plans = tuple(plan for plan in job.plans if plan.depth > depth)
        for key in keys[first:depth]:
            self.waiting.difference_update(self.in_progress.completed(job.request.number, key))

    def _finish(self, job: Job) -> None:
        assert job.pin is not None
        if self.link is not None and self.link.config.write is StoreWrite.PROMPT_END:
            self._to_store += self._items_of(job, job.pin.num_pages, self.link)
        self.radix.release(job.pin)
        job.pin = None
        self.queue.remove(job)
        self._coming.forget(job.request.number)
        self.waiting.difference_update(self.in_progress.end(job.request.number))
        self.active_pages -= job.request.num_pages
        self._forget(job, tokens=job.tokens_left, seconds=job.seconds_left)

    def _items_of(self, job: Job, num_pages: int, link: StoreLink) -> list[StoreItem]:
        """All pages of a prompt, the tails taken of it, and those for the store alone. The tail it was resumed from is
        used, and not written again: the next turn resumes deeper."""
        assert job.start is not None
        keys, tails = job.request.keys, {*job.tails_taken}
        end = len(keys) - len(keys) % self.config.tails.end_multiple
        # Where computing was exact, and further on than a tail that the prompt began with.
        first = max(job.start.exact_depth, job.start.tail_depth + 1)
        extra = [depth for depth in link.config.extra_tails(end) if first <= depth <= num_pages]
        tails.update(extra[: link.config.tails_max])
        resumed = job.start.tail_depth
        if resumed and tail_item(keys[resumed - 1]) in link.store:
            tails.add(resumed)
        items: list[StoreItem] = []
        for depth in range(num_pages, 0, -1):
            if depth in tails:
                items.append(tail_item(keys[depth - 1]))
            items.append(page_item(keys[depth - 1]))
        return items

    def _extend(self, pin: Pin, keys: Sequence[PageKey]) -> bool:
        """False when pinned pages leave no room for some of them."""
        self._make_room(len(keys) * self._page_bytes)
        room = (self.config.budget_bytes - self.radix.num_bytes) // self._page_bytes
        for key in keys[:room]:
            self.radix.extend(pin, key, PageId(self._new_id()))
        return room >= len(keys)

    def _keep_tail(self, key: PageKey, kind: TailKind) -> bool:
        """False when pinned pages and tails leave no room for it."""
        has_room = self._make_room(self.config.tail_bytes)
        if has_room:
            self.radix.insert_tail(key, RecordId(self._new_id()), kind=kind)
        return has_room

    def _make_room(self, num_bytes: int) -> bool:
        """Evict until so many bytes are free; False when what is pinned leaves fewer."""
        over = self.radix.num_bytes + num_bytes - self.config.budget_bytes
        if over > 0:
            self.radix.evict_cheapest(over)
        return self.radix.num_bytes + num_bytes <= self.config.budget_bytes

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

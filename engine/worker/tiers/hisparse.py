"""Which running sequences have their C4 rows in host memory: HiSparse, as a plain state machine. Pure; owned by the
scheduler, and called by nothing else.

Everybody is **resident** first: all its pages are on the device, and nothing here costs anything. When pages run short,
before anybody is preempted or made to wait, the **coldest** running sequence **spills**: the longest one, which gives
most pages for one hot buffer, and of which each step touches the smallest part; those that decode before those whose
prompt is still computed, since others may wait for that. Its full pages whose results are in are copied to host
memory (ahead, a little by each plan, as soon as pages become few); then it keeps of them on the device thin pages, and
as many whole ones as its hot rows take (`engine.spilled`). What it completes from then on follows page by page. When
there is room again for long, it **returns**.

Host pages of a sequence that is spilled are those of the host tier, under the same keys, held as long as they are read:
they are found there by the next sequence that begins alike, and written to the store. Where host memory has no room, or
nothing is gained, a sequence stays as it is, and the worker does what it does without HiSparse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from engine.plan import Copies, PageCopy, RecordCopy, Spill, StepResult, Unspill
from engine.worker.cache.prefix_cache import Departed, PageFacts, PrefixCache
from engine.worker.events import SequenceKey
from engine.worker.holdings import Holdings
from engine.worker.sequences import Phase, Sequence, Spilled
from engine.worker.tiers.host_tier import HostTier
from kvstore.shadow_radix import EvictedPage, Match, Start
from kvstore.tiers import HostPage, HostTail
from rorqual.model_config import PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class HiSparseConfig:
    """What a rank has for it, and when it is used."""

    num_thin_pages: int
    num_buffers: int  # sequences spilled at once
    num_hot_pages: int  # of each, whole ones
    few_pages: float = 1 / 8  # of all whole pages: with fewer free ones, the coldest is copied ahead
    many_pages: float = 1 / 2  # of all whole pages: so many are left free when one returns
    copy_bytes_max: int = 16 * 1024 * 1024  # ahead by one plan, and as many back


@dataclass(slots=True, kw_only=True)
class HiSparseCounts:
    """Since the worker started."""

    num_spills: int = 0
    num_returns: int = 0
    num_starts: int = 0  # of sequences that were spilled from the start
    pages_spilled: int = 0
    rows_hit: int = 0  # picked rows of spilled sequences found on the device, over all layers
    rows_missed: int = 0  # copied from host memory
    rows_useful: int = 0  # brought in ahead, and wanted
    rows_wasted: int = 0  # brought in ahead, and evicted before


@dataclass(frozen=True, slots=True, kw_only=True)
class HiSparseState:
    """For whoever watches a worker. Where it is off: nothing."""

    num_spilled: int = 0  # sequences
    num_buffers: int = 0
    num_thin_pages: int = 0
    num_thin_pages_free: int = 0
    num_host_pages: int = 0  # held for them
    counts: HiSparseCounts = field(default_factory=HiSparseCounts)


class HiSparse:
    def __init__(
        self, config: HiSparseConfig, tier: HostTier, holdings: Holdings, cache: PrefixCache
    ) -> None:
        self.config = config
        self.counts = HiSparseCounts()
        self._tier = tier
        self._holdings = holdings
        self._cache = cache
        self._free_buffers = list(reversed(range(config.num_buffers)))
        self._left_buffers: list[int] = []  # free from the next plan on: this one spills before it unspills
        self._following: dict[int, Sequence] = {}  # spilled ones, by hot buffer
        self._may_spill: set[SequenceKey] = (
            set()
        )  # in the plan that is being made, which spills before it opens
        self._num_host_pages = 0
        self._last_applied = 0
        self._spills: list[tuple[Sequence, Spill]] = []  # of the plan that is being made, like the next two
        self._unspills: list[tuple[Sequence, Unspill]] = []
        self._copies: list[PageCopy] = []
        self._records: list[RecordCopy] = []
        self._tails: list[HostTail] = []  # held until they are taken

    @property
    def state(self) -> HiSparseState:
        return HiSparseState(
            num_spilled=len(self._following),
            num_buffers=self.config.num_buffers,
            num_thin_pages=self.config.num_thin_pages,
            num_thin_pages_free=self._holdings.num_thin_free,
            num_host_pages=self._num_host_pages,
            counts=self.counts,
        )

    def follow(self, running: Collection[Sequence], *, is_anybody_waiting: bool) -> None:
        """At the start of a plan: what spilled sequences have completed follows; with few pages left the coldest
        resident one is copied ahead; with many, one returns."""
        self._may_spill = {sequence.key for sequence in running if sequence.is_opened}
        for sequence in list(self._following.values()):
            if sequence.phase is Phase.RUNNING:
                self._follow(sequence)
        num_free, num_pages = self._holdings.num_pages_free, self._holdings.num_pages
        if num_free < self.config.few_pages * num_pages:
            self._copy_ahead(running)
        elif self._following and not is_anybody_waiting:
            self._return_one(num_free - int(self.config.many_pages * num_pages))

    def relieve(self, running: Iterable[Sequence]) -> bool:
        """Pages run short: whoever is coming back stays, or the coldest sequence spills in the plan that is being made.
        False: none can."""
        if any(self._stop_return(sequence) for sequence in self._following.values()):
            return True
        return any(self._spill(sequence) for sequence in self._coldest(running))

    def start(self, sequence: Sequence) -> Start | None:
        """Start the sequence that waits next, and finds too few pages to be resident, spilled: with what host memory
        has of it. None: it waits on."""
        index, num_hot = self._tier.index, self.config.num_hot_pages
        if not self._free_buffers or sequence.is_adopting or sequence.is_lending or not sequence.can_share:
            return None
        below = index.match(sequence.keys, 0)
        match = Match(num_pages=below.num_pages, tail_depths=below.tail_depths, is_branch=False)
        start = self._cache.start_at(sequence, match)
        if start.from_depth < num_hot or start.reuse_depth <= num_hot:
            return None
        keys = sequence.keys[: start.reuse_depth]
        # Held first: what is evicted to make room comes down here, and must not push out what is wanted.
        pages = [index.pin_page(key) for key in keys]
        tail = index.pin_tail(keys[start.tail_depth - 1]) if start.tail_depth else None
        is_started = self._holdings.start_spilled(sequence, start, num_hot=num_hot)
        if is_started:
            self._begin_spilled(sequence, pages, tail)
        else:
            for page in reversed(pages):
                index.unpin_page(page)
        if tail is not None:
            self._tails.append(tail)  # copied by the plan that is being made, or not at all
        return start if is_started else None

    def _begin_spilled(self, sequence: Sequence, pages: list[HostPage], tail: HostTail | None) -> None:
        """The next plan copies all but C4 rows to the device, the plan that opens it says the rest."""
        number = self._holdings.newest_plan + 1
        for host_page, page in zip(pages, sequence.pages, strict=False):
            self._copies.append(PageCopy(page=page, host_page=host_page.page))
            self._tier.used(host_page, number)
        if tail is not None:
            assert sequence.record is not None
            self._records.append(
                RecordCopy(record=sequence.record, host_record=tail.record, num_bytes=tail.num_bytes)
            )
            self._tier.used(tail, number)
        buffer = self._free_buffers.pop()
        sequence.spilled = Spilled(host_pages=pages, buffer=buffer, num_pages=len(pages))
        self._following[buffer] = sequence
        self._num_host_pages += len(pages)
        self.counts.num_starts += 1

    def num_pages_more(self, running: Iterable[Sequence]) -> int:
        """Pages that sequences can hold beyond the whole ones: thin ones of those that have spilled, and of the longest
        ones that could."""
        config, holdings = self.config, self._holdings
        gains = [item.pin.num_pages - config.num_hot_pages for item in self._coldest(running) if item.pin]
        num_possible = sum(gains[: len(self._free_buffers)])
        return config.num_thin_pages - holdings.num_thin_free + min(num_possible, holdings.num_thin_free)

    def absorb(self, sequence: Sequence, digests: Several[tuple[int, ...]]) -> None:
        """Results of a sequence that may be spilled are in; `digests` of the newest full pages."""
        state = sequence.spilled
        if state is None or state.buffer is None:
            return
        num_pages = sequence.num_landed // PAGE_TOKENS
        for number, found in enumerate(digests, start=num_pages - len(digests)):
            # Before it is known how many drafts were accepted these are taken for those of pages before them.
            if number >= len(state.host_pages):
                state.digests.setdefault(number, found)

    def leave(self, sequence: Sequence) -> None:
        """It ends or is preempted, and still holds its pages. What it has completed and not copied yet is copied by the
        next plan."""
        state = sequence.spilled
        self._spills = [item for item in self._spills if item[0] is not sequence]
        self._unspills = [item for item in self._unspills if item[0] is not sequence]
        if state is None:
            return
        self._stop_return(sequence)
        own = set(sequence.pages)
        self._copies = [item for item in self._copies if item.page not in own]
        self._records = [item for item in self._records if item.record != sequence.record]
        if state.buffer is not None:
            for number in range(state.num_pages, sequence.num_landed // PAGE_TOKENS):
                if not self._offer(sequence, number):
                    break
            del self._following[state.buffer]
            self._free_buffers.append(state.buffer)
        self._let_go(sequence, state)

    def take(self) -> tuple[tuple[Spill, ...], tuple[Unspill, ...], Copies]:
        """Of the plan that is being made; the copies are promotions. What was to spill, and has planned its last token
        since, is closed by this plan."""
        spills = tuple(item for sequence, item in self._spills if sequence.phase is Phase.RUNNING)
        copies = Copies(pages=tuple(self._copies), records=tuple(self._records))
        taken = spills, tuple(item for _, item in self._unspills), copies
        self._spills, self._unspills, self._copies, self._records = [], [], [], []
        for tail in self._tails:
            self._tier.index.unpin_tail(tail)
        self._tails.clear()
        self._free_buffers += self._left_buffers
        self._left_buffers.clear()
        return taken

    def landed(self, result: StepResult) -> None:
        self._last_applied = result.number
        for use in result.hot:
            self.counts.rows_hit += use.num_hits
            self.counts.rows_missed += use.num_misses
            self.counts.rows_useful += use.num_useful
            self.counts.rows_wasted += use.num_wasted

    def check(self) -> None:
        """Assert that everything adds up: for tests."""
        num_free = len(self._free_buffers) + len(self._left_buffers)
        assert num_free + len(self._following) == self.config.num_buffers
        for buffer, sequence in self._following.items():
            state = sequence.spilled
            assert state is not None
            assert state.buffer == buffer
            assert len(state.host_pages) >= state.num_pages
            thin = [self._holdings.is_thin(page) for page in sequence.pages]
            num_hot = self.config.num_hot_pages
            assert not any(thin[:num_hot])
            assert all(thin[num_hot : state.num_pages])
            assert not any(thin[state.num_pages :])

    def _coldest(self, running: Iterable[Sequence]) -> list[Sequence]:
        found = [sequence for sequence in running if self._can_spill(sequence)]
        return sorted(
            found,
            key=lambda item: (item.num_computed < len(item.prompt), -(item.pin.num_pages if item.pin else 0)),
        )

    def _can_spill(self, sequence: Sequence) -> bool:
        """Whether that would free pages: one without anything of the cache has no keys; one that was just restored is
        still read from its tail; of one that replays no page is certain."""
        pin, state, num_hot = sequence.pin, sequence.spilled, self.config.num_hot_pages
        if pin is None or pin.tail is not None or not self._free_buffers:
            return False
        if sequence.phase is not Phase.RUNNING or not sequence.is_opened or sequence.is_lending:
            return False
        if sequence.key not in self._may_spill:
            return False
        if sequence.num_replaying or (state is not None and state.buffer is not None):
            return False
        return num_hot < pin.num_pages <= num_hot + self._holdings.num_thin_free

    def _spill(self, sequence: Sequence) -> bool:
        pin, slot = sequence.pin, sequence.slot
        assert pin is not None
        assert slot is not None
        num_pages = pin.num_pages
        if self._holdings.num_pages_let_go(sequence) <= self.config.num_hot_pages:
            return False
        if not self._copy(sequence, num_pages, num_bytes_max=None):
            return False
        if not self._holdings.spill(sequence, num_pages, num_hot=self.config.num_hot_pages):
            return False
        self._cache.leave(sequence)
        state = sequence.spilled
        assert state is not None
        state.buffer = buffer = self._free_buffers.pop()
        state.num_pages = num_pages
        self._following[buffer] = sequence
        self.counts.num_spills += 1
        self._plan_spill(sequence, state, first=0)
        return True

    def _follow(self, sequence: Sequence) -> None:
        state = sequence.spilled
        assert state is not None
        if state.returning:
            self._bring_back(sequence, state)
            return
        first = state.num_pages
        while state.num_pages < sequence.num_landed // PAGE_TOKENS and self._holdings.num_thin_free:
            if not self._offer(sequence, state.num_pages):
                break
            self._holdings.thin(sequence, state.num_pages)
            state.num_pages += 1
        if state.num_pages > first:
            self._plan_spill(sequence, state, first=first)

    def _plan_spill(self, sequence: Sequence, state: Spilled, *, first: int) -> None:
        assert sequence.slot is not None
        assert state.buffer is not None
        self.counts.pages_spilled += state.num_pages - first
        item = Spill(
            slot=sequence.slot,
            buffer=state.buffer,
            first=first,
            pages=tuple(sequence.pages[first : state.num_pages]),
            host_pages=tuple(item.page for item in state.host_pages[first : state.num_pages]),
        )
        self._spills.append((sequence, item))

    def _copy_ahead(self, running: Iterable[Sequence]) -> None:
        room = self.config.copy_bytes_max
        coldest = self._coldest(running)
        if coldest and coldest[0].pin is not None:
            self._copy(coldest[0], coldest[0].pin.num_pages, num_bytes_max=room)

    def _copy(self, sequence: Sequence, num_pages: int, *, num_bytes_max: int | None) -> bool:
        """The first pages of a resident sequence come to be held in host memory, as many as may be copied now. Whether
        they all are."""
        state = sequence.spilled
        if state is None:
            state = sequence.spilled = Spilled()
        room = num_bytes_max
        while len(state.host_pages) < num_pages:
            if room is not None and room <= 0:
                return False
            key = sequence.keys[len(state.host_pages)]
            if not self._tier.index.state(key)[0]:
                found = self._cache.look(key, page=True, tail=False)
                assert found is not None, "a page that is pinned is not there"
                if not self._tier.keep(found):
                    return False
                if room is not None:
                    room -= self._cache.config.costs.page_bytes
            self._hold(sequence, state)
        return True

    def _offer(self, sequence: Sequence, number: int) -> bool:
        """The next page of a spilled sequence, which only it has, comes to be held in host memory. False: there is no
        room."""
        state = sequence.spilled
        assert state is not None
        self._cache.extend_keys(sequence, (number + 1) * PAGE_TOKENS)
        if number < len(state.host_pages):
            return True
        key = sequence.keys[number]
        if not self._tier.index.state(key)[0]:
            item = EvictedPage(
                page=sequence.pages[number],
                key=key,
                parent=sequence.keys[number - 1],
                hits=0,
                worth=state.host_pages[-1].worth,
            )
            facts = PageFacts(digests=state.digests.pop(number, None), tenant=sequence.tenant)
            if not self._tier.keep(Departed(pages=((item, facts),))):
                return False
        self._hold(sequence, state)
        return True

    def _hold(self, sequence: Sequence, state: Spilled) -> None:
        state.host_pages.append(self._tier.index.hold_page(sequence.keys[len(state.host_pages)]))
        self._num_host_pages += 1

    def _let_go(self, sequence: Sequence, state: Spilled) -> None:
        """Plans in flight may still read what it held."""
        for item in state.host_pages:
            self._tier.used(item, self._holdings.newest_plan)
            self._tier.index.unpin_page(item)
        self._num_host_pages -= len(state.host_pages)
        sequence.spilled = None

    def _return_one(self, num_pages_max: int) -> None:
        """The shortest one, if it fits: it has the least use of being spilled."""
        spilled = [item for item in self._following.values() if item.phase is Phase.RUNNING]
        for sequence in sorted(spilled, key=lambda item: len(item.pages)):
            state = sequence.spilled
            assert state is not None
            is_whole = sequence.is_opened and state.num_pages <= sequence.num_landed // PAGE_TOKENS
            if state.returning or state.num_pages < len(state.host_pages) or not is_whole:
                return
            num_more = state.num_pages - self.config.num_hot_pages
            if num_more <= num_pages_max and self._holdings.begin_return(state.num_pages, state.returning):
                self._bring_back(sequence, state)
            return

    def _stop_return(self, sequence: Sequence) -> bool:
        """It stays where it is, if it was coming back. Whether it was."""
        state = sequence.spilled
        if state is None or not state.returning:
            return False
        self._copies = [item for item in self._copies if item.page not in state.returning]
        self._holdings.end_return(state.returning)
        state.returning.clear()
        state.num_back = 0
        return True

    def _bring_back(self, sequence: Sequence, state: Spilled) -> None:
        """What it returns into is copied, by as many plans as that takes. It is read there, by it and by others, when
        all copies are made."""
        room, page_bytes = self.config.copy_bytes_max, self._cache.config.costs.page_bytes
        if state.num_back == len(state.returning):
            if state.last_copy <= self._last_applied:
                self._end_return(sequence, state)
            return
        state.last_copy = self._holdings.newest_plan + 1
        while state.num_back < len(state.returning) and room > 0:
            source, target = state.host_pages[state.num_back], state.returning[state.num_back]
            self._copies.append(PageCopy(page=target, host_page=source.page))
            state.num_back += 1
            room -= page_bytes

    def _end_return(self, sequence: Sequence, state: Spilled) -> None:
        """It is as any other again, and what it has computed is in the cache."""
        assert sequence.slot is not None
        assert state.buffer is not None
        self._unspills.append((sequence, Unspill(slot=sequence.slot, pages=tuple(state.returning))))
        self._holdings.unspill(sequence, tuple(state.returning))
        state.returning.clear()
        del self._following[state.buffer]
        self._left_buffers.append(state.buffer)
        self._may_spill.discard(sequence.key)
        self.counts.num_returns += 1
        known = [item.digests for item in state.host_pages]
        num_landed = sequence.num_landed // PAGE_TOKENS
        known += [state.digests.get(number) for number in range(len(known), num_landed)]
        self._let_go(sequence, state)
        sequence.pin = self._cache.hold(sequence.keys, num_pages=0)
        digests = [item for item in known if item is not None]
        self._cache.absorb(sequence, digests if len(digests) == len(known) else ())

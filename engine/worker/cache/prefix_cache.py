"""What a worker's scheduler keeps of finished prefixes, and who is computing which: pure, and no ids of its own.

`engine.worker.holdings` owns it; `engine.worker.admission` asks it where a sequence can start, and the scheduler tells
it what has been computed. It puts sequences' full pages into the index (`kvstore.shadow_radix`) once their results are
in, and so only what is certain: no draft, nothing that is still on its way. It holds pages and tails for sequences by
pins, and never frees an id: what is evicted goes back through `holdings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Protocol

from engine.worker.sequences import Sequence
from kvstore.keys import PageKey, page_keys, root_key
from kvstore.shadow_radix import (
    Changes,
    Costs,
    Evicted,
    EvictedPage,
    EvictedTail,
    InProgress,
    Match,
    Pin,
    ShadowRadix,
    Start,
    StartKind,
    TailKind,
    TailPolicy,
    cheapest_start,
    plan_tails,
)
from kvstore.store.contract import TenantLabel, tenant_label
from rorqual.ids import PageId, RecordId
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray

_NOTHING = Match(num_pages=0, tail_depths=(), is_branch=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Root ingredients of page keys, what keeping costs, and which tails are taken."""

    fingerprint: str
    numerics: str
    wire_id: str
    costs: Costs
    policy: TailPolicy = field(default_factory=TailPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where a sequence can start, as long as nothing is evicted."""

    match: Match
    start: Start


@dataclass(slots=True, kw_only=True)
class CacheCounts:
    """Since the worker started. Pages are full pages of prompts, and of what preempted sequences had generated."""

    pages_hit: dict[StartKind, int] = field(
        default_factory=dict[StartKind, int]
    )  # not computed, by kind of start
    pages_missed: int = 0
    tokens_reused: int = 0
    tokens_computed: int = 0  # of prompts: replayed ones too
    pages_evicted: int = 0
    tails_evicted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheState:
    """For whoever watches a worker. Of a cache that is off: nothing."""

    num_pages: int = 0
    num_tails: int = 0
    num_bytes: int = 0  # of pages and tails
    counts: CacheCounts = field(default_factory=CacheCounts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What a reader of a tail's record must know of it."""

    num_bytes: int
    digest: int  # unsigned 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLoan:
    """Pages and a tail that others may read while the pin is held: `PrefixCache.take_back` ends it."""

    pin: Pin
    pages: tuple[PageId, ...]  # from the first one asked for on
    digests: tuple[int, ...]  # of each page one for each paged component
    tail_depth: int  # in pages from the start of the path; 0: there is no tail
    record: RecordId | None
    packed: Packed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """What is known of a kept page besides its key: where it is not, nobody may be told of it."""

    digests: tuple[int, ...] | None  # one for each paged component
    tenant: TenantLabel  # whose prompts it is of


@dataclass(frozen=True, slots=True, kw_only=True)
class Departed:
    """What has been evicted, and what was known of its bytes: ids that are the caller's again."""

    pages: tuple[tuple[EvictedPage, PageFacts], ...] = ()
    tails: tuple[tuple[EvictedTail, Packed | None, TenantLabel], ...] = ()


class Below(Protocol):
    """A tier that keeps what is evicted here: `kvstore.tiers.HostIndex`. It says so before it changes."""

    def state(self, key: PageKey) -> tuple[bool, bool]:
        """Whether it has the page of this key, and the tail behind it."""
        ...

    def contents(self) -> Iterator[tuple[PageKey, bool]]:
        """Every page that it has, and whether its tail is there."""
        ...


class PrefixCache:
    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.counts = CacheCounts()
        self._index = ShadowRadix(costs=config.costs)
        self._in_progress: InProgress[Sequence] = InProgress()
        self._digests: dict[PageId, tuple[int, ...]] = {}  # of pages in the index, where they are known
        self._tenants: dict[PageId, TenantLabel] = {}  # of pages in the index
        self._packed: dict[RecordId, Packed] = {}  # of tails in the index, where it is known
        self._below: Below | None = None  # the tier that takes what is evicted here
        self._orphans: set[Pin] = set()  # whose sequences are gone while a plan reads their tails

    @property
    def state(self) -> CacheState:
        costs = self.config.costs
        return CacheState(
            num_pages=self.num_pages,
            num_tails=self.num_tails,
            num_bytes=self.num_pages * costs.page_bytes + self.num_tails * costs.tail_bytes,
            counts=self.counts,
        )

    @property
    def num_pages(self) -> int:
        return self._index.num_pages

    @property
    def num_tails(self) -> int:
        return self._index.num_tails

    @property
    def num_pages_evictable(self) -> int:
        return self._index.num_pages_evictable

    @property
    def num_tails_evictable(self) -> int:
        return self._index.num_tails_evictable

    @property
    def num_pins(self) -> int:
        """Of sequences, of what is lent, and of plans in flight."""
        return self._index.num_pins

    def open(self, sequence: Sequence, *, salt: str) -> None:
        """Before it waits: the keys of its prompt, apart from those of every other salt."""
        config = self.config
        sequence.tenant = tenant_label(salt)
        sequence.root = root_key(
            fingerprint=config.fingerprint, numerics=config.numerics, wire_id=config.wire_id, salt=salt
        )
        self.extend_keys(sequence, len(sequence.prompt))

    def extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        """Keys of all full pages among its first tokens, which are known."""
        assert sequence.root is not None
        first, end = len(sequence.keys), num_tokens // PAGE_TOKENS
        if end > first:
            parent = sequence.keys[-1] if sequence.keys else sequence.root
            tokens = sequence.tokens_of(first * PAGE_TOKENS, end * PAGE_TOKENS)
            sequence.keys.extend(page_keys(parent, tokens))

    def find(self, sequence: Sequence) -> Found:
        """Its cheapest start. Changes nothing but its keys, for tokens it has generated before it was preempted."""
        num_known = sequence.num_known
        self.extend_keys(sequence, num_known)
        match = self._index.match(sequence.keys) if sequence.can_share else _NOTHING
        return Found(match=match, start=self.start_at(sequence, match))

    def start_at(self, sequence: Sequence, match: Match) -> Start:
        """The cheapest one if so much was kept."""
        if sequence.is_adopting:
            shared = min(match.num_pages, sequence.num_full_pages)
            return Start(
                kind=StartKind.COLD, tail_depth=0, from_depth=0, reuse_depth=shared, num_tokens_computed=0
            )
        return cheapest_start(
            match, num_tokens=sequence.num_known, rebuild_pages=self.config.costs.rebuild_pages
        )

    def follows(self, sequence: Sequence, found: Found) -> bool:
        """Whether it had better wait, since another is computing the page it would compute first. If not, the pages
        that it misses are its own to compute, until `leave`."""
        if sequence.is_adopting or not sequence.can_share:
            return False
        sequence.is_following = (
            self._in_progress.ask(sequence, sequence.keys[found.start.reuse_depth :]) is not None
        )
        return sequence.is_following

    def leave(self, sequence: Sequence) -> None:
        """It computes nothing more, or waits for nothing any more. Whoever has waited for it may go on."""
        sequence.is_following = False
        _wake(self._in_progress.end(sequence))

    def num_pages_to_hold(self, keys: Several[PageKey], *, num_pages: int) -> int:
        """Pages that can be evicted now and could not if these first ones of a path were pinned."""
        return self._index.num_pages_to_hold(keys, num_pages=num_pages)

    def num_pages_let_go(self, pin: Pin) -> int:
        """Pages that could be evicted without this pin, and cannot now."""
        return self._index.num_pages_let_go(pin)

    def is_tail_evictable(self, sequence: Sequence, start: Start) -> bool:
        """Whether the tail it would start from counts among those evictable now."""
        return bool(start.tail_depth) and not self._index.is_tail_pinned(sequence.keys[start.tail_depth - 1])

    def pin(self, sequence: Sequence, start: Start) -> tuple[PageId, ...]:
        """Hold for it the pages it shares, which are returned, and the tail it starts from."""
        assert sequence.pin is None
        sequence.pin = self._index.pin(
            sequence.keys, num_pages=start.reuse_depth, tail_depth=start.tail_depth
        )
        return tuple(sequence.pin.pages)

    def started(self, sequence: Sequence, found: Found, *, num_tails_free: int) -> None:
        """It runs from now on: which tails are worth taking, and what starting here was worth."""
        start, counts = found.start, self.counts
        if sequence.is_adopting:
            return
        num_pages = sequence.num_known // PAGE_TOKENS
        plans = plan_tails(
            num_pages=num_pages,
            match=found.match,
            start=start,
            policy=self.config.policy,
            num_tails_free=num_tails_free,
        )
        sequence.tails_planned = {plan.depth: plan.kind for plan in plans}
        counts.pages_hit[start.kind] = counts.pages_hit.get(start.kind, 0) + start.from_depth
        counts.pages_missed += num_pages - start.from_depth
        counts.tokens_reused += start.from_depth * PAGE_TOKENS
        counts.tokens_computed += start.num_tokens_computed

    def tails_within(self, sequence: Sequence, first: int, end: int) -> list[tuple[int, TailKind]]:
        """Depths, in pages, at which a chunk of tokens first .. end-1 should leave a tail, ascending."""
        wanted = dict(sequence.tails_planned)
        for key in self._in_progress.tails_wanted(sequence):
            wanted.setdefault(sequence.keys.index(key) + 1, TailKind.BRANCH)
        return sorted((depth, kind) for depth, kind in wanted.items() if first < depth * PAGE_TOKENS <= end)

    def absorb(self, sequence: Sequence, digests: Several[tuple[int, ...]] = ()) -> None:
        """Take its full pages whose results are in into the index. Where others have put the same content there it
        keeps its own page besides. `digests`: of the newest of these pages, one for each."""
        pin = sequence.pin
        if pin is None:
            return
        num_pages = sequence.num_landed // PAGE_TOKENS
        first = pin.num_pages
        if num_pages <= first:
            return
        self.extend_keys(sequence, num_pages * PAGE_TOKENS)
        for depth in range(first, num_pages):
            key, page = sequence.keys[depth], sequence.pages[depth]
            if self._index.extend(pin, key, page) == page:
                sequence.num_pages_cached += 1
                self._tenants[page] = sequence.tenant
                number = depth - num_pages + len(digests)
                if number >= 0 and digests:
                    self._digests[page] = digests[number]
            _wake(self._in_progress.completed(sequence, key))

    def digests_of(self, sequence: Sequence, first: int, end: int) -> tuple[int, ...]:
        """Of its shared pages number first .. end-1, in order."""
        return tuple(digest for page in sequence.pages[first:end] for digest in self._digests[page])

    def keep_tail(
        self,
        sequence: Sequence,
        depth: int,
        record: RecordId,
        *,
        kind: TailKind,
        packed: Packed | None = None,
    ) -> RecordId | None:
        """The record holds the state at this boundary of the sequence. Returns it where it is of no use: the page
        before it is not kept, or the boundary lies behind the sequence's end."""
        if depth > len(sequence.keys):
            return record
        return self.take_in_tail(sequence.keys[depth - 1], record, kind=kind, packed=packed)

    def take_in_tail(
        self, key: PageKey, record: RecordId, *, kind: TailKind, packed: Packed | None
    ) -> RecordId | None:
        """The record holds the state behind this page. Returns it where it is of no use."""
        unused = self._index.insert_tail(key, record, kind=kind)
        if unused is None and packed is not None:
            self._packed[record] = packed
        return unused

    def keys_of(self, prompt: TokenArray, *, salt: str) -> tuple[PageKey, ...]:
        """Of its full pages."""
        config = self.config
        root = root_key(
            fingerprint=config.fingerprint, numerics=config.numerics, wire_id=config.wire_id, salt=salt
        )
        return page_keys(root, prompt)

    def match(self, keys: Several[PageKey]) -> Match:
        """What is here of a path. Looks only."""
        return self._index.match(keys)

    def hold(self, keys: Several[PageKey], *, num_pages: int) -> Pin:
        """Its first pages, which are here, until `take_back`."""
        return self._index.pin(keys, num_pages=num_pages)

    def take_in(self, pin: Pin, key: PageKey, page: PageId, facts: PageFacts) -> bool:
        """The page that follows on what is held, which is held then too. False: it was here already."""
        is_new = self._index.extend(pin, key, page) == page
        if is_new:
            self._tenants[page] = facts.tenant
            if facts.digests is not None:
                self._digests[page] = facts.digests
        return is_new

    def lend(self, keys: Several[PageKey], *, first: int, wants_tail: bool) -> KeyLoan | None:
        """Of a path: the pages that are here from number `first` on, as far as they could be checked by whoever reads
        them, and the deepest tail that could be. None when that is nothing."""
        match = self._index.match(keys)
        pin = self._index.pin(keys, num_pages=match.num_pages)
        pages = tuple(pin.pages[first:])
        num_known = next((i for i, page in enumerate(pages) if page not in self._digests), len(pages))
        self._index.release(pin)
        num_pages = min(first, match.num_pages) + num_known
        tail_depth = 0
        if wants_tail:
            tail_depth = next((d for d in reversed(match.tail_depths) if d <= num_pages), 0)
        if match.num_pages < first or not (num_known or tail_depth):
            return None
        pin = self._index.pin(keys, num_pages=num_pages, tail_depth=tail_depth)
        packed = self._packed.get(pin.tail) if pin.tail is not None else None
        if packed is None:
            self._index.release_tail(pin)
            tail_depth = 0
            if not num_known:
                self._index.release(pin)
                return None
        return KeyLoan(
            pin=pin,
            pages=pages[:num_known],
            digests=tuple(digest for page in pages[:num_known] for digest in self._digests[page]),
            tail_depth=tail_depth,
            record=pin.tail if tail_depth else None,
            packed=packed,
        )

    def release(self, sequence: Sequence) -> None:
        """It holds nothing of the index any more. A tail that a plan in flight reads stays pinned until `resumed`."""
        pin, sequence.pin = sequence.pin, None
        sequence.num_pages_cached = 0
        if pin is None:
            return
        if pin.tail is not None and sequence.is_opened:
            self._orphans.add(pin)
        else:
            self._index.release(pin)

    def resumed(self, pin: Pin) -> None:
        """The plan that has read its tail is done."""
        if pin in self._orphans:
            self._orphans.remove(pin)
            self._index.release(pin)
        else:
            self._index.release_tail(pin)

    def surrender(self, sequence: Sequence) -> Pin | None:
        """Its pin is the caller's from now on, who releases it by `take_back`."""
        pin, sequence.pin = sequence.pin, None
        sequence.num_pages_cached = 0
        assert pin is None or pin.tail is None, "state is lent while a plan reads what it was made from"
        return pin

    def take_back(self, pin: Pin) -> None:
        self._index.release(pin)

    def evict_pages(self, count: int) -> Departed:
        return self._departed(self._index.evict_pages(count))

    def evict_tail(self) -> Departed:
        return self._departed(self._index.evict_tails(1))

    def _departed(self, evicted: Evicted) -> Departed:
        self.counts.pages_evicted += len(evicted.page_items)
        self.counts.tails_evicted += len(evicted.tail_items)
        tenants = {item.key: self._tenants.pop(item.page) for item in evicted.page_items}
        return Departed(
            pages=tuple(
                (item, PageFacts(digests=self._digests.pop(item.page, None), tenant=tenants[item.key]))
                for item in evicted.page_items
            ),
            tails=tuple(
                (
                    item,
                    self._packed.pop(item.record, None),
                    tenants[item.key] if item.key in tenants else self._tenant_of(item.key),
                )
                for item in evicted.tail_items
            ),
        )

    def look(self, key: PageKey, *, page: bool, tail: bool) -> Departed | None:
        """A page and its tail, as far as they are wanted, as they would be evicted now; they stay. None: the page is
        not here."""
        found = self._index.look(key)
        if found is None:
            return None
        item, its_tail = found
        tenant = self._tenants[item.page]
        facts = PageFacts(digests=self._digests.get(item.page), tenant=tenant)
        return Departed(
            pages=((item, facts),) if page else (),
            tails=((its_tail, self._packed.get(its_tail.record), tenant),) if tail and its_tail else (),
        )

    def _tenant_of(self, key: PageKey) -> TenantLabel:
        """Of a page that is here."""
        found = self._index.look(key)
        assert found is not None, "a tail without its page"
        return self._tenants[found[0].page]

    def join(self, below: Below) -> None:
        """From now on the feed tells what is here or in this tier below."""
        self._below = below
        self._index.join(below.state)

    def has_page(self, key: PageKey) -> bool:
        """Here, not below."""
        return self._index.has_page(key)

    def note(self, key: PageKey) -> None:
        """What the tier below has of this key is about to change."""
        self._index.note(key)

    def take_changes(self) -> Changes:
        """For the feed: what is different from the last time this was called."""
        return self._index.take_changes()

    def contents(self) -> Iterator[tuple[PageKey, int]]:
        """Every page, here or in the tier below, and its flags of the feed. The cache must not change meanwhile."""
        flags = self._index.flags
        for key, _ in self._index.contents():
            yield key, flags(key)
        if self._below is None:
            return
        for key, _ in self._below.contents():
            if not self._index.has_page(key):
                yield key, flags(key)

    def check(self) -> None:
        """Assert that everything adds up. O(pages): for tests."""
        self._index.check()
        self._in_progress.check()
        assert len(self._digests) <= self.num_pages, "digests of pages that are gone"
        assert len(self._tenants) == self.num_pages, "tenants of pages that are gone, or the reverse"
        assert len(self._packed) <= self.num_tails, "digests of tails that are gone"


def _wake(sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        sequence.is_following = False

"""Schedulers with strict fake ranks, and the pipes between them under the test's control; a prefill and a decode one
with a hand-over between them that takes as long as the test says."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from fake_rank import FakeRank
from fake_state import (
    EOS,
    NUM_PAGE_COMPONENTS,
    PAGE_BYTES,
    PAGE_TOKENS,
    REBUILD_TOKENS,
    RECORD_BYTES,
    VOCAB_SIZE,
    Slot,
    answer,
)

from engine.plan import Fetch, RecordFetch, StepPlan
from engine.worker.cache.prefix_cache import CacheConfig
from engine.worker.drafts.policy import DraftPolicy
from engine.worker.events import (
    Adoption,
    Event,
    LentEvent,
    PagesEvent,
    ScoresEvent,
    SequenceKey,
    Surrender,
    TokenEvent,
)
from engine.worker.scheduler import Scheduler
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.tiers.hisparse import HiSparseConfig
from engine.worker.tiers.host_tier import HostTierConfig
from kvstore.shadow_radix import Costs, TailPolicy
from rorqual.feed import ABSENT, HOST_PAGE, HOST_TAIL, TAIL
from rorqual.sampling import SamplingParams
from rorqual.session import Role
from tests.harness.keeping import kept_by

FIRST_HOST_ID = 100_000


def a_prompt(key: int, length: int) -> list[int]:
    return random.Random(key).choices(range(VOCAB_SIZE), k=length)


def a_related_prompt(key: int, length: int) -> list[int]:
    """One of three families; members of one have the beginning in common, and part after 0 to 3 pages and a bit."""
    shared = a_prompt(-1 - key % 3, PAGE_TOKENS * (key // 3 % 4) + 100 * (key % 2))
    return (shared + a_prompt(key, length))[:length]


def a_cache(**policy: int) -> CacheConfig:
    return CacheConfig(
        fingerprint="fake",
        numerics="float32",
        wire_id="fake-wire",
        costs=Costs(
            page_bytes=PAGE_BYTES, tail_bytes=RECORD_BYTES, rebuild_pages=REBUILD_TOKENS // PAGE_TOKENS
        ),
        policy=TailPolicy(**policy),
    )


def a_host_tier(num_pages: int = 64, num_records: int = 16, **options: float) -> HostTierConfig:
    """Of ids that are none of a device's."""
    return HostTierConfig(num_pages=num_pages, num_records=num_records, first_id=FIRST_HOST_ID, **options)


class Bench:
    """A scheduler and a rank, with the pipe of plans and results between them under the test's control."""

    def __init__(
        self,
        *,
        num_pages: int = 16,
        num_slots: int = 4,
        prefill_tokens_max: int = 512,
        role: Role = Role.BOTH,
        num_records: int = 0,
        policy: DraftPolicy | None = None,
        cache: CacheConfig | None = None,
        host_tier: HostTierConfig | None = None,
        hisparse: HiSparseConfig | None = None,
        **options: int,
    ) -> None:
        tokens_max = options.pop("sequence_tokens_max", num_pages * 256)
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_pages=num_pages,
                num_slots=num_slots,
                vocab_size=VOCAB_SIZE,
                sequence_tokens_max=tokens_max,
                eos_token_ids=frozenset({EOS}),
                prefill_tokens_max=prefill_tokens_max,
                role=role,
                num_records=num_records,
                num_page_components=NUM_PAGE_COMPONENTS if num_records else 0,
                cache=cache,
                host_tier=host_tier,
                hisparse=hisparse,
                **options,
            ),
            policy,
        )
        self.rank = FakeRank(
            num_pages=num_pages,
            num_slots=num_slots,
            prefill_tokens_max=prefill_tokens_max,
            num_records=num_records,
            drafts_max=options.get("drafts_max", 0),
            num_host_pages=host_tier.num_pages if host_tier is not None else 0,
            num_host_records=host_tier.num_records if host_tier is not None else 0,
            first_host_id=FIRST_HOST_ID,
            num_thin=hisparse.num_thin_pages if hisparse is not None else 0,
            num_hot_buffers=hisparse.num_buffers if hisparse is not None else 0,
            num_hot_pages=hisparse.num_hot_pages if hisparse is not None else 0,
        )
        self.pipe: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.events: dict[int, list[TokenEvent]] = {}
        self.first_index: dict[int, int] = {}
        self.scores: dict[int, list[float]] = {}
        self.pages: dict[int, list[PagesEvent]] = {}
        self.lent: dict[int, LentEvent] = {}
        self.surrendered: dict[int, Surrender] = {}  # not taken back
        self.adoptions: dict[int, Adoption] = {}
        self.asked: dict[int, tuple[list[int], SamplingParams, str]] = {}  # prompts, and their salts

    def open(
        self,
        key: int,
        prompt: list[int],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        adopt: bool = False,
        salt: str = "",
        **sampling: int,
    ) -> SamplingParams:
        params = SamplingParams(**{"seed": key, **sampling})
        self.scheduler.open(
            SequenceKey(key),
            prompt=np.array(prompt, dtype=np.int32),
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            sampling=params,
            adopt=adopt,
            salt=salt,
        )
        self.asked[key] = prompt, params, salt
        self.events[key] = []
        self.first_index[key] = 0
        self.scores[key] = []
        self.pages[key] = []
        return params

    def send(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.pipe.append(plan)
            self.plans.append(plan)
            if plan.demote:
                kept = kept_by(self.scheduler.cache)
                self.rank.kept[plan.number] = kept.pages, kept.records
        return plan

    def receive(self) -> list[Event]:
        """The rank executes in order, when the test says so."""
        if not self.pipe:
            return []
        events = self.scheduler.apply(self.rank.step(self.pipe.popleft()))
        for number, event in enumerate(events):
            match event:
                case ScoresEvent():
                    self._take_scores(event)
                case PagesEvent():
                    self._take_pages(event)
                case TokenEvent():
                    own = self.events[event.key]
                    assert event.index == self.first_index[event.key] + len(own)
                    own.append(event)
                case LentEvent():
                    before = events[number - 1]
                    assert isinstance(before, TokenEvent)
                    assert (before.key, before.index, before.finish_reason) == (event.key, 0, None)
                    self.lent[event.key] = event
                    self.rank.lend((), event.record)
        self.take_surrendered()
        self.scheduler.check_all()
        if self.scheduler.config.hisparse is not None:
            wipe(self)
        return events

    def cancel(self, key: int) -> bool:
        found = self.scheduler.cancel(SequenceKey(key))
        self.take_surrendered()
        return found

    def take_surrendered(self) -> None:
        for item in self.scheduler.take_surrendered():
            assert item.key not in self.surrendered
            assert item.pages == tuple(page for event in self.pages[item.key] for page in event.pages)
            self.surrendered[item.key] = item

    def take_back(self, key: int) -> None:
        """Nobody reads what was lent of a sequence any more."""
        item = self.surrendered.pop(key)
        self.rank.take_back(item.pages, item.record)
        self.scheduler.take_back(item.record)

    def take_adoptions(self) -> list[Adoption]:
        found = self.scheduler.take_adoptions()
        self.adoptions |= {int(item.key): item for item in found}
        return found

    def run(self, *, steps_max: int = 100_000) -> None:
        self.drain(steps_max=steps_max)
        assert self.scheduler.is_idle
        self.check_empty()

    def drain(self, *, steps_max: int = 100_000) -> None:
        """Until there is nothing to do without somebody else."""
        for _ in range(steps_max):
            while self.send():
                pass
            if not self.pipe:
                return
            self.receive()

    def step(self) -> StepPlan | None:
        plan = self.send()
        self.receive()
        return plan

    def check_empty(self) -> None:
        load = self.scheduler.load()
        assert (load.sequences_running, load.sequences_waiting, load.tokens_waiting) == (0, 0, 0)
        assert load.pages_free == load.pages_total
        assert load.slots_free == load.slots_total
        assert load.pages_leased == 0
        assert self.scheduler.num_records_free == self.scheduler.config.num_records
        assert self.scheduler.num_sequences == 0
        assert self.rank.slots == {}
        check_host_memory(self)

    def tokens(self, key: int) -> list[int]:
        return [event.token_id for event in self.events[key]]

    def _take_scores(self, event: ScoresEvent) -> None:
        """They follow on one another and come before the first token."""
        assert self.events[event.key] == []
        scores = self.scores[event.key]
        assert event.prompt_logprobs.first == len(scores) + 1
        assert len(event.prompt_logprobs.alternatives) == len(event.prompt_logprobs.logprobs) > 0
        scores.extend(event.prompt_logprobs.logprobs)

    def _take_pages(self, event: PagesEvent) -> None:
        """They follow on one another and come before the first token, under one record."""
        assert self.events[event.key] == []
        own = self.pages[event.key]
        assert event.first_page == sum(len(item.pages) for item in own)
        assert {item.record for item in own} <= {event.record}
        assert len(event.digests) == NUM_PAGE_COMPONENTS * len(event.pages) > 0
        own.append(event)
        self.rank.lend(event.pages)


def lending(**options) -> Bench:
    return Bench(**{"num_records": 4, **options}, role=Role.PREFILL)


def adopting(**options) -> Bench:
    return Bench(**{"num_records": 4, **options}, role=Role.DECODE)


@dataclass
class Reading:
    """One hand-over, as the decode worker's host sees it."""

    adoption: Adoption
    num_pages: int = 0  # read, or being read
    fetch: int = 0  # open; 0: none
    is_last: bool = False  # the fetch brings the record
    is_cancelled: bool = False


@dataclass
class Pair:
    """Two workers. A sequence has the same key on both."""

    prefill: Bench
    decode: Bench
    readings: dict[int, Reading] = field(default_factory=dict)
    num_fetches: int = 0

    def bind(self, key: int, prompt: list[int], max_tokens: int, **options: int) -> None:
        self.decode.open(key, prompt, max_tokens, adopt=True, **options)
        self.decode.first_index[key] = 1

    def cancel_decode(self, key: int) -> bool:
        found = self.decode.cancel(key)
        reading = self.readings.get(key)
        if found and reading is not None:
            reading.is_cancelled = True
            if not reading.fetch:
                self._settle(key)
        return found

    def begin(self, key: int) -> bool:
        """Start to read what is offered and not read yet. False when there is nothing, or it is not time."""
        self._note_adoptions()
        reading = self.readings.get(key)
        if reading is None or reading.fetch or reading.adoption.after > self.decode.scheduler.last_applied:
            return False
        offered = self.prefill.pages[key]
        first = max(reading.num_pages, reading.adoption.num_present)
        pages = tuple(page for event in offered for page in event.pages)[first:]
        digests = tuple(item for event in offered for item in event.digests)
        lent = self.prefill.lent.get(key)
        if not pages and lent is None:
            return False
        self.num_fetches += 1
        reading.fetch = self.num_fetches
        reading.is_last = lent is not None
        self.decode.rank.begin_fetch(
            Fetch(
                fetch=self.num_fetches,
                peer=1,
                seconds=10.0,
                source_pages=pages,
                target_pages=reading.adoption.pages[first : first + len(pages)],
                digests=digests[first * NUM_PAGE_COMPONENTS :],
                record=None
                if lent is None
                else RecordFetch(
                    source=lent.record,
                    target=reading.adoption.record,
                    num_tokens=lent.num_tokens,
                    num_bytes=lent.record_bytes,
                    digest=lent.record_digest,
                ),
            )
        )
        reading.num_pages = first + len(pages)
        return True

    def end(self, key: int) -> bool:
        """The bytes of the open read have come. False when there is none."""
        reading = self.readings.get(key)
        if reading is None or not reading.fetch:
            return False
        fetched = self.decode.rank.end_fetch(reading.fetch, self.prefill.rank)
        reading.fetch = 0
        if reading.is_cancelled:
            self._settle(key)
            return True
        assert fetched.error == "", fetched.error
        if reading.is_last:
            del self.readings[key]
            self.decode.scheduler.adopted(SequenceKey(key), tuple(self.prefill.tokens(key)))
            self.prefill.take_back(key)
        return True

    def hand_over(self, key: int) -> None:
        """All at once."""
        self._note_adoptions()
        while self.readings[key].adoption.after > self.decode.scheduler.last_applied:
            self.decode.receive()
        assert self.begin(key)
        assert self.end(key)

    def drain(self) -> None:
        """Let everything that can still come about come about."""
        while True:
            self.prefill.drain()
            self.decode.drain()
            self._note_adoptions()
            if not any(self.end(key) or self.begin(key) for key in list(self.readings)):
                return

    def _settle(self, key: int) -> None:
        del self.readings[key]
        self.decode.scheduler.settle(SequenceKey(key))

    def _note_adoptions(self) -> None:
        for item in self.decode.take_adoptions():
            self.readings[item.key] = Reading(adoption=item)


class FeedMirror:
    """Follows what a scheduler's cache tells routers."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._flags: dict[bytes, int] = {}

    def follow(self) -> None:
        """Every change begins at what was told before, and all of them lead to what is there, in the tier it is in."""
        cache, tier = self._bench.scheduler.cache, self._bench.scheduler.host_tier
        if cache is None:
            return
        changes = cache.take_changes()
        assert not changes.is_overflowed
        for key, before, now in changes.entries:
            assert self._flags.pop(key, ABSENT) == before != now
            if now:
                self._flags[key] = now
        assert self._flags == dict(cache.contents())
        below = {page.key for page in tier.index.pages()} if tier is not None else set()
        assert {key for key in below if not cache.has_page(key)} <= self._flags.keys()
        for key, flags in self._flags.items():
            here = cache.look(key, page=True, tail=True)
            assert bool(flags & HOST_PAGE) == (here is None)
            assert here is not None or key in below
            has_tail_here = here is not None and bool(here.tails)
            has_tail_below = tier is not None and tier.index.state(key)[1]
            assert bool(flags & TAIL) == (has_tail_here or has_tail_below)
            assert bool(flags & HOST_TAIL) == (has_tail_below and not has_tail_here)


def a_hisparse(
    num_thin: int = 64, num_buffers: int = 4, num_hot: int = 1, **options: float
) -> HiSparseConfig:
    return HiSparseConfig(num_thin_pages=num_thin, num_buffers=num_buffers, num_hot_pages=num_hot, **options)


def wipe(bench: Bench) -> None:
    """What nobody has and no plan in flight may use, of the device's pages and the host's, holds nothing any more."""
    scheduler = bench.scheduler
    holdings, tier = scheduler._holdings, scheduler.host_tier
    assert tier is not None
    for pages in (holdings._pages, holdings._thin):
        for page in pages._free:
            if pages.last_plan((page,)) <= scheduler.last_applied:
                bench.rank.memory[page] = None
    for record in holdings._records._free:
        if holdings._record_plans.get(record, 0) <= scheduler.last_applied:
            bench.rank.records[record] = None
    kept = {item.page for item in tier.index.pages()} | tier.index._reserved_pages
    for page in bench.rank.host_memory.pages.keys() - kept:
        if tier._plans.get(page, 0) <= scheduler.last_applied:
            bench.rank.host_memory.pages[page] = None


def check_host_memory(bench: Bench) -> None:
    """Every page and tail that a scheduler at rest has below its cache is where it says, and is what its key stands
    for: tokens of one of the sequences, behind all before them."""
    tier, cache = bench.scheduler.host_tier, bench.scheduler.cache
    if tier is None or cache is None:
        return
    assert tier.is_idle
    assert not any(item.num_pins for item in (*tier.index.pages(), *tier.index.tails()))
    made: dict[bytes, tuple[Slot, int]] = {}
    for number, (prompt, params, salt) in bench.asked.items():
        num_tokens = bench.first_index[number] + len(bench.events[number])
        tokens = prompt + answer(prompt, num_tokens, params, ignore_eos=True)
        slot = Slot(tokens=tokens, num_prompt=len(prompt), sampling=params, tokens_max=len(tokens))
        slot.compute(len(tokens))
        keys = cache.keys_of(np.array(tokens, dtype=np.int32), salt=salt)
        made.update((key, (slot, depth)) for depth, key in enumerate(keys, start=1))
    for page in tier.index.pages():
        slot, depth = made[page.key]
        assert bench.rank.host_memory.pages[page.page] == slot.rows[depth - 1], f"host page {page.page}"
    for tail in tier.index.tails():
        slot, depth = made[tail.key]
        packed = bench.rank.host_memory.records[tail.record]
        assert packed == slot.pack(depth * PAGE_TOKENS), f"host record {tail.record}"

"""Which tokens the rank computes in the next step: the mind of a worker, as a plain state machine.

The host calls it: `open` and `cancel` as commands arrive, `plan` whenever a step may be sent, `apply` when a
result is back. It performs no I/O, reads no clock and draws no randomness: the same calls give the same
plans.

A sequence waits, then runs (it holds a slot and pages), and when its last token has been planned it lands:
its slot and pages are free again while the token is still on its way. Up to `plans_inflight_max` plans are
out at once: the rank executes them strictly in order and keeps the newest token of each slot itself, so the
next decode segment can be planned before the token it reads is known here. The end by `max_tokens` is
therefore known ahead; the end by an end-of-sequence token is seen one step late, and the extra token is
dropped.

With drafts (how many, `engine.worker.drafts.speculation` says) a decode gives one token or more, how many is known
when its result is back. What is known of a sequence meanwhile has a lower bound, which says where it ends at the
latest, and an upper bound, which it holds pages for. Nobody is preempted for the sake of drafts: without a free page
there are fewer, and a sequence whose upper bound alone wants a page waits for its results first.

Who starts next is told in `engine.worker.admission`; how prompts share a step, in `engine.worker.chunks`. A preempted
sequence, the youngest running one (that started to run last), returns to the head of the queue. The oldest one can
thus always get the pages it needs.

With a cache (`engine.worker.cache.prefix_cache`), full pages stay when their sequence has ended, and so do the tails
it has left (`engine.worker.cache.tails`). A page enters the cache when the result that completes it is in: only then
are its tokens certain. So a landing sequence keeps its full pages until its last token is here. Sequences that begin
alike share pages, which nobody writes; what starts between a tail and the end of what is shared replays it. With host
memory below the cache, what is evicted goes there and comes back while a sequence waits, and the longest running
sequences leave some of their state there rather than that anybody is preempted (`engine.worker.tiers.lower_tiers`);
copies alone are worth a step.

On a prefill worker a sequence **lends**: its first token is its last one here. The host is told of every full page
as it is computed and, with the token, of the record that holds the rest of the state. What the host has been told of
may have been lent and is never free again by itself: it is surrendered to the host when the sequence ends, however
it ends, and comes back by `take_back`. All else of a lending sequence is free as usual. A sequence of a single token
needs nobody else, and lends nothing.

On a decode worker a sequence **adopts**: it is given a slot, pages and a record, others read the state of its prompt
into them, and after `adopted` it runs like any other; preempted, it computes its prompt itself. Bytes from elsewhere
are written outside the order of plans, so an adoption says which plan must be done before; and it cannot be
preempted, since a read cannot be stopped. A running sequence that finds no page and nobody younger to take it from
therefore waits, without losing its own, as long as pages are adopting or in quarantine. Cancelled, it leaves pages
and record in quarantine until the host settles them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Several
from itertools import chain

import msgspec

from engine.plan import Sampled, StepPlan, StepResult
from engine.worker.admission import Admission
from engine.worker.adopting import Adopting
from engine.worker.cache.imports import Imports
from engine.worker.cache.prefix_cache import CacheState, PrefixCache
from engine.worker.cache.tails import Tails, digests_by_slot
from engine.worker.chunks import chunk_counts
from engine.worker.drafts.policy import DraftPolicy, FixedDrafts
from engine.worker.drafts.speculation import Speculation
from engine.worker.events import Adoption, Event, SequenceKey, Surrender, TokenEvent
from engine.worker.holdings import Holdings
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.sequences import Phase, Sequence, Step
from engine.worker.telling import lent_event, pages_events, score_events
from engine.worker.tiers.filling import Filling
from engine.worker.tiers.hisparse import HiSparseState
from engine.worker.tiers.host_tier import HostTier
from engine.worker.tiers.lower_tiers import LowerTiers
from engine.worker.tiers.speeds import Speeds
from rorqual.errors import InvalidRequest
from rorqual.ids import RecordId, SlotId
from rorqual.sampling import SamplingParams
from rorqual.session import Load, Role, TokenArray, check_sequence, credit_pages


class Scheduler:
    def __init__(self, config: SchedulerConfig, policy: DraftPolicy | None = None) -> None:
        self.config = config
        self.num_preemptions = 0
        self.is_starved = False  # a running sequence waits for pages that others hold for state to come
        self.last_applied = 0  # number of the newest plan whose result is in
        self.speeds = Speeds(config.speeds)
        self._sequences: dict[SequenceKey, Sequence] = {}
        self._cache = PrefixCache(config.cache) if config.cache is not None else None
        tier: HostTier | None = None
        if self._cache is not None and config.host_tier is not None:
            tier = HostTier(config.host_tier, self._cache)
        self._holdings = Holdings(
            num_pages=config.num_pages,
            num_slots=config.num_slots,
            num_records=config.num_records,
            num_thin=config.hisparse.num_thin_pages if config.hisparse is not None else 0,
            cache=self._cache,
            tier=tier,
        )
        self.imports = Imports(self._holdings, self._cache)
        self._below = LowerTiers(
            config,
            tier,
            holdings=self._holdings,
            cache=self._cache,
            imports=self.imports,
            sequences=self._sequences,
            speeds=self.speeds,
        )
        self._admission = Admission(
            self._holdings,
            self._cache,
            self._below.restoring,
            sequences_waiting_max=config.sequences_waiting_max,
            tokens_waiting_max=config.tokens_waiting_max,
        )
        self._tails = Tails(
            self._holdings,
            self._cache,
            num_held_max=config.num_records - (config.num_slots if config.role is Role.DECODE else 0),
        )
        self._speculation = Speculation(
            policy or FixedDrafts(config.drafts_max),
            self._holdings,
            drafts_max=config.drafts_max,
            rows_max=config.draft_rows_max,
        )
        self._running: dict[SequenceKey, Sequence] = {}  # oldest first
        self._adopting = Adopting(self._holdings)
        self._landing: dict[SequenceKey, Sequence] = {}  # those with pages
        self._closes: list[SlotId] = []  # slots to close on the rank with the next plan
        self._inflight: deque[Step] = deque()
        self._next_number = 1
        self._step_ms = 0.0

    @property
    def num_sequences(self) -> int:
        """Opened and not ended: waiting, adopting, running and landing."""
        return len(self._sequences)

    @property
    def num_lent_pages(self) -> int:
        """Surrendered to the host and not taken back."""
        return self._holdings.num_lent_pages

    @property
    def num_records_free(self) -> int:
        return self._holdings.num_records_free

    @property
    def is_idle(self) -> bool:
        """Nothing to compute, nothing on its way, nothing left open on the rank, nothing with others."""
        is_open = self._sequences or self._inflight or self._closes or not self._below.is_idle
        return self._holdings.is_clear and not is_open

    def open(
        self,
        key: SequenceKey,
        *,
        prompt: TokenArray,
        max_tokens: int,
        ignore_eos: bool,
        sampling: SamplingParams,
        adopt: bool = False,
        salt: str = "",
        num_fetches: int = 0,
    ) -> None:
        """Queue a sequence; with `adopt` one whose prompt is computed elsewhere, and scored there. It shares pages with
        those of the same `salt`. It waits for so many calls of `fetched`. Raises InvalidRequest if it can never be
        served here, Overloaded if the queue is full.
        """
        assert key not in self._sequences, f"sequence {key} opened twice"
        assert not adopt or self.config.role is Role.DECODE
        check_sequence(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            vocab_size=self.config.vocab_size,
            sequence_tokens_max=self.config.sequence_tokens_max,
        )
        if adopt and max_tokens < 2:
            raise InvalidRequest("a sequence of one token ends where its prompt is", field="max_tokens")
        self._admission.check_room(len(prompt))
        if adopt:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        sequence = Sequence(
            key=key,
            prompt=prompt,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            sampling=sampling,
            is_lending=self.config.role is Role.PREFILL and max_tokens > 1,
            is_adopting=adopt,
            num_fetches=num_fetches,
        )
        if self._cache is not None:
            self._cache.open(sequence, salt=salt)
        self._sequences[key] = sequence
        self._admission.add(sequence)

    def fetched(self, key: SequenceKey) -> None:
        """One thing it waited for is in the cache or in host memory, or will not come in time. A sequence that has
        ended is passed over."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            assert sequence.num_fetches > 0, f"sequence {key} does not wait for a read"
            sequence.num_fetches -= 1

    def cancel(self, key: SequenceKey) -> bool:
        """End a sequence now; its pages and slot are free for the next plan, but for what others may be reading or
        writing. False when it has ended already."""
        return self.cancel_all((key,)) == 1

    def cancel_all(self, keys: Iterable[SequenceKey]) -> int:
        """Cancel several at the price of one check. How many had not ended yet."""
        found = [sequence for key in keys if (sequence := self._sequences.get(key)) is not None]
        for sequence in found:
            self._end(sequence)
        self._check()
        return len(found)

    def plan(self) -> StepPlan | None:
        """The next step to send; None when there is nothing to do or enough is in flight."""
        if len(self._inflight) >= self.config.plans_inflight_max:
            return None
        step = Step(number=self._next_number, digest=self._keeps_digests)
        self.is_starved = False
        self._below.begin(self._running.values(), is_anybody_waiting=self._admission.num_waiting > 0)
        self._plan_decodes(step)
        self._admit()
        self._plan_chunks(step)
        copies = self._below.take(step.number, self._admission.first)
        step.has_copies = bool(copies)
        if not step.segments and not step.has_copies and (not self._closes or self._inflight):
            # Closing slots alone is worth a step only when no other step will come to carry it.
            return None
        plan = StepPlan(
            number=step.number,
            closes=tuple(self._closes),
            opens=tuple(step.opens),
            segments=tuple(step.segments),
            demote=copies.demote,
            promote=copies.promote,
            spills=copies.spills,
            unspills=copies.unspills,
        )
        self._closes.clear()
        self._next_number += 1
        self._holdings.planned(step.number)
        self._inflight.append(step)
        for sequence in step.sequences.values():
            sequence.num_inflight += 1
            if sequence.is_planned_to_the_end:
                # Not before the plan is complete: what is freed now may be given away from the next plan on.
                self._land_soon(sequence)
        self._check()
        return plan

    def apply(self, result: StepResult) -> list[Event]:
        """Take in the oldest plan's result; what it did to each sequence that is still wanted: its scores, its full
        pages, its tokens, and then that it can go on elsewhere."""
        assert self._inflight, f"result {result.number} answers no plan"
        step = self._inflight.popleft()
        assert step.number == result.number, f"result {result.number} came for plan {step.number}"
        sampled = step.tokens_of(result)
        lent = {SlotId(item.slot): item for item in result.lent}
        assert lent.keys() == step.lending.keys(), "slots lent are not those planned"
        assert len(result.lent) == len(step.lending), "a slot was lent twice"
        self._step_ms = result.step_ms
        self.last_applied = step.number
        for sequence in step.sequences.values():
            sequence.num_inflight -= 1
        self._free_read(step)
        self._below.landed(result)
        events: list[Event] = []
        if result.prompt_scores:
            events.extend(score_events(step, result.prompt_scores))
        self._tails.note(step, result)
        digests = digests_by_slot(result, per_page=self.config.num_page_components)
        self._absorb_chunks(step, digests)
        for slot, item in lent.items():
            events.extend(
                pages_events(
                    step, slot, item, cache=self._cache, num_components=self.config.num_page_components
                )
            )
        for slot, items in sampled.items():
            sequence = step.sequences[slot]
            tokens = self._land(sequence, items, drafts=step.sampling[slot], digests=digests.get(slot, ()))
            events.extend(tokens)
            if tokens and sequence.is_lending and tokens[-1].finish_reason is None:
                events.append(lent_event(sequence, lent[slot]))
                self._end(sequence)
        self._tails.settle(step)
        self._speculation.learn(step, result)
        self._check()
        return events

    def load(self) -> Load:
        holdings = self._holdings
        remaining = (sequence.num_remaining for sequence in self._running.values())
        return Load(
            sequences_running=len(self._running) + len(self._adopting.sequences),
            sequences_waiting=self._admission.num_waiting,
            tokens_waiting=self._admission.tokens_waiting + sum(count for count in remaining if count > 1),
            pages_free=holdings.num_pages_free,
            pages_total=self.config.num_pages,
            slots_free=holdings.num_slots_free,
            slots_total=self.config.num_slots,
            step_ms=self._step_ms,
            pages_leased=holdings.num_lent_pages + holdings.num_quarantined_pages,
        )

    def take_surrendered(self) -> list[Surrender]:
        """Sequences that have left lent state to the host since the last time: after `apply` and cancels."""
        return self._holdings.take_surrendered()

    def take_back(self, record: RecordId) -> None:
        """Nobody can be reading any more what was surrendered under this record: its own pages are free for the next
        plan, shared ones if no other uses them."""
        self._holdings.take_back(record)
        self._check()

    def take_adoptions(self) -> list[Adoption]:
        """Sequences that have been given room for their state since the last time; whoever can start, starts. To be
        asked after everything that frees something. Each one taken ends in `adopted`, or in a cancel and `settle`."""
        self._admit()
        return self._adopting.take()

    def adopted(
        self, key: SequenceKey, token_ids: tuple[int, ...], digests: Several[tuple[int, ...]] = ()
    ) -> None:
        """The state of the prompt is in the adoption's pages and record, and nothing writes there any more;
        `token_ids` is what was generated so far, `digests` those of its full pages, a tuple for each. Raises
        InvalidRequest, and nothing has changed, when it cannot go on from there."""
        sequence = self._adopting.waiting(key)
        self.config.check_generated(token_ids, max_tokens=sequence.max_tokens)
        del self._adopting.sequences[key]
        sequence.adopt(token_ids)
        self._running[key] = sequence
        self._absorb(sequence, digests)
        self._check()

    def settle(self, key: SequenceKey) -> None:
        """Nothing is read any more into what a sequence held that was cancelled while it adopted, or nothing ever
        was. Due once for every adoption taken that did not come to `adopted`."""
        self._holdings.settle(key)
        self._check()

    @property
    def num_pages_usable(self) -> int:
        """By sequences: what those that run can give way is counted."""
        return self.config.num_pages + self._below.num_pages_more(self._running.values())

    def num_pages_grown(self, keys: Iterable[SequenceKey]) -> int:
        """Pages that these sequences hold beyond what they are charged for by `rorqual.session.credit_pages`."""
        found = (sequence for key in keys if (sequence := self._sequences.get(key)) is not None)
        return sum(max(0, len(item.pages) - credit_pages(len(item.prompt))) for item in found)

    @property
    def cache(self) -> PrefixCache | None:
        """For the feed, which looks only, and for those who lend what is in it. None where it is off."""
        return self._cache

    @property
    def host_tier(self) -> HostTier | None:
        """What of the cache is in host memory. None where it is off."""
        return self._below.tier

    @property
    def filling(self) -> Filling | None:
        """What a store could add to the cache. None without host memory."""
        return self._below.filling

    @property
    def hisparse_state(self) -> HiSparseState:
        return self._below.hisparse_state

    def cache_state(self) -> CacheState:
        return self._cache.state if self._cache is not None else CacheState()

    def check_all(self) -> None:
        """Assert that everything adds up, also what takes long to add up: for tests."""
        self._check()
        self._admission.check()
        if self._cache is not None:
            self._cache.check()
        self._below.check()

    @property
    def _keeps_digests(self) -> bool:
        """Of the pages that it may lend later."""
        return self._cache is not None and (self.config.role is not Role.BOTH or self.config.keeps_digests)

    def _plan_decodes(self, step: Step) -> None:
        """One token for every running sequence whose next token is the only one missing, and drafts behind it. Oldest
        first, so that a victim of preemption is never among those found before."""
        decoding: list[Sequence] = []
        for sequence in list(self._running.values()):
            if sequence.phase is not Phase.RUNNING or (sequence.num_remaining != 1 and sequence.is_paged):
                continue
            if self._grow(sequence) and sequence.num_remaining == 1:
                decoding.append(sequence)
        for sequence, drafts in zip(decoding, self._speculation.choose(decoding), strict=True):
            fitting = self._speculation.fit(sequence, drafts)
            self._tails.give(sequence, self._running.values(), drafts=fitting)
            step.add(sequence, 1, drafts=fitting)

    def _admit(self) -> None:
        """Start waiting sequences while slots, pages and records last."""
        if not self._admission.num_waiting:
            return
        holders = chain(self._running.values(), self._adopting.sequences.values())
        reserve = sum(1 for sequence in holders if sequence.is_near_page_end)
        while (sequence := self._start_next(reserve)) is not None:
            if sequence.is_adopting:
                self._adopting.begin(sequence, last_applied=self.last_applied)
            else:
                self._running[sequence.key] = sequence
            reserve += sequence.is_near_page_end

    def _start_next(self, pages_reserved: int) -> Sequence | None:
        while (sequence := self._admission.start_next(pages_reserved=pages_reserved)) is None:
            if self._admission.short is None:
                return None
            if not self._below.relieve(self._running.values()):
                return self._admission.start_head(self._below.start_spilled)
        return sequence

    def _plan_chunks(self, step: Step) -> None:
        """The next chunk of every running sequence that is still in its prompt, as far as the budget goes; of one whose
        state was there to its last token, the next token."""
        unfinished: list[Sequence] = []
        for sequence in self._running.values():
            if sequence.slot in step.sequences or not sequence.is_paged:
                continue
            if sequence.num_remaining:
                unfinished.append(sequence)
            else:
                step.add(sequence, 0)
        counts = chunk_counts(
            [sequence.num_chunkable for sequence in unfinished],
            budget=self.config.prefill_tokens_max,
            step_number=step.number,
        )
        for sequence, count in zip(unfinished, counts, strict=True):
            if count:
                step.add(sequence, count, tails=self._tails.take(sequence, count))

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the known tokens, at the cost of the youngest if need be. False when that was the sequence,
        or when it waits for pages that come back by themselves, or to hear how many of its drafts were accepted."""
        while not sequence.is_paged:
            if self._holdings.grow(sequence) or self._below.relieve(self._running.values()):
                continue
            if sequence.num_drafting or any(item.pages for item in self._landing.values()):
                return False
            victim = self._running[next(reversed(self._running))]
            if victim is sequence and (self._adopting.sequences or self._holdings.num_quarantined):
                self.is_starved = True
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything away and requeue at the head. What of it nobody has kept until then is computed anew;
        since sampling is a function of the position, the answer stays the same."""
        assert not sequence.is_lending, "a lending sequence has all its pages from the start"
        self._vacate(sequence)
        self._leave(sequence)
        sequence.phase = Phase.WAITING
        self._admission.add_preempted(sequence)
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        """It runs no more."""
        assert sequence.phase is Phase.RUNNING
        del self._running[sequence.key]
        slot = self._holdings.free_slot(sequence)
        if sequence.is_opened:
            self._closes.append(slot)

    def _land_soon(self, sequence: Sequence) -> None:
        """Its last token is planned. The pages that will be full it keeps until it has landed, if there is use for
        them then; the rows of one that will not are, where it lends, in the record before a later plan can overwrite
        them."""
        self._vacate(sequence)
        num_kept = sequence.num_full_pages_max if sequence.is_lending or self._cache is not None else 0
        self._holdings.free_pages(sequence, first=min(num_kept, len(sequence.pages)))
        self._landing[sequence.key] = sequence
        sequence.phase = Phase.LANDING

    def _free_read(self, step: Step) -> None:
        """The rank has read what the step restored sequences from."""
        for record in step.restoring:
            self._holdings.free_record(record)
        if self._cache is not None:
            for pin in step.resuming:
                self._cache.resumed(pin)

    def _absorb_chunks(self, step: Step, digests: Mapping[SlotId, Several[tuple[int, ...]]]) -> None:
        """What the step has computed for good, however many drafts were accepted; and the tails it has taken."""
        for segment in step.segments:
            slot = SlotId(segment.slot)
            sequence = step.sequences[slot]
            if sequence.phase is not Phase.ENDED:
                sequence.note_landed(segment.start + segment.count)
                self._absorb(sequence, digests.get(slot, ()))
        self._tails.keep(step)

    def _absorb(self, sequence: Sequence, digests: Several[tuple[int, ...]] = ()) -> None:
        if self._cache is not None:
            self._cache.absorb(sequence, digests)
            self._below.absorb(sequence, digests)

    def _leave(self, sequence: Sequence) -> None:
        """It holds nothing any more but what plans in flight may write a tail into."""
        self._below.leave(sequence)
        self._tails.part(sequence)
        if self._cache is not None:
            self._cache.leave(sequence)
        self._holdings.free_state(sequence)

    def _land(
        self,
        sequence: Sequence,
        items: list[Sampled],
        *,
        drafts: int,
        digests: Several[tuple[int, ...]] = (),
    ) -> list[TokenEvent]:
        """What a step has sampled of a sequence, in order, until it ends."""
        if sequence.phase is Phase.ENDED:
            return []  # cancelled, or sampled beyond its end-of-sequence token
        assert sequence.is_scored, f"a token came after {sequence.num_scored} of the prompt's scores"
        is_waiting = sequence.phase is Phase.WAITING
        if is_waiting:
            self._admission.count(sequence, -1)
        sequence.land(len(items), drafts=drafts)
        events = sequence.take_tokens(items, self.config.eos_token_ids)
        if is_waiting:
            self._admission.count(sequence, +1)
        sequence.note_landed(len(sequence.prompt) + len(sequence.generated) - 1)
        self._absorb(sequence, digests)
        if events[-1].finish_reason is not None:
            self._end(sequence)
        elif sequence.phase is Phase.RUNNING and sequence.is_planned_to_the_end:
            self._land_soon(sequence)  # more drafts were accepted than could be known when it was planned
        return events

    def _end(self, sequence: Sequence) -> None:
        key = sequence.key
        self._below.ended(sequence)
        match sequence.phase:
            case Phase.WAITING:
                self._admission.remove(sequence)
                if self._cache is not None:
                    self._cache.leave(sequence)
            case Phase.ADOPTING:
                self._adopting.abandon(sequence)
            case Phase.RUNNING:
                self._vacate(sequence)
                self._leave(sequence)
            case Phase.LANDING:
                del self._landing[key]
                self._leave(sequence)
            case Phase.ENDED:
                raise AssertionError(f"sequence {key} ended twice")
        sequence.phase = Phase.ENDED
        self._speculation.forget(key)
        del self._sequences[key]

    def _check(self) -> None:
        self._holdings.check(
            chain(self._running.values(), self._adopting.sequences.values(), self._landing.values()),
            num_records_planned=self._tails.num_parting
            + sum(len(step.restoring) + len(step.tails) for step in self._inflight),
        )

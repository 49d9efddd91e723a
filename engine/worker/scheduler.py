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

Running sequences are always older than waiting ones: admission takes the head of the queue, and a preempted
sequence, the youngest running one, returns to the head. The oldest one can thus always get the pages it
needs.

Prompts share the tokens of a step (`prefill_tokens_max`) so that a long one does not hold up the short ones
behind it, and is not held up by them either: half of the budget, in whole pages, is kept for the oldest
unfinished prompt; the rest goes to the others, the shortest remainder first; what they leave is the oldest
one's again. With an odd number of pages the half is rounded up in every second step, so with a budget of one
page the oldest and the others take turns. The oldest is thus done after twice its own time at most, however
many come after it, and every prompt is the oldest one day. Each chunk ends at a page boundary or the
prompt's end. Admission looks at slots and pages alone; the rank hears of a sequence with its first chunk.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NewType

import msgspec
import numpy as np

from engine.plan import PromptScores, Sampled, Segment, SlotOpen, StepPlan, StepResult
from kvstore.pages import PageAllocator, SlotAllocator, pages_for
from rorqual.errors import Overloaded
from rorqual.ids import PageId, SlotId
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import (
    Alternatives,
    FinishReason,
    Load,
    PromptLogprobs,
    TokenArray,
    alternatives_of,
    check_sequence,
)

SequenceKey = NewType("SequenceKey", int)
"""A sequence on this worker, whatever session it came by. Keys of later sequences are larger."""

RESERVE_TOKENS = PAGE_TOKENS // 4
"""A running sequence within this many tokens of a page boundary keeps one free page from being given to a
newcomer, who would be preempted again within a few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    num_pages: int
    num_slots: int
    vocab_size: int
    sequence_tokens_max: int  # prompt + completion of one sequence; all of it fits into num_pages
    eos_token_ids: frozenset[int]
    prefill_tokens_max: int  # of one step's chunks; decode segments come on top: neither starves the other
    plans_inflight_max: int = 2
    sequences_waiting_max: int = 1024
    tokens_waiting_max: int = 8 * 1024 * 1024  # 32 MB of prompts; a single prompt may always wait

    def __post_init__(self) -> None:
        assert self.prefill_tokens_max > 0
        assert self.prefill_tokens_max % PAGE_TOKENS == 0, "a chunk ends at a page boundary"
        assert self.sequence_tokens_max <= self.num_pages * PAGE_TOKENS
        assert self.plans_inflight_max > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one sequence has landed. The last one has a finish reason; no event follows it."""

    key: SequenceKey
    index: int
    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresEvent:
    """A chunk of a prompt has been scored, where that was asked for. The last one comes before token 0."""

    key: SequenceKey
    prompt_logprobs: PromptLogprobs


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.num_preemptions = 0
        self._pages = PageAllocator(config.num_pages)
        self._slots = SlotAllocator(config.num_slots)
        self._sequences: dict[SequenceKey, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()  # oldest first
        self._tokens_waiting = 0  # of those, prompt and generated; does not change while they wait
        self._running: dict[SequenceKey, _Sequence] = {}  # oldest first
        self._closes: list[SlotId] = []  # slots to close on the rank with the next plan
        self._inflight: deque[_Step] = deque()
        self._next_number = 1
        self._step_ms = 0.0

    @property
    def num_sequences(self) -> int:
        """Opened and not ended: waiting, running and landing."""
        return len(self._sequences)

    @property
    def is_idle(self) -> bool:
        """Nothing to compute, nothing on its way, nothing left open on the rank."""
        return not (self._sequences or self._inflight or self._closes)

    def open(
        self,
        key: SequenceKey,
        *,
        prompt: TokenArray,
        max_tokens: int,
        ignore_eos: bool,
        sampling: SamplingParams,
    ) -> None:
        """Queue a sequence. Raises InvalidRequest if it can never be served here, Overloaded if the queue is
        full."""
        assert key not in self._sequences, f"sequence {key} opened twice"
        check_sequence(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            vocab_size=self.config.vocab_size,
            sequence_tokens_max=self.config.sequence_tokens_max,
        )
        if len(self._waiting) >= self.config.sequences_waiting_max or (
            self._waiting and self._tokens_waiting + len(prompt) > self.config.tokens_waiting_max
        ):
            raise Overloaded(
                f"{len(self._waiting)} sequences with {self._tokens_waiting} tokens are waiting already"
            )
        sequence = _Sequence(
            key=key, prompt=prompt, max_tokens=max_tokens, ignore_eos=ignore_eos, sampling=sampling
        )
        self._sequences[key] = sequence
        self._waiting.append(sequence)
        self._tokens_waiting += sequence.num_known

    def cancel(self, key: SequenceKey) -> bool:
        """End a sequence now; its pages and slot are free for the next plan. False when it has ended
        already."""
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
        step = _Step(number=self._next_number)
        self._plan_decodes(step)
        self._admit()
        self._plan_chunks(step)
        if not step.segments and (not self._closes or self._inflight):
            # Closing slots alone is worth a step only when no other step will come to carry it.
            return None
        plan = StepPlan(
            number=step.number,
            closes=tuple(self._closes),
            opens=tuple(step.opens),
            segments=tuple(step.segments),
        )
        self._closes.clear()
        self._next_number += 1
        self._inflight.append(step)
        for sequence in step.sequences.values():
            sequence.num_inflight += 1
            if sequence.is_planned_to_the_end:
                # Not before the plan is complete: what is freed now may be given away from the next plan on.
                self._release(sequence)
                sequence.phase = _Phase.LANDING
        self._check()
        return plan

    def apply(self, result: StepResult) -> list[ScoresEvent | TokenEvent]:
        """Take in the oldest plan's result; what it did to each sequence that is still wanted, a sequence's
        scores before its token."""
        assert self._inflight, f"result {result.number} answers no plan"
        step = self._inflight.popleft()
        assert step.number == result.number, f"result {result.number} came for plan {step.number}"
        sampled = {SlotId(item.slot) for item in result.sampled}
        assert sampled == step.sampling, f"slots sampled {sampled}, planned {step.sampling}"
        assert len(result.sampled) == len(step.sampling), "a slot was sampled twice"
        self._step_ms = result.step_ms
        for sequence in step.sequences.values():
            sequence.num_inflight -= 1
        scored = self._score(step, result.prompt_scores) if result.prompt_scores else ()
        landed = [self._land(step.sequences[SlotId(item.slot)], item) for item in result.sampled]
        self._check()
        return [*scored, *(event for event in landed if event is not None)]

    def load(self) -> Load:
        remaining = (sequence.num_remaining for sequence in self._running.values())
        return Load(
            sequences_running=len(self._running),
            sequences_waiting=len(self._waiting),
            tokens_waiting=self._tokens_waiting + sum(count for count in remaining if count > 1),
            pages_free=self._pages.num_free,
            pages_total=self._pages.num_total,
            slots_free=self._slots.num_free,
            slots_total=self._slots.num_total,
            step_ms=self._step_ms,
        )

    def _plan_decodes(self, step: _Step) -> None:
        """One token for every running sequence whose next token is the only one missing. Oldest first, so
        that a victim of preemption is never in the step yet."""
        for sequence in list(self._running.values()):
            if sequence.phase is not _Phase.RUNNING or sequence.num_remaining != 1:
                continue
            if self._grow(sequence):
                step.add(sequence, 1)

    def _admit(self) -> None:
        """Start waiting sequences, first come first served, while slots and pages last."""
        if not self._waiting:
            return
        reserve = sum(1 for sequence in self._running.values() if sequence.is_near_page_end)
        while self._waiting:
            sequence = self._waiting[0]
            if sequence.num_inflight:
                return  # preempted: tokens it will resume from are still on their way
            num_pages = pages_for(sequence.num_known)
            if not self._slots.num_free or num_pages + reserve > self._pages.num_free:
                return
            self._waiting.popleft()
            self._tokens_waiting -= sequence.num_known
            self._start(sequence, num_pages)
            reserve += sequence.is_near_page_end

    def _plan_chunks(self, step: _Step) -> None:
        """The next chunk of every running sequence that is still in its prompt, as far as the budget goes."""
        unfinished = [sequence for sequence in self._running.values() if sequence.slot not in step.sequences]
        counts = _chunk_counts(
            [sequence.num_remaining for sequence in unfinished],
            budget=self.config.prefill_tokens_max,
            step_number=step.number,
        )
        for sequence, count in zip(unfinished, counts, strict=True):
            if count:
                step.add(sequence, count)

    def _start(self, sequence: _Sequence, num_pages: int) -> None:
        """All pages of the known tokens are taken now: taking them chunk by chunk would admit too many."""
        slot, pages = self._slots.allocate(), self._pages.allocate(num_pages)
        assert slot is not None
        assert pages is not None
        sequence.start(slot, pages)
        self._running[sequence.key] = sequence

    def _grow(self, sequence: _Sequence) -> bool:
        """Make room for the next token, at the cost of the youngest if need be. False when that was the
        sequence."""
        while len(sequence.pages) < pages_for(sequence.num_computed + 1):
            pages = self._pages.allocate(1)
            if pages is not None:
                sequence.pages.extend(pages)
                continue
            victim = self._running[next(reversed(self._running))]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: _Sequence) -> None:
        """Take everything away and requeue at the head. Prompt and generated tokens are computed anew later;
        since sampling is a function of the position, the answer stays the same."""
        self._release(sequence)
        sequence.phase = _Phase.WAITING
        self._waiting.appendleft(sequence)
        self._tokens_waiting += sequence.num_known
        self.num_preemptions += 1

    def _release(self, sequence: _Sequence) -> None:
        assert sequence.phase is _Phase.RUNNING
        assert sequence.slot is not None
        del self._running[sequence.key]
        self._pages.free(sequence.pages)
        self._slots.free(sequence.slot)
        if sequence.is_opened:
            self._closes.append(sequence.slot)
        sequence.pages = []
        sequence.slot = None

    def _score(self, step: _Step, items: Iterable[PromptScores]) -> list[ScoresEvent]:
        """One event for each sequence whose scores are news: the rank sends them in small parts."""
        parts: dict[int, list[PromptScores]] = {}
        for item in items:
            parts.setdefault(item.slot, []).append(item)
        events: list[ScoresEvent] = []
        for slot, own in parts.items():
            sequence = step.sequences[SlotId(slot)]
            if sequence.phase is _Phase.ENDED:
                continue
            found = sequence.take_scores(own)
            if found is not None:
                events.append(ScoresEvent(key=sequence.key, prompt_logprobs=found))
        return events

    def _land(self, sequence: _Sequence, sampled: Sampled) -> TokenEvent | None:
        sequence.num_promised -= 1
        if sequence.phase is _Phase.ENDED:
            return None  # cancelled, or sampled beyond its end-of-sequence token
        assert sequence.is_scored, f"a token came after {sequence.num_scored} of the prompt's scores"
        index = len(sequence.generated)
        sequence.generated.append(sampled.token_id)
        finish_reason = self._finish_reason(sequence, sampled.token_id)
        if finish_reason is not None:
            self._end(sequence)
        return TokenEvent(
            key=sequence.key,
            index=index,
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            alternatives=sampled.alternatives,
            finish_reason=finish_reason,
        )

    def _finish_reason(self, sequence: _Sequence, token_id: int) -> FinishReason | None:
        if token_id in self.config.eos_token_ids and not sequence.ignore_eos:
            return FinishReason.STOP
        if len(sequence.generated) == sequence.max_tokens:
            return FinishReason.LENGTH
        return None

    def _end(self, sequence: _Sequence) -> None:
        if sequence.phase is _Phase.WAITING:
            self._waiting.remove(sequence)
            self._tokens_waiting -= sequence.num_known
        elif sequence.phase is _Phase.RUNNING:
            self._release(sequence)
        sequence.phase = _Phase.ENDED
        del self._sequences[sequence.key]

    def _check(self) -> None:
        self._pages.check()
        self._slots.check()
        held = sum(len(sequence.pages) for sequence in self._running.values())
        assert not self._tokens_waiting or self._waiting, "tokens wait without a sequence"
        assert held == self._pages.num_in_use, "pages in use are not the running sequences'"
        assert len(self._running) == self._slots.num_in_use, "slots in use are not the running sequences'"


class _Phase(enum.Enum):
    WAITING = "waiting"  # in the queue, holds nothing
    RUNNING = "running"  # holds a slot and pages
    LANDING = "landing"  # its last token is planned, holds nothing
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    key: SequenceKey
    prompt: TokenArray
    max_tokens: int
    ignore_eos: bool
    sampling: SamplingParams
    phase: _Phase = _Phase.WAITING
    generated: list[int] = field(default_factory=list[int])  # tokens that have landed
    num_promised: int = 0  # tokens sampled by plans in flight
    num_inflight: int = 0  # plans in flight that compute something of it
    num_computed: int = 0  # positions computed by the plans made so far, since it last started
    slot: SlotId | None = None
    pages: list[PageId] = field(default_factory=list[PageId])
    is_opened: bool = False  # the rank knows that it has the slot
    num_pages_sent: int = 0
    num_scored: int = 0  # prompt tokens whose scores have been passed on

    @property
    def num_known(self) -> int:
        """Tokens here or on their way."""
        return len(self.prompt) + len(self.generated) + self.num_promised

    @property
    def num_remaining(self) -> int:
        """Tokens known and not computed. One: a decode step, or the last token of a prompt, which is the
        same."""
        return self.num_known - self.num_computed

    @property
    def is_planned_to_the_end(self) -> bool:
        return len(self.generated) + self.num_promised == self.max_tokens

    @property
    def is_scored(self) -> bool:
        return self.sampling.prompt_logprobs is None or self.num_scored == len(self.prompt) - 1

    @property
    def is_near_page_end(self) -> bool:
        """It will ask for another page soon, unless it ends before."""
        num_last = min(self.num_known + RESERVE_TOKENS, len(self.prompt) + self.max_tokens - 1)
        return pages_for(num_last) > len(self.pages)

    def start(self, slot: SlotId, pages: Iterable[PageId]) -> None:
        assert self.num_inflight == 0
        assert self.num_promised == 0
        self.phase = _Phase.RUNNING
        self.slot = slot
        self.pages = list(pages)
        self.is_opened = False
        self.num_pages_sent = 0
        self.num_computed = 0

    def slot_open(self) -> SlotOpen:
        assert self.slot is not None
        assert not self.is_opened
        self.is_opened = True
        tokens = np.concatenate((self.prompt, np.asarray(self.generated, dtype=np.int32)))
        # A resumed sequence whose scores are all out does not pay for them again.
        prompt_logprobs = None if self.is_scored else self.sampling.prompt_logprobs
        return SlotOpen(
            slot=self.slot,
            tokens=tokens.astype("<i4", copy=False).tobytes(),
            num_prompt=len(self.prompt),
            sampling=msgspec.structs.replace(self.sampling, prompt_logprobs=prompt_logprobs),
        )

    def next_segment(self, count: int) -> Segment:
        """The next `count` tokens, with the pages they need that the rank does not know yet."""
        assert self.slot is not None
        assert self.is_opened
        assert count == 1 or self.num_computed % PAGE_TOKENS == 0
        end = self.num_computed + count
        num_pages = pages_for(end)
        segment = Segment(
            slot=self.slot,
            start=self.num_computed,
            count=count,
            pages=tuple(self.pages[self.num_pages_sent : num_pages]),
            sample=end == self.num_known,
        )
        self.num_pages_sent = num_pages
        self.num_computed = end
        self.num_promised += segment.sample
        return segment

    def take_scores(self, parts: Iterable[PromptScores]) -> PromptLogprobs | None:
        """What is new of them: a preempted prompt is scored again from its beginning, in other chunks."""
        first = self.num_scored + 1
        logprobs: list[float] = []
        alternatives: list[Alternatives] = []
        for part in parts:
            num_old = self.num_scored + 1 - part.first
            assert num_old >= 0, f"scores from {part.first} after {self.num_scored}"
            if num_old < len(part.logprobs):
                logprobs.extend(part.logprobs[num_old:])
                alternatives.extend(alternatives_of(pairs) for pairs in part.alternatives[num_old:])
                self.num_scored = part.first - 1 + len(part.logprobs)
        if not logprobs:
            return None
        return PromptLogprobs(first=first, logprobs=tuple(logprobs), alternatives=tuple(alternatives))


@dataclass(slots=True, kw_only=True)
class _Step:
    """A plan while it is made, and what must be remembered of it while it is in flight."""

    number: int
    opens: list[SlotOpen] = field(default_factory=list[SlotOpen])
    segments: list[Segment] = field(default_factory=list[Segment])
    sequences: dict[SlotId | None, _Sequence] = field(default_factory=dict["SlotId | None", "_Sequence"])
    sampling: set[SlotId] = field(default_factory=set[SlotId])

    def add(self, sequence: _Sequence, count: int) -> None:
        if not sequence.is_opened:
            self.opens.append(sequence.slot_open())
        segment = sequence.next_segment(count)
        slot = SlotId(segment.slot)
        assert slot not in self.sequences, f"slot {slot} has two segments in step {self.number}"
        self.segments.append(segment)
        self.sequences[slot] = sequence
        if segment.sample:
            self.sampling.add(slot)


def _chunk_counts(remaining: Sequence[int], *, budget: int, step_number: int) -> list[int]:
    """How much of each unfinished prompt the step computes, by what remains of them, oldest first. The rule
    is in the module's docstring."""
    if not remaining:
        return []
    counts = [0] * len(remaining)
    half = (budget // PAGE_TOKENS + step_number % 2) // 2 * PAGE_TOKENS
    kept = min(remaining[0], half)
    budget -= kept
    for index in sorted(range(1, len(remaining)), key=remaining.__getitem__):
        counts[index] = _chunk_tokens(remaining[index], budget)
        budget -= counts[index]
    counts[0] = _chunk_tokens(remaining[0], budget + kept)
    return counts


def _chunk_tokens(num_remaining: int, budget: int) -> int:
    """The rest if it fits the budget, else as many whole pages as do."""
    return num_remaining if num_remaining <= budget else budget // PAGE_TOKENS * PAGE_TOKENS

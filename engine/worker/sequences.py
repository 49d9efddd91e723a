"""One sequence on a worker, and one step while it is in flight: what the scheduler remembers of them.

Only `engine.worker.scheduler`, `engine.worker.holdings` and `engine.worker.speculation` touch these. A sequence knows
its tokens and what it holds; it never takes or gives back anything itself.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine.plan import PromptScores, Restore, Sampled, Segment, SlotOpen, StepResult
from engine.worker.events import SequenceKey, TokenEvent
from kvstore.pages import pages_for
from rorqual.ids import PageId, RecordId, SlotId
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import Alternatives, FinishReason, PromptLogprobs, TokenArray, alternatives_of

RESERVE_TOKENS = PAGE_TOKENS // 4
"""A running sequence within this many tokens of a page boundary keeps one free page from being given to a
newcomer, who would be preempted again within a few steps."""


class Phase(enum.Enum):
    WAITING = "waiting"  # in the queue, holds nothing
    ADOPTING = "adopting"  # holds a slot, pages and a record, into which its state is read
    RUNNING = "running"  # holds a slot and pages, and a record until it is planned into, or from, it
    LANDING = "landing"  # its last token is planned; holds nothing, or what it lends
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    key: SequenceKey
    prompt: TokenArray
    max_tokens: int
    ignore_eos: bool
    sampling: SamplingParams
    is_lending: bool = False  # ends here with its first token, and goes on elsewhere
    is_adopting: bool = False  # its prompt's state comes from elsewhere, and has not yet
    phase: Phase = Phase.WAITING
    generated: list[int] = field(default_factory=list[int])  # tokens that have landed
    num_promised: int = 0  # tokens sampled by plans in flight, at least: one by each that samples
    num_drafting: int = 0  # drafts of plans in flight: so many more they may give at most
    num_inflight: int = 0  # plans in flight that compute something of it
    num_computed: int = (
        0  # positions computed for good by the plans made so far, at least, since it last started
    )
    slot: SlotId | None = None
    pages: list[PageId] = field(default_factory=list[PageId])
    record: RecordId | None = None
    is_opened: bool = False  # the rank knows that it has the slot
    num_pages_sent: int = 0
    num_scored: int = 0  # prompt tokens whose scores have been passed on
    num_pages_told: int = 0  # of the first pages: the host may have lent them
    is_told: bool = False  # of any page or of the record

    @property
    def num_known(self) -> int:
        """Tokens here or on their way, at least: how many drafts in flight are accepted is not known here yet."""
        return len(self.prompt) + len(self.generated) + self.num_promised

    @property
    def num_known_max(self) -> int:
        """Tokens here or on their way, at most."""
        return min(self.num_known + self.num_drafting, self.num_tokens_max)

    @property
    def num_remaining(self) -> int:
        """Tokens known and not computed. One: a decode step, or the last token of a prompt, which is the
        same."""
        return self.num_known - self.num_computed

    @property
    def num_tokens_max(self) -> int:
        """Prompt and all that is generated here. The last one is never computed here."""
        return len(self.prompt) + self.num_wanted

    @property
    def num_drafts_useful(self) -> int:
        """Drafts that the next decode can accept at most. The last token of a prompt is no decode."""
        if self.is_lending or self.num_computed < len(self.prompt):
            return 0
        return max(0, self.num_tokens_max - self.num_known - 1)

    @property
    def num_wanted(self) -> int:
        """Tokens to generate here."""
        return 1 if self.is_lending else self.max_tokens

    @property
    def num_full_pages(self) -> int:
        """Of the prompt."""
        return len(self.prompt) // PAGE_TOKENS

    @property
    def is_planned_to_the_end(self) -> bool:
        """Whatever becomes of drafts."""
        return len(self.generated) + self.num_promised >= self.num_wanted

    @property
    def is_scored(self) -> bool:
        return self.sampling.prompt_logprobs is None or self.num_scored == len(self.prompt) - 1

    @property
    def is_paged(self) -> bool:
        """It holds the pages of all tokens it may know."""
        return self.num_pages_with(0) <= len(self.pages)

    @property
    def is_near_page_end(self) -> bool:
        """It will ask for another page soon, unless it ends before."""
        num_last = min(self.num_known_max + RESERVE_TOKENS, self.num_tokens_max - 1)
        return pages_for(num_last) > len(self.pages)

    @property
    def num_pages_to_start(self) -> int:
        """All pages of the known tokens are taken at once: taking them chunk by chunk would admit too many. What is
        adopted comes with a token, which decoding starts from."""
        return pages_for(self.num_known + self.is_adopting)

    @property
    def needs_record(self) -> bool:
        """To start."""
        return self.is_lending or self.is_adopting

    def num_pages_with(self, drafts: int) -> int:
        """Pages of the tokens that may have been computed when the next one and so many drafts are."""
        return pages_for(min(self.num_known_max + drafts, self.num_tokens_max - 1))

    def start(self, slot: SlotId, pages: Iterable[PageId], record: RecordId | None) -> None:
        assert self.num_inflight == 0
        assert self.num_promised == self.num_drafting == 0
        assert (record is not None) == self.needs_record
        self.phase = Phase.ADOPTING if self.is_adopting else Phase.RUNNING
        self.slot = slot
        self.pages = list(pages)
        self.record = record
        self.is_opened = False
        self.num_pages_sent = 0
        self.num_computed = 0

    def adopt(self, token_ids: Iterable[int]) -> None:
        """The prompt's state is in the pages and the record. From now on it is a sequence like any other."""
        assert self.phase is Phase.ADOPTING
        assert self.generated == []
        self.is_adopting = False
        self.phase = Phase.RUNNING
        self.generated.extend(token_ids)
        self.num_computed = len(self.prompt)

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
            restore=self._restore() if self.num_computed else None,
            tokens_max=self.num_tokens_max,
        )

    def _restore(self) -> Restore:
        """Hands the record over to the step."""
        assert self.record is not None
        assert not self.is_lending
        num_pages = pages_for(self.num_computed)
        restore = Restore(
            num_computed=self.num_computed, pages=tuple(self.pages[:num_pages]), record=self.record
        )
        self.num_pages_sent = num_pages
        self.record = None
        return restore

    def next_segment(self, count: int, drafts: int = 0) -> Segment:
        """The next `count` tokens, with the pages they need that the rank does not know yet; drafts are computed
        behind the last token known."""
        assert self.slot is not None
        assert self.is_opened
        end = self.num_computed + count
        assert end == self.num_known or end % PAGE_TOKENS == 0
        sample = end == self.num_known
        assert not drafts or (sample and count == 1), "drafts follow the newest token alone"
        assert drafts <= self.num_drafts_useful
        # With fewer drafts than before, or where some were rejected, the rank has all pages already.
        num_pages = max(self.num_pages_with(drafts) if sample else pages_for(end), self.num_pages_sent)
        assert num_pages <= len(self.pages)
        segment = Segment(
            slot=self.slot,
            start=self.num_computed,
            count=count,
            pages=tuple(self.pages[self.num_pages_sent : num_pages]),
            sample=sample,
            lend=self.is_lending,
            record=self.record if sample and self.is_lending and self.record is not None else -1,
            drafts=drafts,
        )
        self.num_pages_sent = num_pages
        self.num_computed = end
        self.num_promised += sample
        self.num_drafting += drafts
        return segment

    def land(self, num_sampled: int, *, drafts: int) -> None:
        """A plan with `drafts` has sampled so many tokens of it: all but one of them were computed there."""
        self.num_promised -= 1
        self.num_drafting -= drafts
        self.num_computed += max(0, num_sampled - 1)

    def take_tokens(self, items: Iterable[Sampled], eos_token_ids: Collection[int]) -> list[TokenEvent]:
        """What has been sampled of it, in order; nothing behind the token that ends it."""
        events: list[TokenEvent] = []
        for item in items:
            index = len(self.generated)
            self.generated.append(item.token_id)
            event = TokenEvent(
                key=self.key,
                index=index,
                token_id=item.token_id,
                logprob=item.logprob,
                alternatives=item.alternatives,
                finish_reason=self._finish_reason(item.token_id, eos_token_ids),
            )
            events.append(event)
            if event.finish_reason is not None:
                break
        return events

    def _finish_reason(self, token_id: int, eos_token_ids: Collection[int]) -> FinishReason | None:
        if token_id in eos_token_ids and not self.ignore_eos:
            return FinishReason.STOP
        if len(self.generated) == self.max_tokens:
            return FinishReason.LENGTH
        return None

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
class Step:
    """A plan while it is made, and what must be remembered of it while it is in flight."""

    number: int
    opens: list[SlotOpen] = field(default_factory=list[SlotOpen])
    segments: list[Segment] = field(default_factory=list[Segment])
    sequences: dict[SlotId | None, Sequence] = field(default_factory=dict["SlotId | None", "Sequence"])
    sampling: dict[SlotId, int] = field(default_factory=dict[SlotId, int])  # with so many drafts
    lending: dict[SlotId, Segment] = field(default_factory=dict[SlotId, Segment])
    restoring: list[RecordId] = field(default_factory=list[RecordId])  # read by the rank in this step

    @property
    def is_plain_decode(self) -> bool:
        """It does nothing else: what it takes is what decoding takes."""
        return not self.opens and all(segment.count == 1 for segment in self.segments)

    def add(self, sequence: Sequence, count: int, *, drafts: int = 0) -> None:
        if not sequence.is_opened:
            item = sequence.slot_open()
            self.opens.append(item)
            if item.restore is not None:
                self.restoring.append(RecordId(item.restore.record))
        segment = sequence.next_segment(count, drafts)
        slot = SlotId(segment.slot)
        assert slot not in self.sequences, f"slot {slot} has two segments in step {self.number}"
        self.segments.append(segment)
        self.sequences[slot] = sequence
        if segment.sample:
            self.sampling[slot] = drafts
        if segment.lend:
            self.lending[slot] = segment

    def tokens_of(self, result: StepResult) -> dict[SlotId, list[Sampled]]:
        """What the rank has sampled for each segment that samples: nothing for a slot that was full already."""
        found: dict[SlotId, list[Sampled]] = {slot: [] for slot in self.sampling}
        for item in result.sampled:
            assert SlotId(item.slot) in found, f"slots sampled {item.slot}, planned {set(found)}"
            found[SlotId(item.slot)].append(item)
        verified = {SlotId(item.slot): item for item in result.verified}
        assert len(verified) == len(result.verified), "a slot was verified twice"
        assert verified.keys() <= found.keys(), "drafts were verified that nobody asked for"
        for slot, items in found.items():
            if items:
                accepted = verified[slot].num_accepted if slot in verified else 0
                assert len(items) == 1 + accepted, f"a slot was sampled {len(items)} times"
                assert accepted <= self.sampling[slot], f"{accepted} drafts accepted of {self.sampling[slot]}"
            else:
                # Its last token came with an earlier result.
                is_over = self.sequences[slot].phase is Phase.ENDED
                assert is_over, f"slots sampled without {slot}, planned {set(found)}"
        return found

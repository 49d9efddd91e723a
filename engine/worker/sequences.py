"""One sequence on a worker, and one step while it is in flight: what the scheduler remembers of them.

Only `engine.worker.scheduler`, `engine.worker.holdings` and `engine.worker.drafts.speculation` touch these. A sequence
knows its tokens and what it holds; it never takes or gives back anything itself.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import msgspec
import numpy as np

from engine.plan import PromptScores, Restore, Sampled, Segment, SlotOpen, StepResult, TailPoint
from engine.worker.events import SequenceKey, TokenEvent
from kvstore.keys import PageKey
from kvstore.pages import pages_for
from kvstore.shadow_radix import Pin, Start, StartKind, TailKind
from kvstore.store.contract import NO_TENANT, TenantLabel
from kvstore.tiers import HostPage
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
    LANDING = "landing"  # its last token is planned; holds pages that others can use once it has landed
    ENDED = "ended"


@dataclass(slots=True, kw_only=True, eq=False)
class Spilled:
    """What of a sequence is held in host memory for its C4 rows to be read there, or for when they will be. Only
    `engine.worker.tiers.hisparse` changes it."""

    host_pages: list[HostPage] = field(default_factory=list[HostPage])  # of its first pages
    buffer: int | None = None  # its hot buffer; None: it is resident still
    num_pages: int = 0  # of its first pages, that are spilled
    digests: dict[int, tuple[int, ...]] = field(
        default_factory=dict[int, tuple[int, ...]]
    )  # of pages behind those, by number
    returning: list[PageId] = field(default_factory=list[PageId])  # whole pages for all that is spilled
    num_back: int = 0  # of those, whose copies are planned
    last_copy: int = 0  # the newest plan that copies some of them


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
    root: PageKey | None = None  # of its page keys; None: no page of it is ever shared
    tenant: TenantLabel = NO_TENANT  # whose it is, for a store
    keys: list[PageKey] = field(
        default_factory=list[PageKey]
    )  # of full pages of known tokens, the first ones
    pin: Pin | None = None  # on its pages that the index has, of which it may hold copies of its own
    num_pages_cached: int = 0  # of `pages`, those that the index owns
    num_pages_shared: int = 0  # of the first pages: they were there when it started, and are never written
    start_kind: StartKind | None = None  # how it last started, with an index
    num_landed: int = 0  # tokens computed for good, by plans whose results are in
    num_tokens_cached: int | None = (
        None  # of the prompt, that did not have to be computed when it first started
    )
    is_following: bool = False  # waits for pages that another is computing
    num_fetches: int = 0  # reads from other workers, or from a store, that it waits for
    is_restoring: bool = False  # waits for pages that come back from host memory
    num_restores: int = 0  # for which it has waited since it last started
    host_clock: int = -1  # of the host index, when that was last found to have nothing for it
    tails_planned: dict[int, TailKind] = field(default_factory=dict[int, TailKind])  # by depth in pages
    tail_record: RecordId | None = None  # for boundaries that it crosses as it decodes
    tail_depth: int = 0  # in pages, of the boundary whose state is there; 0: of none yet
    spilled: Spilled | None = None

    @property
    def is_fetching(self) -> bool:
        return self.num_fetches > 0

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
    def can_share(self) -> bool:
        """It may start from pages of others. A prompt with scores outstanding is computed whole."""
        return self.root is not None and self.is_scored

    @property
    def num_pages_private(self) -> int:
        """Pages that are its own."""
        return len(self.pages) - self.num_pages_cached

    @property
    def num_full_pages_max(self) -> int:
        """Full pages of what plans so far may have computed. The last token is never computed."""
        return (min(self.num_known_max, self.num_tokens_max) - 1) // PAGE_TOKENS

    @property
    def num_replaying(self) -> int:
        """Tokens still to be computed for the sake of the window alone: their pages are shared."""
        return max(0, self.num_pages_shared * PAGE_TOKENS - self.num_computed)

    @property
    def num_chunkable(self) -> int:
        """Tokens of the prompt that the next chunk may have: none goes beyond where replaying ends."""
        return self.num_replaying or self.num_remaining

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

    def may_cross(self, drafts: int) -> bool:
        """Whether the next decode may compute the last token of a page, of its own or of a draft."""
        first = self.num_computed // PAGE_TOKENS
        return min(self.num_known_max + drafts, self.num_tokens_max - 1) // PAGE_TOKENS > first

    def num_pages_with(self, drafts: int) -> int:
        """Pages of the tokens that may have been computed when the next one and so many drafts are."""
        return pages_for(min(self.num_known_max + drafts, self.num_tokens_max - 1))

    def tokens_of(self, first: int, end: int) -> TokenArray:
        """Known tokens first .. end-1, prompt and generated."""
        num_prompt = len(self.prompt)
        generated = self.generated[max(0, first - num_prompt) : max(0, end - num_prompt)]
        tail = np.asarray(generated, dtype=np.int32)
        return np.concatenate((self.prompt[first:end], tail)) if first < num_prompt else tail

    def start(
        self, slot: SlotId, pages: Iterable[PageId], record: RecordId | None, *, start: Start | None
    ) -> None:
        """`start`: from what others have computed; None: from nothing, and nothing is shared."""
        assert self.num_inflight == 0
        assert self.num_promised == self.num_drafting == 0
        assert self.tail_record is None
        assert (record is not None) == self.needs_record
        self.phase = Phase.ADOPTING if self.is_adopting else Phase.RUNNING
        self.slot = slot
        self.pages = list(pages)
        self.record = record
        self.is_opened = False
        self.num_pages_sent = 0
        self.num_computed = 0
        self.num_landed = 0
        self.num_pages_shared = self.num_pages_cached = 0
        self.num_restores = 0
        self.tails_planned = {}
        if start is not None:
            self.start_kind = start.kind
            if self.num_tokens_cached is None:
                self.num_tokens_cached = start.from_depth * PAGE_TOKENS
            self.num_computed = self.num_landed = start.from_depth * PAGE_TOKENS
            self.num_pages_shared = self.num_pages_cached = start.reuse_depth

    def adopt(self, token_ids: Iterable[int]) -> None:
        """The prompt's state is in the pages and the record. From now on it is a sequence like any other."""
        assert self.phase is Phase.ADOPTING
        assert self.generated == []
        self.is_adopting = False
        self.phase = Phase.RUNNING
        self.generated.extend(token_ids)
        self.num_computed = self.num_landed = len(self.prompt)
        self.num_pages_shared = 0  # none of its pages is computed here: there is nothing to replay

    def slot_open(self) -> SlotOpen:
        assert self.slot is not None
        assert not self.is_opened
        self.is_opened = True
        tokens = self.tokens_of(0, len(self.prompt) + len(self.generated))
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
        """From a record of its own, which came from elsewhere and is handed over to the step; or from a tail, which
        stays pinned; or from no record, with an empty window. What is spilled of it is so from the start."""
        record = -1
        if self.record is not None and not self.is_lending:
            record, self.record = self.record, None
        elif self.pin is not None and self.pin.tail is not None:
            record = self.pin.tail
        num_pages = pages_for(self.num_computed)
        self.num_pages_sent = num_pages
        restore = Restore(num_computed=self.num_computed, pages=tuple(self.pages[:num_pages]), record=record)
        state = self.spilled
        if state is None or state.buffer is None:
            return restore
        host_pages = tuple(item.page for item in state.host_pages[: state.num_pages])
        return msgspec.structs.replace(restore, host_pages=host_pages, buffer=state.buffer)

    def next_segment(
        self, count: int, drafts: int = 0, *, tails: Several[TailPoint] = (), digest: bool = False
    ) -> Segment:
        """The next `count` tokens, with the pages they need that the rank does not know yet; drafts are computed
        behind the last token known. None is computed where all of them are restored: the next one is sampled."""
        assert self.slot is not None
        assert self.is_opened
        end = self.num_computed + count
        assert end == self.num_known or end % PAGE_TOKENS == 0
        assert not self.num_replaying or count <= self.num_replaying, "a chunk goes on beyond what it replays"
        assert count or end == self.num_known, "a chunk of nothing"
        sample = end == self.num_known
        replay = self.num_replaying > 0
        assert not drafts or (sample and count == 1), "drafts follow the newest token alone"
        assert drafts <= self.num_drafts_useful
        # With fewer drafts than before, or where some were rejected, the rank has all pages already.
        num_pages = max(self.num_pages_with(drafts) if sample else pages_for(end), self.num_pages_sent)
        assert num_pages <= len(self.pages)
        lend = self.is_lending and (sample or not replay)
        is_decode = sample and count == 1 and not replay
        segment = Segment(
            slot=self.slot,
            start=self.num_computed,
            count=count,
            pages=tuple(self.pages[self.num_pages_sent : num_pages]),
            sample=sample,
            lend=lend,
            record=self.record if sample and self.is_lending and self.record is not None else -1,
            drafts=drafts,
            replay=replay,
            digest=digest and not lend and not replay,
            tails=tuple(tails),
            tail_record=self.tail_record if is_decode and self.tail_record is not None else -1,
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

    def note_landed(self, end: int) -> None:
        """The first `end` tokens are computed for good."""
        self.num_landed = max(self.num_landed, end)

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
                cached_tokens=0 if index else self.num_tokens_cached or 0,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TailTaken:
    """A record into which a step packs the state of a sequence at a page boundary."""

    sequence: Sequence
    slot: SlotId
    depth: int  # in pages
    kind: TailKind
    record: RecordId


@dataclass(slots=True, kw_only=True)
class Step:
    """A plan while it is made, and what must be remembered of it while it is in flight."""

    number: int
    digest: bool = False  # the full pages that its segments complete
    opens: list[SlotOpen] = field(default_factory=list[SlotOpen])
    segments: list[Segment] = field(default_factory=list[Segment])
    sequences: dict[SlotId | None, Sequence] = field(default_factory=dict["SlotId | None", "Sequence"])
    sampling: dict[SlotId, int] = field(default_factory=dict[SlotId, int])  # with so many drafts
    lending: dict[SlotId, Segment] = field(default_factory=dict[SlotId, Segment])
    restoring: list[RecordId] = field(default_factory=list[RecordId])  # read by the rank in this step
    resuming: list[Pin] = field(default_factory=list[Pin])  # whose tails are read by the rank in this step
    tails: list[TailTaken] = field(default_factory=list[TailTaken])  # taken within chunks
    has_copies: bool = False  # to or from host memory

    @property
    def is_plain_decode(self) -> bool:
        """It does nothing else: what it takes is what decoding takes."""
        is_alone = not self.opens and not self.has_copies
        return is_alone and all(segment.count == 1 for segment in self.segments)

    def add(self, sequence: Sequence, count: int, *, drafts: int = 0, tails: Several[TailTaken] = ()) -> None:
        if not sequence.is_opened:
            self._open(sequence)
        points = [TailPoint(num_tokens=item.depth * PAGE_TOKENS, record=item.record) for item in tails]
        segment = sequence.next_segment(count, drafts, tails=points, digest=self.digest)
        slot = SlotId(segment.slot)
        assert slot not in self.sequences, f"slot {slot} has two segments in step {self.number}"
        self.segments.append(segment)
        self.sequences[slot] = sequence
        self.tails.extend(tails)
        if segment.sample:
            self.sampling[slot] = drafts
        if segment.lend:
            self.lending[slot] = segment

    def _open(self, sequence: Sequence) -> None:
        item = sequence.slot_open()
        self.opens.append(item)
        if sequence.pin is not None and sequence.pin.tail is not None:
            self.resuming.append(sequence.pin)
        elif item.restore is not None and item.restore.record >= 0:
            self.restoring.append(RecordId(item.restore.record))

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

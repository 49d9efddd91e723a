"""What the scheduler tells the host: events of sequences, and what passes in and out of its keeping.

`engine.worker.scheduler` makes them, the host reads them. Values only: nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from rorqual.ids import PageId, RecordId, SlotId
from rorqual.session import FinishReason, PromptLogprobs

SequenceKey = NewType("SequenceKey", int)
"""A sequence on this worker, whatever session it came by. Keys of later sequences are larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One token of one sequence has landed. The last one has a finish reason; no event follows it."""

    key: SequenceKey
    index: int
    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    cached_tokens: int = 0  # with token 0: of the prompt, those that did not have to be computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresEvent:
    """A chunk of a prompt has been scored, where that was asked for. The last one comes before token 0."""

    key: SequenceKey
    prompt_logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PagesEvent:
    """Full pages of a lending sequence are computed and can be read from now on. They come in order, the last of
    them before token 0. The record will hold the rest; until the LentEvent it holds nothing."""

    key: SequenceKey
    record: RecordId
    first_page: int  # the number within the sequence of pages[0]
    pages: tuple[PageId, ...]  # never empty
    digests: tuple[int, ...]  # unsigned 64 bits; of each page one for each paged component, in layout order


@dataclass(frozen=True, slots=True, kw_only=True)
class LentEvent:
    """The record is packed: another worker can go on. It comes right after token 0 and is the last event of a
    lending sequence that goes on elsewhere, which the scheduler then forgets and surrenders."""

    key: SequenceKey
    record: RecordId
    num_tokens: int  # computed: the prompt's length
    record_bytes: int
    record_digest: int  # unsigned 64 bits


Event = ScoresEvent | PagesEvent | TokenEvent | LentEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrender:
    """A lending sequence has ended or gone on elsewhere. What the host was told of it, all pages of its PagesEvents
    and the record, is the host's to lend; all of it comes back together, by the record. The rest is free already, or
    kept for others. Other sequences may have pages in common with it, and lend them too."""

    key: SequenceKey
    pages: tuple[PageId, ...]
    record: RecordId


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """There is room for a sequence whose state comes from elsewhere: it may be written into those of its first full
    pages that are not there yet, and the record, but not before the result of plan number `after` has been applied."""

    key: SequenceKey
    slot: SlotId
    pages: tuple[PageId, ...]  # for the prompt and one token more
    num_present: (
        int  # the first of them: they are there already, others may use them, and nothing is written there
    )
    record: RecordId
    after: int  # 0: no plan in flight can be using any of it

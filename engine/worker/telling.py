"""What a step's result is to the host: a prompt's scores, pages that others may read, and the record that ends it.

Called by `engine.worker.scheduler` for each result, before the sequences' tokens land. It marks on a sequence what the
host has been told of, which is then never free again by itself, and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan import Lent, PromptScores
from engine.worker.cache.prefix_cache import PrefixCache
from engine.worker.events import LentEvent, PagesEvent, ScoresEvent
from engine.worker.sequences import Phase, Sequence, Step
from rorqual.ids import SlotId
from rorqual.model_config import PAGE_TOKENS


def score_events(step: Step, items: Iterable[PromptScores]) -> list[ScoresEvent]:
    """One event for each sequence whose scores are news: the rank sends them in small parts."""
    parts: dict[int, list[PromptScores]] = {}
    for item in items:
        parts.setdefault(item.slot, []).append(item)
    events: list[ScoresEvent] = []
    for slot, own in parts.items():
        sequence = step.sequences[SlotId(slot)]
        if sequence.phase is Phase.ENDED:
            continue
        found = sequence.take_scores(own)
        if found is not None:
            events.append(ScoresEvent(key=sequence.key, prompt_logprobs=found))
    return events


def pages_events(
    step: Step, slot: SlotId, item: Lent, *, cache: PrefixCache | None, num_components: int
) -> list[PagesEvent]:
    """The full pages of a lending sequence that are there now and that nobody was told of, if any: those that a segment
    has completed, and before them those that were there when it started. From now on others may be reading them."""
    sequence, segment = step.sequences[slot], step.lending[slot]
    assert (item.record_bytes > 0) == (segment.record >= 0), "a record was packed that was not planned"
    first, end = sequence.num_pages_told, (segment.start + segment.count) // PAGE_TOKENS
    if sequence.phase is Phase.ENDED or first == end:
        return []
    assert sequence.record is not None
    num_there = min(max(first, sequence.num_pages_shared), end)
    digests = item.page_digests
    if num_there > first:
        assert cache is not None
        there = cache.digests_of(sequence, first, num_there)
        if segment.replay:
            # Read and not written: they still hold what was digested when they were made.
            assert there[len(there) - len(digests) :] == digests, "shared pages are not what they were"
            digests = ()
        digests = there + digests
    assert len(digests) == (end - first) * num_components, (
        f"{len(digests)} digests, not {(end - first) * num_components}"
    )
    sequence.num_pages_told = end
    sequence.is_told = True
    return [
        PagesEvent(
            key=sequence.key,
            record=sequence.record,
            first_page=first,
            pages=tuple(sequence.pages[first:end]),
            digests=digests,
        )
    ]


def lent_event(sequence: Sequence, item: Lent) -> LentEvent:
    """It goes on elsewhere, from what the host is told of now at the latest."""
    assert sequence.record is not None
    assert sequence.num_pages_told == sequence.num_full_pages
    sequence.is_told = True
    return LentEvent(
        key=sequence.key,
        record=sequence.record,
        num_tokens=len(sequence.prompt),
        record_bytes=item.record_bytes,
        record_digest=item.record_digest,
    )

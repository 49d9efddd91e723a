"""What a session is told of its sequences: events of the scheduler as reports. Pure; called by `engine.worker.host`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from engine.worker.events import Event, ScoresEvent, TokenEvent
from rorqual.ids import SequenceId
from rorqual.session import ErrorCode, FinishReason, Offer, SequenceReport, alternatives_of


def with_tokens(events: Iterable[Event]) -> Iterator[tuple[Event, list[TokenEvent]]]:
    """Each event; the first of several tokens of one sequence stands for all of them, which come along."""
    for _, run in groupby(events, key=lambda event: (event.key, type(event))):
        first, *rest = run
        if isinstance(first, TokenEvent):
            yield first, [first, *(event for event in rest if isinstance(event, TokenEvent))]
        else:
            yield from ((event, []) for event in (first, *rest))


def token_report(sequence_id: SequenceId, tokens: Sequence[TokenEvent]) -> SequenceReport:
    has_logprobs = tokens[0].logprob is not None
    return SequenceReport(
        sequence_id=sequence_id,
        first_index=tokens[0].index,
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
        alternatives=tuple(alternatives_of(token.alternatives) for token in tokens) if has_logprobs else (),
        finish_reason=tokens[-1].finish_reason,
        cached_tokens=tokens[0].cached_tokens,
    )


def scores_report(sequence_id: SequenceId, event: ScoresEvent) -> SequenceReport:
    return SequenceReport(sequence_id=sequence_id, first_index=0, prompt_logprobs=event.prompt_logprobs)


def offer_report(sequence_id: SequenceId, offer: Offer) -> SequenceReport:
    return SequenceReport(sequence_id=sequence_id, first_index=0, offer=offer)


def error_report(sequence_id: SequenceId, code: ErrorCode, text: str) -> SequenceReport:
    return SequenceReport(
        sequence_id=sequence_id,
        first_index=0,
        finish_reason=FinishReason.ERROR,
        error=text,
        error_code=code,
    )

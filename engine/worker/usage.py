"""What a worker's sequences did, kept for the sessions that observe: counts, and a bounded fair part as samples.

The host has one `UsageLedger`; each of its sessions notes its own sequences through a `UsageMeter` and, if it observes,
reads with a cursor of its own, so that two autoscalers both hear of everything. Where nobody observes nothing is kept
but when each open sequence began. It knows no wire and decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rorqual.ids import SequenceId
from rorqual.session import FinishReason, Open, SequenceReport
from rorqual.usage import SAMPLES_MAX, PromptSample, StreamSample, Usage

T = TypeVar("T")


class UsageLedger:
    """Shared by all sessions of a worker."""

    def __init__(self, *, randomness: random.Random | None = None) -> None:
        """`randomness` picks which samples stay when there are too many."""
        self._randomness = randomness or random.Random(0)
        self._cursors: set[UsageCursor] = set()

    @property
    def num_cursors(self) -> int:
        return len(self._cursors)

    def follow(self) -> UsageCursor:
        """From now on; `forget` it."""
        cursor = UsageCursor(self._randomness)
        self._cursors.add(cursor)
        return cursor

    def forget(self, cursor: UsageCursor) -> None:
        self._cursors.discard(cursor)

    def note_prompt(self, sample: PromptSample) -> None:
        for cursor in self._cursors:
            cursor.prompts.add(sample)

    def note_stream(self, sample: StreamSample) -> None:
        for cursor in self._cursors:
            cursor.streams.add(sample)


class UsageCursor:
    """What one observer has not been told yet."""

    def __init__(self, randomness: random.Random) -> None:
        self._randomness = randomness
        self.prompts: _Reservoir[PromptSample] = _Reservoir(randomness)
        self.streams: _Reservoir[StreamSample] = _Reservoir(randomness)

    def take(self) -> Usage:
        prompts, streams = self.prompts, self.streams
        self.prompts, self.streams = _Reservoir(self._randomness), _Reservoir(self._randomness)
        return Usage(
            num_prompts=prompts.count,
            prompts=tuple(prompts.samples),
            num_streams=streams.count,
            streams=tuple(streams.samples),
        )


class UsageMeter:
    """One session's sequences. `now` is in seconds, of one monotonic clock."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger
        self._open: dict[SequenceId, _Sequence] = {}

    def opened(self, command: Open, *, now: float) -> None:
        self._open[command.sequence_id] = _Sequence(num_prompt=len(command.prompt), opened_at=now)

    def saw(self, reports: Iterable[SequenceReport], *, now: float) -> None:
        """What the session is about to be told."""
        for report in reports:
            if not report.token_ids and report.finish_reason is None:
                continue
            sequence = self._open.get(report.sequence_id)
            if sequence is None:
                continue
            if report.token_ids:
                self._landed(sequence, report, now)
            if report.finish_reason is not None:
                del self._open[report.sequence_id]
                self._ended(sequence, report.finish_reason)

    def _landed(self, sequence: _Sequence, report: SequenceReport, now: float) -> None:
        if not sequence.num_tokens:
            sequence.first_at = now
            sequence.num_first = len(report.token_ids)
            if report.first_index == 0:  # else another worker has computed the prompt
                self._ledger.note_prompt(
                    PromptSample(
                        prompt_tokens=sequence.num_prompt,
                        computed_tokens=max(0, sequence.num_prompt - report.cached_tokens),
                        ttft_seconds=max(0.0, now - sequence.opened_at),
                    )
                )
        sequence.num_tokens += len(report.token_ids)
        sequence.num_generated = report.first_index + len(report.token_ids)
        sequence.last_at = now

    def _ended(self, sequence: _Sequence, reason: FinishReason) -> None:
        if reason is FinishReason.HANDED_OVER or not sequence.num_tokens:
            return
        num_after = sequence.num_tokens - sequence.num_first
        self._ledger.note_stream(
            StreamSample(
                context_tokens=sequence.num_prompt + sequence.num_generated,
                generated_tokens=sequence.num_generated,
                itl_seconds=(sequence.last_at - sequence.first_at) / num_after if num_after else None,
            )
        )


@dataclass(slots=True, kw_only=True)
class _Sequence:
    num_prompt: int
    opened_at: float
    first_at: float = 0.0
    last_at: float = 0.0
    num_first: int = 0  # tokens that came first, together
    num_tokens: int = 0  # from this worker
    num_generated: int = 0  # on whatever worker


class _Reservoir(Generic[T]):
    """A fair part of what was added: each is in it with the same probability (Vitter's algorithm R)."""

    def __init__(self, randomness: random.Random) -> None:
        self._randomness = randomness
        self.count = 0
        self.samples: list[T] = []

    def add(self, sample: T) -> None:
        self.count += 1
        if len(self.samples) < SAMPLES_MAX:
            self.samples.append(sample)
            return
        place = self._randomness.randrange(self.count)
        if place < SAMPLES_MAX:
            self.samples[place] = sample

"""The drafts of a worker's steps: how many each decode gets, and what is learned when its result is back.

Owned by `engine.worker.scheduler`. It asks the policy (`engine.worker.drafts.policy`), keeps what that says within the
pages that are free, and tells it what steps have come to. It never preempts anybody.
"""

from __future__ import annotations

from collections.abc import Sequence as Several

from engine.plan import StepResult
from engine.worker.drafts.policy import DraftPolicy, DraftRoom, Outcome
from engine.worker.events import SequenceKey
from engine.worker.holdings import Holdings
from engine.worker.sequences import Sequence, Step
from rorqual.ids import SlotId


class Speculation:
    """`drafts_max` of a decode, `rows_max` of all decodes of a step. With none nothing is asked and nothing told."""

    def __init__(self, policy: DraftPolicy, holdings: Holdings, *, drafts_max: int, rows_max: int) -> None:
        self._policy = policy
        self._holdings = holdings
        self._drafts_max = drafts_max
        self._rows_max = rows_max

    def choose(self, decoding: Several[Sequence]) -> list[int]:
        """Drafts for the sequences of a step that each decode a token, in that order: for `fit`."""
        if not self._drafts_max or not decoding:
            return [0] * len(decoding)
        rooms = [
            DraftRoom(key=sequence.key, drafts_max=min(self._drafts_max, sequence.num_drafts_useful))
            for sequence in decoding
        ]
        counts = self._policy.choose(rooms, rows_max=self._rows_max)
        assert sum(counts) <= self._rows_max
        return counts

    def fit(self, sequence: Sequence, drafts: int) -> int:
        """As many of them as there are pages for, its own and free ones, which it is given."""
        while sequence.num_pages_with(drafts) > len(sequence.pages):
            if not self._holdings.grow(sequence):
                drafts -= 1
        return drafts

    def learn(self, step: Step, result: StepResult) -> None:
        """What became of a step's drafts and, if it did nothing but decode, what it took. A slot that was full already
        was not computed: a step of such slots alone took no time, and says nothing about others."""
        if not self._drafts_max:
            return
        outcomes = [
            Outcome(
                key=step.sequences[SlotId(item.slot)].key,
                num_drafts=item.num_drafts,
                num_accepted=item.num_accepted,
            )
            for item in result.verified
        ]
        num_sequences = len({item.slot for item in result.sampled})
        step_ms = result.step_ms if step.is_plain_decode and num_sequences else None
        self._policy.learn(outcomes, num_sequences=num_sequences, step_ms=step_ms)

    def forget(self, key: SequenceKey) -> None:
        """The sequence has ended."""
        self._policy.forget(key)

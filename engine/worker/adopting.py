"""Sequences of a decode worker whose state is on its way from a prefill worker. Owned by `engine.worker.scheduler`.

One begins when it has been given a slot, pages and a record; whoever reads its state into them takes the adoption, and
says when it is there, or the sequence is cancelled: then what was taken stays in quarantine, since it may be written to
still. Knows nothing of what is read, or how.
"""

from __future__ import annotations

from engine.worker.events import Adoption, SequenceKey
from engine.worker.holdings import Holdings
from engine.worker.sequences import Sequence


class Adopting:
    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self.sequences: dict[SequenceKey, Sequence] = {}
        self._adoptions: dict[SequenceKey, Adoption] = {}  # of those, not taken yet

    def begin(self, sequence: Sequence, *, last_applied: int) -> None:
        """It has been given all it needs. Plans up to `last_applied` are done."""
        assert sequence.slot is not None
        assert sequence.record is not None
        last_plan = self._holdings.last_plan(sequence)
        self.sequences[sequence.key] = sequence
        self._adoptions[sequence.key] = Adoption(
            key=sequence.key,
            slot=sequence.slot,
            pages=tuple(sequence.pages),
            num_present=sequence.num_pages_shared,
            record=sequence.record,
            after=last_plan if last_plan > last_applied else 0,
        )

    def take(self) -> list[Adoption]:
        """Those that have begun since the last time."""
        taken = list(self._adoptions.values())
        self._adoptions.clear()
        return taken

    def waiting(self, key: SequenceKey) -> Sequence:
        """One whose adoption was taken."""
        assert key in self.sequences, f"sequence {key} is not adopting"
        assert key not in self._adoptions, f"state of sequence {key} came before its adoption was taken"
        return self.sequences[key]

    def abandon(self, sequence: Sequence) -> None:
        """Nobody wants the state any more that is read into what it holds; unless nobody has heard of the room."""
        del self.sequences[sequence.key]
        self._holdings.free_slot(sequence)
        if self._adoptions.pop(sequence.key, None) is None:
            self._holdings.quarantine(sequence)
        else:
            self._holdings.free_state(sequence)

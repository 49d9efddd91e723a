"""The tails a worker takes: into which records, and what becomes of them. Owned by `engine.worker.scheduler`.

A tail is the state of a sequence at a page boundary, packed into a record by the rank while it computes: others that
begin with the same pages go on from there. Chunks of prompts leave tails where `kvstore.shadow_radix.retention` says; a
decoding sequence holds one record, into which each boundary it crosses is packed anew, and which goes to the cache when
it ends, or is preempted. No sequence waits or ends for the sake of a record: where none is to be had, no tail is taken.
What plans in flight may write into is given away only when they are done.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Several

from engine.plan import StepResult
from engine.worker.cache.prefix_cache import Packed, PrefixCache
from engine.worker.holdings import Holdings
from engine.worker.sequences import Sequence, Step, TailTaken
from kvstore.shadow_radix import TailKind
from rorqual.ids import RecordId, SlotId
from rorqual.model_config import PAGE_TOKENS


class Tails:
    """`num_held_max`: records that decoding sequences may hold together; the others are for those handed over."""

    def __init__(self, holdings: Holdings, cache: PrefixCache | None, *, num_held_max: int) -> None:
        self._holdings = holdings
        self._cache = cache
        self._num_held_max = num_held_max
        self._packed: dict[RecordId, Packed] = {}  # of records that hold a tail and are not in the cache yet
        self._parting: dict[RecordId, Sequence] = {}  # of sequences that hold nothing else any more

    @property
    def num_parting(self) -> int:
        return len(self._parting)

    def take(self, sequence: Sequence, count: int) -> list[TailTaken]:
        """Records for the boundaries within the next `count` tokens of a prompt: fewer than wished for if need be, then
        the deepest."""
        if self._cache is None:
            return []
        assert sequence.slot is not None
        first, slot = sequence.num_computed, sequence.slot
        taken: list[TailTaken] = []
        for depth, kind in reversed(self._cache.tails_within(sequence, first, first + count)):
            record = self._holdings.take_record()
            if record is None:
                break
            taken.append(TailTaken(sequence=sequence, slot=slot, depth=depth, kind=kind, record=record))
        return taken[::-1]

    def give(self, sequence: Sequence, running: Iterable[Sequence], *, drafts: int) -> None:
        """A record to a sequence whose next decode may cross a page boundary, if it has none."""
        if self._cache is None or sequence.tail_record is not None or sequence.is_lending:
            return
        if not sequence.may_cross(drafts):
            return
        num_held = sum(item.tail_record is not None for item in running) + len(self._parting)
        if num_held < self._num_held_max:
            sequence.tail_record = self._holdings.take_record()

    def note(self, step: Step, result: StepResult) -> None:
        """Which boundaries are packed now. Every tail of a chunk is, and of a decode what it has come to."""
        planned = {(int(item.slot), item.depth * PAGE_TOKENS): item for item in step.tails}
        for item in result.tailed:
            packed = Packed(num_bytes=item.num_bytes, digest=item.digest)
            taken = planned.pop((item.slot, item.num_tokens), None)
            if taken is not None:
                self._packed[taken.record] = packed
                continue
            sequence = step.sequences[SlotId(item.slot)]
            assert sequence.tail_record is not None, f"slot {item.slot} left a tail that was not planned"
            sequence.tail_depth = item.num_tokens // PAGE_TOKENS
            self._packed[sequence.tail_record] = packed
        assert not planned, f"tails were planned that were not taken: {planned}"

    def keep(self, step: Step) -> None:
        """The pages before the tails of a step's chunks are in the cache, if their sequences still wanted them."""
        for item in step.tails:
            self._keep_one(item.sequence, item.depth, item.record, kind=item.kind)

    def part(self, sequence: Sequence) -> None:
        """It ends or is preempted: its last boundary stays, once no plan in flight can overwrite it."""
        if sequence.tail_record is None:
            return
        if sequence.num_inflight:
            self._parting[sequence.tail_record] = sequence
        else:
            self._settle(sequence)

    def settle(self, step: Step) -> None:
        """A result is in: some may have been the last of theirs."""
        for sequence in step.sequences.values():
            record = sequence.tail_record
            if record is not None and record in self._parting and not sequence.num_inflight:
                del self._parting[record]
                self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        record, depth = sequence.tail_record, sequence.tail_depth
        assert record is not None
        sequence.tail_record = None
        sequence.tail_depth = 0
        if depth:
            self._keep_one(sequence, depth, record, kind=TailKind.TURN_END)
        else:
            self._packed.pop(record, None)
            self._holdings.free_record(record)

    def _keep_one(self, sequence: Sequence, depth: int, record: RecordId, *, kind: TailKind) -> None:
        """On the device, where the page before it is; or in host memory, if only that has the page."""
        assert self._cache is not None
        packed = self._packed.pop(record, None)
        unused = self._cache.keep_tail(sequence, depth, record, kind=kind, packed=packed)
        if unused is None:
            return
        if packed is not None and depth <= len(sequence.keys):
            key, tenant = sequence.keys[depth - 1], sequence.tenant
            self._holdings.demote_tail(unused, key, kind=kind, packed=packed, tenant=tenant)
        self._holdings.free_record(unused)


def digests_by_slot(result: StepResult, *, per_page: int) -> dict[SlotId, Several[tuple[int, ...]]]:
    """Of the pages that a step has completed, in order: a tuple for each page."""
    found = [(item.slot, item.page_digests) for item in result.lent]
    found += [(item.slot, item.page_digests) for item in result.completed]
    return {
        SlotId(slot): [digests[at : at + per_page] for at in range(0, len(digests), per_page)]
        for slot, digests in found
        if digests
    }

"""All that a scheduler does with host memory: one door for it to what is evicted, copied at the end of a turn, brought
back, read from a store, and spilled. Pure; owned by the scheduler, and empty where a worker has no host memory.

What is where in host memory `engine.worker.tiers.host_tier` knows; the others decide what goes there, and what comes
back: `restoring` for those that wait, `filling` from a store, `turn_ends` what a sequence leaves, `hisparse` the C4
rows of those that run. Their copies are made by the plan that is being made when they ask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass

from engine.plan import NO_COPIES, Copies, Spill, StepResult, Unspill
from engine.worker.cache.imports import Imports
from engine.worker.cache.prefix_cache import PrefixCache
from engine.worker.events import SequenceKey
from engine.worker.holdings import Holdings
from engine.worker.scheduler_config import SchedulerConfig
from engine.worker.sequences import Phase, Sequence
from engine.worker.tiers.filling import Filling
from engine.worker.tiers.hisparse import HiSparse, HiSparseState
from engine.worker.tiers.host_tier import HostTier
from engine.worker.tiers.restoring import Restoring
from engine.worker.tiers.speeds import Speeds
from engine.worker.tiers.turn_ends import TurnEnds
from kvstore.shadow_radix import Start


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCopies:
    """What one plan does with host memory."""

    demote: Copies = NO_COPIES
    promote: Copies = NO_COPIES
    spills: tuple[Spill, ...] = ()
    unspills: tuple[Unspill, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.demote or self.promote or self.spills or self.unspills)


class LowerTiers:
    def __init__(
        self,
        config: SchedulerConfig,
        tier: HostTier | None,
        *,
        holdings: Holdings,
        cache: PrefixCache | None,
        imports: Imports,
        sequences: Mapping[SequenceKey, Sequence],
        speeds: Speeds,
    ) -> None:
        self.tier = tier
        self.restoring: Restoring | None = None
        self.filling: Filling | None = None
        self._turn_ends: TurnEnds | None = None
        self._hisparse: HiSparse | None = None
        if tier is None or cache is None:
            return
        self.restoring = Restoring(tier, holdings, cache, imports, speeds)
        self.filling = Filling(tier, cache, sequences, speeds)
        if tier.config.takes_turns:
            self._turn_ends = TurnEnds(tier, cache)
        if config.hisparse is not None:
            self._hisparse = HiSparse(config.hisparse, tier, holdings, cache)

    @property
    def is_idle(self) -> bool:
        """No copy waits for a plan."""
        is_copying = self.tier is not None and not self.tier.is_idle
        return not is_copying and (self._turn_ends is None or self._turn_ends.is_idle)

    @property
    def hisparse_state(self) -> HiSparseState:
        return self._hisparse.state if self._hisparse is not None else HiSparseState()

    def begin(self, running: Collection[Sequence], *, is_anybody_waiting: bool) -> None:
        """A plan is being made."""
        if self._hisparse is not None:
            self._hisparse.follow(running, is_anybody_waiting=is_anybody_waiting)

    def relieve(self, running: Collection[Sequence]) -> bool:
        """Pages run short. Whether there are more now, at nobody's cost but time."""
        return self._hisparse is not None and self._hisparse.relieve(running)

    def num_pages_more(self, running: Collection[Sequence]) -> int:
        """That sequences can hold besides the device's whole ones."""
        return self._hisparse.num_pages_more(running) if self._hisparse is not None else 0

    def start_spilled(self, sequence: Sequence) -> Start | None:
        """For one that waits, and finds too few pages: from what host memory has of it."""
        return self._hisparse.start(sequence) if self._hisparse is not None else None

    def take(self, number: int, first_waiting: Callable[[int], Collection[Sequence]]) -> PlanCopies:
        """For plan `number`, which is complete but for these; `first_waiting`: so many of those that start next."""
        if self.tier is None or self.restoring is None:
            return PlanCopies()
        self.restoring.look(first_waiting(self.tier.config.sequences_max))
        if self._turn_ends is not None:
            self._turn_ends.feed()
        demote, promote = self.tier.take_copies(number), self.restoring.take_copies(number)
        if self._hisparse is None:
            return PlanCopies(demote=demote, promote=promote)
        spills, unspills, back = self._hisparse.take()
        if back:
            promote = Copies(pages=(*promote.pages, *back.pages), records=(*promote.records, *back.records))
        return PlanCopies(demote=demote, promote=promote, spills=spills, unspills=unspills)

    def landed(self, result: StepResult) -> None:
        if self.tier is not None:
            self.tier.landed(result.number)
        if self.restoring is not None:
            self.restoring.landed(result.number)
        if self._hisparse is not None:
            self._hisparse.landed(result)

    def absorb(self, sequence: Sequence, digests: Several[tuple[int, ...]]) -> None:
        """What it has computed is certain now. `digests` of the newest full pages, one for each."""
        if self._hisparse is not None:
            self._hisparse.absorb(sequence, digests)

    def ended(self, sequence: Sequence) -> None:
        """Its turn is over: it still holds what it has."""
        if self._turn_ends is not None and sequence.phase in (Phase.RUNNING, Phase.LANDING):
            self._turn_ends.ended(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It is about to give back all that it holds."""
        if self._hisparse is not None:
            self._hisparse.leave(sequence)

    def check(self) -> None:
        """Assert that everything adds up: for tests."""
        if self.tier is not None:
            self.tier.index.check()
        if self.restoring is not None:
            self.restoring.check()
        if self._hisparse is not None:
            self._hisparse.check()

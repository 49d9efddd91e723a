"""What a scheduler does with the memory below its device, in one place. Pure; owned by the scheduler.

It knows when what is asked of whom: `engine.worker.host_tier` keeps what the cache gives up,
`engine.worker.restoring` brings it back, `engine.worker.spilling` copies what sequences leave behind, and
`engine.worker.filling` says what a store could add. Without host memory every call does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from engine.plan import NO_COPIES, Copies
from engine.worker.events import SequenceKey
from engine.worker.filling import Filling
from engine.worker.holdings import Holdings
from engine.worker.host_tier import HostTier
from engine.worker.imports import Imports
from engine.worker.prefix_cache import PrefixCache
from engine.worker.restoring import Restoring
from engine.worker.sequences import Phase, Sequence
from engine.worker.spilling import Spilling


class Tiering:
    def __init__(
        self,
        tier: HostTier | None,
        cache: PrefixCache | None,
        *,
        holdings: Holdings,
        imports: Imports,
        sequences: Mapping[SequenceKey, Sequence],
    ) -> None:
        """`sequences` are the scheduler's, which have been opened and have not ended."""
        self.tier = tier
        self.restoring: Restoring | None = None
        self.filling: Filling | None = None
        self._spilling: Spilling | None = None
        if tier is not None and cache is not None:
            self.restoring = Restoring(tier, holdings, cache, imports)
            self.filling = Filling(tier, cache, sequences)
            if tier.config.takes_turns:
                self._spilling = Spilling(tier, cache)

    @property
    def is_idle(self) -> bool:
        """No copy waits for a plan."""
        is_spilling = self._spilling is not None and not self._spilling.is_idle
        return not is_spilling and (self.tier is None or self.tier.is_idle)

    def look(self, first: Callable[[int], Iterable[Sequence]]) -> None:
        """Begin to bring back what those can use who wait and cannot start yet; `first` gives so many of them."""
        if self.tier is not None and self.restoring is not None:
            self.restoring.look(first(self.tier.config.sequences_max))

    def take_copies(self, number: int) -> tuple[Copies, Copies]:
        """From the device and back to it, for plan `number`, in which everything else is decided already."""
        if self.tier is None or self.restoring is None:
            return NO_COPIES, NO_COPIES
        if self._spilling is not None:
            self._spilling.feed()
        return self.tier.take_copies(number), self.restoring.take_copies(number)

    def landed(self, number: int) -> None:
        """The result of plan `number` is in."""
        if self.tier is not None and self.restoring is not None:
            self.tier.landed(number)
            self.restoring.landed(number)

    def ended(self, sequence: Sequence) -> None:
        """It is about to end, and its phase still says from where."""
        if self._spilling is not None and sequence.phase in (Phase.RUNNING, Phase.LANDING):
            self._spilling.ended(sequence)

    def check(self) -> None:
        """Assert that everything adds up: for tests."""
        if self.tier is not None and self.restoring is not None:
            self.tier.index.check()
            self.restoring.check()

"""How two models are compared: by logits, up to the first token whose discrete choices differ.

Two correct implementations may choose differently where two scores are all but equal, and everything after that token
differs for good. So a difference in a choice is an error unless the judge's own margin there is tiny, and a tally
keeps how much was compared at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tests.harness.oracle import OracleRun
from tests.harness.picks import Picks

MARGIN = 1e-5
"""Choices nearer than this may fall either way."""


@dataclass(slots=True)
class Tally:
    """Positions compared and skipped over many comparisons, and the largest error met."""

    compared: int = 0
    total: int = 0
    worst: float = 0.0

    @property
    def share(self) -> float:
        return self.compared / self.total if self.total else 0.0

    def judge(self, logits_NV: Tensor, picks: Picks, oracle: OracleRun, *, tolerance: float) -> None:
        """Compare one request of N tokens with the first N of the oracle's run."""
        count = len(logits_NV)
        wanted = oracle.logits[:count]
        choice = picks.first_difference(oracle.picks.cut(count))
        self.total += count
        if choice is not None:
            margin = oracle.margin(choice)
            assert margin < MARGIN, f"{choice} differs though the oracle's margin is {margin:.2e}"
            count = choice.position
            if count == 0:
                return
        error = relative_error(logits_NV[:count], wanted[:count])
        assert error < tolerance, f"error {error:.2e} of max |logit| within {count} tokens"
        self.compared += count
        self.worst = max(self.worst, error)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())

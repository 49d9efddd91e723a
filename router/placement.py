"""Which worker gets a sequence: a pure function of what the router knows.

Called by `router.dispatch` for every sequence. Policies are plain values behind `Placement`; they see a
picture of the fleet and never the fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rorqual.session import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One connected worker. What is outstanding is the router's own count: it includes what the worker's
    last report could not know yet."""

    address: str
    session_number: int  # over all workers: a worker that came back has another one
    draining: bool
    sequences_outstanding: int
    sequences_outstanding_max: int
    tokens_outstanding: int  # to be computed or generated for the router's sequences, at most
    sequences_max: int  # that the worker runs at once
    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The sequence to be placed."""

    prompt_tokens: int
    tokens_max: int  # to be generated


class Placement(Protocol):
    """Picks one of the workers, none of which is draining or full; never called without a candidate."""

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> WorkerView: ...


class LeastOutstandingTokens:
    """The worker with the least to do, counted in tokens; among equals the one with fewest sequences, then
    the first by address, so that the same picture always gives the same answer."""

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> WorkerView:
        return min(
            workers, key=lambda view: (view.tokens_outstanding, view.sequences_outstanding, view.address)
        )


def candidates(workers: Sequence[WorkerView], *, excluded: frozenset[int]) -> list[WorkerView]:
    """Workers that may take a sequence now. `excluded` are sessions that have already failed it."""
    return [
        view
        for view in workers
        if not view.draining
        and view.session_number not in excluded
        and view.sequences_outstanding < view.sequences_outstanding_max
    ]

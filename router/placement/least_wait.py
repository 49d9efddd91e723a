"""Which workers get a sequence: a pure function of what the router knows.

Called by `router.dispatch` for every sequence: whole to one worker that does both, or split over a prefill and a
decode worker. Policies are plain values behind `Placement`; they see the fleet in columns (`router.placement.columns`)
and never the fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvstore.keys import PageKey
from rorqual.performance.sources import TOKENS_PER_SECOND_UNKNOWN
from rorqual.session import PeerFetch, Role, credit_pages
from router.placement.columns import Bools, FleetColumns, Float64s, WorkerView

WAIT_SECONDS_SAME = 0.01
WAIT_SHARE_SAME = 0.1
"""Predictions are no better than this. Of waits that differ by less than either, the less busy worker is chosen, so
that a rate measured a little higher does not draw every sequence to one worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the store that all workers share has of one prompt, as far as is known. Depths in pages."""

    first: int = 0  # pages before this one are not known to be there
    pages: int = 0  # it has those from there up to this depth; 0: none
    tail: int = 0  # deepest boundary with a tail there, up to that depth; 0: none


NOTHING_STORED = Stored()
"""Nothing is known, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The sequence to be placed."""

    prompt_tokens: int
    tokens_max: int  # to be generated
    charged: str = ""  # address of the decode worker that has granted it credit already
    is_queueing: bool = False  # it waits for credit, or others do, so that it would have to
    keys: Mapping[str, tuple[PageKey, ...]] = field(
        default_factory=dict[str, tuple[PageKey, ...]]
    )  # of its full pages, by wire id; empty where no policy asks for them
    session: str = ""  # said by the client: prompts of one session begin alike
    stored: Stored = NOTHING_STORED  # of the first chain in `keys`


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What a policy expects of a prompt it has placed. `finished` gives it back."""

    number: int
    tokens_reused: int  # of the prompt: not computed
    fetch: PeerFetch | None = None  # what it is to read from another worker first
    seconds: float  # to the first token; 0 of policies that predict nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """One worker does everything."""

    worker: WorkerView
    predicted: Predicted | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One computes the prompt, another decodes. Without `decode` it has to wait for credit first."""

    prefill: WorkerView
    decode: WorkerView | None
    predicted: Predicted | None = None


class Placement(Protocol):
    @property
    def uses_keys(self) -> bool:
        """It looks at `Demand.keys`."""
        ...

    def choose(self, fleet: FleetColumns, able_W: Bools, demand: Demand) -> Whole | Split | None:
        """Among the able, none of which is draining or full. None when they cannot serve a sequence between them.
        Every answer with `predicted` is followed by one `finished`."""
        ...

    def finished(self, predicted: Predicted) -> None:
        """The prompt has been computed, was given up, or is to be placed anew."""
        ...


class LeastPredictedWait:
    """Whatever is predicted to give the first token soonest. A decode worker is not on the way to it, unless none has
    credit to give: then a worker that does both comes first. The same picture always gives the same answer."""

    uses_keys = False

    def finished(self, predicted: Predicted) -> None:
        """Nothing is remembered of a prompt."""

    def choose(self, fleet: FleetColumns, able_W: Bools, demand: Demand) -> Whole | Split | None:
        decode = decode_worker(fleet, able_W, demand)
        can_W = able_W & fleet.both_W
        if decode >= 0 or (not can_W.any() and (able_W & fleet.decode_W).any()):
            can_W |= able_W & fleet.prefill_W
        if not can_W.any():
            return None
        wait_W = np.where(can_W, predicted_wait_W(fleet, demand.prompt_tokens), np.inf)
        shortest = float(wait_W.min())
        longest = shortest + max(WAIT_SECONDS_SAME, WAIT_SHARE_SAME * shortest)
        chosen = fleet.view(fleet.least_busy(wait_W <= longest))
        if chosen.role is Role.BOTH:
            return Whole(worker=chosen)
        return Split(prefill=chosen, decode=fleet.view(decode) if decode >= 0 else None)


def predicted_wait_W(fleet: FleetColumns, prompt_tokens: int) -> Float64s:
    """Seconds to the first token on workers that compute prompts: those before it, its own, and, where every place
    is taken, until one is free."""
    rate_W = np.where(fleet.prefill_rate_W == 0.0, TOKENS_PER_SECOND_UNKNOWN, fleet.prefill_rate_W)
    return (fleet.tokens_ahead_W() + prompt_tokens) / rate_W + fleet.seconds_until_place_W()


def missing_roles(roles: Iterable[Role]) -> str:
    """Why workers of these roles cannot answer a request between them; empty when they can."""
    present = set(roles)
    if Role.BOTH in present or {Role.PREFILL, Role.DECODE} <= present:
        return ""
    if not present:
        return "no worker is connected"
    return f"no {'decode' if Role.PREFILL in present else 'prefill'} worker is connected"


HELD_SHARE = 0.5
"""A decode worker that has all pages of a prompt may be fuller by so much than one that has none."""


def decode_worker(
    fleet: FleetColumns, able_W: Bools, demand: Demand, *, held_W: Float64s | None = None
) -> int:
    """The row of the one that is charged already, else of the least full of those with room; rather one that has to
    read less. -1: none. `held_W`: what share of the prompt's pages a worker has."""
    able_W = able_W & fleet.decode_W
    if demand.charged:
        row = fleet.row_of.get(demand.charged, -1)
        return row if row >= 0 and able_W[row] else -1
    if demand.is_queueing:
        return -1
    pages = credit_pages(demand.prompt_tokens)
    rows = np.flatnonzero(able_W & fleet.fits_W(pages))
    if not len(rows):
        return -1
    cost = fleet.fullness_with_W(pages)[rows]
    if held_W is not None:
        cost -= HELD_SHARE * held_W[rows]
    return fleet.first_by_address(rows[cost == cost.min()])

"""Which workers get a sequence: a pure function of what the router knows.

Called by `router.dispatch` for every sequence: whole to one worker that does both, or split over a prefill and a
decode worker. Policies are plain values behind `Placement`; they see a picture of the fleet and never the fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.keys import PageKey
from rorqual.session import Load, Role, credit_pages
from router.credit import CreditUse

TOKENS_PER_SECOND_UNKNOWN = 1000.0
"""Assumed of a worker that has measured no prefill yet: so much that it is tried, not so much that all wait there."""

WAIT_SECONDS_SAME = 0.01
WAIT_SHARE_SAME = 0.1
"""Predictions are no better than this. Of waits that differ by less than either, the less busy worker is chosen, so
that a rate measured a little higher does not draw every sequence to one worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One connected worker. What is outstanding is the router's own count: it includes what the worker's
    last report could not know yet."""

    address: str
    session_number: int  # over all workers: a worker that came back has another one
    role: Role = Role.BOTH
    draining: bool
    sequences_outstanding: int
    sequences_outstanding_max: int
    tokens_outstanding: int  # to be computed or generated for the router's sequences, at most
    prompt_tokens_outstanding: int = 0  # of these, to be computed before a first token, as was predicted
    prompt_tokens_sent: int = 0  # the same, as if the worker kept nothing
    sequences_max: int  # that the worker runs at once
    load: Load
    credit: CreditUse | None = None  # of a decode worker
    index: int = 0  # its place in the picture of caches
    pages_cached: int = 0  # that it is known to keep


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What a policy expects of a prompt it has placed. `finished` gives it back."""

    number: int
    tokens_reused: int  # of the prompt: not computed
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

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> Whole | Split | None:
        """Among workers none of which is draining or full. None when they cannot serve a sequence between them. Every
        answer with `predicted` is followed by one `finished`."""
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

    def choose(self, workers: Sequence[WorkerView], demand: Demand) -> Whole | Split | None:
        decode = decode_worker(workers, demand)
        able = [view for view in workers if view.role is Role.BOTH]
        if decode is not None or (not able and of_role(workers, Role.DECODE)):
            able += of_role(workers, Role.PREFILL)
        if not able:
            return None
        waits = {view.address: predicted_wait(view, demand.prompt_tokens) for view in able}
        shortest = min(waits.values())
        longest = shortest + max(WAIT_SECONDS_SAME, WAIT_SHARE_SAME * shortest)
        chosen = min((view for view in able if waits[view.address] <= longest), key=busyness)
        return Whole(worker=chosen) if chosen.role is Role.BOTH else Split(prefill=chosen, decode=decode)


def predicted_wait(view: WorkerView, prompt_tokens: int) -> float:
    """Seconds to the first token on a worker that computes prompts: those before it, its own, and, where every place
    is taken, until one is free."""
    rate = view.load.prefill_tokens_per_second or TOKENS_PER_SECOND_UNKNOWN
    return (tokens_ahead(view) + prompt_tokens) / rate + seconds_until_place(view)


def tokens_ahead(view: WorkerView) -> int:
    """Prompt tokens to be computed there before another one's: this router's, and what the worker says beyond them."""
    own = max(view.prompt_tokens_sent, view.prompt_tokens_outstanding)
    return view.prompt_tokens_outstanding + max(0, view.load.tokens_waiting - own)


def seconds_until_place(view: WorkerView) -> float:
    """0 as long as there is a place to run. A prefill worker's are free soon after each prompt."""
    num_queued = view.sequences_outstanding + 1 - view.sequences_max
    if view.role is Role.BOTH and num_queued > 0:
        # Places become free one by one, as sequences end that have generated all they may.
        tokens_left = view.tokens_outstanding - view.prompt_tokens_outstanding
        steps_each = tokens_left / max(view.sequences_outstanding, 1)
        return num_queued * steps_each / max(view.sequences_max, 1) * view.load.step_ms / 1000
    return 0.0


def candidates(workers: Iterable[WorkerView], *, excluded: frozenset[int]) -> list[WorkerView]:
    """Workers that may take a sequence now. `excluded` are sessions that have already failed it. How much a
    decode worker may take is a matter of its credit."""
    return [
        view
        for view in workers
        if not view.draining
        and view.session_number not in excluded
        and (view.role is Role.DECODE or view.sequences_outstanding < view.sequences_outstanding_max)
    ]


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
    workers: Sequence[WorkerView], demand: Demand, *, held: Mapping[int, float] | None = None
) -> WorkerView | None:
    """The one that is charged already, else the least full of those with room; rather one that has to read less.
    `held`: by index, what share of the prompt's pages a worker has."""
    shares = held or {}
    decoders = of_role(workers, Role.DECODE)
    if demand.charged:
        return next((view for view in decoders if view.address == demand.charged), None)
    if demand.is_queueing:
        return None
    pages = credit_pages(demand.prompt_tokens)
    able = [
        (view.credit.fullness_with(pages) - HELD_SHARE * shares.get(view.index, 0.0), view.address, view)
        for view in decoders
        if view.credit is not None and view.credit.fits(pages)
    ]
    return min(able, key=lambda item: item[:2])[2] if able else None


def of_role(workers: Iterable[WorkerView], role: Role) -> list[WorkerView]:
    """In their order; the list is the caller's."""
    return [view for view in workers if view.role is role]


def busyness(view: WorkerView) -> tuple[int, int, str]:
    """Of workers whose waits are alike, who comes first."""
    return view.tokens_outstanding, view.sequences_outstanding, view.address

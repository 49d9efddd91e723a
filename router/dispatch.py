"""From a request to updates of its choices: the production `router.generation.Generator`.

The gateways call `generate`. Each choice is a sequence, placed by the `Placement` policy and opened through
the fleet, whole on one worker or split over two (`router.split`), for which a decode worker's credit is
charged first. Its numbered tokens come back as reports and leave as text. A stop string found here cancels
the sequence on its workers at once. A worker that fails a sequence before its first token costs one retry
elsewhere, while the request's other choices go on; after that the client has seen tokens, and the request
fails. A client that reads too slowly fails its own request. Every stage of a choice has a deadline. Closing
the generator cancels everything it has open.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut, WorkerLost
from rorqual.service import until_first
from rorqual.session import (
    Alternatives,
    ErrorCode,
    FinishReason,
    PromptLogprobs,
    SequenceReport,
    check_sequence,
    credit_pages,
)
from rorqual.telemetry import fields
from router.credit import Ticket
from router.fleet import Fleet
from router.fleet_metrics import FleetMetrics
from router.generation import ChoiceUpdate, Generation, ServedModel, TokenOut
from router.members import Members
from router.placement import (
    Demand,
    Placement,
    Predicted,
    Split,
    Whole,
    WorkerView,
    missing_roles,
)
from router.prompt_keys import PromptKeys
from router.sequences import Mailbox, SequenceRequest
from router.split import SplitSequence
from router.stored import StoreKnowledge
from router.text import TextDelta

log = logging.getLogger(__name__)


class ChoiceTextLike(Protocol):
    """One choice's tokens to text, as `router.text.ChoiceText` does it."""

    def feed(self, token_ids: Iterable[int], *, finished: bool = False) -> TextDelta: ...


class MakeTexts(Protocol):
    """The text side of a request: one `ChoiceTextLike` for each of its choices. May raise InvalidRequest."""

    def __call__(self, generation: Generation) -> Sequence[ChoiceTextLike]: ...


class OpenSequence(Protocol):
    """A choice that is being served: a `RemoteSequence`, or a `SplitSequence` of two."""

    @property
    def failed_sessions(self) -> frozenset[int]:
        """After a failure: the sessions on which it is not to be tried again."""
        ...

    @property
    def is_handing_over(self) -> bool:
        """Its first token is out and the worker that goes on with it has sent none yet."""
        ...

    def cancel(self) -> None: ...


class Stage(enum.Enum):
    """What a choice waits for."""

    PLACE = "place"  # a worker to connect
    CREDIT = "credit"  # room promised by a decode worker
    FIRST_TOKEN = "first_token"
    HAND_OVER = "hand_over"  # the first token of the decode worker
    NEXT_TOKEN = "next_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    served_name: str
    created: int  # seconds since 1970, for /v1/models
    place_seconds_max: float = 10.0  # while no worker is connected
    credit_seconds_max: float = 60.0  # while no decode worker has credit to give
    first_token_seconds_max: float = 600.0  # place, credit, queue and prompt; a retry does not extend it
    hand_over_seconds_max: float = 30.0  # from the first token to the decode worker's first one
    next_token_seconds_max: float = 120.0  # a preempted sequence is computed anew within this
    bind_early_tokens: int = 8192  # prompts of so many are read by the decode worker while they are computed
    values_unread_max: int = 64 * 1024  # tokens and alternatives a client may leave unread: 4 MB


class Dispatcher:
    def __init__(
        self,
        *,
        fleet: Fleet,
        placement: Placement,
        make_texts: MakeTexts,
        config: DispatchConfig,
        metrics: FleetMetrics,
        store: StoreKnowledge | None = None,
    ) -> None:
        """With `store`, somebody must `run` it, too."""
        self.store = store
        self._fleet = fleet
        self._placement = placement
        self._make_texts = make_texts
        self._config = config
        self._metrics = metrics

    def model(self) -> ServedModel | None:
        """What every connected worker can serve; None while they cannot serve anything between them."""
        members = self._fleet.members
        if members.first is None or members.missing():
            return None
        return ServedModel(
            name=self._config.served_name,
            created=self._config.created,
            vocab_size=members.first.vocab_size,
            sequence_tokens_max=members.sequence_tokens_max,
            eos_token_ids=members.first.eos_token_ids,
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[ChoiceUpdate, None]:
        """See `router.generation.Generator`."""
        check_generation(generation, self._fleet.members)
        num_scores = generation.num_choices * generation.sampling.num_prompt_scores(len(generation.prompt))
        mailbox = Mailbox(values_max=self._config.values_unread_max + num_scores)
        start = asyncio.get_running_loop().time()
        choices = [
            _Choice(
                number=number, text=text, first_token_deadline=start + self._config.first_token_seconds_max
            )
            for number, text in enumerate(self._make_texts(generation))
        ]
        assert len(choices) == generation.num_choices
        keys = PromptKeys(generation.prompt, salt=generation.cache_salt)
        try:
            if self.store is not None and self._placement.uses_keys:
                roots = self._fleet.members.roots
                keys.stored = await self.store.ask(keys.of(roots), salt=generation.cache_salt)
            while live := [choice for choice in choices if not choice.is_finished]:
                for choice in live:
                    if choice.sequence is None:
                        self._place(choice, generation, mailbox, keys)
                await self._wait_for_news(live, mailbox)
                for number, reports in _by_choice(mailbox.take()).items():
                    choice = choices[number]
                    if choice.is_finished:
                        continue  # it was stopped here after these had been delivered
                    update = self._advance(choice, reports, generation)
                    if update is not None:
                        yield update
        finally:
            for choice in choices:
                choice.cancel()
                choice.give_credit_back(self._fleet)
                self._keep_promise(choice)

    def _place(self, choice: _Choice, generation: Generation, mailbox: Mailbox, keys: PromptKeys) -> None:
        """Open the choice on its workers, or let it wait: for a worker to connect that has not failed it yet, or for
        credit. Raises Overloaded when waiting cannot help."""
        workers = self._fleet.columns
        able_W = workers.able_W(excluded=frozenset(choice.failed_sessions))
        ticket = choice.ticket
        if ticket is not None and not ticket.is_waiting and not self._fleet.credit.is_usable(ticket):
            choice.give_credit_back(self._fleet)
            choice.is_urgent, ticket = True, None
        demand = Demand(
            prompt_tokens=len(generation.prompt),
            tokens_max=generation.max_tokens,
            charged=ticket.address if ticket is not None else "",
            is_queueing=self._fleet.credit.num_waiting > 0,
            keys=keys.of(self._fleet.members.roots) if self._placement.uses_keys else {},
            session=f"{generation.cache_salt} {generation.session_key}" if generation.session_key else "",
            stored=keys.stored,
        )
        self._keep_promise(choice)
        placed = self._placement.choose(workers, able_W, demand)
        choice.predicted = placed.predicted if placed is not None else None
        match placed:
            case Whole(worker=worker):
                choice.give_credit_back(self._fleet)
                request = _request(choice, generation)
                choice.sequence = self._fleet.open(worker.address, request, sink=mailbox, tag=choice.number)
                self._note_placed(choice, generation, worker.address, "whole")
            case Split(prefill=prefill, decode=decode):
                if ticket is None:
                    ticket = self._ask_for_credit(choice, generation, mailbox, decode)
                    if ticket.is_granted and decode is None:
                        # It came at once: now it can be said who computes the prompt.
                        self._place(choice, generation, mailbox, keys)
                        return
                if ticket.is_granted:
                    self._open_split(choice, generation, mailbox, prefill.address)
                else:
                    self._keep_promise(choice)
                    self._enter(choice, Stage.CREDIT)
            case None:
                self._check_waiting_helps(choice)
                self._enter(choice, Stage.PLACE)

    def _keep_promise(self, choice: _Choice) -> None:
        """The prompt of a choice that was placed has been computed, or is not computed there any more."""
        if choice.predicted is not None:
            self._placement.finished(choice.predicted)
            choice.predicted = None

    def _ask_for_credit(
        self, choice: _Choice, generation: Generation, mailbox: Mailbox, decode: WorkerView | None
    ) -> Ticket:
        """For one sequence of such a prompt, from before it is computed. Raises Overloaded when too many wait."""
        try:
            choice.ticket = self._fleet.credit.ask(
                credit_pages(len(generation.prompt)),
                on_grant=mailbox.wake,
                preferred=decode.address if decode is not None else "",
                is_urgent=choice.is_urgent,
            )
        except Overloaded:
            self._metrics.requests_overloaded.inc()
            raise
        return choice.ticket

    def _open_split(
        self, choice: _Choice, generation: Generation, mailbox: Mailbox, prefill_address: str
    ) -> None:
        assert choice.ticket is not None
        # A single token is the prefill worker's: nobody will have to go on.
        is_early = generation.max_tokens > 1 and len(generation.prompt) >= self._config.bind_early_tokens
        choice.sequence = SplitSequence(
            fleet=self._fleet,
            prefill_address=prefill_address,
            ticket=choice.ticket,
            request=_request(choice, generation),
            is_early=is_early,
            sink=mailbox,
            tag=choice.number,
            now=asyncio.get_running_loop().time,
        )
        choice.ticket = None
        self._note_placed(choice, generation, prefill_address, "split")

    def _note_placed(self, choice: _Choice, generation: Generation, address: str, kind: str) -> None:
        self._enter(choice, Stage.FIRST_TOKEN)
        self._metrics.sequences_placed.labels(kind).inc()
        if choice.predicted is not None and choice.predicted.fetch is not None:
            self._metrics.peer_fetches.inc()
        log.debug(
            "placed a sequence %s",
            fields(request=generation.request_id, choice=choice.number, worker=address, kind=kind),
        )

    def _check_waiting_helps(self, choice: _Choice) -> None:
        """Raises Overloaded when the workers that are missing are there and full."""
        workers = self._fleet.columns
        there_W = workers.there_W(excluded=frozenset(choice.failed_sessions))
        if not missing_roles(workers.roles(there_W)):
            self._metrics.requests_overloaded.inc()
            raise Overloaded("every worker is full; try again later")
        if isinstance(choice.failure, Overloaded):
            # The only workers there are have said that they are full.
            self._metrics.requests_overloaded.inc()
            raise choice.failure

    def _enter(self, choice: _Choice, stage: Stage) -> None:
        """Set the deadline of what the choice waits for now. Waiting on for the same does not extend it, but every
        token begins a new wait."""
        if choice.stage is stage and stage in (Stage.PLACE, Stage.CREDIT):
            return
        choice.stage = stage
        now = asyncio.get_running_loop().time()
        match stage:
            case Stage.PLACE:
                choice.deadline = min(now + self._config.place_seconds_max, choice.first_token_deadline)
            case Stage.CREDIT:
                choice.deadline = min(now + self._config.credit_seconds_max, choice.first_token_deadline)
            case Stage.FIRST_TOKEN:
                choice.deadline = choice.first_token_deadline
            case Stage.HAND_OVER:
                choice.deadline = now + self._config.hand_over_seconds_max
            case Stage.NEXT_TOKEN:
                choice.deadline = now + self._config.next_token_seconds_max

    async def _wait_for_news(self, live: Sequence[_Choice], mailbox: Mailbox) -> None:
        """Until a report or credit has come, or, while a choice has no worker, until there is another one to
        try."""
        if not mailbox.has_news:
            change = self._fleet.next_change
            overdue = min(live, key=lambda choice: choice.deadline)
            try:
                async with asyncio.timeout_at(overdue.deadline):
                    if any(choice.sequence is None for choice in live):
                        await until_first(mailbox.wait(), change.wait())
                    else:
                        await mailbox.wait()
            except TimeoutError:
                raise self._overdue(overdue) from None
        if mailbox.has_spilled:
            raise StageTimedOut("the client reads too slowly: the answer was given up")

    def _overdue(self, choice: _Choice) -> RorqualError:
        """What it means that a choice's next deadline has passed."""
        self._metrics.stages_overdue.labels(choice.stage.value).inc()
        number = choice.number
        match choice.stage:
            case Stage.PLACE:
                text = self._fleet.missing() or "no worker that could serve this is connected"
                return choice.failure or Overloaded(f"{text}; try again later")
            case Stage.CREDIT:
                return StageTimedOut(f"decode credit for choice {number} did not come in time")
            case Stage.FIRST_TOKEN:
                return StageTimedOut(f"the first token of choice {number} did not come in time")
            case Stage.HAND_OVER:
                return StageTimedOut(f"no decode worker went on with choice {number} in time")
            case Stage.NEXT_TOKEN:
                return StageTimedOut(f"token {choice.num_tokens} of choice {number} did not come in time")

    def _advance(
        self, choice: _Choice, reports: Sequence[SequenceReport], generation: Generation
    ) -> ChoiceUpdate | None:
        """Take a choice's reports in, as one update. One whose worker failed it early enough is left without
        a sequence, to be placed anew."""
        assert choice.sequence is not None
        update = choice.take(reports)
        if update is not None and update.tokens:
            self._keep_promise(choice)
            self._enter(choice, Stage.HAND_OVER if choice.sequence.is_handing_over else Stage.NEXT_TOKEN)
        failure = _failure(reports[-1])
        if failure is None or choice.is_finished:
            return update
        is_first = choice.num_tokens == 0 and choice.failure is None
        if not is_first or isinstance(failure, InvalidRequest):
            if isinstance(failure, WorkerLost):
                self._metrics.sequences_lost.inc()
            raise failure
        log.warning(
            "retried a sequence %s",
            fields(request=generation.request_id, choice=choice.number, error=failure),
        )
        self._metrics.sequences_retried.inc()
        choice.start_over(failure)
        return None


def check_generation(generation: Generation, members: Members) -> None:
    """What no worker could serve is refused before it is sent. Without a worker it is checked there."""
    if generation.num_choices < 1:
        raise InvalidRequest(f"n must be at least 1, got {generation.num_choices}", field="n")
    if members.first is None:
        return
    check_sequence(
        prompt=generation.prompt,
        max_tokens=generation.max_tokens,
        sampling=generation.sampling,
        vocab_size=members.first.vocab_size,
        sequence_tokens_max=members.sequence_tokens_max,
        num_choices=generation.num_choices,
    )


@dataclass(slots=True, kw_only=True)
class _Choice:
    number: int
    text: ChoiceTextLike
    first_token_deadline: float  # on the loop's clock
    stage: Stage = Stage.FIRST_TOKEN
    deadline: float = 0.0  # of the stage; set when it has been placed, or waits to be
    ticket: Ticket | None = None  # until a split sequence has it
    is_urgent: bool = False  # it had credit and lost it: others who wait come after it
    sequence: OpenSequence | None = None
    predicted: Predicted | None = None  # where it was placed, until its prompt is computed
    num_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    is_finished: bool = False
    failure: RorqualError | None = None  # of the first attempt
    failed_sessions: set[int] = field(default_factory=set[int])
    scores: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])  # until the first token

    def cancel(self) -> None:
        if self.sequence is not None:
            self.sequence.cancel()

    def give_credit_back(self, fleet: Fleet) -> None:
        if self.ticket is not None:
            fleet.credit.release(self.ticket)
            self.ticket = None

    def start_over(self, failure: RorqualError) -> None:
        """Its worker has failed it: it needs another one."""
        assert self.sequence is not None
        self.failed_sessions |= self.sequence.failed_sessions
        self.is_urgent = True
        self.failure = failure
        self.sequence = None
        self.scores.clear()

    def take(self, reports: Sequence[SequenceReport]) -> ChoiceUpdate | None:
        """The tokens of all reports and the text they make certain; cut at a stop string, which ends the
        choice."""
        tokens = _tokens(reports[0]) if len(reports) == 1 else [t for r in reports for t in _tokens(r)]
        self.scores += [r.prompt_logprobs for r in reports if r.prompt_logprobs is not None]
        finish_reason = reports[-1].finish_reason
        ended = finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        delta = self.text.feed([token.token_id for token in tokens], finished=ended)
        if delta.stop_index is not None:
            tokens = tokens[: delta.stop_index + 1 - self.num_tokens]
            finish_reason, ended = FinishReason.STOP, True
            self.cancel()
        first_index = self.num_tokens
        if first_index == 0:
            # Of the worker that gave token 0: one that failed before counts for nothing.
            self.cached_tokens = max((report.cached_tokens for report in reports), default=0)
        self.num_tokens += len(tokens)
        self.is_finished = ended
        if not (tokens or ended):
            return None
        return ChoiceUpdate(
            choice=self.number,
            first_index=first_index,
            tokens=tuple(tokens),
            text=delta.text,
            reasoning=delta.reasoning,
            finish_reason=finish_reason if ended else None,
            prompt_logprobs=self._take_scores() if self.scores else None,
            cached_tokens=self.cached_tokens if first_index == 0 else 0,
        )

    def _take_scores(self) -> PromptLogprobs:
        """All parts as one, with the first update."""
        parts, self.scores = self.scores, []
        return PromptLogprobs(
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
            alternatives=tuple(item for part in parts for item in part.alternatives),
        )


def _request(choice: _Choice, generation: Generation) -> SequenceRequest:
    return SequenceRequest(
        request_id=generation.request_id,
        prompt=generation.prompt,
        max_tokens=generation.max_tokens,
        ignore_eos=generation.ignore_eos,
        sampling=msgspec.structs.replace(generation.sampling, choice=choice.number),
        tokens_reused=choice.predicted.tokens_reused if choice.predicted is not None else 0,
        cache_salt=generation.cache_salt,
        fetch=choice.predicted.fetch if choice.predicted is not None else None,
    )


def _by_choice(reports: Iterable[tuple[int, SequenceReport]]) -> dict[int, list[SequenceReport]]:
    grouped: dict[int, list[SequenceReport]] = {}
    for number, report in reports:
        grouped.setdefault(number, []).append(report)
    return grouped


def _failure(report: SequenceReport) -> RorqualError | None:
    """What a worker's last word on a sequence means for the request."""
    if report.finish_reason is FinishReason.CANCELLED:
        return WorkerLost("the worker cancelled the sequence")
    if report.finish_reason is FinishReason.HANDED_OVER:
        return WorkerLost("the worker handed over a sequence that it was to serve whole")
    if report.finish_reason is not FinishReason.ERROR:
        return None
    match report.error_code:
        case ErrorCode.INVALID:
            return InvalidRequest(report.error)
        case ErrorCode.OVERLOADED:
            return Overloaded(report.error)
        case _:
            return WorkerLost(report.error)


def _tokens(report: SequenceReport) -> list[TokenOut]:
    if not report.logprobs:
        return [TokenOut(token_id=token_id, logprob=None) for token_id in report.token_ids]
    alternatives = report.alternatives or [None] * len(report.token_ids)
    return [
        TokenOut(token_id=token_id, logprob=logprob, alternatives=_pairs(item))
        for token_id, logprob, item in zip(report.token_ids, report.logprobs, alternatives, strict=True)
    ]


def _pairs(item: Alternatives | None) -> tuple[tuple[int, float], ...]:
    return () if item is None else tuple(zip(item.token_ids, item.logprobs, strict=True))

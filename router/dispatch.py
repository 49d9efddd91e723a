"""From a request to updates of its choices: the production `router.generation.Generator`.

The gateways call `generate`. Each choice is a sequence, placed by the `Placement` policy and opened on a
worker through the fleet; its numbered tokens come back as reports and leave as text. A stop string found
here cancels the sequence on its worker at once. A worker that fails a sequence before its first token costs
one retry elsewhere, while the request's other choices go on; after that the client has seen tokens, and the
request fails. A client that reads too slowly fails its own request. Closing the generator cancels
everything it has open.
"""

from __future__ import annotations

import asyncio
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
    Welcome,
    check_sequence,
)
from rorqual.telemetry import fields
from router.fleet import Fleet, Mailbox, RemoteSequence, SequenceRequest
from router.fleet_metrics import FleetMetrics
from router.generation import ChoiceUpdate, Generation, ServedModel, TokenOut
from router.placement import Demand, Placement, candidates
from router.text import TextDelta

log = logging.getLogger(__name__)


class ChoiceTextLike(Protocol):
    """One choice's tokens to text, as `router.text.ChoiceText` does it."""

    def feed(self, token_ids: Iterable[int], *, finished: bool = False) -> TextDelta: ...


class MakeTexts(Protocol):
    """The text side of a request: one `ChoiceTextLike` for each of its choices. May raise InvalidRequest."""

    def __call__(self, generation: Generation) -> Sequence[ChoiceTextLike]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    served_name: str
    created: int  # seconds since 1970, for /v1/models
    place_seconds_max: float = 10.0  # while no worker is connected
    first_token_seconds_max: float = 600.0  # queue and prompt; a retry does not extend it
    next_token_seconds_max: float = 120.0  # a preempted sequence is computed anew within this
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
    ) -> None:
        self._fleet = fleet
        self._placement = placement
        self._make_texts = make_texts
        self._config = config
        self._metrics = metrics

    def model(self) -> ServedModel | None:
        """What every connected worker can serve; None while there is none."""
        welcomes = self._fleet.welcomes()
        if not welcomes:
            return None
        return ServedModel(
            name=self._config.served_name,
            created=self._config.created,
            vocab_size=welcomes[0].vocab_size,
            sequence_tokens_max=min(welcome.sequence_tokens_max for welcome in welcomes),
            eos_token_ids=welcomes[0].eos_token_ids,
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[ChoiceUpdate, None]:
        """See `router.generation.Generator`."""
        check_generation(generation, self._fleet.welcomes())
        num_scores = generation.num_choices * generation.sampling.num_prompt_scores(len(generation.prompt))
        mailbox = Mailbox(values_max=self._config.values_unread_max + num_scores)
        start = asyncio.get_running_loop().time()
        choices = [
            _Choice(number=number, text=text, deadline=start + self._config.first_token_seconds_max)
            for number, text in enumerate(self._make_texts(generation))
        ]
        assert len(choices) == generation.num_choices
        try:
            while live := [choice for choice in choices if not choice.is_finished]:
                for choice in live:
                    if choice.sequence is None:
                        self._place(choice, generation, mailbox)
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

    def _place(self, choice: _Choice, generation: Generation, mailbox: Mailbox) -> None:
        """Open the choice on a worker, or leave it as it is while none is connected that has not failed it
        yet. Raises Overloaded when waiting cannot help."""
        workers = self._fleet.view()
        able = candidates(workers, excluded=frozenset(choice.failed_sessions))
        if not able:
            if any(
                not view.draining and view.session_number not in choice.failed_sessions for view in workers
            ):
                self._metrics.requests_overloaded.inc()
                raise Overloaded("every worker is full; try again later")
            if isinstance(choice.failure, Overloaded):
                # The only workers there are have said that they are full.
                self._metrics.requests_overloaded.inc()
                raise choice.failure
            if choice.place_deadline is None:
                now = asyncio.get_running_loop().time()
                choice.place_deadline = min(now + self._config.place_seconds_max, choice.deadline)
            return
        chosen = self._placement.choose(
            able, Demand(prompt_tokens=len(generation.prompt), tokens_max=generation.max_tokens)
        )
        request = SequenceRequest(
            request_id=generation.request_id,
            prompt=generation.prompt,
            max_tokens=generation.max_tokens,
            ignore_eos=generation.ignore_eos,
            sampling=msgspec.structs.replace(generation.sampling, choice=choice.number),
        )
        choice.sequence = self._fleet.open(chosen.address, request, mailbox=mailbox, tag=choice.number)
        choice.place_deadline = None
        log.debug(
            "placed a sequence %s",
            fields(request=generation.request_id, choice=choice.number, worker=chosen.address),
        )

    async def _wait_for_news(self, live: Sequence[_Choice], mailbox: Mailbox) -> None:
        """Until a report has come, or, while a choice has no worker, until there is another one to try."""
        if not mailbox.has_news:
            change = self._fleet.next_change
            overdue = min(live, key=_next_deadline)
            try:
                async with asyncio.timeout_at(_next_deadline(overdue)):
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
        if choice.place_deadline is not None:
            self._metrics.stages_overdue.labels("place").inc()
            return choice.failure or Overloaded("no worker is connected; try again later")
        self._metrics.stages_overdue.labels("next_token" if choice.num_tokens else "first_token").inc()
        what = f"token {choice.num_tokens}" if choice.num_tokens else "the first token"
        return StageTimedOut(f"{what} of choice {choice.number} did not come in time")

    def _advance(
        self, choice: _Choice, reports: Sequence[SequenceReport], generation: Generation
    ) -> ChoiceUpdate | None:
        """Take a choice's reports in, as one update. One whose worker failed it early enough is left without
        a sequence, to be placed anew."""
        update = choice.take(reports)
        if update is not None and update.tokens:
            now = asyncio.get_running_loop().time()
            choice.deadline = now + self._config.next_token_seconds_max
        failure = _failure(reports[-1])
        if failure is None or choice.is_finished:
            return update
        assert choice.sequence is not None
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


def check_generation(generation: Generation, welcomes: Sequence[Welcome]) -> None:
    """What no worker could serve is refused before it is sent. Without a worker it is checked there."""
    if generation.num_choices < 1:
        raise InvalidRequest(f"n must be at least 1, got {generation.num_choices}", field="n")
    if not welcomes:
        return
    check_sequence(
        prompt=generation.prompt,
        max_tokens=generation.max_tokens,
        sampling=generation.sampling,
        vocab_size=welcomes[0].vocab_size,
        sequence_tokens_max=min(welcome.sequence_tokens_max for welcome in welcomes),
        num_choices=generation.num_choices,
    )


@dataclass(slots=True, kw_only=True)
class _Choice:
    number: int
    text: ChoiceTextLike
    deadline: float  # of the next token, on the loop's clock
    place_deadline: float | None = None  # while it waits for a worker to connect
    sequence: RemoteSequence | None = None
    num_tokens: int = 0
    is_finished: bool = False
    failure: RorqualError | None = None  # of the first attempt
    failed_sessions: set[int] = field(default_factory=set[int])
    scores: list[PromptLogprobs] = field(default_factory=list[PromptLogprobs])  # until the first token

    def cancel(self) -> None:
        if self.sequence is not None:
            self.sequence.cancel()

    def start_over(self, failure: RorqualError) -> None:
        """Its worker has failed it: it needs another one."""
        assert self.sequence is not None
        self.failed_sessions.add(self.sequence.session_number)
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
        )

    def _take_scores(self) -> PromptLogprobs:
        """All parts as one, with the first update."""
        parts, self.scores = self.scores, []
        return PromptLogprobs(
            logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
            alternatives=tuple(item for part in parts for item in part.alternatives),
        )


def _next_deadline(choice: _Choice) -> float:
    return choice.deadline if choice.place_deadline is None else choice.place_deadline


def _by_choice(reports: Iterable[tuple[int, SequenceReport]]) -> dict[int, list[SequenceReport]]:
    grouped: dict[int, list[SequenceReport]] = {}
    for number, report in reports:
        grouped.setdefault(number, []).append(report)
    return grouped


def _failure(report: SequenceReport) -> RorqualError | None:
    """What a worker's last word on a sequence means for the request."""
    if report.finish_reason is FinishReason.CANCELLED:
        return WorkerLost("the worker cancelled the sequence")
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

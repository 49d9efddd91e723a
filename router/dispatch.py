"""From a request to updates of its choices: the production `router.generation.Generator`.

The gateways call `generate`. Each choice is a sequence, placed by the `Placement` policy and opened on a
worker through the fleet; its numbered tokens come back as reports and leave as text. A stop string found
here cancels the sequence on its worker at once. A worker that fails a sequence before its first token costs
one retry elsewhere; after that the client has seen tokens, and the request fails. Closing the generator
cancels everything it has open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut, WorkerLost
from rorqual.session import Alternatives, ErrorCode, FinishReason, PromptLogprobs, SequenceReport, Welcome
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
        mailbox = Mailbox()
        start = asyncio.get_running_loop().time()
        choices = [
            _Choice(number=number, text=text, deadline=start + self._config.first_token_seconds_max)
            for number, text in enumerate(self._make_texts(generation))
        ]
        assert len(choices) == generation.num_choices
        try:
            for choice in choices:
                await self._place(choice, generation, mailbox)
            while live := [choice for choice in choices if not choice.is_finished]:
                await self._wait_for_news(live, mailbox)
                for number, reports in _by_choice(mailbox.take()).items():
                    choice = choices[number]
                    if choice.is_finished:
                        continue  # it was stopped here after these had been delivered
                    update = await self._advance(choice, reports, generation, mailbox)
                    if update is not None:
                        yield update
        finally:
            for choice in choices:
                choice.cancel()

    async def _place(self, choice: _Choice, generation: Generation, mailbox: Mailbox) -> None:
        """Open the choice on a worker. Waits while none is connected, never while all are full."""
        request = SequenceRequest(
            request_id=generation.request_id,
            prompt=generation.prompt,
            max_tokens=generation.max_tokens,
            ignore_eos=generation.ignore_eos,
            sampling=msgspec.structs.replace(generation.sampling, choice=choice.number),
        )
        demand = Demand(prompt_tokens=len(generation.prompt), tokens_max=generation.max_tokens)
        loop = asyncio.get_running_loop()
        deadline = min(loop.time() + self._config.place_seconds_max, choice.deadline)
        while True:
            workers = self._fleet.view()
            able = candidates(workers, excluded=frozenset(choice.failed_sessions))
            if able:
                chosen = self._placement.choose(able, demand)
                choice.sequence = self._fleet.open(
                    chosen.address, request, mailbox=mailbox, tag=choice.number
                )
                log.debug(
                    "placed a sequence %s",
                    fields(request=generation.request_id, choice=choice.number, worker=chosen.address),
                )
                return
            if any(not view.draining and view.session not in choice.failed_sessions for view in workers):
                self._metrics.requests_overloaded.inc()
                raise Overloaded("every worker is full; try again later")
            try:
                async with asyncio.timeout_at(deadline):
                    await self._fleet.wait_for_change()
            except TimeoutError:
                self._metrics.stages_overdue.labels("place").inc()
                raise choice.failure or Overloaded("no worker is connected; try again later") from None

    async def _wait_for_news(self, live: Sequence[_Choice], mailbox: Mailbox) -> None:
        overdue = min(live, key=lambda choice: choice.deadline)
        try:
            async with asyncio.timeout_at(overdue.deadline):
                await mailbox.wait()
        except TimeoutError:
            stage = "next_token" if overdue.num_tokens else "first_token"
            self._metrics.stages_overdue.labels(stage).inc()
            what = f"token {overdue.num_tokens}" if overdue.num_tokens else "the first token"
            raise StageTimedOut(f"{what} of choice {overdue.number} did not come in time") from None

    async def _advance(
        self, choice: _Choice, reports: Sequence[SequenceReport], generation: Generation, mailbox: Mailbox
    ) -> ChoiceUpdate | None:
        """Take a choice's reports in, as one update. Opens it anew when its worker failed it early enough."""
        update = choice.take(reports)
        if update is not None and update.tokens:
            now = asyncio.get_running_loop().time()
            choice.deadline = now + self._config.next_token_seconds_max
        failure = _failure(reports[-1])
        if failure is None or choice.is_finished:
            return update
        assert choice.sequence is not None
        choice.failed_sessions.add(choice.sequence.session)
        choice.sequence = None
        is_first = choice.num_tokens == 0 and choice.failure is None
        if not is_first or isinstance(failure, InvalidRequest):
            if isinstance(failure, WorkerLost):
                self._metrics.sequences_lost.inc()
            raise failure
        log.warning(
            "retried a sequence %s",
            fields(request=generation.request_id, choice=choice.number, error=failure),
        )
        choice.failure = failure
        self._metrics.sequences_retried.inc()
        await self._place(choice, generation, mailbox)
        return None


def check_generation(generation: Generation, welcomes: Sequence[Welcome]) -> None:
    """What no worker could serve is refused before it is sent. Without a worker the length is checked
    there."""
    if len(generation.prompt) == 0:
        raise InvalidRequest("prompt must have at least one token", field="prompt")
    if generation.max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens must be at least 1, got {generation.max_tokens}", field="max_tokens"
        )
    if generation.num_choices < 1:
        raise InvalidRequest(f"n must be at least 1, got {generation.num_choices}", field="n")
    if not welcomes:
        return
    tokens_max = min(welcome.sequence_tokens_max for welcome in welcomes)
    if len(generation.prompt) + generation.max_tokens > tokens_max:
        raise InvalidRequest(
            f"prompt of {len(generation.prompt)} and max_tokens of {generation.max_tokens} tokens exceed the"
            f" {tokens_max} tokens a sequence can have",
            field="prompt" if len(generation.prompt) >= tokens_max else "max_tokens",
            code="context_length_exceeded",
        )
    generation.sampling.check(welcomes[0].vocab_size)


@dataclass(slots=True, kw_only=True)
class _Choice:
    number: int
    text: ChoiceTextLike
    deadline: float  # of the next token, on the loop's clock
    sequence: RemoteSequence | None = None
    num_tokens: int = 0
    is_finished: bool = False
    failure: RorqualError | None = None  # of the first attempt
    failed_sessions: set[int] = field(default_factory=set[int])

    def cancel(self) -> None:
        if self.sequence is not None:
            self.sequence.cancel()

    def take(self, reports: Sequence[SequenceReport]) -> ChoiceUpdate | None:
        """The tokens of all reports and the text they make certain; cut at a stop string, which ends the
        choice."""
        tokens = [token for report in reports for token in _tokens(report)]
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
        prompt_logprobs = _prompt_logprobs(reports)
        if not (tokens or ended or prompt_logprobs):
            return None
        return ChoiceUpdate(
            choice=self.number,
            first_index=first_index,
            tokens=tuple(tokens),
            text=delta.text,
            reasoning=delta.reasoning,
            finish_reason=finish_reason if ended else None,
            prompt_logprobs=prompt_logprobs,
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
    logprobs: Sequence[float | None] = report.logprobs or [None] * len(report.token_ids)
    pairs: Sequence[tuple[tuple[int, float], ...]] = [_pairs(item) for item in report.alternatives]
    return [
        TokenOut(token_id=token_id, logprob=logprob, alternatives=alternatives)
        for token_id, logprob, alternatives in zip(
            report.token_ids, logprobs, pairs or [()] * len(report.token_ids), strict=True
        )
    ]


def _pairs(item: Alternatives) -> tuple[tuple[int, float], ...]:
    return tuple(zip(item.token_ids, item.logprobs, strict=True))


def _prompt_logprobs(reports: Iterable[SequenceReport]) -> PromptLogprobs | None:
    return next((report.prompt_logprobs for report in reports if report.prompt_logprobs is not None), None)

"""A sequence open on a worker, as the router sees it, and where its reports go.

`router.worker_link` makes a `RemoteSequence` for each `SequenceRequest` and feeds it; whoever opened it gets its
reports through a `Sink`: a request's `Mailbox`, or a `router.split.SplitSequence` in between. Nothing here knows the
wire, and nothing decides what a failure means.
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Protocol

from rorqual.ids import SequenceId
from rorqual.model_config import PAGE_TOKENS
from rorqual.sampling import SamplingParams
from rorqual.session import ErrorCode, FinishReason, Offer, Role, SequenceReport, Source, TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """A sequence to open."""

    request_id: str
    prompt: TokenArray
    max_tokens: int  # to be generated, on all workers together
    ignore_eos: bool
    sampling: SamplingParams
    source: Source | None = None  # for a decode worker
    tokens_reused: int = 0  # of the prompt, that the worker is predicted not to compute
    cache_salt: str = ""


class Sink(Protocol):
    def put(self, tag: int, report: SequenceReport) -> bool:
        """Take a report of the sequence opened with `tag`; the last has a finish reason. False: hear no more of it,
        cancel it. May open, cancel and go on with sequences, this one too."""
        ...


class Link(Protocol):
    """What a sequence asks of its worker's session. Nothing happens where the sequence has ended."""

    @property
    def address(self) -> str: ...

    @property
    def session_number(self) -> int: ...

    def cancel(self, sequence: RemoteSequence) -> None: ...

    def take(self, sequence: RemoteSequence, offer: Offer, token_ids: tuple[int, ...]) -> None: ...

    def keep_lease(self, sequence: RemoteSequence, lease_seconds: float | None, *, at_once: bool) -> None: ...


class Mailbox:
    """Reports for one request, of all its sequences, in order of arrival.

    Holds `values_max` tokens and alternatives that nobody has taken. With more it spills: it empties itself,
    keeps nothing from then on, and the fleet cancels each of its sequences.
    """

    def __init__(self, *, values_max: int) -> None:
        self.has_spilled = False
        self._values_max = values_max
        self._num_values = 0
        self._reports: list[tuple[int, SequenceReport]] = []
        self._news = asyncio.Event()

    @property
    def has_news(self) -> bool:
        return self._news.is_set()

    def put(self, tag: int, report: SequenceReport) -> bool:
        """False once it has spilled."""
        self._news.set()
        if self.has_spilled:
            return False
        self._num_values += report.num_values
        self._reports.append((tag, report))
        if self._num_values > self._values_max:
            self.has_spilled = True
            self._reports.clear()
        return not self.has_spilled

    def wake(self) -> None:
        """Something else than a report has come that its reader waits for."""
        self._news.set()

    async def wait(self) -> None:
        await self._news.wait()

    def take(self) -> list[tuple[int, SequenceReport]]:
        """Everything since the last time, each with the tag of its sequence."""
        self._news.clear()
        self._num_values = 0
        reports, self._reports = self._reports, []
        return reports


class RemoteSequence:
    """A sequence open on a worker. Its reports go to the sink under `tag`; the last has a finish reason."""

    def __init__(
        self,
        *,
        link: Link,
        role: Role,
        sequence_id: SequenceId,
        request: SequenceRequest,
        sink: Sink,
        tag: int,
    ) -> None:
        self.session_number = link.session_number
        self.sequence_id = sequence_id
        self._link = link
        self._sink = sink
        self._tag = tag
        # A decode worker goes on after the first token and has no prompt to compute; a prefill worker ends with it.
        is_decode = role is Role.DECODE
        self.num_received = 1 if is_decode else 0
        self._num_tokens_max = 1 if role is Role.PREFILL else request.max_tokens
        self._prompt_tokens = 0 if is_decode else len(request.prompt)
        self._num_ready = (
            0 if is_decode else request.tokens_reused
        )  # of the prompt: kept, or computed and offered
        self._num_scored = 0  # prompt tokens whose logprobs have come
        wants_scores = request.sampling.prompt_logprobs is not None and not is_decode
        self._num_scores_wanted = len(request.prompt) - 1 if wants_scores else 0

    @property
    def address(self) -> str:
        return self._link.address

    @property
    def failed_sessions(self) -> frozenset[int]:
        """What to keep away from when it has failed."""
        return frozenset({self.session_number})

    @property
    def prompt_tokens_outstanding(self) -> int:
        return 0 if self.num_received else self._prompt_tokens - self._num_ready

    @property
    def prompt_tokens_sent(self) -> int:
        """The same, as if the worker kept nothing and had offered nothing."""
        return 0 if self.num_received else self._prompt_tokens

    @property
    def tokens_outstanding(self) -> int:
        return self.prompt_tokens_outstanding + max(self._num_tokens_max - self.num_received, 0)

    @property
    def is_handing_over(self) -> bool:
        """Never: it is served whole."""
        return False

    def cancel(self) -> None:
        """Tell the worker at once. No report comes after this; nothing happens when it has ended already."""
        self._link.cancel(self)

    def take(self, offer: Offer, token_ids: tuple[int, ...]) -> None:
        """On a decode worker: state it may read."""
        self._link.take(self, offer, token_ids)

    def keep_lease(self, lease_seconds: float | None, *, at_once: bool = False) -> None:
        """On a prefill worker: renew its lease from now on, often enough for one of so many seconds that has just
        begun, or, with `at_once`, may have begun a while ago. None: no more."""
        self._link.keep_lease(self, lease_seconds, at_once=at_once)

    def count(self, report: SequenceReport) -> None:
        """Note what a report brings, which is to be delivered next."""
        self.num_received += len(report.token_ids)
        if report.prompt_logprobs is not None:
            self._num_scored += len(report.prompt_logprobs.logprobs)
        if report.offer is not None:
            num_pages = report.offer.first_page + len(report.offer.pages)
            num_offered = min(num_pages * PAGE_TOKENS, self._prompt_tokens)
            self._num_ready = max(self._num_ready, num_offered)

    def deliver(self, report: SequenceReport) -> bool:
        """False when nobody wants to hear more."""
        return self._sink.put(self._tag, report)

    def left_out(self, report: SequenceReport) -> str:
        """What should have come before this report and did not; empty when it follows on."""
        if report.token_ids and report.first_index > self.num_received:
            return f"tokens {self.num_received}..{report.first_index - 1}"
        scores = report.prompt_logprobs
        num_scored = self._num_scored
        if scores is not None:
            if scores.first != num_scored + 1:
                return f"logprobs of the prompt between {num_scored + 1} and {scores.first}"
            num_scored += len(scores.logprobs)
        if report.token_ids and num_scored != self._num_scores_wanted:
            return f"logprobs of the prompt, of which {num_scored} came for {self._num_scores_wanted}"
        return ""

    def failure(self, text: str) -> SequenceReport:
        """The last report of a sequence whose worker gives none."""
        return SequenceReport(
            sequence_id=self.sequence_id,
            first_index=self.num_received,
            finish_reason=FinishReason.ERROR,
            error=text,
            error_code=ErrorCode.FAILED,
        )


def without_first(report: SequenceReport, count: int) -> SequenceReport:
    """The report without its first `count` tokens, which have been delivered before."""
    return dataclasses.replace(
        report,
        first_index=report.first_index + min(count, len(report.token_ids)),
        token_ids=report.token_ids[count:],
        logprobs=report.logprobs[count:],
        alternatives=report.alternatives[count:],
    )

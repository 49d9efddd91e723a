"""The course of one split sequence: when to bind, what to pass on, who renews, what a loss means.

Pure: reports of its prefill and its decode worker go in, effects come out, which `router.split` carries out in order.
It knows no addresses, no credit and no time.

The prefill worker samples the first token, which goes to the client at once, and offers state under a lease. A decode
worker is bound to it late, when everything has been offered, or early, with the first offer. Until that worker says
that it renews the lease, the router does. Offers are kept until it has sent a token of its own: up to then it may be
lost, and another one can be bound instead.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from rorqual.ids import SequenceId
from rorqual.session import ErrorCode, FinishReason, Offer, SequenceReport

BINDS_MAX = 3
"""Decode workers tried for one sequence: two may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """To the client."""

    report: SequenceReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """Open it on a decode worker as soon as one has credit, then call `HandOver.opened`."""

    offer: Offer  # names the lease
    kind: str  # "early", "late", "again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """To the decode worker that is bound."""

    offer: Offer
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepLease:
    """Renew from now on; None: no more. With `at_once` the last renewal may be long ago."""

    seconds: float | None
    at_once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Nothing follows. Give back what is held, on the decode worker and, where `cancels_prefill`, on the other: once
    the state has been read, that worker hears it from the reader, who knows better when."""

    cancels_prefill: bool


_GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH)

Effect = Deliver | Bind | Pass | KeepLease | End


class Phase(enum.Enum):
    PREFILL = "prefill"  # no decode worker is needed yet
    BINDING = "binding"  # one is needed
    READING = "reading"  # one has been told
    DECODING = "decoding"  # it has sent a token
    ENDED = "ended"


class HandOver:
    def __init__(self, *, is_early: bool) -> None:
        self.phase = Phase.PREFILL
        self.has_landed = False  # the decode worker has sent a token
        self.is_prefill_to_blame = False  # for the failure it has ended with
        self._is_early = is_early
        self._is_prefill_open = True
        self._prefill_failure = ""
        self._first_token: int | None = None
        self._offers: list[Offer] = []
        self._num_pages = 0  # offered
        self._is_complete = False  # the record has been offered
        self._num_passed = 0  # offers the decode worker that reads has been told of
        self._is_bound = False  # it has said that it renews the lease
        self._num_binds = 0

    @property
    def is_under_way(self) -> bool:
        """The client has the first token and nobody has gone on with it yet."""
        return self._first_token is not None and self.phase not in (Phase.DECODING, Phase.ENDED)

    @property
    def _has_passed_all(self) -> bool:
        return self._is_complete and self._num_passed == len(self._offers)

    def from_prefill(self, report: SequenceReport) -> list[Effect]:
        """A report of the prefill worker, the last one also when its session was lost."""
        if self.phase in (Phase.DECODING, Phase.ENDED):
            return []  # nothing is wanted of it any more
        wrong = self._breach(report)
        if wrong:
            return self._fail_prefill(_failed(report, f"the prefill worker {wrong}"))
        self._first_token = report.token_ids[0] if report.token_ids else self._first_token
        finish = report.finish_reason
        if finish in _GOOD_ENDS:
            return [_deliver(report), self._end(cancels_prefill=False)]
        effects: list[Effect] = []
        if report.token_ids or report.prompt_logprobs is not None:
            effects.append(_deliver(dataclasses.replace(report, finish_reason=None)))
        if finish is not None:
            effects += self._close_prefill(report)
        elif report.offer is not None:
            effects += self._take_offer(report.offer)
        elif self.phase is Phase.READING:
            effects += self._pass_on()  # the record may have waited for the token
        return effects

    def from_decode(self, report: SequenceReport) -> list[Effect]:
        """A report of the decode worker that was opened last."""
        if self.phase is Phase.ENDED:
            return []
        effects: list[Effect] = []
        if report.bound and self.phase is Phase.READING:
            self._is_bound = True
            effects.append(KeepLease(seconds=None))
        has_ended_well = report.finish_reason in _GOOD_ENDS
        if self.phase is Phase.READING and (report.token_ids or has_ended_well):
            if not (report.token_ids and self._has_passed_all):
                failure = _failed(report, "the decode worker went on before it could know the state")
                return [*effects, *self._fail(failure)]
            self.phase = Phase.DECODING
            self.has_landed = True
            self._offers.clear()
            effects.append(KeepLease(seconds=None))
        if has_ended_well:
            return [*effects, _deliver(report), self._end(cancels_prefill=False)]
        if report.token_ids:
            effects.append(_deliver(dataclasses.replace(report, finish_reason=None)))
        if report.finish_reason is not None:
            effects += self._lose_decode(report)
        return effects

    def opened(self) -> list[Effect]:
        """A decode worker has been sent the sequence: everything offered so far is for it."""
        assert self.phase is Phase.BINDING
        self.phase = Phase.READING
        self._is_bound = False
        self._num_passed = 0
        return self._pass_on()

    def refused(self, text: str) -> list[Effect]:
        """There was credit, and still the decode worker could not be sent the sequence."""
        assert self.phase is Phase.BINDING
        report = SequenceReport(sequence_id=SequenceId(0), first_index=0, error=text)
        return self._lose_decode(report)

    def cancel(self) -> list[Effect]:
        """Nobody wants it any more. May be called at any time."""
        if self.phase is Phase.ENDED:
            return []
        return [self._end(cancels_prefill=self.phase is not Phase.DECODING)]

    def _take_offer(self, offer: Offer) -> list[Effect]:
        effects: list[Effect] = []
        if not self._offers:
            effects.append(KeepLease(seconds=offer.lease_seconds))
        self._offers.append(offer)
        self._num_pages += len(offer.pages)
        self._is_complete = offer.record is not None
        if self.phase is Phase.READING:
            return [*effects, *self._pass_on()]
        if self.phase is Phase.PREFILL and (self._is_early or self._is_complete):
            effects.append(self._bind())
        return effects

    def _bind(self) -> Bind:
        kind = "again" if self._num_binds else "early" if self._is_early else "late"
        self.phase = Phase.BINDING
        self._num_binds += 1
        return Bind(offer=self._offers[0], kind=kind)

    def _pass_on(self) -> list[Effect]:
        """Offers the decode worker has not been told of; the one with the record goes with the first token."""
        effects: list[Effect] = []
        for offer in self._offers[self._num_passed :]:
            if offer.record is not None and self._first_token is None:
                break
            first = () if offer.record is None or self._first_token is None else (self._first_token,)
            effects.append(Pass(offer=offer, token_ids=first))
            self._num_passed += 1
        return effects

    def _close_prefill(self, report: SequenceReport) -> list[Effect]:
        """The prefill worker has nothing more to give. Who was bound and has been told of all of it may have read it,
        and says so, or fails."""
        self._is_prefill_open = False
        if report.finish_reason is not FinishReason.HANDED_OVER:
            self._prefill_failure = report.error or "it was cancelled"
        is_read = self._is_bound or report.finish_reason is FinishReason.HANDED_OVER
        if self.phase is Phase.READING and self._is_complete and is_read:
            return []
        if report.finish_reason is FinishReason.HANDED_OVER:
            report = _failed(
                report, "the state was handed over and the decode worker that has read it is gone"
            )
        return self._fail_prefill(report)

    def _lose_decode(self, report: SequenceReport) -> list[Effect]:
        """Bind another one, as long as nobody has decoded and the state is still there."""
        if self.phase is Phase.DECODING:
            return self._fail(report)
        text = report.error or "the decode worker cancelled the sequence"
        if report.error_code is ErrorCode.INVALID:
            # The client's request was fine: the prefill worker took it. Another decode worker would say the same.
            return self._fail(_failed(report, text))
        if not self._is_prefill_open:
            why = f", and the state is gone: {self._prefill_failure}" if self._prefill_failure else ""
            return self._fail(_failed(report, f"{text}{why}"))
        if self._num_binds >= BINDS_MAX:
            return self._fail(_failed(report, text))
        keep = KeepLease(seconds=self._offers[0].lease_seconds, at_once=True)
        if not self._is_complete:
            # It was bound early and there was no room, or it was lost: the next one comes when all is there.
            self.phase, self._is_early = Phase.PREFILL, False
            return [keep]
        return [keep, self._bind()]

    def _breach(self, report: SequenceReport) -> str:
        """What the report says that cannot be; empty when it is in order."""
        if len(report.token_ids) + (self._first_token is not None) > 1:
            return "sent more than the first token"
        offer = report.offer
        if offer is None:
            return ""
        if self._is_complete:
            return "offered more than everything"
        if offer.first_page != self._num_pages:
            return f"offered page {offer.first_page} after {self._num_pages} pages"
        if self._offers and offer.lease != self._offers[0].lease:
            return "offered state under another lease"
        if not offer.pages and offer.record is None:
            return "offered nothing"
        return "" if offer.lease_seconds > 0 else f"offered state for {offer.lease_seconds:g} s"

    def _fail_prefill(self, report: SequenceReport) -> list[Effect]:
        self.is_prefill_to_blame = True
        return self._fail(report)

    def _fail(self, report: SequenceReport) -> list[Effect]:
        last = dataclasses.replace(
            report, token_ids=(), logprobs=(), alternatives=(), prompt_logprobs=None, offer=None
        )
        return [_deliver(last), self._end(cancels_prefill=True)]

    def _end(self, *, cancels_prefill: bool) -> End:
        self.phase = Phase.ENDED
        self._offers.clear()
        return End(cancels_prefill=cancels_prefill)


def _deliver(report: SequenceReport) -> Deliver:
    """What the client's side is to see of it: no offers."""
    return Deliver(report=dataclasses.replace(report, offer=None, bound=False))


def _failed(report: SequenceReport, text: str) -> SequenceReport:
    return dataclasses.replace(
        report, finish_reason=FinishReason.ERROR, error=text, error_code=ErrorCode.FAILED
    )

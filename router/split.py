"""A split sequence: open on a prefill worker, then on a decode worker, and one stream of reports to its reader.

Made by `router.dispatch`, which handles it like a `RemoteSequence`. `router.hand_over` decides; this carries its
effects out on the fleet and keeps the charge to a decode worker's credit until the sequence ends. It reads no clock
but the one it is given, for a metric.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import msgspec

from rorqual.errors import Overloaded
from rorqual.session import FinishReason, SequenceReport, Source, credit_pages
from rorqual.telemetry import fields
from router.credit import Ticket
from router.fleet import Fleet
from router.hand_over import Bind, Deliver, Effect, End, HandOver, KeepLease, Pass
from router.sequences import RemoteSequence, SequenceRequest, Sink

log = logging.getLogger(__name__)

_PREFILL, _DECODE = 0, 1  # tags of its two sequences


class SplitSequence:
    def __init__(
        self,
        *,
        fleet: Fleet,
        prefill_address: str,
        ticket: Ticket,
        request: SequenceRequest,
        is_early: bool,
        sink: Sink,
        tag: int,
        now: Callable[[], float],
    ) -> None:
        """Opens the sequence on the prefill worker. From then on `ticket`, which is granted, belongs to it. Raises
        Overloaded when a bound is reached; the ticket is then still the caller's."""
        self._fleet = fleet
        self._request = request
        self._sink = sink
        self._tag = tag
        self._now = now
        self._course = HandOver(is_early=is_early)
        self._ticket = ticket
        self._source: Source | None = None
        self._kind = ""  # of the next bind
        self._avoided: set[int] = set()  # sessions of decode workers that have failed it
        self._first_token_at = 0.0
        self._decode: RemoteSequence | None = None
        self._prefill = fleet.open(prefill_address, request, sink=self, tag=_PREFILL)

    @property
    def failed_sessions(self) -> frozenset[int]:
        """What to keep away from when it has failed before its first token: nothing, if it was for want of a decode
        worker."""
        return self._prefill.failed_sessions if self._course.is_prefill_to_blame else frozenset()

    @property
    def is_handing_over(self) -> bool:
        """Its first token is out and its decode worker has sent none yet."""
        return self._course.is_under_way

    def cancel(self) -> None:
        """Tell both workers at once. No report comes after this; nothing happens when it has ended already."""
        self._carry_out(self._course.cancel())

    def put(self, tag: int, report: SequenceReport) -> bool:
        """From the fleet; see `router.sequences.Sink`."""
        was_under_way = self._course.is_under_way
        if tag == _PREFILL:
            effects = self._course.from_prefill(report)
        else:
            assert self._decode is not None
            if report.finish_reason is not None:
                self._avoided.add(self._decode.session_number)
            if report.finish_reason is FinishReason.ERROR and self._course.is_under_way:
                log.warning(
                    "lost a hand-over %s",
                    fields(request=self._request.request_id, worker=self._decode.address, error=report.error),
                )
            effects = self._course.from_decode(report)
        if self._course.is_under_way and not was_under_way:
            self._first_token_at = self._now()
        elif was_under_way and self._course.has_landed:
            self._fleet.metrics.hand_over_seconds.observe(self._now() - self._first_token_at)
        return self._carry_out(effects)

    def _carry_out(self, effects: list[Effect]) -> bool:
        """False when the reader wants to hear no more: then everything has been given back."""
        for effect in effects:
            match effect:
                case Deliver(report=report):
                    if not self._sink.put(self._tag, report):
                        self._course.cancel()
                        self._give_back(cancels_prefill=True)
                        return False
                case Bind(offer=offer, kind=kind):
                    self._source = Source(
                        address=self._prefill.address, lease=offer.lease, wire_id=offer.wire_id
                    )
                    self._kind = kind
                    self._bind()
                case Pass(offer=offer, token_ids=token_ids):
                    assert self._decode is not None
                    self._decode.take(offer, token_ids)
                case KeepLease(seconds=seconds, at_once=at_once):
                    self._prefill.keep_lease(seconds, at_once=at_once)
                case End(cancels_prefill=cancels_prefill):
                    self._give_back(cancels_prefill=cancels_prefill)
        return True

    def _bind(self) -> None:
        """On the decode worker that was charged at the start, if it still takes sequences and has not failed this
        one; else on another one, when it has credit. How long that may take is the dispatcher's to say."""
        credit = self._fleet.credit
        if not credit.is_usable(self._ticket) or self._ticket.session_number in self._avoided:
            credit.release(self._ticket)
            self._ticket = credit.ask(
                credit_pages(len(self._request.prompt)),
                on_grant=self._take_credit,
                avoided=frozenset(self._avoided),
                is_urgent=True,
            )
        if self._ticket.is_granted:
            self._open_decode()

    def _take_credit(self) -> None:
        """The credit it waited for was granted, and perhaps lost again."""
        if self._fleet.credit.is_usable(self._ticket):
            self._open_decode()
        else:
            self._bind()

    def _open_decode(self) -> None:
        # The prompt's logprobs have come from the prefill worker.
        sampling = msgspec.structs.replace(self._request.sampling, prompt_logprobs=None)
        request = dataclasses.replace(self._request, source=self._source, sampling=sampling, fetch=None)
        try:
            self._decode = self._fleet.open(self._ticket.address, request, sink=self, tag=_DECODE)
        except Overloaded as error:
            self._avoided.add(self._ticket.session_number)
            self._carry_out(self._course.refused(str(error)))
            return
        self._fleet.metrics.binds.labels(self._kind).inc()
        self._carry_out(self._course.opened())

    def _give_back(self, *, cancels_prefill: bool) -> None:
        if cancels_prefill:
            self._prefill.cancel()
        if self._decode is not None:
            self._decode.cancel()
        self._fleet.credit.release(self._ticket)

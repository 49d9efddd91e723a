"""The course of a split sequence as a pure function of what its workers report, in any order they may."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.ids import Incarnation, LeaseName, SequenceId, WorkerId
from rorqual.session import ErrorCode, FinishReason, Offer, RecordOffer, SequenceReport
from router.hand_over import BINDS_MAX, Bind, Deliver, Effect, End, HandOver, KeepLease, Pass

LEASE = LeaseName(worker_id=WorkerId("p"), incarnation=Incarnation(1), lease_id=7, generation=3)
RECORD = RecordOffer(record=7, num_tokens=600, num_bytes=64, digest=5)


def an_offer(first_page: int = 0, num_pages: int = 2, *, last: bool = False) -> Offer:
    return Offer(
        lease=LEASE,
        wire_id="w",
        lease_seconds=9.0,
        transfer_seconds=3.0,
        first_page=first_page,
        pages=tuple(range(first_page, first_page + num_pages)),
        digests=tuple(range(first_page, first_page + num_pages)),
        record=RECORD if last else None,
    )


def report(
    *tokens: int,
    index: int = 0,
    finish: FinishReason | None = None,
    offer: Offer | None = None,
    bound: bool = False,
) -> SequenceReport:
    return SequenceReport(
        sequence_id=SequenceId(1),
        first_index=index,
        token_ids=tokens,
        finish_reason=finish,
        offer=offer,
        bound=bound,
    )


def an_error(text: str = "broke", code: ErrorCode = ErrorCode.FAILED) -> SequenceReport:
    return dataclasses.replace(report(finish=FinishReason.ERROR), error=text, error_code=code)


def kinds(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def at_reading(*, early: bool = False) -> HandOver:
    """The token is out, everything is offered, a decode worker has been told of it."""
    course = HandOver(is_early=early)
    course.from_prefill(report(offer=an_offer()))
    if early:
        course.opened()
    course.from_prefill(report(10))
    course.from_prefill(report(offer=an_offer(2, 0, last=True)))
    if not early:
        course.opened()
    return course


def test_late_means_with_the_last_offer_and_everything_is_passed_on_then() -> None:
    course = HandOver(is_early=False)
    assert course.from_prefill(report(offer=an_offer())) == [KeepLease(seconds=9.0)]
    assert kinds(course.from_prefill(report(10))) == ["Deliver"]
    effects = course.from_prefill(report(offer=an_offer(2, 0, last=True)))
    assert effects == [Bind(offer=an_offer(), kind="late")]
    assert course.opened() == [
        Pass(offer=an_offer(), token_ids=()),
        Pass(offer=an_offer(2, 0, last=True), token_ids=(10,)),
    ]


def test_early_means_with_the_first_offer_and_each_is_passed_on_as_it_comes() -> None:
    course = HandOver(is_early=True)
    first = course.from_prefill(report(offer=an_offer()))
    assert first == [KeepLease(seconds=9.0), Bind(offer=an_offer(), kind="early")]
    assert course.opened() == [Pass(offer=an_offer(), token_ids=())]
    assert course.from_prefill(report(offer=an_offer(2))) == [Pass(offer=an_offer(2), token_ids=())]


def test_a_record_that_comes_before_the_first_token_is_held_until_there_is_one() -> None:
    course = HandOver(is_early=True)
    course.from_prefill(report(offer=an_offer()))
    course.opened()
    assert course.from_prefill(report(offer=an_offer(2, 0, last=True))) == []
    effects = course.from_prefill(report(10))
    assert kinds(effects) == ["Deliver", "Pass"]
    assert effects[1] == Pass(offer=an_offer(2, 0, last=True), token_ids=(10,))


def test_the_token_and_the_record_may_come_in_one_report() -> None:
    course = HandOver(is_early=False)
    effects = course.from_prefill(report(10, offer=an_offer(0, 0, last=True)))
    assert kinds(effects) == ["Deliver", "KeepLease", "Bind"]
    assert effects[0] == Deliver(report=report(10))  # no offer is shown to the client's side


@pytest.mark.parametrize("first", ["handed_over", "token"])
def test_the_prefill_worker_may_hear_of_the_hand_over_before_or_after_the_first_token(first: str) -> None:
    course = at_reading()
    handed_over = report(finish=FinishReason.HANDED_OVER)
    if first == "handed_over":
        assert course.from_prefill(handed_over) == []
    assert kinds(course.from_decode(report(11, index=1))) == ["KeepLease", "Deliver"]
    if first == "token":
        assert course.from_prefill(handed_over) == []
    effects = course.from_decode(report(12, index=2, finish=FinishReason.LENGTH))
    assert effects == [
        Deliver(report=report(12, index=2, finish=FinishReason.LENGTH)),
        End(cancels_prefill=False),
    ]


def test_a_decode_worker_lost_after_the_state_was_handed_over_to_it_is_the_end() -> None:
    course = at_reading()
    course.from_prefill(report(finish=FinishReason.HANDED_OVER))
    effects = course.from_decode(an_error("worker d was lost"))
    assert kinds(effects) == ["Deliver", "End"]
    assert not course.is_prefill_to_blame


def test_the_state_handed_over_to_a_worker_that_is_gone_is_lost() -> None:
    course = at_reading()
    assert kinds(course.from_decode(an_error())) == ["KeepLease", "Bind"]
    effects = course.from_prefill(report(finish=FinishReason.HANDED_OVER))
    assert kinds(effects) == ["Deliver", "End"]
    assert isinstance(effects[0], Deliver)
    assert effects[0].report.error_code is ErrorCode.FAILED


def test_the_router_renews_until_the_decode_worker_does_and_again_at_once_when_it_is_lost() -> None:
    course = at_reading()
    assert course.from_decode(report(bound=True)) == [KeepLease(seconds=None)]
    effects = course.from_decode(an_error())
    assert effects == [KeepLease(seconds=9.0, at_once=True), Bind(offer=an_offer(), kind="again")]
    assert kinds(course.opened()) == ["Pass", "Pass"]


def test_a_prefill_worker_that_fails_before_anyone_is_bound_ends_it() -> None:
    course = at_reading()
    effects = course.from_prefill(an_error("the lease expired"))
    assert kinds(effects) == ["Deliver", "End"]
    assert course.is_prefill_to_blame


def test_a_prefill_worker_that_fails_after_that_is_heard_of_only_if_the_reader_fails_too() -> None:
    course = at_reading()
    course.from_decode(report(bound=True))
    assert course.from_prefill(an_error("the lease expired")) == []
    effects = course.from_decode(an_error("the read failed"))
    assert isinstance(effects[0], Deliver)
    assert effects[0].report.error == "the read failed, and the state is gone: the lease expired"


def test_an_early_reader_that_has_not_been_told_everything_cannot_come_through_alone() -> None:
    course = HandOver(is_early=True)
    course.from_prefill(report(offer=an_offer()))
    course.opened()
    course.from_decode(report(bound=True))
    assert kinds(course.from_prefill(an_error())) == ["Deliver", "End"]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ([report(10, 11)], "more than the first token"),
        ([report(10), report(11, index=1)], "more than the first token"),
        ([report(offer=an_offer(1))], "page 1 after 0 pages"),
        ([report(offer=an_offer()), report(offer=an_offer(1))], "page 1 after 2 pages"),
        ([report(offer=an_offer(0, 0, last=True)), report(offer=an_offer(0, 1))], "more than everything"),
        (
            [
                report(offer=an_offer()),
                report(
                    offer=dataclasses.replace(an_offer(2), lease=dataclasses.replace(LEASE, generation=4))
                ),
            ],
            "another lease",
        ),
        ([report(offer=dataclasses.replace(an_offer(), lease_seconds=0.0))], "for 0 s"),
        ([report(offer=dataclasses.replace(an_offer(), lease_seconds=float("nan")))], "for nan s"),
        ([report(finish=FinishReason.HANDED_OVER)], "is gone"),
    ],
)
def test_a_prefill_worker_that_breaks_a_rule_has_failed(wrong: list[SequenceReport], text: str) -> None:
    course = HandOver(is_early=False)
    effects = [effect for item in wrong for effect in course.from_prefill(item)]
    assert kinds(effects)[-2:] == ["Deliver", "End"]
    assert isinstance(effects[-2], Deliver)
    assert text in effects[-2].report.error
    assert effects[-1] == End(cancels_prefill=True)
    assert course.is_prefill_to_blame


@pytest.mark.parametrize("wrong", [report(11, index=1), report(finish=FinishReason.STOP)])
def test_tokens_of_a_decode_worker_that_cannot_know_the_state_are_never_delivered(
    wrong: SequenceReport,
) -> None:
    course = HandOver(is_early=True)
    course.from_prefill(report(offer=an_offer()))
    course.opened()
    effects = course.from_decode(wrong)
    assert kinds(effects) == ["Deliver", "End"]
    assert isinstance(effects[0], Deliver)
    assert effects[0].report.token_ids == ()
    assert effects[0].report.error_code is ErrorCode.FAILED


def test_who_cannot_be_sent_the_sequence_counts_as_one_that_failed_it() -> None:
    course = HandOver(is_early=False)
    course.from_prefill(report(10, offer=an_offer(0, 0, last=True)))
    for _ in range(BINDS_MAX - 1):
        assert kinds(course.refused("too many commands")) == ["KeepLease", "Bind"]
    assert kinds(course.refused("too many commands")) == ["Deliver", "End"]


EVENTS = st.lists(
    st.sampled_from(
        [
            "offer",
            "last",
            "token",
            "handed_over",
            "p_fails",
            "p_stops",
            "bound",
            "d_token",
            "d_ends",
            "d_fails",
            "d_wrong",
            "cancel",
        ]
    ),
    max_size=25,
)


@given(early=st.booleans(), events=EVENTS)
def test_whatever_happens_the_client_sees_one_stream_and_everything_is_given_back_once(
    early: bool, events: list[str]
) -> None:
    course = HandOver(is_early=early)
    shell = _Shell(course)
    for event in events:
        shell.happen(event)
    shell.carry_out(course.cancel())
    assert shell.num_ends == 1
    assert shell.num_binds <= BINDS_MAX
    assert shell.delivered == list(range(10, 10 + len(shell.delivered)))
    assert course.cancel() == []


class _Shell:
    """Carries effects out in the smallest world, and keeps what they must never do."""

    def __init__(self, course: HandOver) -> None:
        self.course = course
        self.delivered: list[int] = []
        self.num_binds = 0
        self.num_ends = 0
        self.is_decode_open = False
        self.num_offered = 0
        self.num_passed = 0
        self.has_all = False

    def happen(self, event: str) -> None:
        course = self.course
        match event:
            case "offer" | "last":
                last = event == "last"
                effects = course.from_prefill(report(offer=an_offer(self.num_offered, 1, last=last)))
                self.num_offered += 1
            case "token":
                effects = course.from_prefill(report(10))
            case "handed_over":
                effects = course.from_prefill(report(finish=FinishReason.HANDED_OVER))
            case "p_fails":
                effects = course.from_prefill(an_error())
            case "p_stops":
                effects = course.from_prefill(report(finish=FinishReason.STOP))
            case "cancel":
                effects = course.cancel()
            case _:
                effects = self.from_decode(event)
        self.carry_out(effects)

    def from_decode(self, event: str) -> list[Effect]:
        if not self.is_decode_open:
            return []
        number = len(self.delivered)
        self.is_decode_open = event in ("bound", "d_token")
        match event:
            case "bound":
                return self.course.from_decode(report(bound=True))
            case "d_token":
                return self.course.from_decode(report(10 + number, index=number))
            case "d_ends":
                return self.course.from_decode(report(10 + number, index=number, finish=FinishReason.LENGTH))
            case "d_wrong":
                return self.course.from_decode(an_error(code=ErrorCode.INVALID))
            case _:
                return self.course.from_decode(an_error())

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert self.num_ends == 0, "something happens after the end"
            match effect:
                case Deliver(report=item):
                    assert item.offer is None
                    self.delivered += item.token_ids
                case Bind():
                    assert not self.is_decode_open
                    self.num_binds += 1
                    self.is_decode_open, self.num_passed, self.has_all = True, 0, False
                    self.carry_out(self.course.opened())
                case Pass(offer=offer, token_ids=token_ids):
                    assert self.is_decode_open
                    assert not self.has_all
                    assert offer.first_page == self.num_passed
                    self.num_passed += len(offer.pages)
                    self.has_all = offer.record is not None
                    assert token_ids == ((10,) if self.has_all else ())
                case End():
                    self.num_ends += 1
                case KeepLease():
                    pass

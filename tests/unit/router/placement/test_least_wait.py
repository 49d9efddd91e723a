"""Placement is a pure function of the picture it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.session import Credit, Load, Role
from router.credit import CreditUse
from router.placement import (
    TOKENS_PER_SECOND_UNKNOWN,
    Demand,
    LeastPredictedWait,
    Split,
    Whole,
    WorkerView,
    missing_roles,
    predicted_wait_W,
)
from tests.unit.router.placement.fleets import SEQUENCES_MAX, fleet_of

LOAD = Load(
    sequences_running=0,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=1,
    pages_total=1,
    slots_free=1,
    slots_total=1,
    step_ms=0.0,
)
DEMAND = Demand(prompt_tokens=1000, tokens_max=10)
ROOM = CreditUse(limit=Credit(sequences=4, pages=100))


def a_view(
    address: str,
    role: Role = Role.BOTH,
    *,
    ahead: int = 0,
    rate: float = 1000.0,
    tokens: int = 0,
    sequences: int = 0,
    draining: bool = False,
    step_ms: float = 0.0,
    waiting: int = 0,
    credit: CreditUse | None = ROOM,
) -> WorkerView:
    load = dataclasses.replace(LOAD, prefill_tokens_per_second=rate, step_ms=step_ms, tokens_waiting=waiting)
    return WorkerView(
        address=address,
        session_number=int(address),
        role=role,
        draining=draining,
        sequences_outstanding=sequences,
        tokens_outstanding=max(tokens, ahead),
        prompt_tokens_outstanding=ahead,
        sequences_max=4,
        load=load,
        credit=credit if role is Role.DECODE else None,
    )


def placed(workers: Sequence[WorkerView], demand: Demand = DEMAND) -> Whole | Split | None:
    """Every one of them is able, and their rows are in this order."""
    fleet = fleet_of([dataclasses.replace(view, index=index) for index, view in enumerate(workers)])
    return LeastPredictedWait().choose(fleet, fleet.connected_W, demand)


def predicted_wait(view: WorkerView, prompt_tokens: int) -> float:
    return float(predicted_wait_W(fleet_of([dataclasses.replace(view, index=0)]), prompt_tokens)[0])


def choose(*workers: WorkerView, demand: Demand = DEMAND) -> str:
    """The addresses chosen, "-" for a decode worker that has to be waited for, empty for nobody."""
    chosen = placed(workers, demand)
    match chosen:
        case Whole(worker=worker):
            return worker.address
        case Split(prefill=prefill, decode=decode):
            return f"{prefill.address} {decode.address if decode is not None else '-'}"
        case None:
            return ""


def test_the_worker_with_the_shortest_predicted_wait_is_chosen() -> None:
    # 2 s, 3 s, 1.25 s: rate counts as much as what is ahead.
    assert choose(a_view("1", ahead=1000), a_view("2", ahead=2000), a_view("3", ahead=4000, rate=4000)) == "3"


def test_what_a_worker_says_is_waiting_counts_though_the_router_knows_of_less() -> None:
    assert choose(a_view("1", ahead=100, waiting=5000), a_view("2", ahead=3000)) == "2"


def test_a_worker_that_has_measured_nothing_is_given_an_assumed_rate() -> None:
    assert predicted_wait(a_view("1", rate=0.0), 1000) == pytest.approx(1000 / TOKENS_PER_SECOND_UNKNOWN)


def test_where_every_place_is_taken_the_wait_for_one_counts() -> None:
    # One more than it runs; each of the four has 100 steps of 50 ms to go.
    full = a_view("1", sequences=4, tokens=400, step_ms=50.0)
    assert predicted_wait(full, 1000) == pytest.approx(1.0 + 100 / 4 * 0.05)
    assert choose(full, a_view("2", ahead=1000)) == "2"
    assert choose(full, a_view("2", ahead=1500)) == "1"


def test_among_waits_as_good_as_equal_the_less_busy_worker_is_chosen() -> None:
    assert choose(a_view("1", tokens=300), a_view("2", tokens=200, rate=950.0)) == "2"
    assert choose(a_view("3", sequences=1), a_view("2", sequences=1), a_view("1", sequences=2)) == "2"


def test_a_split_is_chosen_where_its_first_token_comes_sooner() -> None:
    decode = a_view("9", Role.DECODE)
    assert choose(a_view("1", ahead=2000), a_view("2", Role.PREFILL, ahead=1000), decode) == "2 9"
    assert choose(a_view("1", ahead=1000), a_view("2", Role.PREFILL, ahead=2000), decode) == "1"


def test_the_decode_worker_with_the_most_credit_left_is_chosen() -> None:
    prefill = a_view("1", Role.PREFILL)
    limit = Credit(sequences=10, pages=100)

    def decode(address: str, sequences: int, pages: int) -> WorkerView:
        return a_view(address, Role.DECODE, credit=CreditUse(limit=limit, sequences=sequences, pages=pages))

    # 1000 tokens are charged 5 pages: 60 %, 65 %, 60 % full with it.
    assert choose(prefill, decode("4", 5, 10), decode("3", 1, 60), decode("2", 5, 10)) == "1 2"
    assert choose(prefill, decode("2", 10, 10), decode("3", 1, 95)) == "1 3"


def test_without_credit_a_worker_of_both_roles_comes_first_and_else_the_sequence_waits() -> None:
    full = a_view(
        "3", Role.DECODE, credit=CreditUse(limit=Credit(sequences=1, pages=9), sequences=1, pages=1)
    )
    prefill, both = a_view("2", Role.PREFILL), a_view("1", ahead=9000)
    assert choose(prefill, full, both) == "1"
    assert choose(prefill, full) == "2 -"
    queueing = dataclasses.replace(DEMAND, is_queueing=True)
    assert choose(prefill, a_view("3", Role.DECODE), demand=queueing) == "2 -"
    assert choose(prefill, a_view("3", Role.DECODE), both, demand=queueing) == "1"


def test_a_worker_that_is_charged_already_is_kept_though_it_is_full() -> None:
    full = a_view(
        "3", Role.DECODE, credit=CreditUse(limit=Credit(sequences=1, pages=9), sequences=1, pages=1)
    )
    charged = dataclasses.replace(DEMAND, charged="3", is_queueing=True)
    assert choose(a_view("2", Role.PREFILL), full, a_view("4", Role.DECODE), demand=charged) == "2 3"


@pytest.mark.parametrize(
    ("roles", "missing"),
    [
        ([], "no worker is connected"),
        ([Role.PREFILL], "no decode worker is connected"),
        ([Role.DECODE, Role.DECODE], "no prefill worker is connected"),
        ([Role.DECODE, Role.PREFILL], ""),
        ([Role.BOTH], ""),
        ([Role.BOTH, Role.DECODE], ""),
    ],
)
def test_what_is_missing_is_what_keeps_workers_from_serving_between_them(
    roles: list[Role], missing: str
) -> None:
    assert missing_roles(roles) == missing
    workers = [a_view(str(number), role) for number, role in enumerate(roles, start=1)]
    assert (choose(*workers) == "") == bool(missing)


views = st.lists(
    st.builds(
        a_view,
        st.integers(1, 9).map(str),
        st.sampled_from(Role),
        ahead=st.integers(0, 5000),
        rate=st.sampled_from([0.0, 990.0, 1000.0, 3000.0]),
        tokens=st.integers(0, 5),
        sequences=st.integers(0, 9),
        draining=st.booleans(),
        step_ms=st.sampled_from([0.0, 20.0]),
    ),
    unique_by=lambda view: view.address,
)


@given(views, st.frozensets(st.integers(1, 9)))
def test_a_candidate_is_never_draining_full_or_excluded_and_none_else_is_left_out(
    workers: list[WorkerView], excluded: frozenset[int]
) -> None:
    fleet = fleet_of([dataclasses.replace(view, index=index) for index, view in enumerate(workers)], rows=12)
    able_W = fleet.able_W(excluded=excluded)
    for view, is_found in zip(workers, able_W.tolist(), strict=False):
        has_room = view.role is Role.DECODE or view.sequences_outstanding < SEQUENCES_MAX
        is_able = not view.draining and view.session_number not in excluded and has_room
        assert is_found == is_able
    assert not able_W[len(workers) :].any()


@given(views, st.booleans())
def test_the_same_picture_gives_the_same_answer_and_it_can_serve(
    workers: list[WorkerView], is_queueing: bool
) -> None:
    demand = dataclasses.replace(DEMAND, is_queueing=is_queueing)
    chosen = choose(*workers, demand=demand)
    assert chosen == choose(*workers[::-1], demand=demand)
    assert bool(chosen) != bool(missing_roles(view.role for view in workers))


@given(views)
def test_nobody_else_would_give_the_first_token_much_sooner(workers: list[WorkerView]) -> None:
    chosen = placed(workers)
    if chosen is None:
        return
    first = chosen.worker if isinstance(chosen, Whole) else chosen.prefill
    can_split = any(view.role is Role.DECODE for view in workers)
    for view in workers:
        if view.role is Role.BOTH or (view.role is Role.PREFILL and can_split):
            shortest = predicted_wait(view, DEMAND.prompt_tokens)
            assert predicted_wait(first, DEMAND.prompt_tokens) <= shortest + max(0.01, 0.1 * shortest) + 1e-9

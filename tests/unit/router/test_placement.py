"""Placement is a pure function of the picture it is given."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rorqual.session import Load
from router.placement import Demand, LeastOutstandingTokens, WorkerView, candidates

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
DEMAND = Demand(prompt_tokens=10, tokens_max=10)


def a_view(address: str, *, tokens: int = 0, sequences: int = 0, draining: bool = False) -> WorkerView:
    return WorkerView(
        address=address,
        session_number=int(address),
        draining=draining,
        sequences_outstanding=sequences,
        sequences_outstanding_max=8,
        tokens_outstanding=tokens,
        sequences_max=4,
        load=LOAD,
    )


views = st.lists(
    st.builds(
        a_view,
        st.integers(1, 9).map(str),
        tokens=st.integers(0, 5),
        sequences=st.integers(0, 9),
        draining=st.booleans(),
    ),
    unique_by=lambda view: view.address,
)


def test_the_worker_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    workers = [a_view("1", tokens=5), a_view("2", tokens=3, sequences=7), a_view("3", tokens=4)]
    assert LeastOutstandingTokens().choose(workers, DEMAND).address == "2"


def test_among_equals_it_is_the_one_with_fewest_sequences_then_the_first_by_address() -> None:
    workers = [a_view("3", sequences=1), a_view("2", sequences=1), a_view("1", sequences=2)]
    assert LeastOutstandingTokens().choose(workers, DEMAND).address == "2"


@given(views, st.frozensets(st.integers(1, 9)))
def test_a_candidate_is_never_draining_full_or_excluded_and_none_else_is_left_out(
    workers: list[WorkerView], excluded: frozenset[int]
) -> None:
    found = candidates(workers, excluded=excluded)
    for view in workers:
        is_able = not view.draining and view.sequences_outstanding < 8 and view.session_number not in excluded
        assert (view in found) == is_able
    if found:
        chosen = LeastOutstandingTokens().choose(found, DEMAND)
        assert chosen in found
        assert chosen == LeastOutstandingTokens().choose(found[::-1], DEMAND)

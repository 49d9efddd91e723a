"""What is decided from columns is what is decided worker by worker, ties too; and a view is its row."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.performance import FLASH, model_costs
from rorqual.session import Credit, Load, Role
from router.credit import CreditUse
from router.placement import Demand, FleetTable, LeastPredictedWait, Split, Whole, WorkerView
from router.placement.by_cache import ByCache
from router.placement.cache import CacheDemand, CachePlacement, Decision, FleetPicture
from router.placement.policies import BY_CACHE
from router.placement.predictions import RATIO_MAX_UNKNOWN, Predictions, unknown_hardware_model
from tests.unit.router.placement.fleets import a_table, fleet_of, put
from tests.unit.router.placement.naive import NaiveByCache, Placed, able, least_wait
from tests.unit.router.placement.pictures import Caches, keys

ROWS = 7
MODEL = unknown_hardware_model(model_costs(FLASH))

uses = st.builds(
    lambda limit, pages, sequences, promised: CreditUse(
        limit=Credit(sequences=limit, pages=pages), sequences=sequences, pages=promised
    ),
    st.integers(0, 4),
    st.sampled_from([0, 20, 40]),
    st.integers(0, 4),
    st.sampled_from([0, 10, 20, 33]),
)


@st.composite
def a_worker(draw: st.DrawFn, index: int) -> WorkerView:
    """Figures of few sizes, so that many are alike."""
    role = draw(st.sampled_from(Role))
    ahead = draw(st.sampled_from([0, 0, 300, 5000]))
    load = Load(
        sequences_running=1,
        sequences_waiting=0,
        tokens_waiting=draw(st.sampled_from([0, 100, 7000])),
        pages_free=draw(st.integers(0, 3)),
        pages_total=9,
        slots_free=1,
        slots_total=1,
        step_ms=draw(st.sampled_from([0.0, 20.0])),
        prefill_tokens_per_second=draw(st.sampled_from([0.0, 990.0, 1000.0, 3000.0])),
        peer_bytes_per_second=draw(st.sampled_from([0.0, 1e4, 1e9])),
        peer_latency_seconds=draw(st.sampled_from([0.0, 0.5])),
        host_bytes_per_second=draw(st.sampled_from([0.0, 1e5, 1e9])),
        store_bytes_per_second=draw(st.sampled_from([0.0, 1e5, 1e9])),
        store_latency_seconds=draw(st.sampled_from([0.0, 0.1])),
    )
    return WorkerView(
        # Not in the order of rows.
        address=f"w{(index * 5 + draw(st.integers(0, 1)) * 3) % 10}{index}",
        session_number=index + 1 + 10 * draw(st.integers(0, 1)),
        role=role,
        draining=draw(st.integers(0, 9)) == 0,
        sequences_outstanding=draw(st.integers(0, 8)),
        tokens_outstanding=ahead + draw(st.sampled_from([0, 0, 100])),
        prompt_tokens_outstanding=ahead,
        prompt_tokens_sent=draw(st.sampled_from([ahead, 2 * ahead])),
        sequences_max=4,
        load=load,
        credit=draw(uses) if role is Role.DECODE else None,
        index=index,
        pages_cached=draw(st.integers(0, 9)),
        can_share=role is not Role.BOTH,
    )


def fleets() -> st.SearchStrategy[list[WorkerView]]:
    rows = st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS).flatmap(
        lambda indexes: st.tuples(*(a_worker(index) for index in indexes))
    )
    return rows.map(list)


prompts = st.builds(keys, st.text("ab", min_size=1, max_size=3), st.sampled_from([0, 1, 30, 60]))
demands = st.builds(
    lambda prompt, is_queueing, charged, session: Demand(
        prompt_tokens=256 * len(prompt) + 10,
        tokens_max=9,
        keys={"wire": prompt},
        is_queueing=is_queueing,
        charged=charged,
        session=session,
    ),
    prompts,
    st.booleans(),
    st.sampled_from(["", "", "w00", "w51"]),
    st.sampled_from(["", "s"]),
)
excluded = st.frozensets(st.integers(1, 9), max_size=2)
held = st.dictionaries(
    st.integers(0, ROWS - 1), st.tuples(prompts, st.lists(st.integers(1, 60), max_size=2)), max_size=5
)


@given(fleets())
def test_a_view_is_its_row_and_a_worker_that_has_left_has_none(views: list[WorkerView]) -> None:
    table = a_table(ROWS)
    for view in views:
        put(table, view)
    columns = table.columns
    assert [columns.view(view.index) for view in views] == views
    assert columns.connected_W.sum() == len(views)
    for view in views[1:]:
        table.disconnect(view.index)
        table.set_credit(view.address, None)
    assert columns.connected_W.sum() == len(views[:1])
    assert columns.has_credit_W.sum() == sum(view.credit is not None for view in views[:1])


def test_the_table_grows_as_workers_join_and_a_row_can_be_anothers_later() -> None:
    table = FleetTable(rows_max=4, sequences_outstanding_max=1)
    assert table.columns.num_rows == 0
    table.join(2, "c")
    assert (table.columns.num_rows, table.columns.row_of) == (3, {"c": 2})
    table.join(0, "a")
    table.leave(2)
    table.join(2, "d")
    assert (table.columns.addresses, table.columns.row_of) == (["a", "", "d"], {"a": 0, "d": 2})
    assert len(table.columns.loads) == table.columns.num_rows == 3


@given(fleets(), excluded, demands)
def test_the_least_wait_is_that_of_a_walk_over_the_workers(
    views: list[WorkerView], excluded: frozenset[int], demand: Demand
) -> None:
    fleet = fleet_of(views, rows=ROWS)
    placed = LeastPredictedWait().choose(fleet, fleet.able_W(excluded=excluded), demand)
    assert names(placed) == least_wait(able(views, excluded), demand)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.sampled_from(list(BY_CACHE)), held, st.lists(st.tuples(fleets(), excluded, demands), max_size=8))
def test_a_policy_is_shown_what_a_walk_over_the_workers_shows_it(
    name: str,
    held: dict[int, tuple[tuple[bytes, ...], list[int]]],
    steps: list[tuple[list[WorkerView], frozenset[int], Demand]],
) -> None:
    caches = Caches(ROWS, held)  # pyright: ignore[reportArgumentType]
    predictions = Predictions(MODEL, ratio_max=RATIO_MAX_UNKNOWN)
    shown, shown_naively = Watched(BY_CACHE[name](MODEL)), Watched(BY_CACHE[name](MODEL))
    placement = ByCache(shown, caches=caches, predictions=predictions)
    naive = NaiveByCache(shown_naively, caches=caches, model=MODEL, ratio_max=RATIO_MAX_UNKNOWN)
    for number, (views, without, demand) in enumerate(steps):
        fleet = fleet_of(views, rows=ROWS)
        placed = placement.choose(fleet, fleet.able_W(excluded=without), demand)
        expected, decision = naive.choose(able(views, without), demand)
        assert names(placed) == expected
        assert shown.fleets == shown_naively.fleets
        predicted = placed.predicted if placed is not None else None
        assert (predicted is None) == (decision is None)
        if predicted is not None and decision is not None:
            assert predicted.seconds == decision.predicted_seconds
            assert predicted.tokens_reused == min(decision.resume * 256, demand.prompt_tokens - 1)
            address = predicted.fetch.address if predicted.fetch is not None else ""
            assert address == {view.index: view.address for view in views}.get(decision.fetch.peer, "")
            if number % 2:
                placement.finished(predicted)
                naive.finished(predicted.number)


class Watched:
    """A policy, and what it was shown."""

    def __init__(self, policy: CachePlacement) -> None:
        self._policy = policy
        self.fleets: list[dict[str, list[float]]] = []

    def choose(self, fleet: FleetPicture, request: CacheDemand) -> Decision:
        columns: dict[str, list[float]] = {}
        for item in fields(FleetPicture):
            column = getattr(fleet, item.name)
            if isinstance(column, np.ndarray):
                # Of who cannot be given a prompt it matters whether he can be read from, and that he slows nobody.
                matters_for_all = item.name in ("can_prefill_W", "readable_W", "work_seconds_W", "slowness_W")
                columns[item.name] = (column if matters_for_all else column[fleet.can_prefill_W]).tolist()
        for source, speeds in fleet.speeds.items():
            columns[f"{source.value} rate"] = speeds.rate_W[fleet.can_prefill_W].tolist()
            columns[f"{source.value} latency"] = speeds.latency_W[fleet.can_prefill_W].tolist()
        self.fleets.append(columns)
        return self._policy.choose(fleet, request)

    def finished(self, number: int) -> None:
        self._policy.finished(number)


def names(placed: Whole | Split | None) -> Placed:
    match placed:
        case Whole(worker=worker):
            return worker.address, worker.address
        case Split(prefill=prefill, decode=decode):
            return prefill.address, decode.address if decode is not None else ""
        case None:
            return None

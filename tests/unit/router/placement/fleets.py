"""Fleets in columns, written down as views of their workers."""

from __future__ import annotations

from collections.abc import Sequence

from router.placement import FleetColumns, FleetTable, WorkerView
from router.placement.columns import Bools

SEQUENCES_MAX = 8
"""Outstanding on a worker that computes prompts."""


def a_table(rows: int) -> FleetTable:
    table = FleetTable(rows_max=rows, sequences_outstanding_max=SEQUENCES_MAX)
    for row in range(rows):
        table.join(row, f"row {row}")
    return table


def put(table: FleetTable, view: WorkerView) -> None:
    """The row of this worker as the view says."""
    if table.columns.addresses[view.index] != view.address:
        table.leave(view.index)
        table.join(view.index, view.address)
    table.connect(
        view.index,
        session_number=view.session_number,
        role=view.role,
        sequences_max=view.sequences_max,
        can_share=view.can_share,
        load=view.load,
    )
    table.set_draining(view.index, view.draining)
    table.set_pages_cached(view.index, view.pages_cached)
    table.set_outstanding(
        view.index,
        sequences=view.sequences_outstanding,
        tokens=view.tokens_outstanding,
        prompt_tokens=view.prompt_tokens_outstanding,
        prompt_tokens_sent=view.prompt_tokens_sent,
    )
    table.set_credit(view.address, view.credit)


def fleet_of(views: Sequence[WorkerView], *, rows: int | None = None) -> FleetColumns:
    """Rows without a view are of workers that are not connected."""
    table = a_table(rows if rows is not None else max((view.index for view in views), default=-1) + 1)
    for view in views:
        put(table, view)
    return table.columns


def able_of(fleet: FleetColumns) -> Bools:
    return fleet.able_W(excluded=frozenset())

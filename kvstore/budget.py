"""How a worker's memory for cached state is divided into pages and records. Pure, no torch; the rank asks at its start.

A page saves computing its 256 tokens only where a tail, a record at a page boundary, lets a sequence begin behind it
(or where a rebuild pays), so tails get a share of the bytes. A tail costs as much as a few pages, and there is one for
a boundary at most: more tails than pages are of no use.
"""

from __future__ import annotations

from dataclasses import dataclass

TAIL_SHARE = 0.25
"""Of the bytes of pages and tails together. With Flash a tail costs 4.1 pages: one for every 12 pages, 3,000 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    num_pages: int
    num_records: int


def divide(
    *,
    page_bytes: int,
    record_bytes: int,
    kv_bytes: int,
    num_pages: int | None,
    num_pages_useful: int,
    num_records: int,
    tail_share: float,
) -> Budget:
    """`num_records` that are there in any case, and tails beside them: `tail_share` of `kv_bytes`; or, where
    `num_pages` is given, so many that they are that share of pages and tails together. Without a number of pages, as
    many as the rest of `kv_bytes` holds, `num_pages_useful` at most: perhaps none.
    """
    assert 0 <= tail_share < 1
    assert record_bytes > 0
    if num_pages is None:
        # A model of window-only layers has no paged state: pages cost nothing then.
        fitting = int(kv_bytes * (1 - tail_share)) // page_bytes if page_bytes else num_pages_useful
        num_pages = min(fitting, num_pages_useful)
    tail_bytes = num_pages * page_bytes * tail_share / (1 - tail_share)
    num_tails = min(int(tail_bytes // record_bytes), num_pages)
    return Budget(num_pages=num_pages, num_records=num_records + num_tails)

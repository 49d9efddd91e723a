"""How bytes become pages and tails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.budget import Budget, divide

FLASH = {"page_bytes": 899_648, "record_bytes": 3_726_240}


def test_tails_get_their_share_of_the_bytes_and_pages_the_rest() -> None:
    found = divide(
        **FLASH,
        kv_bytes=10**10,
        num_pages=None,
        num_pages_useful=10**6,
        num_records=32,
        tail_share=0.25,
    )
    assert found == Budget(num_pages=8336, num_records=32 + 670)
    tails = (found.num_records - 32) * FLASH["record_bytes"]
    assert tails / (tails + found.num_pages * FLASH["page_bytes"]) == pytest.approx(0.25, rel=1e-2)


def test_without_a_share_only_the_records_asked_for_are_there() -> None:
    found = divide(
        **FLASH, kv_bytes=10**9, num_pages=None, num_pages_useful=10**6, num_records=4, tail_share=0.0
    )
    assert found == Budget(num_pages=1111, num_records=4)


def test_a_given_number_of_pages_stays_and_tails_come_on_top() -> None:
    found = divide(**FLASH, kv_bytes=1, num_pages=120, num_pages_useful=5, num_records=2, tail_share=0.25)
    assert found == Budget(num_pages=120, num_records=2 + 9)


def test_pages_that_cost_nothing_are_as_many_as_are_of_use() -> None:
    found = divide(
        page_bytes=0,
        record_bytes=100,
        kv_bytes=10,
        num_pages=None,
        num_pages_useful=7,
        num_records=1,
        tail_share=0.5,
    )
    assert found == Budget(num_pages=7, num_records=1)


@given(
    page_bytes=st.integers(1, 10**6),
    record_bytes=st.integers(1, 10**7),
    kv_bytes=st.integers(0, 10**12),
    useful=st.integers(1, 10**6),
    share=st.floats(0, 0.9),
)
def test_what_is_divided_fits_and_no_more_tails_than_pages_are_there(
    page_bytes: int, record_bytes: int, kv_bytes: int, useful: int, share: float
) -> None:
    found = divide(
        page_bytes=page_bytes,
        record_bytes=record_bytes,
        kv_bytes=kv_bytes,
        num_pages=None,
        num_pages_useful=useful,
        num_records=0,
        tail_share=share,
    )
    assert found.num_pages <= useful
    assert found.num_records <= found.num_pages
    assert found.num_pages * page_bytes + found.num_records * record_bytes <= kv_bytes * (1 + 1e-9)

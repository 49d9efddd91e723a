"""Pages, slots and records: every id has one owner, and the counts always add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.pages import IdAllocator, PageAllocator, pages_for
from rorqual.ids import PageId, SlotId


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (256, 1), (257, 2), (1 << 20, 4096)])
def test_pages_for_rounds_up(num_tokens: int, num_pages: int) -> None:
    assert pages_for(num_tokens) == num_pages


takes = st.tuples(st.integers(0, 8), st.booleans())


@given(st.integers(1, 20), st.lists(st.one_of(takes, st.just(None)), max_size=60))
def test_no_page_has_two_owners_and_counts_add_up(
    num_total: int, moves: list[tuple[int, bool] | None]
) -> None:
    allocator = PageAllocator(num_total)
    held: list[tuple[int, ...]] = []
    for move in moves:
        if move is None:
            if held:
                allocator.free(held.pop(0))
        else:
            free = allocator.num_free
            count, cold = move
            pages = allocator.allocate(count, cold=cold)
            if pages is None:
                assert count > free
                assert allocator.num_free == free
            else:
                assert len(pages) == count
                held.append(pages)
        owned = [page for pages in held for page in pages]
        assert len(owned) == len(set(owned)) == allocator.num_in_use
        assert allocator.num_free == num_total - len(owned)
        allocator.check()


def test_giving_back_a_free_page_is_a_broken_invariant() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.free(pages)
    with pytest.raises(AssertionError, match="not in use"):
        allocator.free(pages)


def test_the_page_given_back_last_is_taken_first_or_with_cold_last() -> None:
    allocator = PageAllocator(4)
    assert allocator.allocate(4) == (0, 1, 2, 3)
    for page in (2, 0, 3, 1):
        allocator.free([PageId(page)])
    assert allocator.allocate(1) == (1,)
    assert allocator.allocate(2, cold=True) == (2, 0)
    assert allocator.allocate(1, cold=True) == (3,)


def test_pages_remember_the_last_plan_of_all_that_had_them() -> None:
    allocator = PageAllocator(3)
    pages = allocator.allocate(3)
    assert pages is not None
    assert allocator.last_plan(pages) == 0
    allocator.free(pages[:1], last_plan=7)
    allocator.free(pages[1:], last_plan=4)
    assert allocator.last_plan(pages) == 7
    assert allocator.last_plan(pages[1:]) == 4
    assert allocator.last_plan([]) == 0
    # An owner whose plans never used them takes nothing away from what is known.
    again = allocator.allocate(3)
    assert again is not None
    allocator.free(again)
    assert allocator.last_plan(pages) == 7


def test_slots_come_lowest_first_and_run_out() -> None:
    allocator = IdAllocator(3, make=SlotId)
    assert [allocator.allocate() for _ in range(4)] == [0, 1, 2, None]
    allocator.free(SlotId(2))
    allocator.free(SlotId(0))
    assert allocator.allocate() == 0
    with pytest.raises(AssertionError, match="not in use"):
        allocator.free(SlotId(2))
    allocator.check()


def test_there_may_be_none_of_a_kind() -> None:
    allocator = IdAllocator(0, make=SlotId)
    assert allocator.allocate() is None
    allocator.check()

"""Pages and slots: every id has one owner, and the counts always add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.pages import PageAllocator, SlotAllocator, pages_for


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (256, 1), (257, 2), (1 << 20, 4096)])
def test_pages_for_rounds_up(num_tokens: int, num_pages: int) -> None:
    assert pages_for(num_tokens) == num_pages


@given(st.integers(1, 20), st.lists(st.one_of(st.integers(0, 8), st.just(None)), max_size=60))
def test_no_page_has_two_owners_and_counts_add_up(num_total: int, moves: list[int | None]) -> None:
    allocator = PageAllocator(num_total)
    held: list[tuple[int, ...]] = []
    for move in moves:
        if move is None:
            if held:
                allocator.free(held.pop(0))
        else:
            free = allocator.num_free
            pages = allocator.allocate(move)
            if pages is None:
                assert move > free
                assert allocator.num_free == free
            else:
                assert len(pages) == move
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


def test_slots_come_lowest_first_and_run_out() -> None:
    allocator = SlotAllocator(3)
    assert [allocator.allocate() for _ in range(4)] == [0, 1, 2, None]
    allocator.free(2)
    allocator.free(0)
    assert allocator.allocate() == 0
    with pytest.raises(AssertionError, match="not in use"):
        allocator.free(2)
    allocator.check()

"""Sizes of hot buffers, and what they make room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hisparse import (
    NUM_HOT_MAX,
    Division,
    HotShape,
    capacity,
    divide_spilled,
    host_bytes,
    hot_bytes,
    hot_shape,
    resident_bytes,
    spilled_bytes,
    tokens_worth_spilling,
    whole_pages,
)
from kvstore.layout import Numerics, build_layout
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS, LayerConfig, LayerKind, ModelConfig
from rorqual.performance import FLASH, PRO

MILLION = 1 << 20
SERVED = build_layout(FLASH, Numerics.SERVED)


def shape_of(config: ModelConfig, *, num_drafts: int = 0, num_hot: int | None = None) -> HotShape:
    return hot_shape(
        build_layout(config, Numerics.SERVED),
        index_topk=config.index_topk,
        num_drafts=num_drafts,
        num_tokens_max=MILLION,
        num_hot=num_hot,
    )


def test_a_hot_buffer_has_eight_times_the_picks_in_whole_pages() -> None:
    assert shape_of(FLASH) == HotShape(num_hot=4096, num_entries=262_144)
    assert shape_of(PRO) == HotShape(num_hot=8192, num_entries=262_144)
    assert shape_of(FLASH, num_drafts=9).num_hot == 10 * 512
    assert shape_of(FLASH, num_hot=1025) == HotShape(num_hot=1088, num_entries=262_144)
    assert shape_of(FLASH, num_hot=1025).num_hot_pages(64) == 17
    assert whole_pages(SERVED, shape_of(FLASH)) == 66


@pytest.mark.parametrize(
    ("num_drafts", "num_hot", "complaint"),
    [
        (0, 448, r"a hot buffer of 448 rows is too small: .* 0 drafts picks up to 1 x 512 = 512 rows"),
        (2, 1471, r"a hot buffer of 1472 rows is too small: .* 2 drafts picks up to 3 x 512 = 1536 rows"),
        (0, NUM_HOT_MAX, "a hot buffer has 32704 rows at most, not 32768"),
    ],
)
def test_a_hot_buffer_that_a_step_may_not_fit_into_is_refused(
    num_drafts: int, num_hot: int, complaint: str
) -> None:
    assert shape_of(FLASH, num_drafts=2, num_hot=1473).num_hot == 1536
    assert shape_of(FLASH, num_hot=32_704).num_hot == 32_704
    with pytest.raises(ConfigError, match=complaint):
        shape_of(FLASH, num_drafts=num_drafts, num_hot=num_hot)


def test_a_model_without_picked_rows_has_nothing_to_spill() -> None:
    window_only = replace(FLASH, layers=(LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=False),) * 2)
    with pytest.raises(ConfigError, match="nothing to spill"):
        shape_of(window_only)


def test_a_flash_request_of_a_million_tokens_keeps_its_index_and_a_hot_buffer() -> None:
    shape = shape_of(FLASH)
    state = 21 * (4096 * 7 + 262_144 * 2)
    assert hot_bytes(SERVED, shape) == 21 * (64 + 2) * 64 * 584 + state
    assert resident_bytes(SERVED, MILLION) == 4096 * 899_648 + SERVED.slot_bytes
    assert spilled_bytes(SERVED, shape, MILLION) == (
        66 * 899_648 + (4096 - 66 + 1) * (21 * 64 * 68 + 20 * 2 * 584) + SERVED.slot_bytes + state
    )
    assert host_bytes(SERVED, MILLION) == 4096 * 899_648
    assert host_bytes(SERVED, MILLION - 1) == 4095 * 899_648  # the newest page is not there


@given(pages=st.integers(1, 66))
def test_a_request_whose_pages_are_all_whole_takes_them_and_the_state(pages: int) -> None:
    shape, num_tokens = shape_of(FLASH), pages * PAGE_TOKENS
    state = 21 * shape.state_bytes
    assert spilled_bytes(SERVED, shape, num_tokens) == resident_bytes(SERVED, num_tokens) + state
    assert tokens_worth_spilling(SERVED, shape) > num_tokens


@given(pages=st.integers(1, 4096), config=st.sampled_from((FLASH, PRO)), factor=st.integers(1, 16))
def test_spilling_pays_from_the_length_that_is_named(pages: int, config: ModelConfig, factor: int) -> None:
    layout, shape = (
        build_layout(config, Numerics.SERVED),
        shape_of(config, num_hot=factor * config.index_topk),
    )
    num_tokens = pages * PAGE_TOKENS
    pays = spilled_bytes(layout, shape, num_tokens) < resident_bytes(layout, num_tokens)
    assert pays == (num_tokens >= tokens_worth_spilling(layout, shape))


@given(tokens=st.integers(1, MILLION), device_bytes=st.integers(0, 10**12))
def test_requests_fit_into_the_device_and_no_more_would(tokens: int, device_bytes: int) -> None:
    found = capacity(SERVED, shape_of(FLASH), num_tokens=tokens, device_bytes=device_bytes)
    assert found.num_resident * found.resident_bytes <= device_bytes
    assert (found.num_resident + 1) * found.resident_bytes > device_bytes
    assert (found.num_spilled == 0) == (found.num_resident == 0)
    if found.num_spilled:
        left = device_bytes - found.resident_bytes - (found.num_spilled - 1) * found.spilled_bytes
        assert 0 <= left < found.spilled_bytes
        assert found.gain_here == found.num_spilled / found.num_resident


THIN_BYTES = 899_648 - 21 * 64 * 584


def division(device_bytes: int, num_buffers: int, num_thin: int | None = None) -> Division:
    return divide_spilled(
        SERVED, shape_of(FLASH), device_bytes=device_bytes, num_buffers=num_buffers, num_thin=num_thin
    )


@given(device_bytes=st.integers(10**9, 10**12), num_buffers=st.integers(1, 12))
def test_a_division_holds_as_long_requests_as_any_spilled_and_one_more_resident(
    device_bytes: int, num_buffers: int
) -> None:
    state = num_buffers * 21 * shape_of(FLASH).state_bytes
    if device_bytes < state + 899_648 * (num_buffers * 66 + 1):
        with pytest.raises(ConfigError, match="whole pages"):
            division(device_bytes, num_buffers)
        return
    found = division(device_bytes, num_buffers)
    assert state + found.num_pages * 899_648 + found.num_thin * THIN_BYTES <= device_bytes
    assert found.num_thin % num_buffers == 0
    # The length that its pages are for, and that a page more of each request would not fit.
    length = found.num_thin // num_buffers - 1 + 66 if found.num_thin else 66
    if found.num_thin:
        assert found.num_pages >= num_buffers * 66 + length
    longer = (num_buffers * 66 + length + 1) * 899_648 + num_buffers * (length + 2 - 66) * THIN_BYTES
    assert length == 4096 or state + longer > device_bytes


def test_a_named_number_of_thin_pages_leaves_the_rest_to_whole_ones() -> None:
    state = 2 * 21 * shape_of(FLASH).state_bytes
    device_bytes = state + 1000 * THIN_BYTES + 500 * 899_648
    assert division(device_bytes, 2, 1000) == Division(num_pages=500, num_thin=1000)
    assert division(device_bytes - 1, 2, 1000) == Division(num_pages=499, num_thin=1000)
    assert division(500 * 899_648, 0) == Division(num_pages=500, num_thin=0)


def test_whole_pages_that_do_not_hold_all_hot_buffers_are_refused() -> None:
    state = 4 * 21 * shape_of(FLASH).state_bytes
    least = state + 10 * THIN_BYTES + 265 * 899_648
    assert division(least, 4, 10).num_pages == 4 * 66 + 1
    complaint = (
        r"4 x 66 \+ 1 = 265 whole pages .* 64 for 4096 hot rows and 2 .* hold 264, beside 10 thin pages"
    )
    with pytest.raises(ConfigError, match=complaint):
        division(least - 1, 4, 10)
    with pytest.raises(ConfigError, match="hold 0, "):
        division(0, 1)

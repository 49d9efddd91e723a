"""Sizes of hot buffers, and what they make room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hisparse import (
    NUM_HOT_MAX,
    HotShape,
    capacity,
    host_bytes,
    hot_bytes,
    hot_shape,
    resident_bytes,
    spilled_bytes,
    tokens_worth_spilling,
)
from kvstore.layout import Numerics, build_layout
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS, LayerConfig, LayerKind, ModelConfig
from rorqual.performance import FLASH, PRO

MILLION = 1 << 20


def shape_of(config: ModelConfig, *, num_drafts: int = 0, num_hot: int | None = None) -> HotShape:
    return hot_shape(
        build_layout(config, Numerics.SERVED),
        index_topk=config.index_topk,
        num_drafts=num_drafts,
        num_tokens_max=MILLION,
        num_hot=num_hot,
    )


def test_a_hot_buffer_has_eight_times_the_picks_and_two_pages_of_newest_rows() -> None:
    assert shape_of(FLASH) == HotShape(num_hot=4096, num_entries=262_144)
    assert shape_of(PRO) == HotShape(num_hot=8192, num_entries=262_144)
    assert shape_of(FLASH, num_drafts=9).num_hot == 10 * 512


@pytest.mark.parametrize(
    ("num_drafts", "num_hot", "complaint"),
    [
        (0, 511, r"a hot buffer of 511 rows is too small: .* 0 drafts picks up to 1 x 512 = 512 rows"),
        (2, 1535, r"a hot buffer of 1535 rows is too small: .* 2 drafts picks up to 3 x 512 = 1536 rows"),
        (0, NUM_HOT_MAX + 1, "a hot buffer has 32767 rows at most, not 32768"),
    ],
)
def test_a_hot_buffer_that_a_step_may_not_fit_into_is_refused(
    num_drafts: int, num_hot: int, complaint: str
) -> None:
    assert shape_of(FLASH, num_drafts=2, num_hot=1536).num_hot == 1536
    with pytest.raises(ConfigError, match=complaint):
        shape_of(FLASH, num_drafts=num_drafts, num_hot=num_hot)


def test_a_model_without_picked_rows_has_nothing_to_spill() -> None:
    window_only = replace(FLASH, layers=(LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=False),) * 2)
    with pytest.raises(ConfigError, match="nothing to spill"):
        shape_of(window_only)


def test_a_flash_request_of_a_million_tokens_keeps_its_index_and_a_hot_buffer() -> None:
    layout, shape = build_layout(FLASH, Numerics.SERVED), shape_of(FLASH)
    hot = 21 * ((4096 + 128) * 584 + 4096 * 7 + 262_144 * 2)
    assert hot_bytes(layout, shape) == hot
    assert resident_bytes(layout, MILLION) == 4096 * 899_648 + layout.slot_bytes
    assert (
        spilled_bytes(layout, shape, MILLION)
        == 4096 * (21 * 64 * 68 + 20 * 2 * 584) + layout.slot_bytes + hot
    )
    assert host_bytes(layout, MILLION) == 4096 * 899_648
    assert host_bytes(layout, MILLION - 1) == 4095 * 899_648  # the newest page is not there


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
    layout = build_layout(FLASH, Numerics.SERVED)
    found = capacity(layout, shape_of(FLASH), num_tokens=tokens, device_bytes=device_bytes)
    assert found.num_resident * found.resident_bytes <= device_bytes
    assert (found.num_resident + 1) * found.resident_bytes > device_bytes
    assert (
        found.num_spilled * found.spilled_bytes
        <= device_bytes
        < (found.num_spilled + 1) * found.spilled_bytes
    )

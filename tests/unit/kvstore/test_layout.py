"""Component descriptors: the sizes of the served and float32 state of the real models and of any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.layout import DRAFTS_MAX, Component, IndexSpace, Numerics, RowForm, build_layout
from rorqual.errors import ConfigError
from rorqual.model_config import PAGE_TOKENS, LayerConfig, LayerKind, ModelConfig, parse_model_config
from tests.harness.releases import FLASH, PRO


@pytest.fixture(scope="module")
def flash() -> ModelConfig:
    return parse_model_config(FLASH)


@pytest.mark.parametrize(("raw", "bytes_per_token"), [(FLASH, 3514.25), (PRO, 5031.4375)])
def test_served_pages_have_the_published_bytes_per_token(raw: dict[str, Any], bytes_per_token: float) -> None:
    layout = build_layout(parse_model_config(raw), Numerics.SERVED)
    assert layout.page_bytes / PAGE_TOKENS == bytes_per_token


def test_served_rows_are_584_and_68_bytes(flash: ModelConfig) -> None:
    layout = build_layout(flash, Numerics.SERVED)
    for component in (Component.C4, Component.C128, Component.WINDOW, Component.DRAFT_WINDOW):
        kv = layout.find(component)
        assert kv is not None
        assert (kv.form, kv.width, kv.data_bytes, kv.scale_bytes, kv.row_bytes) == (
            RowForm.KV_FP8,
            512,
            576,
            8,
            584,
        )
    index = layout.find(Component.C4_INDEX)
    assert index is not None
    assert (index.form, index.width, index.data_bytes, index.scale_bytes) == (RowForm.INDEX_FP4, 128, 64, 4)


def test_a_page_is_64_c4_rows_64_index_rows_and_2_c128_rows_of_each_layer(flash: ModelConfig) -> None:
    layout = build_layout(flash, Numerics.SERVED)
    paged = [item for item in layout.descriptors if item.space is IndexSpace.PAGE]
    found = {item.component: (item.num_rows, len(item.layers), item.layer_bytes) for item in paged}
    assert found == {
        Component.C4: (64, 21, 64 * 584),
        Component.C4_INDEX: (64, 21, 64 * 68),
        Component.C128: (2, 20, 2 * 584),
    }


def test_rings_hold_the_window_a_page_and_the_drafts_and_unfinished_rows_are_float32(
    flash: ModelConfig,
) -> None:
    for numerics in Numerics:
        layout = build_layout(flash, numerics)
        rings = {item.component: item for item in layout.descriptors if item.space is IndexSpace.SLOT}
        assert rings[Component.WINDOW].num_rows == 128 + PAGE_TOKENS + DRAFTS_MAX
        assert rings[Component.WINDOW].layers == tuple(range(43))
        assert rings[Component.DRAFT_WINDOW].layers == (0,)
        streams = rings[Component.LAST_STREAMS]
        assert (streams.layers, streams.num_rows, streams.width) == ((0,), DRAFTS_MAX + 1, 4 * 4096)
        unfinished = {
            component: (item.num_rows - DRAFTS_MAX, item.width, item.form)
            for component, item in rings.items()
            if component.value.endswith("unfinished")
        }
        # Rows of K and S; CSA keeps two halves of each, and the window before.
        assert unfinished == {
            Component.C4_UNFINISHED: (8, 2048, RowForm.F32),
            Component.C4_INDEX_UNFINISHED: (8, 512, RowForm.F32),
            Component.C128_UNFINISHED: (128, 1024, RowForm.F32),
        }


def test_served_streams_are_bf16_values(flash: ModelConfig) -> None:
    streams = build_layout(flash, Numerics.SERVED).find(Component.LAST_STREAMS)
    assert streams is not None
    assert (streams.form, streams.row_bytes, streams.scale_bytes) == (RowForm.BF16, 32_768, 0)


def test_compressed_and_unfinished_rows_know_their_ratio_and_no_others_have_one(flash: ModelConfig) -> None:
    ratios = {item.component: item.ratio for item in build_layout(flash, Numerics.SERVED).descriptors}
    assert ratios == dict.fromkeys(Component, 1) | {
        Component.C4: 4,
        Component.C4_INDEX: 4,
        Component.C4_UNFINISHED: 4,
        Component.C4_INDEX_UNFINISHED: 4,
        Component.C128: 128,
        Component.C128_UNFINISHED: 128,
    }


def test_float32_rows_are_four_bytes_a_value(flash: ModelConfig) -> None:
    layout = build_layout(flash, Numerics.FLOAT32)
    assert all(item.form is RowForm.F32 for item in layout.descriptors)
    assert all((item.data_bytes, item.scale_bytes) == (4 * item.width, 0) for item in layout.descriptors)
    assert layout.page_bytes == 4 * (21 * 64 * (512 + 128) + 20 * 2 * 512)


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (256, 1), (257, 2), (1 << 20, 4096)])
def test_a_request_takes_whole_pages_and_one_slot(
    flash: ModelConfig, num_tokens: int, num_pages: int
) -> None:
    layout = build_layout(flash, Numerics.SERVED)
    taken = layout.allocated_bytes(num_tokens)
    assert sum(taken.values()) == num_pages * layout.page_bytes + layout.slot_bytes
    assert taken["c128"] == num_pages * 20 * 2 * 584


kinds = st.sampled_from(((LayerKind.WINDOW, 0), (LayerKind.CSA, 4), (LayerKind.HCA, 128)))


@settings(max_examples=50)
@given(
    layers=st.lists(kinds, min_size=1, max_size=9),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 9)),
    numerics=st.sampled_from(Numerics),
    num_mtp_blocks=st.integers(0, 2),
)
def test_any_layout_adds_up_and_lists_each_layer_once(
    layers: list[tuple[LayerKind, int]], widths: tuple[int, int], numerics: Numerics, num_mtp_blocks: int
) -> None:
    config = replace(
        parse_model_config(FLASH),
        layers=tuple(LayerConfig(kind=kind, ratio=ratio, hash_routed=False) for kind, ratio in layers),
        head_dim=64 * widths[0] + 64,
        index_head_dim=2 ** widths[1],
        num_mtp_blocks=num_mtp_blocks,
    )
    layout = build_layout(config, numerics)
    assert layout.page_bytes + layout.slot_bytes == sum(item.unit_bytes for item in layout.descriptors)
    assert sum(layout.allocated_bytes(1).values()) == layout.page_bytes + layout.slot_bytes
    for kind, component in ((LayerKind.CSA, Component.C4), (LayerKind.HCA, Component.C128)):
        numbers = tuple(number for number, (found, _) in enumerate(layers) if found is kind)
        item = layout.find(component)
        assert (item.layers if item else ()) == numbers
    assert (layout.find(Component.DRAFT_WINDOW) is None) == (num_mtp_blocks == 0)
    assert layout.find(Component.LAST_STREAMS) is not None
    for item in layout.descriptors:
        assert item.layer_bytes == item.num_rows * (item.data_bytes + item.scale_bytes)
        assert (item.unit_bytes, item.unit_rows) == (
            len(item.layers) * item.layer_bytes,
            len(item.layers) * item.num_rows,
        )
        if item.form is RowForm.KV_FP8:
            assert item.data_bytes == config.head_dim - 64 + 2 * 64
            assert item.scale_bytes % 8 == 0
            assert item.scale_bytes * 64 >= config.head_dim - 64
        if item.form is RowForm.INDEX_FP4:
            assert item.data_bytes == config.index_head_dim // 2
            assert 0 <= 32 * item.scale_bytes - config.index_head_dim < 32


def test_components_without_layers_are_left_out(flash: ModelConfig) -> None:
    window_only = replace(
        flash.without_mtp(), layers=(LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=False),) * 2
    )
    layout = build_layout(window_only, Numerics.SERVED)
    assert [item.component for item in layout.descriptors] == [Component.WINDOW, Component.LAST_STREAMS]
    assert layout.page_bytes == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"index_head_dim": 96}, "served numerics need index_head_dim to be a power of two, not 96"),
        ({"head_dim": 64}, "head_dim - qk_rope_head_dim to be positive and even, not 0"),
        ({"head_dim": 67}, "head_dim - qk_rope_head_dim to be positive and even, not 3"),
    ],
)
def test_widths_that_the_served_formats_cannot_hold_are_refused(
    flash: ModelConfig, change: dict[str, int], complaint: str
) -> None:
    config = replace(flash, **change)
    build_layout(config, Numerics.FLOAT32)
    with pytest.raises(ConfigError, match=complaint):
        build_layout(config, Numerics.SERVED)

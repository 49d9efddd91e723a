"""Pools: bytes exactly as the layout says, and views that reach each byte from one row only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstore.layout import Component, IndexSpace, Numerics, RowForm, StateLayout, build_layout
from kvstore.pools import Pools, plain_memory
from kvstore.transfer.contract import ByteArray
from rorqual.model_config import LayerConfig, LayerKind, ModelConfig, parse_model_config

torch.set_num_threads(1)

NUM_PAGES, NUM_SLOTS = 3, 2
SMALL = parse_model_config(
    {
        "vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 80,
        "qk_rope_head_dim": 8, "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 8, "sliding_window": 4,
        "index_n_heads": 2, "index_head_dim": 64, "index_topk": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 8, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 1,
        "compress_ratios": [0, 4, 128, 4, 0],
    }
)  # fmt: skip


def make(numerics: Numerics, config: ModelConfig = SMALL) -> tuple[StateLayout, Pools]:
    layout = build_layout(config, numerics)
    return layout, Pools(layout, num_pages=NUM_PAGES, num_slots=NUM_SLOTS)


@pytest.mark.parametrize("numerics", Numerics)
def test_pools_take_the_bytes_that_the_layout_promises(numerics: Numerics) -> None:
    layout, pools = make(numerics)
    assert pools.num_bytes == layout.page_bytes * NUM_PAGES + layout.slot_bytes * NUM_SLOTS
    for item in layout.descriptors:
        units = NUM_PAGES if item.space is IndexSpace.PAGE else NUM_SLOTS
        assert pools[item.component].bytes_ulb.shape == (units, len(item.layers), item.layer_bytes)


def test_a_served_unit_is_all_data_first_then_all_scales() -> None:
    layout, pools = make(Numerics.SERVED)
    for item in layout.descriptors:
        if item.form is RowForm.F32:
            continue
        pool, layer = pools[item.component], item.layers[-1]
        data, scales = pool.data_and_scales(layer)
        data[1, 2 % item.num_rows] = 11
        scales[1, 2 % item.num_rows] = 22
        row = 2 % item.num_rows
        unit = pool.bytes_ulb[1, -1]
        first_scale = item.num_rows * item.data_bytes
        expected = torch.zeros(item.layer_bytes, dtype=torch.uint8)
        expected[row * item.data_bytes : (row + 1) * item.data_bytes] = 11
        expected[first_scale + row * item.scale_bytes :][: item.scale_bytes] = 22
        assert torch.equal(unit, expected), item.component
        unit.zero_()
        assert not bool(pool.bytes_ulb.any()), "another unit or layer was written"


@pytest.mark.parametrize("component", Component)
def test_a_float32_row_id_counts_rows_of_all_layers_and_is_the_same_in_each(component: Component) -> None:
    _, pools = make(Numerics.FLOAT32)
    pool = pools[component]
    item = pool.descriptor
    num_units = pool.bytes_ulb.shape[0]
    for index, layer in enumerate(item.layers):
        rows = pool.rows_f32(layer)
        for unit in range(num_units):
            for row in range(item.num_rows):
                rows[unit * item.unit_rows + row] = (unit * 8 + index) * 1024 + row
    found = pool.bytes_ulb.view(torch.float32).unflatten(-1, (item.num_rows, item.width))
    for unit in range(num_units):
        for index in range(len(item.layers)):
            wanted = (unit * 8 + index) * 1024 + torch.arange(item.num_rows).float()
            assert torch.equal(found[unit, index], wanted.unsqueeze(1).expand(-1, item.width))


@pytest.mark.parametrize("numerics", Numerics)
def test_a_page_of_a_component_is_one_run_of_the_memory_that_is_given(numerics: Numerics) -> None:
    layout = build_layout(SMALL, numerics)
    given: dict[str, ByteArray] = {}

    def allocate(name: str, unit_bytes: int, num_units: int) -> ByteArray:
        given[name] = plain_memory(name, unit_bytes, num_units)
        return given[name]

    pools = Pools(layout, num_pages=NUM_PAGES, num_slots=NUM_SLOTS, allocate=allocate)
    paged = [item for item in layout.descriptors if item.space is IndexSpace.PAGE]
    assert set(given) == {item.component.value for item in paged} == {"c4", "c4_index", "c128"}
    for item in paged:
        memory = given[item.component.value]
        assert memory.shape == (NUM_PAGES * item.unit_bytes,)
        pool = pools[item.component]
        for layer in item.layers:
            if item.form is RowForm.F32:
                pool.rows_f32(layer)[item.unit_rows : item.unit_rows + item.num_rows] = torch.nan
            else:
                for view in pool.data_and_scales(layer):
                    view[1] = 0xFF
        page = memory.reshape(NUM_PAGES, -1)
        assert [bool(row.any()) for row in page] == [False, True, False]
        pool.bytes_ulb[1] = 7
        assert (page[1] == 7).all()


@pytest.mark.parametrize("numerics", Numerics)
def test_poison_makes_every_float_a_nan(numerics: Numerics) -> None:
    layout, pools = make(numerics)
    pools.fill(0xFF)
    for item in layout.descriptors:
        for layer in item.layers:
            if item.form is RowForm.F32:
                assert bool(pools[item.component].rows_f32(layer).isnan().all())
            else:
                data, scales = pools[item.component].data_and_scales(layer)
                assert bool(scales.view(torch.float8_e8m0fnu).float().isnan().all())
                if item.form is RowForm.BF16:
                    assert bool(data.view(torch.bfloat16).isnan().all())
                if item.form is RowForm.KV_FP8:
                    assert bool(data.view(torch.float8_e4m3fn).float().isnan().all())


def test_a_model_without_compressed_rows_has_no_pages_to_pay_for() -> None:
    layers = (LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=False),)
    layout, pools = make(Numerics.SERVED, replace(SMALL, layers=layers))
    assert pools.num_bytes == layout.slot_bytes * NUM_SLOTS

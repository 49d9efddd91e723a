"""The table of what a device holds: every case that the plan asks for, and its promise."""

from __future__ import annotations

import pytest

from bench.capacity import rows, with_fp8_index
from kvstore.hisparse import capacity, hot_shape
from kvstore.layout import Component, Numerics, build_layout
from rorqual.model_config import ModelConfig
from rorqual.performance import FLASH, PRO

MILLION = 1 << 20


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("index", ["fp4", "fp8"])
def test_four_times_as_many_requests_of_a_million_tokens_fit(config: ModelConfig, index: str) -> None:
    layout = build_layout(config, Numerics.SERVED)
    layout = with_fp8_index(layout) if index == "fp8" else layout
    shape = hot_shape(layout, index_topk=config.index_topk, num_drafts=0, num_tokens_max=MILLION)
    found = capacity(layout, shape, num_tokens=MILLION, device_bytes=64 * 2**30)
    assert found.gain >= 4
    assert found.gain_here >= 4
    assert found.num_spilled >= 4 * found.num_resident


def test_fp8_index_rows_are_those_of_other_engines() -> None:
    item = with_fp8_index(build_layout(FLASH, Numerics.SERVED)).find(Component.C4_INDEX)
    assert item is not None
    assert (item.row_bytes, item.num_rows) == (132, 64)


def test_the_table_has_a_row_for_each_model_index_and_length() -> None:
    table = rows([131_072, MILLION], device_bytes=64 * 10**9)
    assert [row.split()[:3] for row in table] == [
        [model, index, length]
        for model in ("flash", "pro")
        for index in ("fp4", "fp8")
        for length in ("131,072", "1,048,576")
    ]

"""The manifest against the published inventories of the two releases, and its rules at odd widths."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint.manifest import Part, Storage, expected_tensors, expected_weights
from rorqual.model_config import ModelConfig, parse_model_config


@pytest.mark.parametrize(
    ("model", "num_tensors", "num_mtp_tensors", "num_bytes"),
    [("flash", 69_187, 1_575, 159_609_485_896), ("pro", 145_116, 2_343, 864_704_792_696)],
)
def test_tensors_and_bytes_of_the_releases(
    request: pytest.FixtureRequest, model: str, num_tensors: int, num_mtp_tensors: int, num_bytes: int
) -> None:
    tensors = list(expected_tensors(request.getfixturevalue(model)))
    assert len(tensors) == num_tensors
    assert len({tensor.name for tensor in tensors}) == num_tensors
    assert sum(tensor.name.startswith("mtp.") for tensor in tensors) == num_mtp_tensors
    assert sum(tensor.num_bytes for tensor in tensors) == num_bytes


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [("flash", (147.2, 5.4, 3.6, 2.1, 1.1, 0.14)), ("pro", (822.1, 20.3, 14.0, 3.7, 4.0, 0.34))],
)
def test_bytes_by_part_of_the_releases(
    request: pytest.FixtureRequest, model: str, gigabytes: tuple[float, ...]
) -> None:
    sums: Counter[Part] = Counter()
    for tensor in expected_tensors(request.getfixturevalue(model)):
        sums[tensor.part] += tensor.num_bytes
    parts = (
        Part.ROUTED_EXPERTS,
        Part.ATTENTION,
        Part.MTP,
        Part.EMBED_HEAD,
        Part.SHARED_EXPERT,
        Part.HYPER_CONNECTIONS,
    )
    for part, wanted in zip(parts, gigabytes, strict=True):
        assert round(sums[part] / 1e9, 2 if wanted < 1 else 1) == wanted


@pytest.mark.parametrize(("model", "num_bytes"), [("flash", 13_369_344), ("pro", 35_094_528)])
def test_one_routed_expert_has_the_published_bytes(
    request: pytest.FixtureRequest, model: str, num_bytes: int
) -> None:
    tensors = expected_tensors(request.getfixturevalue(model))
    assert (
        sum(item.num_bytes for item in tensors if item.name.startswith("layers.5.ffn.experts.9."))
        == num_bytes
    )


def test_named_tensors_of_flash_have_the_published_shapes(flash: ModelConfig) -> None:
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in expected_tensors(flash)}
    for name, dtype, shape in (
        ("embed.weight", "BF16", (129280, 4096)),
        ("hc_head_fn", "F32", (4, 16384)),
        ("layers.0.hc_attn_fn", "F32", (24, 16384)),
        ("layers.0.attn.attn_sink", "F32", (64,)),
        ("layers.0.attn.wq_b.weight", "F8_E4M3", (32768, 1024)),
        ("layers.0.attn.wq_b.scale", "F8_E8M0", (256, 8)),
        ("layers.0.attn.wo_a.weight", "F8_E4M3", (8192, 4096)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.2.attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1024)),
        ("layers.2.attn.indexer.compressor.ape", "F32", (4, 256)),
        ("layers.2.attn.indexer.compressor.wgate.weight", "BF16", (256, 4096)),
        ("layers.2.attn.indexer.compressor.norm.weight", "BF16", (128,)),
        ("layers.3.attn.compressor.ape", "F32", (128, 512)),
        ("layers.3.attn.compressor.wkv.weight", "BF16", (512, 4096)),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("layers.3.ffn.gate.bias", "F32", (256,)),
        ("layers.3.ffn.experts.255.w2.weight", "I8", (4096, 1024)),
        ("layers.3.ffn.experts.255.w2.scale", "F8_E8M0", (4096, 64)),
        ("layers.3.ffn.shared_experts.w1.scale", "F8_E8M0", (16, 32)),
        ("mtp.0.e_proj.weight", "F8_E4M3", (4096, 4096)),
        ("mtp.0.hc_head_scale", "F32", (1,)),
        ("mtp.0.ffn.gate.bias", "F32", (256,)),
    ):
        assert tensors[name] == (dtype, shape), name
    for name in (
        "layers.0.attn.compressor.ape",
        "layers.3.attn.indexer.wq_b.weight",
        "layers.0.ffn.gate.bias",
    ):
        assert name not in tensors, name


@pytest.mark.parametrize(("model", "gigabytes"), [("flash", 292.5), ("pro", 1602.0)])
def test_the_base_releases_store_experts_in_fp8_blocks(
    request: pytest.FixtureRequest, model: str, gigabytes: float
) -> None:
    config = replace(request.getfixturevalue(model), expert_dtype="fp8")
    assert sum(item.num_bytes for item in expected_tensors(config)) / 1e9 == pytest.approx(gigabytes, abs=0.6)
    expert = {item.name: item.shape for item in expected_tensors(config) if ".experts.0.w1." in item.name}
    inner, outer = config.expert_hidden_size, config.hidden_size
    assert expert["layers.4.ffn.experts.0.w1.scale"] == (inner // 128, outer // 128)


def test_a_float_checkpoint_has_no_scales_and_reads_bf16_as_well(tiny_raw: dict[str, Any]) -> None:
    tensors = list(expected_tensors(parse_model_config(tiny_raw)))
    assert not any(tensor.name.endswith(".scale") for tensor in tensors)
    assert {tensor.dtype for tensor in tensors} == {"F32", "I64"}
    assert all(tensor.dtypes == {"F32", "BF16"} for tensor in tensors if tensor.dtype == "F32")


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), expert_dtype=st.sampled_from(["fp4", "fp8"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_scales_cover_every_value_at_any_width(
    quantised_raw: dict[str, Any], rows: int, columns: int, expert_dtype: str
) -> None:
    config = replace(
        parse_model_config(quantised_raw),
        hidden_size=columns,
        expert_hidden_size=rows,
        expert_dtype=expert_dtype,
    )
    weight = next(
        item for item in expected_weights(config) if item.name == "layers.0.ffn.experts.0.w1.weight"
    )
    values, scale = weight.tensors()
    assert weight.shape == (rows, columns)
    if weight.storage is Storage.FP4:
        assert columns <= 2 * values.shape[1] <= columns + 1
        assert scale.shape == (rows, math.ceil(columns / 32))
    else:
        assert values.shape == (rows, columns)
        assert scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))

"""Random checkpoints: the same for the same seed, whole or absent, and with no trivial value anywhere."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine.checkpoint import writer
from engine.checkpoint.config_file import public_config
from engine.checkpoint.init import InitOptions, init_checkpoint, random_weight
from engine.checkpoint.manifest import expected_tensors, expected_weights
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.safetensors_file import read_header
from engine.checkpoint.writer import WriteOptions, plan_shards, write_checkpoint
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model_config import Dialect, LayerConfig, LayerKind, load_model_config, parse_model_config

Make = Callable[..., Path]


@pytest.mark.parametrize("weights", ["float32", "quantised"])
def test_files_are_what_the_safetensors_library_reads(
    make_checkpoint: Make, quantised_raw: dict[str, Any], weights: str
) -> None:
    path = make_checkpoint(quantised_raw, weights=weights, shard_bytes_max=50_000)
    expected = {tensor.name: tensor for tensor in expected_tensors(load_model_config(path))}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in expected.values())
    for shard in path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert index["weight_map"].pop(name) == shard.name
                found = file.get_slice(name)
                assert (found.get_dtype(), tuple(found.get_shape())) == (
                    expected[name].dtype,
                    expected[name].shape,
                )
                assert file.get_tensor(name).shape == expected[name].shape
    assert not index["weight_map"]


def test_values_depend_on_the_seed_and_not_on_sharding(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    one, many, other = (
        dict(open_checkpoint(make_checkpoint(tiny_raw, name=name, seed=seed, shard_bytes_max=size)).tensors())
        for name, seed, size in (("one", 1, 10**9), ("many", 1, 10_000), ("other", 2, 10**9))
    )
    for name, values in one.items():
        assert torch.equal(values, many[name]), name
        assert not torch.equal(values, other[name]), name


def test_no_two_weights_are_the_same_numbers(tiny_raw: dict[str, Any]) -> None:
    config = parse_model_config(tiny_raw)
    firsts = [float(random_weight(config, weight, 0).flatten()[0]) for weight in expected_weights(config)]
    tables = sum(weight.name.endswith("tid2eid") for weight in expected_weights(config))
    assert len(set(firsts)) >= len(firsts) - tables


def test_nothing_is_left_at_a_trivial_value(tiny_raw: dict[str, Any]) -> None:
    config = parse_model_config(tiny_raw)
    for weight in expected_weights(config):
        values = random_weight(config, weight, 5)
        assert tuple(values.shape) == weight.shape
        if values.dtype is torch.int64:
            continue
        for trivial in (0.0, 1.0):
            assert not (values == trivial).any(), weight.name
        assert values.numel() == 1 or values.std() > 0.01, weight.name
        assert values.abs().max() < 10, weight.name


def test_every_token_of_a_hash_layer_gets_distinct_experts_and_every_expert_is_used(
    tiny_raw: dict[str, Any],
) -> None:
    for num_experts, num_chosen in ((5, 2), (5, 5), (64, 6)):
        config = parse_model_config(
            tiny_raw
            | {"n_routed_experts": num_experts, "num_experts_per_tok": num_chosen, "vocab_size": 2000}
        )
        weight = next(weight for weight in expected_weights(config) if weight.name.endswith("tid2eid"))
        table = random_weight(config, weight, 0).sort(dim=1).values
        assert bool((table[:, 1:] > table[:, :-1]).all())
        counts = torch.bincount(table.flatten(), minlength=num_experts)
        assert len(counts) == num_experts
        mean = 2000 * num_chosen / num_experts
        assert bool(((counts - mean).abs() <= 6 * mean**0.5).all())


def test_the_written_config_says_how_weights_are_stored(
    make_checkpoint: Make, quantised_raw: dict[str, Any]
) -> None:
    raw = json.loads(
        (make_checkpoint(quantised_raw, name="q", weights="quantised") / "config.json").read_text()
    )
    assert raw["quantization_config"]["weight_block_size"] == [128, 128]
    assert raw["expert_dtype"] == "fp4"
    raw = json.loads(
        (make_checkpoint(quantised_raw, name="f", weights="float32") / "config.json").read_text()
    )
    assert "quantization_config" not in raw
    assert "expert_dtype" not in raw


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_the_public_config_of_a_release_is_read_back_as_it_was(
    request: pytest.FixtureRequest, model: str
) -> None:
    config = request.getfixturevalue(model)
    assert parse_model_config(json.loads(json.dumps(public_config(config)))) == config


@given(
    ratios=st.lists(st.sampled_from([0, 4, 128]), min_size=1, max_size=6),
    num_hash=st.integers(0, 3),
    num_mtp=st.integers(0, 2),
    quantised=st.booleans(),
    eos=st.sampled_from([1, [1, 5]]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_public_config_is_read_back_as_it_was(
    quantised_raw: dict[str, Any], ratios: list[int], num_hash: int, num_mtp: int, quantised: bool, eos: Any
) -> None:
    raw = quantised_raw | {
        "num_hidden_layers": len(ratios),
        "compress_ratios": ratios + [0] * num_mtp,
        "num_hash_layers": num_hash,
        "num_nextn_predict_layers": num_mtp,
        "eos_token_id": eos,
    }
    if not quantised:
        del raw["quantization_config"]
    config = parse_model_config(raw)
    assert parse_model_config(json.loads(json.dumps(public_config(config)))) == config


def test_ratios_the_public_config_cannot_say_are_written_in_transformers_words(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    config = parse_model_config(tiny_raw)
    layers = tuple(
        replace(layer, ratio=16) if layer.kind is LayerKind.HCA else layer for layer in config.layers
    )
    late_hash = LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=True)
    odd = replace(config.without_mtp(), layers=(*layers, late_hash))
    again = parse_model_config(public_config(odd))
    assert again == replace(odd, dialect=Dialect.TRANSFORMERS)
    with pytest.raises(ConfigError, match="MTP"):
        public_config(replace(config, layers=layers))


def test_a_tokenizer_is_copied(make_checkpoint: Make, tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tmp_path / "some.json"
    document = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 68}}, "added_tokens": [{"id": 69}]}
    tokenizer.write_text(json.dumps(document))
    path = make_checkpoint(tiny_raw, tokenizer=tokenizer)
    assert (path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 70}]}', "token id 70"),
        ('{"model": {"vocab": {"a": 71}}}', "token id 71"),
        ("{", "not a tokenizer.json"),
        ("[1]", "not a tokenizer.json"),
        (None, "cannot be read"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_written(
    make_checkpoint: Make, tiny_raw: dict[str, Any], tmp_path: Path, content: str | None, reason: str
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    if content is not None:
        tokenizer.write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=reason):
        make_checkpoint(tiny_raw, tokenizer=tokenizer)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_never_overwritten(
    make_checkpoint: Make, tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    occupied = tmp_path / "model"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        make_checkpoint(tiny_raw)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="not a directory"):
        make_checkpoint(tiny_raw, name="file")
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["file", "model", "notes.txt"]


def test_an_empty_directory_is_filled(
    make_checkpoint: Make, tiny_raw: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    open_checkpoint(make_checkpoint(tiny_raw)).check()
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_on_the_way_leaves_nothing(
    tiny_raw: dict[str, Any], tmp_path: Path, failure: type[BaseException] | BaseException
) -> None:
    config = parse_model_config(tiny_raw)

    def produce(weight: writer.WeightSpec) -> torch.Tensor:
        if weight.name.startswith("mtp."):
            raise failure
        return random_weight(config, weight, 0)

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        write_checkpoint(config, produce, WriteOptions(out=tmp_path / "model", shard_bytes_max=100_000))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_writing(
    make_checkpoint: Make, tiny_raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="1000 bytes free"):
        make_checkpoint(tiny_raw)
    assert not list(tmp_path.iterdir())


@given(shard_bytes_max=st.integers(1, 2_000_000))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_hold_every_weight_once_within_their_size(
    quantised_raw: dict[str, Any], shard_bytes_max: int
) -> None:
    weights = list(expected_weights(parse_model_config(quantised_raw)))
    shards = plan_shards(weights, shard_bytes_max)
    assert sorted(weight.name for shard in shards for weight in shard) == sorted(
        item.name for item in weights
    )
    for shard in shards:
        num_bytes = sum(tensor.num_bytes for weight in shard for tensor in weight.tensors())
        assert num_bytes <= shard_bytes_max or len(shard) == 1


def test_every_tensor_begins_at_a_multiple_of_its_element(
    make_checkpoint: Make, quantised_raw: dict[str, Any]
) -> None:
    widths = {"F32": 4, "I64": 8, "BF16": 2}
    # Odd widths everywhere: without care a float would follow an odd number of bytes.
    path = make_checkpoint(quantised_raw | {"q_lora_rank": 23, "moe_intermediate_size": 19})
    for shard in path.glob("*.safetensors"):
        for tensor in read_header(shard):
            assert tensor.offset % widths.get(tensor.dtype, 1) == 0, tensor


def test_progress_of_writing_reaches_all_bytes(tiny_raw: dict[str, Any], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    num_bytes = init_checkpoint(
        parse_model_config(tiny_raw),
        InitOptions(seed=0, out=tmp_path / "model"),
        lambda done, total: steps.append((done, total)),
    )
    assert steps == sorted(steps)
    assert steps[-1] == (num_bytes, num_bytes)

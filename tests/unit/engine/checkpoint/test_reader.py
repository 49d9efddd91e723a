"""Reading: what is handed out, and that every broken file is named in one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import formats
from engine.checkpoint.init import random_weight
from engine.checkpoint.manifest import Storage, expected_tensors, expected_weights
from engine.checkpoint.names import Naming, expert_stack, official_name, transformers_name
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.safetensors_file import encode_header
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model_config import ModelConfig, parse_model_config

Make = Callable[..., Path]


def single_file(
    source: Path, *, change: Callable[[dict[str, torch.Tensor]], None] = lambda state: None
) -> Path:
    """The checkpoint as one model.safetensors written by the safetensors library, with a change."""
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        state |= load_file(shard)
    change(state)
    target = source.with_name(source.name + "-single")
    target.mkdir()
    save_file(state, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def expected_values(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """What loading must give: the drawn values after the storage's own loss."""
    values: dict[str, torch.Tensor] = {}
    for weight in expected_weights(config):
        drawn = random_weight(config, weight, seed)
        if weight.storage is Storage.FP8:
            drawn = formats.dequantise_fp8_blocks(*formats.quantise_fp8_blocks(drawn))
        elif weight.storage is Storage.FP4:
            drawn = formats.round_fp4(drawn)
        elif weight.storage is Storage.BF16:
            drawn = formats.round_bf16(drawn)
        values[weight.name] = drawn
    return values


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize(
    ("weights", "expert_dtype"), [("float32", None), ("quantised", "fp4"), ("quantised", "fp8")]
)
@pytest.mark.parametrize("shard_bytes_max", [10**9, 60_000])
def test_what_was_written_is_read_under_official_names_dequantised(
    make_checkpoint: Make,
    quantised_raw: dict[str, Any],
    weights: str,
    expert_dtype: str | None,
    shard_bytes_max: int,
) -> None:
    if expert_dtype:
        quantised_raw["expert_dtype"] = expert_dtype
    path = make_checkpoint(quantised_raw, seed=3, weights=weights, shard_bytes_max=shard_bytes_max)
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    assert checkpoint.has_mtp
    assert checkpoint.notices == ()
    assert checkpoint.naming is Naming.OFFICIAL
    assert checkpoint.config.quantised == (weights == "quantised")
    assert (checkpoint.num_files > 3) == (shard_bytes_max == 60_000)
    found = dict(checkpoint.tensors())
    assert_equal(found, expected_values(checkpoint.config, 3))


def test_one_file_without_an_index_is_a_checkpoint_too(
    make_checkpoint: Make, quantised_raw: dict[str, Any]
) -> None:
    path = make_checkpoint(quantised_raw)
    assert_equal(dict(open_checkpoint(single_file(path)).tensors()), dict(open_checkpoint(path).tensors()))


@pytest.mark.parametrize("weights", ["float32", "quantised"])
def test_loading_in_pieces_fills_the_same_values(
    make_checkpoint: Make, quantised_raw: dict[str, Any], weights: str
) -> None:
    # 300 rows: three pieces of at least one block of 128 rows, the last one short.
    path = make_checkpoint(quantised_raw | {"vocab_size": 300, "q_lora_rank": 300}, weights=weights)
    checkpoint = open_checkpoint(path)
    wanted = dict(checkpoint.tensors())
    targets = {name: torch.full_like(values, -7) for name, values in wanted.items()}
    checkpoint.load_into(targets.__getitem__, piece_bytes_max=1)
    assert_equal(targets, wanted)


def test_progress_grows_to_all_bytes(make_checkpoint: Make, quantised_raw: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(make_checkpoint(quantised_raw))
    steps: list[tuple[int, int]] = []
    list(checkpoint.tensors(lambda done, total: steps.append((done, total))))
    total = sum(tensor.num_bytes for tensor in expected_tensors(checkpoint.config))
    assert checkpoint.num_bytes_total == total
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert steps[-1] == (total, total)


def test_all_wrong_tensors_are_listed_in_one_error(make_checkpoint: Make, tiny_raw: dict[str, Any]) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        del state["layers.1.attn.wq_a.weight"], state["mtp.0.e_proj.weight"]
        state["layers.0.surprise"] = torch.zeros(3)
        state["head.weight"] = torch.zeros(7, 40)
        state["norm.weight"] = state["norm.weight"].to(torch.float16)
        state["layers.0.ffn.gate.tid2eid"] = state["layers.0.ffn.gate.tid2eid"].to(torch.int32)

    checkpoint = open_checkpoint(single_file(make_checkpoint(tiny_raw), change=spoil))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check()
    first, *lines = str(caught.value).splitlines()
    assert "2 missing" in first
    assert "1 unexpected" in first
    assert lines == [
        "  mis-shaped: head.weight is [7, 40], must be [70, 40]",
        "  mis-typed: layers.0.ffn.gate.tid2eid is I32, must be I64",
        "  mis-typed: norm.weight is F16, must be BF16 or F32",
        "  missing: layers.1.attn.wq_a.weight",
        "  missing: mtp.0.e_proj.weight",
        "  unexpected: layers.0.surprise in model.safetensors",
    ]
    with pytest.raises(CheckpointError, match="missing"):
        next(checkpoint.tensors())


def test_a_quantised_weight_without_its_scale_is_an_error(
    make_checkpoint: Make, quantised_raw: dict[str, Any]
) -> None:
    path = single_file(
        make_checkpoint(quantised_raw), change=lambda state: state.pop("layers.0.attn.wkv.scale") and None
    )
    with pytest.raises(CheckpointError, match=r"missing: layers\.0\.attn\.wkv\.scale"):
        open_checkpoint(path).check()


def test_bf16_weights_of_an_unquantised_model_become_float32(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        for name, values in state.items():
            if values.dtype is torch.float32:
                state[name] = values.to(torch.bfloat16)

    path = make_checkpoint(tiny_raw)
    wanted = {
        name: values if values.dtype is torch.int64 else formats.round_bf16(values)
        for name, values in open_checkpoint(path).tensors()
    }
    assert_equal(dict(open_checkpoint(single_file(path, change=halve)).tensors()), wanted)


def test_a_model_without_mtp_weights_says_that_it_drafts_nothing(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    def drop_mtp(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith("mtp.")]:
            del state[name]

    checkpoint = open_checkpoint(single_file(make_checkpoint(tiny_raw), change=drop_mtp))
    checkpoint.check()
    assert not checkpoint.has_mtp
    assert checkpoint.config.num_mtp_blocks == 0
    assert any("without drafts" in notice for notice in checkpoint.notices)
    assert not any(name.startswith("mtp.") for name, _ in checkpoint.tensors())


def test_superfluous_copies_in_an_mtp_block_are_passed_over(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    def add_copies(state: dict[str, torch.Tensor]) -> None:
        state["mtp.0.embed.weight"] = state["embed.weight"].clone()
        state["mtp.0.head.weight"] = state["head.weight"].clone()

    path = make_checkpoint(tiny_raw)
    checkpoint = open_checkpoint(single_file(path, change=add_copies))
    steps: list[tuple[int, int]] = []
    found = dict(checkpoint.tensors(lambda done, total: steps.append((done, total))))
    assert_equal(found, dict(open_checkpoint(path).tensors()))
    assert steps[-1][0] == steps[-1][1] == checkpoint.num_bytes_total


def test_a_transformers_config_beside_official_tensors_keeps_the_mtp_blocks(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    path = make_checkpoint(tiny_raw)
    raw = json.loads((path / "config.json").read_text())
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    raw["layer_types"] = [kinds[ratio] for ratio in raw.pop("compress_ratios")[:4]]
    (path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    assert checkpoint.config.num_mtp_blocks == 1


def test_a_config_silent_about_experts_believes_their_tensors(
    make_checkpoint: Make, quantised_raw: dict[str, Any]
) -> None:
    path = make_checkpoint(quantised_raw | {"expert_dtype": "fp8"})
    raw = json.loads((path / "config.json").read_text())
    del raw["expert_dtype"]
    (path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    assert checkpoint.config.expert_dtype == "fp8"
    # One that names FP4 is held to it.
    (path / "config.json").write_text(json.dumps(raw | {"expert_dtype": "fp4"}))
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight is F8_E4M3, must be I8"):
        open_checkpoint(path).check()


def stacked(source: Path, config: ModelConfig) -> Path:
    """The checkpoint's main layers under transformers' names, experts stacked."""

    def rename(state: dict[str, torch.Tensor]) -> None:
        renamed: dict[str, torch.Tensor] = {}
        for name, values in state.items():
            theirs = transformers_name(name)
            if theirs is None:
                continue
            stack = expert_stack(official_name(theirs))
            if stack is None:
                renamed[theirs] = values
            elif theirs not in renamed:
                renamed[theirs] = torch.stack(
                    [
                        torch.cat([state[member] for member in stack.weight_names(expert)])
                        for expert in range(config.num_experts)
                    ]
                )
        state.clear()
        state.update(renamed)

    return single_file(source, change=rename)


def test_stacked_experts_come_one_by_one_as_views(make_checkpoint: Make, tiny_raw: dict[str, Any]) -> None:
    path = make_checkpoint(tiny_raw)
    wanted = {name: values for name, values in open_checkpoint(path).tensors() if not name.startswith("mtp.")}
    checkpoint = open_checkpoint(stacked(path, parse_model_config(tiny_raw)))
    assert checkpoint.naming is Naming.TRANSFORMERS
    found = dict(checkpoint.tensors())
    assert_equal(found, wanted)
    gate, up = (found[f"layers.2.ffn.experts.1.{name}.weight"] for name in ("w1", "w3"))
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    assert gate.untyped_storage().nbytes() == 4 * (gate.numel() + up.numel())
    targets = {name: torch.full_like(values, -7) for name, values in wanted.items()}
    checkpoint.load_into(targets.__getitem__, piece_bytes_max=1)
    assert_equal(targets, wanted)


def test_a_stack_of_the_wrong_shape_is_named_as_the_file_names_it(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    config = parse_model_config(tiny_raw)
    path = single_file(
        stacked(make_checkpoint(tiny_raw), config),
        change=lambda state: state.update(
            {"model.layers.1.mlp.experts.down_proj": torch.zeros(config.num_experts, 3, 4)}
        ),
    )
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).check()
    assert str(caught.value).splitlines()[1:] == [
        "  mis-shaped: model.layers.1.mlp.experts.down_proj is [5, 3, 4], must be [5, 40, 20]"
    ]


def test_a_weight_stored_twice_is_an_error(make_checkpoint: Make, tiny_raw: dict[str, Any]) -> None:
    def double(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.self_attn.kv_proj.weight"] = state["layers.0.attn.wkv.weight"].clone()

    with pytest.raises(CheckpointError, match=r"stored twice: .*layers\.0"):
        open_checkpoint(single_file(make_checkpoint(tiny_raw), change=double)).check()


class TestBrokenFiles:
    """Each error is one CheckpointError that names the file."""

    @pytest.fixture
    def path(self, make_checkpoint: Make, tiny_raw: dict[str, Any]) -> Path:
        return make_checkpoint(tiny_raw, shard_bytes_max=100_000)

    def error(self, path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path).check()
        return str(caught.value)

    def test_truncated_shards_are_all_named(self, path: Path) -> None:
        first, second, *_ = sorted(path.glob("*.safetensors"))
        first.write_bytes(first.read_bytes()[:-1])
        second.write_bytes(second.read_bytes()[:100])
        message = self.error(path)
        assert f"{first}: truncated" in message
        assert f"{second}: not a safetensors file, or truncated" in message

    def test_a_shard_that_is_gone(self, path: Path) -> None:
        shard = next(path.glob("*.safetensors"))
        shard.unlink()
        assert f"{shard}: cannot be read" in self.error(path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "truncated"),
            (b"\xff" * 8, "truncated"),
            (b"\x02\0\0\0\0\0\0\0[]", "not a JSON object"),
            (b"\x02\0\0\0\0\0\0\0{{", "not JSON"),
            (b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}', "'a' is malformed"),
        ],
    )
    def test_a_shard_that_is_something_else(self, path: Path, content: bytes, reason: str) -> None:
        shard = next(path.glob("*.safetensors"))
        shard.write_bytes(content)
        message = self.error(path)
        assert str(shard) in message
        assert reason in message

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "4 bytes for F32 [2]"),
            ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "malformed"),
            ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "overlap others or leave a gap"),
            ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "4 bytes after its last tensor"),
        ],
    )
    def test_a_header_that_contradicts_its_file(self, path: Path, entry: dict[str, Any], reason: str) -> None:
        shard = next(path.glob("*.safetensors"))
        header = json.dumps({"norm.weight": entry}).encode()
        shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        assert reason in self.error(path)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
    def test_a_broken_index(self, path: Path, content: str) -> None:
        index = path / "model.safetensors.index.json"
        index.write_text(content)
        assert str(index) in self.error(path)

    def test_an_index_that_leads_out_of_the_directory(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"norm.weight": "../other/model.safetensors"}}))
        assert "not a file name" in self.error(path)

    def test_an_index_that_names_what_is_not_there(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        raw = json.loads(index.read_text())
        file = raw["weight_map"]["norm.weight"]
        raw["weight_map"]["ghost.weight"] = file
        index.write_text(json.dumps(raw))
        assert f"ghost.weight in {file}" in self.error(path)

    def test_a_directory_without_weights(self, path: Path) -> None:
        for file in path.glob("*.safetensors*"):
            file.unlink()
        assert "neither" in self.error(path)

    def test_a_file_instead_of_a_directory(self, path: Path) -> None:
        assert "not a model directory" in self.error(path / "config.json")

    def test_no_config(self, path: Path) -> None:
        (path / "config.json").unlink()
        with pytest.raises(ConfigError, match="no such file"):
            open_checkpoint(path)

    def test_a_shard_that_shrinks_after_its_header_was_read(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        for shard in path.glob("*.safetensors"):
            with shard.open("r+b") as stream:
                stream.truncate(shard.stat().st_size - 100)
        with pytest.raises(CheckpointError, match="ended inside tensor"):
            list(checkpoint.tensors())


@pytest.mark.slow
def test_headers_of_a_release_are_checked_without_reading_its_160_gigabytes(
    tmp_path: Path, flash: ModelConfig, flash_raw: dict[str, Any]
) -> None:
    tensors = list(expected_tensors(flash))
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(encode_header(tensors))
        # A hole: no disk holds these bytes, and reading them would take minutes.
        stream.truncate(stream.tell() + sum(tensor.num_bytes for tensor in tensors))
    (tmp_path / "config.json").write_text(json.dumps(flash_raw))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.num_bytes_total == 159_609_485_896
    assert sum(checkpoint.bytes_by_part().values()) == 159_609_485_896

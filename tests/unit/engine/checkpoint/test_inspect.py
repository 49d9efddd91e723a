"""The published sizes of the releases, the three subcommands as a person runs them, and the progress line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.cli import main
from engine.checkpoint.inspect import (
    count_weights,
    inspect_config,
    request_state,
    row_layouts,
    to_json,
    to_text,
)
from engine.checkpoint.progress import ProgressLine, format_bytes
from rorqual.model_config import ModelConfig

Make = Callable[..., Path]

BF16, FP8_INDEX, FP4_INDEX = range(3)


@pytest.mark.parametrize(
    ("model", "layout", "sizes", "bytes_per_token"),
    [
        (
            "flash",
            BF16,
            (5_636_096, 5_637_144_576, 1_409_286_144, 167_772_160, 12_206_080, 7_232_045_056),
            6880.0,
        ),
        (
            "flash",
            FP8_INDEX,
            (3_214_336, 3_214_934_016, 726_663_168, 95_682_560, 12_206_080, 4_052_700_160),
            3850.25,
        ),
        (
            "flash",
            FP4_INDEX,
            (3_214_336, 3_214_934_016, 374_341_632, 95_682_560, 12_206_080, 3_700_378_624),
            3514.25,
        ),
        (
            "pro",
            BF16,
            (7_995_392, 8_053_063_680, 2_013_265_920, 260_046_848, 18_710_528, 10_353_082_368),
            9848.0,
        ),
        (
            "pro",
            FP8_INDEX,
            (4_559_872, 4_592_762_880, 1_038_090_240, 148_307_968, 18_710_528, 5_802_431_488),
            5511.4,
        ),
        (
            "pro",
            FP4_INDEX,
            (4_559_872, 4_592_762_880, 534_773_760, 148_307_968, 18_710_528, 5_299_115_008),
            5031.4,
        ),
    ],
)
def test_state_of_a_million_tokens(
    request: pytest.FixtureRequest, model: str, layout: int, sizes: tuple[int, ...], bytes_per_token: float
) -> None:
    config = request.getfixturevalue(model)
    state = request_state(config, 1_048_576, row_layouts(config)[layout])
    found = (state.window, state.c4, state.c4_index, state.c128, state.unfinished, state.total)
    assert found == sizes
    assert state.bytes_per_token == pytest.approx(bytes_per_token, abs=0.05)


@pytest.mark.parametrize(
    ("model", "num_tokens", "total"),
    [
        ("flash", 131_072, 520_080_384),
        ("pro", 131_072, 745_665_536),
        ("flash", 32_768, 141_585_408),
        ("pro", 32_768, 203_869_184),
    ],
)
def test_state_of_shorter_requests(
    request: pytest.FixtureRequest, model: str, num_tokens: int, total: int
) -> None:
    config = request.getfixturevalue(model)
    assert request_state(config, num_tokens, row_layouts(config)[FP8_INDEX]).total == total


def test_layouts_are_named_by_the_bytes_of_a_row(flash: ModelConfig) -> None:
    assert [(rows.kv, rows.index) for rows in row_layouts(flash)] == [(1024, 256), (584, 132), (584, 68)]


@pytest.mark.parametrize(
    ("model", "main", "with_mtp", "active"),
    [("flash", 284.33, 290.94, 13.27), ("pro", 1573.0, 1598.8, 48.85)],
)
def test_parameters_of_the_releases(
    request: pytest.FixtureRequest, model: str, main: float, with_mtp: float, active: float
) -> None:
    weights = count_weights(request.getfixturevalue(model))
    assert weights.num_parameters / 1e9 == pytest.approx(main, abs=0.05)
    assert (weights.num_parameters + weights.num_parameters_mtp) / 1e9 == pytest.approx(with_mtp, abs=0.05)
    assert weights.num_parameters_active / 1e9 == pytest.approx(active, abs=0.005)


def test_pools_are_shown_beside_by_whoever_owns_them(flash: ModelConfig) -> None:
    inspection = inspect_config(
        flash,
        source="x",
        num_tokens=512,
        allocated_bytes=lambda config, num_tokens: {"c4": 7, "window": num_tokens},
    )
    assert to_json(inspection)["allocated"] == {"c4": 7, "window": 512}
    assert "519" in to_text(inspection)
    assert "allocated" not in to_json(inspect_config(flash, source="x", num_tokens=512))


@pytest.fixture
def config_file(tmp_path: Path, flash_raw: dict[str, Any]) -> Path:
    path = tmp_path / "flash.json"
    path.write_text(json.dumps(flash_raw))
    return path


def test_inspecting_the_flash_config_prints_its_inventory(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(config_file)]) == 0
    text = capsys.readouterr().out
    for number in (
        "69,187",
        "1,575",
        "159,609,485,896",
        "284.33 B",
        "13.27 B",
        "4,052,700,160",
        "3,700,378,624",
    ):
        assert number in text
    assert max(len(line) for line in text.splitlines()) < 125


def test_inspecting_as_json_has_the_same_numbers(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(config_file), "--json", "--length", "131072"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_tensors"] == 69_187
    assert document["num_bytes"] == 159_609_485_896
    assert document["num_tokens"] == 131_072
    assert document["request_state"][1]["total"] == 520_080_384
    assert document["allocated"]["c4"] == document["request_state"][2]["c4"]


def test_inspecting_files_counts_what_they_hold(
    make_checkpoint: Make, tiny_raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(tiny_raw)
    (shard,) = path.glob("*.safetensors")
    state = {
        name: values.to(torch.bfloat16) if values.dtype is torch.float32 else values
        for name, values in load_file(shard).items()
        if not name.startswith("mtp.")
    }
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(state, path / "model.safetensors")
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stored"]["num_tensors"] == len(state) == document["num_tensors"]
    assert sum(document["stored"]["bytes_by_part"].values()) == sum(item.nbytes for item in state.values())
    assert any("without drafts" in notice for notice in document["notices"])
    assert main(["inspect", str(path)]) == 0
    assert "bytes in files" in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["float32", "quantised"])
def test_init_then_verify(
    tmp_path: Path, tiny_raw: dict[str, Any], weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(tiny_raw))
    options = ["--config", str(config), "--seed", "-3", "--out", str(out), "--weights", weights]
    assert main(["init", *options, "--shard-mb", "1"]) == 0
    assert main(["verify", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    wrote, verified = captured.out.splitlines()
    assert "seed -3" in wrote
    assert verified.endswith("all sound")
    assert main(["init", *options]) == 1
    assert "not empty" in capsys.readouterr().err


def test_verify_lists_every_unusable_tensor(
    make_checkpoint: Make, quantised_raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_checkpoint(quantised_raw)
    (shard,) = path.glob("*.safetensors")
    state = load_file(shard)
    state["norm.weight"][3] = float("inf")
    state["layers.0.ffn.experts.1.w2.scale"].view(torch.uint8)[0, 0] = 255
    state["layers.0.attn.wkv.weight"].view(torch.uint8)[0, 5] = 0x7F
    state["layers.0.ffn.gate.tid2eid"][9, 1] = 5
    save_file(state, shard)
    assert main(["verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *lines = captured.err.splitlines()
    assert "4 tensors have unusable values" in first
    assert lines == [
        "  layers.0.attn.wkv.weight: 1 of 1440 values are NaN or infinite",
        "  layers.0.ffn.experts.1.w2.weight: 20 of 800 values are NaN or infinite",
        "  layers.0.ffn.gate.tid2eid: 1 entries are not experts 0 to 4",
        "  norm.weight: 1 of 40 values are NaN or infinite",
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["inspect", "nowhere"], "no such file"),
        (["inspect", "{config}", "--length", "0"], "--length"),
        (["verify", "{config}"], "not a model directory"),
        (["verify", "nowhere"], "no such file"),
        (["init", "--config", "{config}", "--seed", "1", "--out", "x", "--shard-mb", "0"], "--shard-mb"),
        (["init", "--config", "nowhere", "--seed", "1", "--out", "x"], "no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_1(
    config_file: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(config=config_file) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert reason in captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_line_is_rewritten_in_place_and_ended() -> None:
    terminal = Terminal()
    with ProgressLine("reading", terminal) as progress:
        for done in range(0, 1_000_001, 10):
            progress(done, 1_000_000)
    text = terminal.getvalue()
    assert text.count("\r") == 101
    assert text.endswith("\rreading 100 % of 1.0 MB\n")


def test_a_progress_line_is_silent_in_a_pipe() -> None:
    pipe = io.StringIO()
    with ProgressLine("reading", pipe) as progress:
        progress(1, 2)
    assert pipe.getvalue() == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (159_609_485_896, "159.6 GB"), (2e12, "2.0 TB")],
)
def test_bytes_read_as_on_a_model_card(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text

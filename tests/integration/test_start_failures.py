"""What keeps a system from starting is told in one clear line: no traceback, a status of 1 and no process left."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.harness.system import IDS_CONFIG, run_command

pytestmark = pytest.mark.minutes

Change = Callable[[Path], None]


def rewrite_config(**changed: Any) -> Change:
    def change(model: Path) -> None:
        config = {key: value for key, value in (IDS_CONFIG | changed).items() if value is not None}
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return change


def write_config(text: str) -> Change:
    return lambda model: (model / "config.json").write_text(text, encoding="utf-8") and None


def cut_shard(model: Path) -> None:
    with a_shard(model).open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def remove_shard(model: Path) -> None:
    a_shard(model).unlink()


def change_tensors(model: Path) -> None:
    """One missing, one of another shape, one too many."""
    tensors = load_file(a_shard(model))
    del tensors["layers.1.attn.wkv.weight"]
    tensors["norm.weight"] = tensors["norm.weight"][:-1].copy()
    tensors["layers.0.attn.whale"] = tensors["norm.weight"].copy()
    save_file(tensors, a_shard(model))
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = dict.fromkeys(tensors, a_shard(model).name)
    index.write_text(json.dumps(content), encoding="utf-8")


def a_shard(model: Path) -> Path:
    return next(iter(sorted(model.glob("*.safetensors"))))


@pytest.fixture
def model(ids_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(ids_model, tmp_path / "whale"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def up(model: Path, *options: str) -> tuple[str, ...]:
    return ("up", "--model", str(model), "--http", "0", "--grpc", "0", *options)


def worker(model: Path, *options: str) -> tuple[str, ...]:
    return ("worker", "--model", str(model), *options)


def router(model: Path, *options: str) -> tuple[str, ...]:
    return (*("router", "--model", str(model), "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"), *options)


def assert_told(command: tuple[str, ...], *texts: str) -> None:
    """The command ends with status 1, and its last word, below what was logged, has all the texts."""
    done = run_command(*command)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    told = f"\n{done.stdout}".rpartition(f"\nrorqual {command[0]}: ")[2]
    for text in texts:
        assert text in told, done.stdout
    # A list of tensors, or what a child said, stands below; every line above is a log line of ours.
    assert told.count("\n") <= 10
    for line in done.stdout.removesuffix(told).splitlines()[:-1]:
        child = r"((prefill|decode|both)-0 +\| )?"
        assert re.match(rf"rorqual up: starting|{child}(rorqual|  |20\d\d-)", line), done.stdout


# What needs no rank to be found is found before one is started.
BAD_CONFIGS: dict[str, tuple[Change, str]] = {
    "no JSON": (write_config('{"vocab_size": '), "config.json"),
    "not an object": (write_config("[1]"), "config.json"),
    "of another architecture": (write_config('{"model_type": "llama", "vocab_size": 5}'), "llama"),
    "without a width": (rewrite_config(hidden_size=None), "'hidden_size'"),
    "with a negative width": (rewrite_config(hidden_size=-64), "'hidden_size'"),
    "with a text for a number": (rewrite_config(num_hidden_layers="four"), "'num_hidden_layers'"),
    "with an unknown ratio": (rewrite_config(compress_ratios=[0, 4, 5, 4, 0]), "'compress_ratios'"),
    "with too few ratios": (rewrite_config(compress_ratios=[0]), "'compress_ratios'"),
    "with heads that do not divide": (rewrite_config(num_attention_heads=5), "'num_attention_heads'"),
    "with too many experts a token": (rewrite_config(num_experts_per_tok=9), "'num_experts_per_tok'"),
    "with an unknown rope": (rewrite_config(rope_scaling={"type": "whale"}), "'rope_scaling'"),
    "with an unknown quantisation": (
        rewrite_config(quantization_config={"quant_method": "gptq"}),
        "'quantization_config.quant_method'",
    ),
}


@pytest.mark.parametrize(("change", "text"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_told_before_anything_is_started(model: Path, change: Change, text: str) -> None:
    change(model)
    done = run_command(*up(model))
    assert done.returncode == 1, done.stdout
    (line,) = done.stdout.splitlines()
    assert line.startswith("rorqual up: ")
    assert "config.json" in line
    assert text in line


BAD_FILES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a bad config": (write_config("{"), ("config.json",)),
    "a shard that was cut": (cut_shard, (".safetensors",)),
    "no shard": (remove_shard, (".safetensors",)),
    "wrong tensors": (
        change_tensors,
        ("layers.1.attn.wkv.weight", "norm.weight", "layers.0.attn.whale"),
    ),
}


@pytest.mark.parametrize(("change", "texts"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_model_that_cannot_be_loaded_is_told_by_the_worker(
    model: Path, change: Change, texts: tuple[str, ...]
) -> None:
    change(model)
    assert_told(worker(model), *texts)


def test_up_passes_on_what_its_worker_said(model: Path) -> None:
    change_tensors(model)
    assert_told(up(model, "--both", "1"), "both-0 (process ", "died", "layers.1.attn.wkv.weight")
    assert_told(up(model), "-0 (process ", "died", "layers.1.attn.wkv.weight", "layers.0.attn.whale")


def test_a_model_that_is_not_there_is_told_by_everybody(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    split = (("prefill", "--model", str(absent)), ("decode", "--model", str(absent)))
    for command in (up(absent), worker(absent), *split, router(absent, "--worker", "127.0.0.1:1")):
        assert_told(command, "--model", str(absent), "no such")


def test_a_port_in_use_is_told(ids_model: Path, taken_port: int) -> None:
    address = f"127.0.0.1:{taken_port}"
    assert_told(up(ids_model, "--http", str(taken_port)), f"--http: cannot listen on {address}")
    assert_told(up(ids_model, "--grpc", str(taken_port)), f"--grpc: cannot listen on {address}")
    assert_told(worker(ids_model, "--listen", address), f"--listen: cannot listen on {address}")


def test_a_router_that_reaches_no_worker_says_which(ids_model: Path, taken_port: int) -> None:
    """One that refuses, and one that takes the connection and never says a word."""
    quiet = f"127.0.0.1:{taken_port}"
    options = ("--worker", "127.0.0.1:1", "--worker", quiet, "--start-seconds", "1")
    assert_told(router(ids_model, *options), "no worker could be reached within 1 s", "127.0.0.1:1", quiet)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--exact", "--threads", "2"), ("--exact", "--threads")),
        (("--pages", "0"), ("--pages",)),
        (("--slots", "-1"), ("--slots",)),
        (("--prefill-tokens", "100"), ("--prefill-tokens", "256")),
        (("--kv-bytes", "5"), ("--kv-bytes", "page")),
        (("--kv-bytes", "many"), ("--kv-bytes", "many")),
        (("--kernel", "linear=whale"), ("linear", "whale")),
        (("--kernel", "linear"), ("--kernel",)),
    ],
    ids=" ".join,
)
def test_an_option_that_makes_no_sense_is_named(
    ids_model: Path, options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    assert_told(worker(ids_model, *options), *texts)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--exact", "--threads", "2"), ("--exact", "--threads 2")),
        (("--prefill", "1"), ("--prefill 1", "--decode N")),
        (("--decode", "1"), ("--decode 1", "--prefill N")),
        (("--both", "0"), ("no worker",)),
    ],
    ids=" ".join,
)
def test_up_names_an_option_that_makes_no_sense(
    ids_model: Path, options: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    assert_told(up(ids_model, *options), *texts)

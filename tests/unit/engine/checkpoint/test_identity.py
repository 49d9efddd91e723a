"""Names of weights: equal for equal weights however they lie in files, and others for others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.identity import PIECE_BYTES, STRIDE_BYTES, WHOLE_BYTES_MAX, weights_id
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.safetensors_file import read_header
from rorqual.errors import CheckpointError

State = dict[str, torch.Tensor]
LARGE = 3 * STRIDE_BYTES


def an_id(folder: Path, *files: State) -> str:
    folder.mkdir()
    stored = []
    for number, state in enumerate(files):
        file = folder / f"part-{number}.safetensors"
        save_file(state, file)
        stored += read_header(file)
    return weights_id(stored)


def a_state() -> State:
    torch.manual_seed(3)
    large = torch.randint(0, 256, (LARGE // 1024, 1024), dtype=torch.uint8)
    return {"large": large, "norm": torch.randn(WHOLE_BYTES_MAX // 4), "scale": torch.randn(3, 5)}


def change(name: str, *at: int) -> Callable[[State], None]:
    def apply(state: State) -> None:
        state[name].view(-1)[list(at)] += 1

    return apply


def transpose(state: State) -> None:
    state["scale"] = state["scale"].reshape(5, 3)


def retype(state: State) -> None:
    state["scale"] = state["scale"].view(torch.int32)


def rename(state: State) -> None:
    state["scales"] = state.pop("scale")


CHANGES = {
    "one value of a small tensor": change("norm", 500),
    "the first bytes of a large one": change("large", 7),
    "a piece within it": change("large", STRIDE_BYTES + PIECE_BYTES - 1),
    "its last byte": change("large", LARGE - 1),
    "a shape": transpose,
    "a type": retype,
    "a name": rename,
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_have_another_name(tmp_path: Path, name: str) -> None:
    changed = a_state()
    CHANGES[name](changed)
    assert an_id(tmp_path / "a", a_state()) != an_id(tmp_path / "b", changed)


def test_how_they_are_spread_over_files_does_not_count(tmp_path: Path) -> None:
    state = a_state()
    parts = [{name: values} for name, values in state.items()]
    assert (
        an_id(tmp_path / "a", state) == an_id(tmp_path / "b", *parts) == an_id(tmp_path / "c", *parts[::-1])
    )


def test_checkpoints_of_one_shape_and_other_values_differ(
    make_checkpoint: Callable[..., Path], tiny_raw: dict[str, Any]
) -> None:
    made = [make_checkpoint(tiny_raw, name=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    one, same, other = (weights_id(open_checkpoint(folder).stored) for folder in made)
    assert one == same != other
    assert len(one) == 16


def test_a_file_that_was_cut_since_its_header_was_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(a_state(), file)
    stored = read_header(file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        weights_id(stored)


def test_swapped_tensors_are_other_weights(tmp_path: Path) -> None:
    state = {"a": torch.zeros(8), "b": torch.ones(8)}
    swapped = {"a": state["b"], "b": state["a"]}
    assert an_id(tmp_path / "a", state) != an_id(tmp_path / "b", swapped)
    assert load_file(tmp_path / "a" / "part-0.safetensors").keys() == swapped.keys()

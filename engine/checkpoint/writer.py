"""Writing a checkpoint directory in the official layout: shards, index, config.json, tokenizer.

Owns the bytes of the shards and that the directory appears whole or not at all. `init` calls it, and
training. Holds one weight at a time, however large the shards are.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch

from engine import formats
from engine.checkpoint.config_file import public_config
from engine.checkpoint.manifest import DTYPE_BYTES, Storage, WeightSpec, expected_weights
from engine.checkpoint.reader import INDEX_FILE, Progress
from engine.checkpoint.safetensors_file import encode_header
from rorqual.errors import CheckpointError
from rorqual.model_config import ModelConfig

SHARD_BYTES_MAX = 4_000_000_000

_TORCH_DTYPES = {
    Storage.BF16: torch.bfloat16,
    Storage.F32: torch.float32,
    Storage.FLOAT: torch.float32,
    Storage.I64: torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    out: Path
    shard_bytes_max: int = SHARD_BYTES_MAX  # of tensors; one larger weight gets a shard of its own
    tokenizer: Path | None = None  # copied as tokenizer.json


def write_checkpoint(
    config: ModelConfig,
    produce: Callable[[WeightSpec], torch.Tensor],
    options: WriteOptions,
    progress: Progress | None = None,
) -> int:
    """Ask `produce` for each weight in turn, store it as the config says, return the bytes of all tensors.

    `produce` returns float32 (int64 for a token-to-expert table) of the weight's shape; quantising is done
    here. Everything is written beside `options.out` and renamed at the end, so a failure leaves nothing
    under that name. Raises CheckpointError if something is there already, if the disk is too small or a
    file cannot be written.
    """
    weights = list(expected_weights(config))
    shards = plan_shards(weights, options.shard_bytes_max)
    num_bytes = sum(tensor.num_bytes for weight in weights for tensor in weight.tensors())
    out = options.out
    _refuse_occupied(out)
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    config_text = json.dumps(public_config(config), indent=2) + "\n"
    try:
        if options.tokenizer is not None:
            check_tokenizer(options.tokenizer, config)
        partial.mkdir(parents=True)
        _refuse_small_disk(partial, num_bytes)
        _write_shards(partial, shards, produce, num_bytes, progress)
        (partial / "config.json").write_text(config_text, encoding="utf-8")
        if options.tokenizer is not None:
            shutil.copyfile(options.tokenizer, partial / "tokenizer.json")
        # An empty directory may be there, which a rename replaces.
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def plan_shards(weights: Sequence[WeightSpec], shard_bytes_max: int) -> list[list[WeightSpec]]:
    """Weights in order, cut where a shard is full. A weight and its scale are never parted.

    Within a shard wider dtypes come first, so that every tensor begins at a multiple of its element size.
    """
    shards: list[list[WeightSpec]] = []
    room = 0
    for weight in weights:
        num_bytes = sum(tensor.num_bytes for tensor in weight.tensors())
        if not shards or num_bytes > room:
            shards.append([])
            room = shard_bytes_max
        shards[-1].append(weight)
        room -= num_bytes
    return [sorted(shard, key=_element_bytes, reverse=True) for shard in shards]


def check_tokenizer(path: Path, config: ModelConfig) -> None:
    """Raise CheckpointError unless the file is a tokenizer.json whose token ids all have an embedding."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, added = raw["model"]["vocab"], raw.get("added_tokens", [])
        ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
        largest = max(cast("list[int]", ids) + [token["id"] for token in added], default=-1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path}: not a tokenizer.json") from None
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: has token id {largest}, but the model's vocab_size is {config.vocab_size}"
        )


def _element_bytes(weight: WeightSpec) -> int:
    return DTYPE_BYTES[weight.tensors()[0].dtype]


def _refuse_occupied(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise CheckpointError(f"{out}: is not empty; choose another directory or remove it")
    elif out.exists():
        raise CheckpointError(f"{out}: exists and is not a directory")


def _refuse_small_disk(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{directory.parent}: {free} bytes free, the checkpoint needs {num_bytes}")


def _write_shards(
    directory: Path,
    shards: Sequence[Sequence[WeightSpec]],
    produce: Callable[[WeightSpec], torch.Tensor],
    num_bytes: int,
    progress: Progress | None,
) -> None:
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [tensor for weight in shard for tensor in weight.tensors()]
        with (directory / file).open("wb") as stream:
            stream.write(encode_header(tensors))
            for weight in shard:
                done += _write_weight(stream, weight, produce(weight))
                if progress:
                    progress(done, num_bytes)
        weight_map |= dict.fromkeys((tensor.name for tensor in tensors), file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_weight(stream: BinaryIO, weight: WeightSpec, values: torch.Tensor) -> int:
    assert tuple(values.shape) == weight.shape, (
        f"{weight.name} is {tuple(values.shape)}, must be {weight.shape}"
    )
    done = 0
    for tensor, stored in zip(weight.tensors(), _encode(weight.storage, values), strict=True):
        assert tuple(stored.shape) == tensor.shape, tensor.name
        data = stored.contiguous().view(torch.uint8).numpy()
        stream.write(cast("bytearray", data))
        done += data.nbytes
    return done


def _encode(storage: Storage, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if storage is Storage.FP8:
        return formats.quantise_fp8_blocks(values)
    if storage is Storage.FP4:
        return formats.quantise_fp4(values)
    return (values.to(_TORCH_DTYPES[storage]),)

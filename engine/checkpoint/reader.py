"""Opening a checkpoint directory and streaming its weights, dequantised, under the official names.

Owns finding the files, the checks, and the bytes on their way from disk to float32. The engine's model
loader and the `checkpoint` command call it. Never holds more than the tensor, expert or piece it is handing
out (plus that tensor's scale): weights of any size load in the memory that stays.

Plain reads rather than a memory map: mapped pages of a float32 checkpoint would count beside the copies
that stay, and a file that shrinks under a map ends the process instead of raising.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from engine import formats
from engine.checkpoint.comparison import Comparison, StoredStack, StoredWeight, compare, summarise
from engine.checkpoint.manifest import Part, Storage, expected_weights
from engine.checkpoint.names import Naming, expert_stack, official_name
from engine.checkpoint.safetensors_file import StoredTensor, read_header
from rorqual.errors import CheckpointError
from rorqual.model_config import Dialect, ModelConfig, load_model_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of the files, in growing order, the last time with both equal."""

PIECE_BYTES_MAX = 32 << 20
"""Of float32, when loading into memory that is already there."""

_WHOLE = 1 << 62
_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [row, row + len(values)) of a weight."""

    name: str
    row: int
    values: torch.Tensor


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the config and all headers of a model directory; no tensor data.

    Raises ConfigError for the config, and CheckpointError for files that are missing, unreadable or
    truncated, naming each. Whether the tensors are the right ones is `check`'s question.
    """
    config = load_model_config(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a model directory")
    stored = _read_headers(path)
    names = [official_name(tensor.name) for tensor in stored]
    notices: list[str] = []
    config = _settle_mtp(config, names, notices)
    config = _settle_expert_dtype(path, config, stored, notices)
    official = all(tensor.name == name for tensor, name in zip(stored, names, strict=True))
    stacked = any(expert_stack(name) for name in names)
    return Checkpoint(
        path=path,
        config=config,
        stored=tuple(stored),
        naming=Naming.OFFICIAL if official and not stacked else Naming.TRANSFORMERS,
        notices=tuple(notices),
    )


class Checkpoint:
    """A directory whose headers have been read.

    `config` is what the files really hold: without MTP blocks if they have none, which `notices` then says.
    """

    def __init__(
        self,
        *,
        path: Path,
        config: ModelConfig,
        stored: Sequence[StoredTensor],
        naming: Naming,
        notices: tuple[str, ...],
    ) -> None:
        self.path = path
        self.config = config
        self.stored = stored
        self.naming = naming
        self.notices = notices
        self._comparison: Comparison | None = None

    @property
    def has_mtp(self) -> bool:
        return self.config.num_mtp_blocks > 0

    @property
    def num_bytes_total(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.num_bytes for tensor in self.stored)

    @property
    def num_files(self) -> int:
        return len({tensor.file for tensor in self.stored})

    def bytes_by_part(self) -> dict[Part, int]:
        """Bytes of the files by what they belong to; complete if `check` passes."""
        sums = dict.fromkeys(Part, 0)
        for item in self._compare().items:
            if isinstance(item, StoredStack):
                sums[item.experts[0][0].part] += item.values.num_bytes
            else:
                sums[item.spec.part] += item.num_bytes
        return sums

    def problems(self) -> tuple[str, ...]:
        """Every missing, unexpected, mis-shaped, mis-typed or doubled tensor, one line each, sorted."""
        return self._compare().problems

    def check(self) -> None:
        """Raise one CheckpointError that lists all `problems`, if there are any."""
        problems = self.problems()
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise CheckpointError(
                f"{self.path}: tensors do not fit the model ({summarise(problems)}):{lines}"
            )

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in the order of the files: its official name and values, which the caller may keep.

        float32, except the int64 `tid2eid`; scales are applied, never handed out. Experts of a stack come
        one by one, as views of that expert's rows. Checks first; raises CheckpointError if a file cannot be
        read.
        """
        for piece in self._pieces(_WHOLE, progress):
            yield piece.name, piece.values

    def load_into(
        self,
        target: Callable[[str], torch.Tensor],
        progress: Progress | None = None,
        *,
        piece_bytes_max: int = PIECE_BYTES_MAX,
    ) -> None:
        """Copy every weight into memory that is already there: `target(official name)` must have its shape.

        Large weights come in pieces of rows (of at least 128), so that even one table that is most of the
        model passes through a few megabytes.
        """
        for piece in self._pieces(piece_bytes_max, progress):
            target(piece.name)[piece.row : piece.row + len(piece.values)].copy_(piece.values)

    def _pieces(self, bytes_max: int, progress: Progress | None) -> Iterator[Piece]:
        self.check()
        done, total = 0, self.num_bytes_total
        for item in sorted(self._compare().items, key=_place):
            if isinstance(item, StoredStack):
                yield from _stack_pieces(item)
                done += item.values.num_bytes
            else:
                yield from _weight_pieces(item, bytes_max)
                done += item.num_bytes
            if progress:
                progress(done, total)
        # Tensors that may be there and are not used were not read.
        if progress and done < total:
            progress(total, total)

    def _compare(self) -> Comparison:
        if self._comparison is None:
            self._comparison = compare(self.config, expected_weights(self.config), self.stored)
        return self._comparison


def _place(item: StoredWeight | StoredStack) -> tuple[str, int]:
    return item.values.file.name, item.values.offset


def _stack_pieces(item: StoredStack) -> Iterator[Piece]:
    """Expert by expert, so that a layer's experts never stand in memory together."""
    for expert, weights in enumerate(item.experts):
        rows = _read_rows(item.values, expert, expert + 1)[0].to(torch.float32)
        row = 0
        for weight in weights:
            yield Piece(name=weight.name, row=0, values=rows[row : row + weight.shape[0]])
            row += weight.shape[0]


def _weight_pieces(item: StoredWeight, bytes_max: int) -> Iterator[Piece]:
    spec = item.spec
    num_rows_total, *columns = spec.shape
    row_bytes = 4 * math.prod(columns)
    # Whole blocks of rows, so that a piece of an FP8 weight begins where a scale begins.
    block = formats.FP8_WEIGHT_BLOCK
    num_rows = max(bytes_max // row_bytes // block, 1) * block
    for row in range(0, num_rows_total, num_rows):
        stop = min(row + num_rows, num_rows_total)
        yield Piece(name=spec.name, row=row, values=_decode(item, row, stop))


def _decode(item: StoredWeight, start: int, stop: int) -> torch.Tensor:
    storage = item.spec.storage
    values = _read_rows(item.values, start, stop)
    if storage is Storage.I64:
        return values
    if storage is Storage.FP8:
        assert item.scale is not None
        block = formats.FP8_WEIGHT_BLOCK
        scale = _read_rows(item.scale, start // block, -(-stop // block))
        return formats.dequantise_fp8_blocks(values, scale)
    if storage is Storage.FP4:
        assert item.scale is not None
        scale = _read_rows(item.scale, start, stop)
        return formats.dequantise_fp4(values, scale, num_columns=item.spec.shape[1])
    return values.to(torch.float32)


def _read_rows(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Rows of the first axis as stored; the 8-bit formats as uint8."""
    row_bytes = tensor.num_bytes // tensor.shape[0]
    buffer = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
    view = memoryview(cast("bytearray", buffer.numpy()))
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + start * row_bytes)
            while view:
                num_read = stream.readinto(view)
                if not num_read:
                    raise CheckpointError(f"{tensor.file}: ended inside tensor {tensor.name!r}")
                view = view[num_read:]
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from None
    return buffer.view(_TORCH_DTYPES.get(tensor.dtype, torch.uint8)).view(stop - start, *tensor.shape[1:])


def _read_headers(path: Path) -> list[StoredTensor]:
    """All tensors of all shards; one error that names every shard that is broken."""
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = _read_index(index)
        files = sorted(set(weight_map.values()))
    elif (path / SINGLE_FILE).is_file():
        weight_map, files = {}, [SINGLE_FILE]
    else:
        raise CheckpointError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    stored: list[StoredTensor] = []
    problems: list[str] = []
    for file in files:
        try:
            stored += read_header(path / file)
        except CheckpointError as error:
            problems.append(str(error))
    if not problems:
        present = {(tensor.name, tensor.file.name) for tensor in stored}
        absent = sorted(
            f"{name} in {file}" for name, file in weight_map.items() if (name, file) not in present
        )
        if absent:
            problems.append(f"{index}: names tensors that are not there: {', '.join(absent)}")
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return stored


def _read_index(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{index}: not JSON, or truncated") from None
    weight_map = cast("dict[str, Any]", raw).get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: key 'weight_map' must map tensor names to files")
    checked = cast("dict[str, Any]", weight_map)
    for name, file in checked.items():
        # A plain name: an index must not lead out of its directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name!r} is mapped to {file!r}, which is not a file name")
    return checked


def _settle_mtp(config: ModelConfig, names: Sequence[str], notices: list[str]) -> ModelConfig:
    """Believe the files about MTP blocks, where the config cannot be believed."""
    blocks = {name.split(".")[1] for name in names if name.startswith("mtp.")}
    if not blocks:
        notices.append("no MTP weights: served without drafts")
        return config.without_mtp()
    # A config saved by transformers beside the release's own files: it has lost the count.
    if config.dialect is Dialect.TRANSFORMERS:
        return replace(config, num_mtp_blocks=len(blocks))
    return config


def _settle_expert_dtype(
    path: Path, config: ModelConfig, stored: Sequence[StoredTensor], notices: list[str]
) -> ModelConfig:
    """A config of the FP8 base releases may not say how experts are stored: then the files do."""
    if not config.quantised or config.expert_dtype != "fp4":
        return config
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "expert_dtype" in raw or "expert_dtype" in (raw.get("quantization_config") or {}):
        return config
    dtypes = {
        tensor.dtype
        for tensor in stored
        if ".ffn.experts." in tensor.name and tensor.name.endswith(".weight")
    }
    if dtypes != {"F8_E4M3"}:
        return config
    notices.append("config.json does not name expert_dtype; the experts' tensors are FP8")
    return replace(config, expert_dtype="fp8")

"""The safetensors container: the header of a file, read and made without touching tensor data.

Owns the byte layout: 8 bytes of header length, a JSON header, then the tensors' bytes back to back. The
reader and the writer call it. Our own, because both need what the library does not offer: headers without
data (a check of a 160 GB checkpoint in seconds), reads of a few rows into memory of our own, and files
written one tensor at a time. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.checkpoint.manifest import DTYPE_BYTES, TensorSpec
from rorqual.errors import CheckpointError

_HEADER_BYTES_MAX = 100_000_000  # what the format allows
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as a file has it. `offset` counts from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file in the order of their bytes. Raises CheckpointError naming the file."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if file_bytes < _LENGTH_BYTES + header_bytes:
                raise CheckpointError(f"{file}: not a safetensors file, or truncated inside its header")
            if header_bytes > _HEADER_BYTES_MAX:
                raise CheckpointError(f"{file}: header of {header_bytes} bytes is too long")
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    entries = cast("dict[str, Any]", header)
    entries.pop("__metadata__", None)
    start = _LENGTH_BYTES + header_bytes
    tensors = [_stored(file, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: tensor.offset)
    _check_layout(file, tensors, start=start, file_bytes=file_bytes)
    return tensors


def encode_header(tensors: Sequence[TensorSpec]) -> bytes:
    """What goes before the bytes of `tensors`, which must follow in this order without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Padded so that the data begin at a multiple of 8 and can be mapped as any dtype.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def _stored(file: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: header entry of tensor {name!r} is malformed") from None
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{file}: header entry of tensor {name!r} is malformed")
    num_bytes = end - begin
    if dtype in DTYPE_BYTES and num_bytes != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{file}: tensor {name!r} has {num_bytes} bytes for {dtype} {list(shape)}")
    return StoredTensor(
        name=name, file=file, dtype=dtype, shape=tuple(shape), offset=start + begin, num_bytes=num_bytes
    )


def _check_layout(file: Path, tensors: Sequence[StoredTensor], *, start: int, file_bytes: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{file}: bytes of tensor {tensor.name!r} overlap others or leave a gap")
        end += tensor.num_bytes
    if end > file_bytes:
        raise CheckpointError(f"{file}: truncated: it has {file_bytes} bytes, its header promises {end}")
    if end < file_bytes:
        raise CheckpointError(f"{file}: {file_bytes - end} bytes after its last tensor")

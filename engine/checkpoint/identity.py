"""Which weights a checkpoint holds: a name for page keys, leases and stores, under which only equal weights may meet.

The rank asks once, at its start. Names, types, shapes and sizes of all tensors count whole; of their bytes samples do:
small tensors whole, of larger ones a piece in every `STRIDE_BYTES`. Training, merging or quantising anew changes every
tensor it touches nearly everywhere, so samples tell; a single row edited by hand may lie between them. Reading all of
160 GB a second time would double the time of a start. It guards against a mix-up, not against an attacker.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from engine.checkpoint.safetensors_file import StoredTensor
from rorqual.errors import CheckpointError

WHOLE_BYTES_MAX = 4096
PIECE_BYTES = 256
STRIDE_BYTES = 4 << 20
THREADS = 16
"""Pieces are far apart: on network storage each is a round trip."""


def weights_id(stored: Sequence[StoredTensor]) -> str:
    """16 hex digits; the order of files and their names do not count. Raises CheckpointError naming the file."""
    files, tensors = zip(*_by_file(stored), strict=True)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="weights-id") as threads:
        digests = [item for found in threads.map(_digests, files, tensors) for item in found]
    digest = xxhash.xxh3_128()
    for name, value in sorted(digests):
        digest.update(f"{len(name)} {name} ".encode())
        digest.update(value)
    return digest.hexdigest()[:16]


def _by_file(stored: Sequence[StoredTensor]) -> list[tuple[Path, list[StoredTensor]]]:
    found: dict[Path, list[StoredTensor]] = {}
    for tensor in stored:
        found.setdefault(tensor.file, []).append(tensor)
    return list(found.items())


def _digests(file: Path, tensors: Sequence[StoredTensor]) -> list[tuple[str, bytes]]:
    try:
        with file.open("rb", buffering=0) as stream:
            found: list[tuple[str, bytes]] = []
            for tensor in tensors:
                digest = xxhash.xxh3_128(f"{tensor.dtype} {tensor.shape} {tensor.num_bytes} ".encode())
                for first, count in _pieces(tensor.num_bytes):
                    stream.seek(tensor.offset + first)
                    piece = stream.read(count)
                    if len(piece) != count:
                        raise CheckpointError(f"{file}: truncated while it was read")
                    digest.update(piece)
                found.append((tensor.name, digest.digest()))
            return found
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def _pieces(num_bytes: int) -> list[tuple[int, int]]:
    """(first byte, bytes): the last piece ends where the tensor does."""
    if num_bytes <= WHOLE_BYTES_MAX:
        return [(0, num_bytes)]
    last = num_bytes - PIECE_BYTES
    return [(first, PIECE_BYTES) for first in (*range(0, last, STRIDE_BYTES), last)]

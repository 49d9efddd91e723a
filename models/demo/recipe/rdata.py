"""Reads the character vectors out of a Debian package of an R data package.

`models.demo.recipe.prose` calls `character_vectors` on a downloaded package. This reads just what such a package
holds: an ar archive, a tar of xz, R's lazy-load database (an index and zlib blocks), and R's XDR serialization of
lists, strings and numbers. Anything else is a ValueError that says what was found; nothing is ever executed.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import cast

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60
UNPACKED_BYTES_MAX = 64 << 20

# SEXP types of R's serialization format, version 2 and 3.
_SYMBOL, _PAIRS, _CHARS, _LOGICALS, _INTEGERS, _REALS, _STRINGS, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_REFERENCE, _NULL = 255, 254
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10
_LATIN1 = 1 << 2 << 12  # of a CHARSXP's flags; others are ASCII or UTF-8


def character_vectors(package: bytes, names: tuple[str, ...]) -> dict[str, list[str]]:
    """The named string vectors of the package's `data/Rdata` database. Raises ValueError or KeyError."""
    index, blocks = _database(_ar_member(package, "data.tar.xz"))
    variables = cast("dict[str, list[int]]", cast("dict[str, object]", _unserialize(index))["variables"])
    found: dict[str, list[str]] = {}
    for name in names:
        offset, length = variables[name]
        value = _unserialize(_inflate_block(blocks[offset : offset + length]))
        if not isinstance(value, list):
            raise ValueError(f"{name} is no character vector")
        found[name] = [cast("str", line) for line in cast("list[object]", value)]
    return found


def _ar_member(archive: bytes, wanted: str) -> bytes:
    if not archive.startswith(AR_MAGIC):
        raise ValueError("not a Debian package: the ar magic is missing")
    position = len(AR_MAGIC)
    while position + AR_HEADER_BYTES <= len(archive):
        header = archive[position : position + AR_HEADER_BYTES]
        name = header[:16].decode("ascii").strip().rstrip("/")
        size = int(header[48:58])
        position += AR_HEADER_BYTES
        if name == wanted:
            return archive[position : position + size]
        position += size + size % 2
    raise ValueError(f"the Debian package has no member {wanted}")


def _database(tar_xz: bytes) -> tuple[bytes, bytes]:
    """The inflated index and the block file of the data database."""
    parts: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tar_xz), mode="r:xz") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(("/data/Rdata.rdx", "/data/Rdata.rdb")):
                content = tar.extractfile(member)
                assert content is not None, member.name
                parts[member.name[-3:]] = content.read(UNPACKED_BYTES_MAX)
    if set(parts) != {"rdx", "rdb"}:
        raise ValueError("the package has no data/Rdata.rdx and data/Rdata.rdb")
    return zlib.decompress(parts["rdx"], wbits=47), parts["rdb"]


def _inflate_block(block: bytes) -> bytes:
    """A block is its inflated length, big-endian, and a zlib stream."""
    (length,) = struct.unpack_from(">I", block)
    if length > UNPACKED_BYTES_MAX:
        raise ValueError(f"a block of {length} bytes is too large")
    data = zlib.decompress(block[4:])
    if len(data) != length:
        raise ValueError(f"a block inflates to {len(data)} bytes, not {length}")
    return data


def _unserialize(data: bytes) -> object:
    if not data.startswith(b"X\n"):
        raise ValueError("not R's XDR serialization")
    reader = _Reader(data=data, position=2)
    version, _writer, _reader_min = reader.integers(3)
    if version == 3:
        reader.take(reader.integer())  # the native encoding's name
    elif version != 2:
        raise ValueError(f"serialization version {version} is not read")
    return reader.item()


@dataclass(slots=True)
class _Reader:
    data: bytes
    position: int
    symbols: list[str] = field(default_factory=list[str])

    def take(self, num_bytes: int) -> bytes:
        piece = self.data[self.position : self.position + num_bytes]
        if len(piece) != num_bytes:
            raise ValueError("the serialized data ends early")
        self.position += num_bytes
        return piece

    def integer(self) -> int:
        return int(struct.unpack(">i", self.take(4))[0])

    def integers(self, count: int) -> list[int]:
        return list(struct.unpack(f">{count}i", self.take(4 * count)))

    def item(self) -> object:
        """A value: str, list, dict for a named list, or None. Attributes other than names are dropped."""
        flags = self.integer()
        kind = flags & 0xFF
        if kind == _NULL:
            return None
        if kind == _CHARS:
            return self._chars(flags)
        if kind == _SYMBOL:
            self.symbols.append(str(self.item()))
            return self.symbols[-1]
        if kind == _REFERENCE:  # of the kinds read here only symbols are referred to, counted from 1
            return self.symbols[(flags >> 8) - 1]
        if kind == _PAIRS:
            return self._pairs(flags)
        value = self._vector(kind)
        attributes = self.item() if flags & _HAS_ATTRIBUTES else None
        names = cast("dict[str, object]", attributes or {}).get("names")
        if names is None:
            return value
        return dict(zip(cast("list[str]", names), value, strict=True))

    def _vector(self, kind: int) -> list[object]:
        count = self.integer()
        if kind in (_LOGICALS, _INTEGERS):
            return list(self.integers(count))
        if kind == _REALS:
            return list(struct.unpack(f">{count}d", self.take(8 * count)))
        if kind in (_STRINGS, _LIST):
            return [self.item() for _ in range(count)]
        raise ValueError(f"R type {kind} is not read")

    def _chars(self, flags: int) -> str | None:
        length = self.integer()
        if length == -1:
            return None
        return self.take(length).decode("latin-1" if flags & _LATIN1 else "utf-8")

    def _pairs(self, flags: int) -> dict[str, object]:
        found: dict[str, object] = {}
        while True:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else None
            found[str(tag)] = self.item()
            flags = self.integer()
            if flags & 0xFF == _NULL:
                return found
            if flags & 0xFF != _PAIRS:
                raise ValueError(f"a pair list goes on with R type {flags & 0xFF}")

"""A stored value: a header that says what the payload is, and the payload. Pure, no torch.

Called by the store's reading and writing and by `rorqual kv verify`. A payload is given out only if every byte of the
value is the one that was written, and only to whom it is for. The digest (XXH3, 128 bits) is against corruption and
mistakes, not against an attacker: who can write to the servers can make values that pass.

Little-endian: magic (4 bytes), version, kind (1 each), zero (2), payload length (8), wire id (8), fingerprint (16: of
SHA-256), page key (16), digest of all these and the payload (16), then the payload.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

from xxhash import xxh3_128

from kvstore.keys import KEY_BYTES, PageKey
from kvstore.store.contract import Kind, Miss, Payload
from rorqual.errors import ConfigError

VALUE_VERSION = 1
_MAGIC = b"RQKV"
_FIELDS = struct.Struct("<4sBBHQ8s16s16s")
_DIGEST_BYTES = 16
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES

_KINDS = {Kind.PAGE: 1, Kind.TAIL: 2}
_KINDS_READ = {number: kind for kind, number in _KINDS.items()}


class Flaw(enum.Enum):
    """What is wrong with a value; each is a reason for a miss."""

    FOREIGN = Miss.FOREIGN
    VERSION = Miss.VERSION
    TRUNCATED = Miss.TRUNCATED
    CORRUPT = Miss.CORRUPT


@dataclass(frozen=True, slots=True)
class Form:
    """Whose bytes: a worker's wire id, and the fingerprint of its model's weights."""

    wire_id: str
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.wire_id) != 16 or not set(self.wire_id) <= set("0123456789abcdef"):
            raise ConfigError(f"a wire id is 16 hex digits, not {self.wire_id!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    kind: Kind
    wire_id: str
    fingerprint: bytes
    page: PageKey
    payload_bytes: int
    digest: bytes


def encode_value(form: Form, kind: Kind, page: PageKey, payload: Payload) -> bytes:
    """The value; it shares no memory with the payload, which is copied once."""
    assert len(page) == KEY_BYTES, f"a page key has {KEY_BYTES} bytes, this one {len(page)}"
    view = memoryview(payload).cast("B")
    fields = _FIELDS.pack(
        _MAGIC,
        VALUE_VERSION,
        _KINDS[kind],
        0,
        len(view),
        bytes.fromhex(form.wire_id),
        _short(form.fingerprint),
        page,
    )
    return b"".join((fields, _digest(fields, view), view))


def decode_value(form: Form, kind: Kind, page: PageKey, value: bytes) -> memoryview | Flaw:
    """The payload, within the value's own memory, if it is the one of this kind and page for this form."""
    checked = check_value(value)
    if isinstance(checked, Flaw):
        return checked
    wanted = (kind, form.wire_id, _short(form.fingerprint), page)
    if (checked.kind, checked.wire_id, checked.fingerprint, checked.page) != wanted:
        return Flaw.FOREIGN
    return memoryview(value)[HEADER_BYTES:]


def check_value(value: bytes) -> Header | Flaw:
    """Whether it is whole, whomever it is for."""
    if value[:4] != _MAGIC[: len(value)]:
        return Flaw.FOREIGN
    if len(value) < HEADER_BYTES:
        return Flaw.TRUNCATED
    _, version, kind, zero, payload_bytes, wire_id, fingerprint, page = _FIELDS.unpack_from(value)
    if version != VALUE_VERSION:
        return Flaw.VERSION
    view = memoryview(value)
    if len(view) - HEADER_BYTES < payload_bytes:
        return Flaw.TRUNCATED
    digest = value[_FIELDS.size : HEADER_BYTES]
    # What is longer than its header says has a wrong digest too: all that stands behind the header is hashed.
    if digest != _digest(view[: _FIELDS.size], view[HEADER_BYTES:]) or kind not in _KINDS_READ or zero:
        return Flaw.CORRUPT
    return Header(
        kind=_KINDS_READ[kind],
        wire_id=wire_id.hex(),
        fingerprint=fingerprint,
        page=PageKey(page),
        payload_bytes=payload_bytes,
        digest=digest,
    )


def _digest(fields: Payload, payload: Payload) -> bytes:
    digest = xxh3_128(fields)
    digest.update(payload)
    return digest.digest()


def _short(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()[:16]

"""Names of what the store keeps in Redis. Pure, no torch.

A value is `rorqual:1:<wire id>:<page|tail>:<tenant>:<page key in hex>`. Nothing in it is a hash tag, so the pages of
one prompt spread over the slots of a Cluster. An account (`kvstore.store.quota`) is `rorqual:1:account:<tenant>`. The
number is the version of names and values: another version sees none of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvstore.keys import PageKey
from kvstore.store.contract import Kind, StoreKey, TenantLabel

_PREFIX = "rorqual:1:"
_VALUE = re.compile(rb"rorqual:1:([0-9a-f]{16}):(page|tail):([0-9a-f]{16}):([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class ValueName:
    """A name read back."""

    wire_id: str
    key: StoreKey


def value_name(wire_id: str, key: StoreKey) -> bytes:
    return f"{_PREFIX}{wire_id}:{key.kind.value}:{key.tenant}:{key.page.hex()}".encode()


def account_name(tenant: TenantLabel) -> bytes:
    return f"{_PREFIX}account:{tenant}".encode()


def value_pattern(*, tenant: TenantLabel | None = None) -> bytes:
    """For SCAN's MATCH: the names of all values, or of one tenant's."""
    return f"{_PREFIX}*:*:{tenant or '*'}:*".encode()


def parse_name(name: bytes) -> ValueName | None:
    """None for what is not the name of a value of this version."""
    match = _VALUE.fullmatch(name)
    if match is None:
        return None
    wire_id, kind, tenant, page = (part.decode() for part in match.groups())
    key = StoreKey(Kind(kind), TenantLabel(tenant), PageKey(bytes.fromhex(page)))
    return ValueName(wire_id, key)

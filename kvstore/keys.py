"""Page keys: the name of 256 tokens together with everything before them. Pure, no torch.

Whoever shares cached state names it by these keys: the index of a worker, the router's picture of all workers, stores
outside of both. A key is 16 bytes of SHA-256, chained: key = sha256(key of the page before, token ids as little-endian
i32)[:16]. Equal keys therefore mean equal content in every process and on every machine, and one key stands for a whole
prefix. 128 bits: among 2**40 pages two differ and collide with probability 2**-49; and since the hash is one that
nobody can invert, no prompt can be made to meet another's pages.

The chain starts at a root, which is made of all that changes the bytes of a page besides tokens, and of a salt. Two
salts have no page in common, so tenants that must not learn from each other's timing get different ones.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NewType

import numpy as np

from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray

PageKey = NewType("PageKey", bytes)
"""KEY_BYTES bytes; a root is one too, though no page has it."""

KEY_BYTES = 16
_ROOT_LABEL = "rorqual page key 1"
_BYTES_PER_PAGE = 4 * PAGE_TOKENS


def root_key(*, fingerprint: str, numerics: str, wire_id: str, salt: str) -> PageKey:
    """The parent of every first page.

    `fingerprint` names the model's weights, `numerics` how they are computed with, `wire_id` the form of the bytes that
    are kept; `salt` separates those who must not share.
    """
    digest = sha256()
    for field in (_ROOT_LABEL, fingerprint, numerics, wire_id, salt):
        encoded = field.encode()
        digest.update(len(encoded).to_bytes(8, "little"))  # so that no two lists of fields read the same
        digest.update(encoded)
    return PageKey(digest.digest()[:KEY_BYTES])


def page_keys(parent: PageKey, token_ids: TokenArray) -> tuple[PageKey, ...]:
    """Keys of the full pages of `token_ids`, in order; tokens behind the last full page have none.

    `parent` is a root, or the key of the page before the first token. 100k tokens are 390 pages of 1,040 hashed bytes:
    below a millisecond where the CPU has SHA instructions.
    """
    assert len(parent) == KEY_BYTES, f"a page key has {KEY_BYTES} bytes, this one {len(parent)}"
    assert token_ids.ndim == 1, "tokens of one sequence are one row"
    content = np.ascontiguousarray(token_ids, dtype="<i4").view(np.uint8).data
    keys: list[PageKey] = []
    key = parent
    for start in range(0, len(token_ids) // PAGE_TOKENS * _BYTES_PER_PAGE, _BYTES_PER_PAGE):
        digest = sha256(key)
        digest.update(content[start : start + _BYTES_PER_PAGE])
        key = PageKey(digest.digest()[:KEY_BYTES])
        keys.append(key)
    return tuple(keys)

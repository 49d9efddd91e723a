"""Prompts written as text, one letter a page: "abc" is three pages, and shares two with "abd"."""

from __future__ import annotations

from functools import cache

import numpy as np

from kvstore.keys import PageKey, page_keys, root_key
from rorqual.model_config import PAGE_TOKENS

ROOT = root_key(fingerprint="fake", numerics="float32", wire_id="0" * 16, salt="")


@cache
def keys_of(prompt: str) -> tuple[PageKey, ...]:
    letters = [ord(letter) for letter in prompt]
    return page_keys(ROOT, np.repeat(np.array(letters, dtype=np.int32), PAGE_TOKENS))


def key_of(prompt: str) -> PageKey:
    """Of the last page."""
    return keys_of(prompt)[-1]

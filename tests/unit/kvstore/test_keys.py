"""Page keys: equal exactly when model, form, salt and the whole prefix are."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.keys import KEY_BYTES, PageKey, page_keys, root_key
from rorqual.model_config import PAGE_TOKENS
from rorqual.session import TokenArray

ROOT = root_key(fingerprint="f", numerics="served", wire_id="0" * 16, salt="")


def tokens(*, num_tokens: int, seed: int = 0) -> TokenArray:
    return np.random.default_rng(seed).integers(0, 129_280, num_tokens, dtype=np.int32)


def test_keys_are_chained_sha256_of_little_endian_tokens() -> None:
    token_ids = tokens(num_tokens=2 * PAGE_TOKENS)
    parent: bytes = ROOT
    for key, page in zip(page_keys(ROOT, token_ids), np.split(token_ids, 2), strict=True):
        content = b"".join(int(token).to_bytes(4, "little") for token in page)
        assert key == hashlib.sha256(parent + content).digest()[:KEY_BYTES]
        parent = key


def test_keys_of_a_known_prompt_never_change() -> None:
    """Stores outlive processes: another rule of keys needs another root label."""
    keys = page_keys(ROOT, np.arange(PAGE_TOKENS, dtype=np.int32))
    assert ROOT.hex() == "3e0e06599c63e036bb8c382fb3b48572"
    assert [key.hex() for key in keys] == ["d69a048ffc154d67a2b53bfb44b6c86d"]


@pytest.mark.parametrize("field", ["fingerprint", "numerics", "wire_id", "salt"])
def test_every_field_of_the_root_separates(field: str) -> None:
    fields = {"fingerprint": "f", "numerics": "served", "wire_id": "0" * 16, "salt": "s"}
    other = fields | {field: fields[field] + "x"}
    assert root_key(**fields) != root_key(**other)
    token_ids = tokens(num_tokens=PAGE_TOKENS)
    assert page_keys(root_key(**fields), token_ids) != page_keys(root_key(**other), token_ids)


def test_fields_do_not_run_into_each_other() -> None:
    one = root_key(fingerprint="ab", numerics="c", wire_id="", salt="")
    other = root_key(fingerprint="a", numerics="bc", wire_id="", salt="")
    assert one != other


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(0, 0), (255, 0), (256, 1), (511, 1), (512, 2)])
def test_only_full_pages_have_keys(num_tokens: int, num_keys: int) -> None:
    assert len(page_keys(ROOT, tokens(num_tokens=num_tokens))) == num_keys


@given(st.integers(0, 5), st.integers(0, 5))
def test_keys_of_a_continuation_are_keys_of_the_whole(num_first: int, num_rest: int) -> None:
    whole = tokens(num_tokens=(num_first + num_rest) * PAGE_TOKENS)
    keys = page_keys(ROOT, whole)
    first = page_keys(ROOT, whole[: num_first * PAGE_TOKENS])
    rest = page_keys(first[-1] if first else ROOT, whole[num_first * PAGE_TOKENS :])
    assert first + rest == keys


@given(st.integers(0, 4 * PAGE_TOKENS - 1))
def test_one_other_token_changes_its_page_and_all_behind(position: int) -> None:
    token_ids = tokens(num_tokens=4 * PAGE_TOKENS)
    changed = token_ids.copy()
    changed[position] ^= 1
    same = [
        one == other for one, other in zip(page_keys(ROOT, token_ids), page_keys(ROOT, changed), strict=True)
    ]
    assert same == [page < position // PAGE_TOKENS for page in range(4)]


def test_the_memory_layout_of_tokens_does_not_matter() -> None:
    token_ids = tokens(num_tokens=2 * PAGE_TOKENS)
    strided = np.repeat(token_ids, 2)[::2]
    assert page_keys(ROOT, strided) == page_keys(ROOT, token_ids)
    assert page_keys(ROOT, token_ids.astype(">i4")) == page_keys(ROOT, token_ids)


def test_a_parent_of_another_length_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="16 bytes"):
        page_keys(PageKey(b"short"), tokens(num_tokens=PAGE_TOKENS))

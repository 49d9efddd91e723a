"""Every `page_digest` kernel against plain Python, and what a digest has to tell apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.digest import BLOCK_WORDS, LENGTH_FACTOR, page_digest_torch
from engine.kernels.registry import choose, implementations

torch.set_num_threads(1)

Digest = Callable[[Tensor, Tensor], Tensor]

kernels = pytest.mark.parametrize("digest", [item.function for item in implementations("page_digest", "cpu")])
other_kernels = pytest.mark.parametrize(
    "digest", [item.function for item in implementations("page_digest", "cpu") if item.name != "torch"]
)
examples = settings(max_examples=40)
sizes = st.one_of(
    st.integers(1, 40),
    st.integers(-9, 9).map(lambda extra: 4 * BLOCK_WORDS + extra),
    st.integers(-9, 9).map(lambda extra: 12 * BLOCK_WORDS + extra),
)
seeds = st.integers(0, 2**31)


def some_bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def factor(number: int) -> int:
    """splitmix64, as published, from seed 0."""
    z = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) | 1


def plain(data: bytes) -> int:
    total = len(data) * LENGTH_FACTOR
    for number in range(-(-len(data) // 4)):
        word = int.from_bytes(data[4 * number : 4 * number + 4], "little")
        total += factor(number % BLOCK_WORDS) * factor(BLOCK_WORDS + number // BLOCK_WORDS) * word
    return total % 2**64


def of(digest: Digest, data: Tensor) -> int:
    return int(digest(data.unsqueeze(0), torch.tensor([0]))[0]) % 2**64


@kernels
@examples
@given(data=st.data())
def test_digests_are_those_of_the_definition_wherever_the_rows_lie(
    digest: Digest, data: st.DataObject
) -> None:
    num_units, size = data.draw(st.integers(1, 3), label="units"), data.draw(sizes, label="bytes of a unit")
    before, after = data.draw(st.integers(0, 5), label="before"), data.draw(st.integers(0, 5), label="after")
    memory = some_bytes(num_units, before + size + after, seed=data.draw(seeds))
    ids = data.draw(st.lists(st.integers(0, num_units - 1), max_size=3), label="ids")
    untouched = memory.clone()
    units = memory[:, before : before + size]
    found = digest(units, torch.tensor(ids, dtype=torch.int64))
    assert found.dtype is torch.int64
    assert [value % 2**64 for value in found.tolist()] == [plain(bytes(units[unit].tolist())) for unit in ids]
    assert torch.equal(memory, untouched)


@other_kernels
def test_every_other_kernel_equals_the_reference_on_the_pages_of_a_large_model(digest: Digest) -> None:
    units = some_bytes(3, 785_408, seed=1)
    ids = torch.tensor([2, 0])
    assert torch.equal(digest(units, ids), page_digest_torch(units, ids))


@kernels
@examples
@given(size=sizes, data=st.data())
def test_any_changed_byte_changes_the_digest(digest: Digest, size: int, data: st.DataObject) -> None:
    unit = some_bytes(size, seed=data.draw(seeds))
    changed = unit.clone()
    changed[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    assert of(digest, unit) != of(digest, changed)


@kernels
@examples
@given(data=st.data())
def test_words_that_trade_places_change_the_digest(digest: Digest, data: st.DataObject) -> None:
    num_words = 3 * BLOCK_WORDS
    words = some_bytes(num_words, 4, seed=data.draw(seeds))
    one, two = data.draw(st.lists(st.integers(0, num_words - 1), min_size=2, max_size=2, unique=True))
    traded = words.clone()
    traded[one], traded[two] = words[two], words[one]
    same = torch.equal(words[one], words[two])
    assert (of(digest, words.flatten()) == of(digest, traded.flatten())) is same


@kernels
def test_blocks_that_trade_places_change_the_digest(digest: Digest) -> None:
    blocks = some_bytes(3, 4 * BLOCK_WORDS, seed=3)
    assert of(digest, blocks.flatten()) != of(digest, blocks[[0, 2, 1]].flatten())


@kernels
def test_zeros_of_every_length_differ(digest: Digest) -> None:
    found = {of(digest, torch.zeros(size, dtype=torch.uint8)) for size in range(1, 100)}
    assert len(found) == 99


def test_no_two_words_of_a_block_can_trade_places_or_lose_their_signs_unseen() -> None:
    """Words differ by less than 2^32, so their difference is a multiple of 2^31 at most; a factor of less than 2^33
    keeps such a product from being a multiple of 2^64. The same for two floats that lose their sign bit."""
    factors = [factor(place) % 2**33 for place in range(BLOCK_WORDS)]
    assert len(set(factors)) == BLOCK_WORDS
    assert not set(factors) & {2**33 - value for value in factors}


@other_kernels
def test_a_unit_beyond_the_pool_is_refused(digest: Digest) -> None:
    for unit in (-1, 2):
        with pytest.raises(AssertionError, match="out of range"):
            digest(torch.zeros((2, 8), dtype=torch.uint8), torch.tensor([0, unit]))


def test_the_fast_kernel_is_chosen() -> None:
    assert choose("cpu", {})["page_digest"].name == "numba"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_digests() -> None:
    units, ids = some_bytes(3, 50_001, seed=4)[:, 1:], torch.tensor([2, 0, 1])
    on_gpu = page_digest_torch(units.cuda(), ids.cuda())
    assert torch.equal(on_gpu.cpu(), page_digest_torch(units, ids))

"""The digest tells contents apart, whatever the order, and is the same one by one and many at once."""

from __future__ import annotations

from fake_content import key_of
from hypothesis import given
from hypothesis import strategies as st

from kvstore.feed.digest import MASK, VECTOR_MIN, digest_of, mix_key, mix_many
from rorqual.feed import ABSENT, PAGE, TAIL

keys = st.binary(min_size=16, max_size=16)
contents = st.dictionaries(keys, st.sampled_from([ABSENT, PAGE, PAGE | TAIL]), max_size=3 * VECTOR_MIN)


@given(contents)
def test_the_digest_is_the_sum_of_what_each_entry_adds(content: dict[bytes, int]) -> None:
    digest = digest_of(b"".join(content), bytes(content.values()))
    assert digest == sum(mix_key(key, flags) for key, flags in content.items()) & MASK


@given(contents)
def test_many_at_once_are_mixed_as_one_by_one(content: dict[bytes, int]) -> None:
    mixed = mix_many(b"".join(content), bytes(content.values()))
    assert mixed.tolist() == [mix_key(key, flags) for key, flags in content.items()]


@given(keys, st.integers(0, 127), st.sampled_from([PAGE, PAGE | TAIL]))
def test_any_bit_of_a_key_changes_what_it_adds(key: bytes, bit: int, flags: int) -> None:
    other = (int.from_bytes(key, "little") ^ 1 << bit).to_bytes(16, "little")
    assert mix_key(key, flags) != mix_key(other, flags)


@given(keys)
def test_a_tail_changes_what_a_page_adds(key: bytes) -> None:
    assert len({mix_key(key, flags) for flags in (ABSENT, PAGE, PAGE | TAIL)}) == 3


def test_halves_of_keys_that_trade_places_are_told_apart() -> None:
    first, second = key_of(1), key_of(2)
    crossed = [first[:8] + second[8:], second[:8] + first[8:]]
    swapped = [key[8:] + key[:8] for key in (first, second)]
    flags = bytes((PAGE, PAGE))
    assert len({digest_of(b"".join(pair), flags) for pair in ([first, second], crossed, swapped)}) == 3

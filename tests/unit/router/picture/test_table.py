"""The table of short keys beside a dict, while it grows, shrinks and is rebuilt all the time."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.picture.table import CHUNK, LOAD_MAX, PLACES_MIN, U32, KeyTable

MULTIPLIER = 0x9E3779B97F4A7C15


class Keep:
    """A mover that counts, and drops references that are listed."""

    def __init__(self) -> None:
        self.drop: set[int] = set()
        self.num_begun = 0
        self.num_ended = 0

    def begin(self) -> None:
        assert self.num_begun == self.num_ended
        self.num_begun += 1

    def end(self) -> None:
        self.num_ended += 1
        assert self.num_begun == self.num_ended

    def move_one(self, ref: int) -> int:
        return 0 if ref in self.drop else ref

    def move_many(self, refs: U32) -> U32:
        return np.array([self.move_one(ref) for ref in refs.tolist()], dtype=np.uint32)


def put(table: KeyTable, short: int, ref: int) -> None:
    place = table.claim(short)
    table.store(place, ref)


def refs_of(table: KeyTable, shorts: list[int]) -> list[int]:
    return table.refs_of(np.array(shorts, dtype=np.uint64)).tolist()


def check_equal(table: KeyTable, model: dict[int, int], absent: list[int]) -> None:
    assert refs_of(table, list(model)) == list(model.values())
    assert refs_of(table, absent) == [0] * len(absent)
    assert table.num_live == sum(ref != 0 for ref in model.values())


@pytest.mark.slow
@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    crowd=st.booleans(),
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=8),
)
def test_the_table_holds_what_a_dict_holds(seed: int, crowd: bool, sizes: list[int]) -> None:
    rng = random.Random(seed)
    table = KeyTable(Keep(), multiplier=MULTIPLIER)
    inverse = pow(MULTIPLIER, -1, 1 << 64)

    def draw() -> int:
        if not crowd:
            return rng.getrandbits(64) | 1
        # All want one of 64 places, whatever the table's size.
        return (rng.randrange(64) << 58 | rng.randrange(1, 1 << 20)) * inverse % (1 << 64)

    model: dict[int, int] = {}
    for size in sizes:
        fresh = list({short for _ in range(size) if (short := draw()) and not model.get(short)})
        if rng.random() < 0.5:
            refs = [rng.randrange(1, 1 << 32) for _ in fresh]
            table.insert(np.array(fresh, dtype=np.uint64), np.array(refs, dtype=np.uint32))
            model |= zip(fresh, refs, strict=True)
        else:
            for short in [*fresh, *rng.sample(list(model), min(size, len(model)))]:
                model[short] = rng.choice([0, rng.randrange(1, 1 << 32)])
                put(table, short, model[short])
        if rng.random() < 0.3:
            table.rebuild()
        if rng.random() < 0.3:
            table.step()
        check_equal(table, model, [short for _ in range(20) if (short := draw()) not in model])
        assert table.load <= LOAD_MAX


@pytest.mark.slow
def test_growing_never_finishes_a_rebuild_in_one_go() -> None:
    """What one claim does stays a chunk, but for tables of a few chunks."""
    rng = random.Random(1)
    table = KeyTable(mover := Keep(), multiplier=MULTIPLIER)
    steps = 0
    step = table.step

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return step()

    table.step = counted  # type: ignore[method-assign]
    most = 0
    for i in range(300_000):
        steps = 0
        put(table, rng.getrandbits(64) | 1, i + 1)
        most = max(most, steps if table.num_live > 4 * CHUNK else 0)
    assert most == 1
    assert mover.num_ended >= 8
    assert table.load <= LOAD_MAX


def test_a_table_whose_keys_come_and_go_stays_as_large_as_it_has_to_be() -> None:
    rng = random.Random(1)
    table = KeyTable(Keep(), multiplier=MULTIPLIER)
    alive: list[int] = []
    for i in range(60_000):
        if len(alive) == 1000:
            put(table, alive.pop(rng.randrange(1000)), 0)
        alive.append(rng.getrandbits(64) | 1)
        put(table, alive[-1], i + 1)
    assert table.num_live == 1000
    assert table.num_bytes <= 12 * 3 * 4096
    assert 0 not in refs_of(table, alive)


def test_a_table_that_has_become_empty_shrinks_by_rebuilds() -> None:
    rng = random.Random(1)
    table = KeyTable(Keep(), multiplier=MULTIPLIER)
    shorts = [rng.getrandbits(64) | 1 for _ in range(20_000)]
    for i, short in enumerate(shorts):
        put(table, short, i + 1)
    for short in shorts:
        put(table, short, 0)
    for _ in range(10):
        table.rebuild()
        while table.step():
            pass
    assert table.num_live == 0
    assert table.num_bytes == 12 * PLACES_MIN


def test_a_rebuild_drops_what_the_mover_drops() -> None:
    table = KeyTable(mover := Keep(), multiplier=MULTIPLIER)
    for i in range(1, 5000):
        put(table, i, i)
    mover.drop = set(range(1, 5000, 2))
    while table.step():
        pass
    table.rebuild()
    assert table.is_rebuilding
    table.step()
    put(table, 4998, 4998)  # moved by being claimed
    while table.step():
        pass
    check_equal(table, {i: i for i in range(2, 5000, 2)}, list(range(1, 5000, 2)))


def test_looking_in_the_middle_of_a_rebuild_sees_both_halves() -> None:
    table = KeyTable(Keep(), multiplier=MULTIPLIER)
    model = {i * 7919 + 1: i + 1 for i in range(4 * CHUNK)}
    for short, ref in model.items():
        put(table, short, ref)
    while table.step():
        pass
    table.rebuild()
    num_looks = 0
    shorts = list(model)
    random.Random(1).shuffle(shorts)
    while table.step():
        for short in (shorts.pop() for _ in range(50)):  # moved ones, and others
            put(table, short, 0)
            model[short] = 0
        check_equal(table, model, [3, 5])
        num_looks += 1
    assert num_looks >= 4


@pytest.mark.parametrize("multiplier", [0, 2, 1 << 64])
def test_a_multiplier_that_loses_bits_is_refused(multiplier: int) -> None:
    with pytest.raises(AssertionError):
        KeyTable(Keep(), multiplier=multiplier)

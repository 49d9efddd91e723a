"""The picture beside a dict for each worker, and what happens at its bounds."""

from __future__ import annotations

import random

import pytest
from fake_content import key_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.errors import Overloaded
from rorqual.feed import CONTENT_FLAGS, HOST_PAGE, HOST_TAIL, PAGE, TAIL
from router.picture import Picture, WorkerContent

MULTIPLIER = 0x9E3779B97F4A7C15
BOTH = PAGE | TAIL
IN_HOST = PAGE | HOST_PAGE
BOTH_IN_HOST = BOTH | HOST_PAGE | HOST_TAIL


def picture_of(*contents: dict[int, int], **bounds: int) -> tuple[Picture, list[WorkerContent]]:
    """With one worker for each content, which is by number of `key_of`."""
    picture = Picture(multiplier=MULTIPLIER, **({"workers_max": 64, "pairs_max": 100_000} | bounds))
    workers = [picture.join() for _ in contents]
    for worker, content in zip(workers, contents, strict=True):
        show(worker, content)
    return picture, workers


def show(worker: WorkerContent, content: dict[int, int]) -> None:
    worker.start()
    assert worker.add(packed(content), bytes(content.values()))
    worker.commit()


def packed(numbers: dict[int, int]) -> bytes:
    return b"".join(map(key_of, numbers))


def look_up(picture: Picture, *numbers: int) -> list[tuple[int, int]]:
    """(leading pages, deepest tail) of each worker."""
    found = picture.look_up([key_of(number) for number in numbers])
    picture.check()
    return list(zip(found.pages_W.tolist(), found.tail_W.tolist(), strict=True))


def test_a_page_counts_only_behind_all_before_it_and_a_tail_only_on_such_a_page() -> None:
    picture, _ = picture_of(
        {1: PAGE, 2: BOTH, 3: PAGE, 4: BOTH}, {1: PAGE, 3: BOTH}, {2: BOTH}, {1: BOTH, 2: PAGE, 4: BOTH}
    )
    assert look_up(picture, 1, 2, 3, 4) == [(4, 4), (1, 0), (0, 0), (2, 1)]
    assert look_up(picture, 1, 2, 3, 99) == [(3, 2), (1, 0), (0, 0), (2, 1)]
    assert look_up(picture, 99, 1) == [(0, 0)] * 4
    assert look_up(picture) == [(0, 0)] * 4


def look_up_tiers(picture: Picture, *numbers: int) -> list[tuple[int, int, int, int]]:
    """(leading pages, deepest tail) of each worker, and the same on its device."""
    found = picture.look_up([key_of(number) for number in numbers])
    picture.check()
    arrays = (found.pages_W, found.tail_W, found.device_pages_W, found.device_tail_W)
    return list(zip(*(array.tolist() for array in arrays), strict=True))


@pytest.mark.parametrize("num_others", [0, 5, 20])
def test_what_is_in_host_memory_counts_for_its_worker_and_ends_what_others_can_read(num_others: int) -> None:
    """Whatever the form of the sets."""
    contents = [
        {1: BOTH, 2: PAGE, 3: BOTH | HOST_TAIL, 4: IN_HOST, 5: BOTH_IN_HOST},
        {1: IN_HOST, 2: BOTH, 3: PAGE},  # no worker tells this: pages go leaf first
        {1: BOTH_IN_HOST},
        {1: BOTH, 2: BOTH},
    ]
    others = [dict.fromkeys(range(1, 6), PAGE) for _ in range(num_others)]
    picture, workers = picture_of(*contents, *others)
    assert look_up_tiers(picture, 1, 2, 3, 4, 5)[:4] == [
        (5, 5, 3, 1),
        (3, 2, 0, 0),
        (1, 1, 0, 0),
        (2, 2, 2, 2),
    ]
    assert look_up_tiers(picture, 1, 2, 3)[0] == (3, 3, 3, 1)
    assert workers[0].change(packed({3: 0, 4: 0, 5: 0}), bytes((BOTH, PAGE, BOTH_IN_HOST)))
    assert look_up_tiers(picture, 1, 2, 3, 4, 5)[0] == (5, 5, 4, 3)
    for worker in workers[4:]:
        worker.clear()
    picture.settle()
    assert look_up_tiers(picture, 1, 2, 3, 4, 5)[:2] == [(5, 5, 4, 3), (3, 2, 0, 0)]


def test_a_row_that_was_anothers_has_nobody_in_host_memory() -> None:
    picture, workers = picture_of(*[{1: BOTH_IN_HOST}] * 20)
    for worker in workers[4:]:
        assert worker.change(key_of(1), bytes((0,)))
    for worker in workers[4:]:
        assert worker.change(key_of(2), bytes((PAGE,)))
    slot = workers[0].slot
    workers[0].clear()
    picture.settle()
    show(workers[0], dict.fromkeys(range(2, 202), PAGE))
    assert workers[0].slot == slot
    assert look_up_tiers(picture, 2)[0] == (1, 0, 1, 0)
    assert workers[0].change(key_of(2), bytes((BOTH,)))
    assert look_up_tiers(picture, 2)[0] == (1, 1, 1, 1)


def test_the_answer_names_who_has_each_leading_page() -> None:
    picture, workers = picture_of({1: PAGE, 2: PAGE}, {1: PAGE}, {}, {1: PAGE, 2: PAGE, 3: PAGE})
    found = picture.look_up([key_of(i) for i in (1, 2, 3, 4)])
    assert found.num_pages == 3
    assert [found.holders(depth).tolist() for depth in (1, 2, 3)] == [[0, 1, 3], [0, 3], [3]]
    assert found.num_holders_D().tolist() == [3, 2, 1]
    assert workers[3].index == 3


def test_an_answer_does_not_change_afterwards() -> None:
    picture, (worker,) = picture_of({1: BOTH})
    found = picture.look_up([key_of(1)])
    worker.clear()
    assert (found.pages_W.tolist(), found.tail_W.tolist(), found.num_pages) == ([1], [1], 1)


def test_what_arrives_is_seen_at_once_when_it_is_complete_and_what_was_there_is_gone() -> None:
    picture, (worker,) = picture_of({1: PAGE})
    worker.start()
    assert worker.add(key_of(2), bytes((PAGE,)))
    assert (look_up(picture, 1), look_up(picture, 2)) == ([(1, 0)], [(0, 0)])
    worker.commit()
    assert (look_up(picture, 1), look_up(picture, 2)) == ([(0, 0)], [(1, 0)])


def test_what_was_abandoned_is_never_seen() -> None:
    picture, (worker,) = picture_of({1: PAGE})
    worker.start()
    assert worker.add(packed(dict.fromkeys(range(500), 1)), bytes([PAGE] * 500))
    worker.abandon()
    assert look_up(picture, 1, 2) == [(1, 0)]
    picture.settle()
    assert picture.num_pairs == 1


def test_a_worker_that_leaves_takes_its_content_along_and_its_index_is_used_again() -> None:
    picture, workers = picture_of({1: PAGE, 2: PAGE}, {1: BOTH})
    picture.leave(workers[0])
    assert look_up(picture, 1) == [(0, 0), (1, 1)]
    assert picture.look_up([key_of(2)]).num_pages == 0
    again = picture.join()
    assert again.index == 0
    assert look_up(picture, 1) == [(0, 0), (1, 1)]
    assert picture.num_workers == 2
    with pytest.raises(AssertionError):
        picture.leave(workers[0])


def test_more_workers_than_there_is_room_for_are_refused() -> None:
    picture, _ = picture_of({}, {}, workers_max=2)
    with pytest.raises(Overloaded):
        picture.join()


def test_more_pages_than_there_is_room_for_are_refused_and_room_comes_back() -> None:
    picture, (first, second) = picture_of(dict.fromkeys(range(60), PAGE), {}, pairs_max=100)
    second.start()
    assert not second.add(packed(dict.fromkeys(range(50), 1)), bytes([PAGE] * 50))
    second.abandon()
    assert not first.change(packed(dict.fromkeys(range(60, 101), 1)), bytes([PAGE] * 41))
    assert picture.num_refused == 2
    first.clear()
    picture.settle()
    show(second, dict.fromkeys(range(100), PAGE))
    assert look_up(picture, *range(100)) == [(0, 0), (100, 0)]


def test_when_all_slots_are_taken_or_dead_the_dead_are_cleared() -> None:
    picture, workers = picture_of({1: PAGE}, {2: PAGE}, workers_max=2)
    for i in range(100):
        show(workers[i % 2], {i: PAGE, 1: BOTH})
    assert look_up(picture, 1) == [(1, 1), (1, 1)]
    assert picture.num_pairs - picture.num_pairs_dead == 4


def test_pages_whose_keys_begin_alike_are_one_page_and_nothing_breaks() -> None:
    picture, (worker,) = picture_of({})
    twins = [key_of(1), key_of(1)[:8] + b"another!"]
    worker.start()
    assert worker.add(b"".join(twins), bytes((PAGE, BOTH)))
    worker.commit()
    assert worker.change(twins[0], b"\x00")
    assert worker.change(twins[1], b"\x00")
    picture.check()
    assert picture.num_pairs == 0


def test_twins_in_two_parts_of_a_snapshot_are_counted_once() -> None:
    """The same with many at a time, and a page that many hold."""
    picture, workers = picture_of(*[{1: PAGE}] * 20, {})
    last = workers[-1]
    last.start()
    for twin, others in ((key_of(1), range(100, 200)), (key_of(1)[:8] + b"another!", range(200, 300))):
        keys = b"".join([twin, *map(key_of, others)])
        assert last.add(keys, bytes([PAGE] * (len(keys) // 16)))
    last.commit()
    assert picture.num_pairs == 20 + 201
    for worker in workers:
        picture.leave(worker)
    picture.settle()
    picture.check()
    assert picture.num_pairs == 0


def test_a_key_that_begins_with_zeros_is_a_key() -> None:
    picture, (worker,) = picture_of({})
    key = bytes(8) + b"whatever"
    assert worker.change(key, bytes((BOTH,)))
    assert picture.look_up([key]).tail_W.tolist() == [1]


class Naive:
    """What a picture of these workers must answer."""

    def __init__(self, num_workers: int) -> None:
        self.contents: list[dict[int, int]] = [{} for _ in range(num_workers)]

    def look_up(self, prompt: list[int]) -> list[tuple[int, int, int, int]]:
        answers: list[tuple[int, int, int, int]] = []
        for content in self.contents:
            flags = [content.get(key, 0) for key in prompt]
            on_device = [flag if not flag & HOST_PAGE else 0 for flag in flags]
            tails_on_device = [flag & TAIL and not flag & HOST_TAIL for flag in on_device]
            answers.append(
                (*reach(flags, [flag & TAIL for flag in flags]), *reach(on_device, tails_on_device))
            )
        return answers


def reach(pages: list[int], tails: list[int]) -> tuple[int, int]:
    num = next((i for i, flag in enumerate(pages) if not flag), len(pages))
    return num, max((i + 1 for i, tail in enumerate(tails[:num]) if tail), default=0)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_workers=st.sampled_from([1, 2, 9, 40, 64]),
    num_keys=st.sampled_from([3, 40, 400]),
)
def test_the_picture_answers_as_dictionaries_do(seed: int, num_workers: int, num_keys: int) -> None:
    """Few keys and many workers: every form of a page's holders, and back again."""
    rng = random.Random(seed)
    some = CONTENT_FLAGS if rng.random() < 0.7 else (PAGE, BOTH)
    picture, workers = picture_of(*[{}] * num_workers)
    naive = Naive(num_workers)
    for _ in range(80):
        at = rng.randrange(num_workers)
        worker, content = workers[at], naive.contents[at]
        match rng.randrange(8):
            case 0:
                numbers = rng.sample(range(num_keys), rng.randint(0, num_keys))
                naive.contents[at] = {number: rng.choice(some) for number in numbers}
                show(worker, naive.contents[at])
            case 1:
                worker.clear()
                naive.contents[at] = {}
                show(worker, {})
            case 2:
                picture.tend()
            case 3:  # one page for everybody, or for nobody any more
                number, flag = rng.randrange(num_keys), rng.choice((0, 0, *some))
                for other, entries in zip(workers, naive.contents, strict=True):
                    assert other.change(key_of(number), bytes((flag,)))
                    entries.pop(number, None)
                    entries.update({number: flag} if flag else {})
            case _:
                numbers = rng.sample(range(num_keys), rng.randint(1, min(num_keys, 100)))
                flags = bytes(rng.choice((0, *some)) for _ in numbers)
                assert worker.change(b"".join(map(key_of, numbers)), flags)
                for number, flag in zip(numbers, flags, strict=True):
                    content.pop(number, None)
                    content.update({number: flag} if flag else {})
        prompt = rng.sample(range(num_keys), min(num_keys, rng.choice((3, 10, 100))))
        assert look_up_tiers(picture, *prompt) == naive.look_up(prompt)
    for worker in workers:
        picture.leave(worker)
    picture.settle()
    picture.check()
    assert (picture.num_pairs, picture.num_keys) == (0, 0)

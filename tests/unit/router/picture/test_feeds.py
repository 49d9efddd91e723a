"""Several workers' feeds into one picture, over a link that loses, doubles, delays and breaks: each worker's content is
exactly the worker's at the number its reader names, or empty; and the picture answers as a dictionary would.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from fake_content import key_of, tell
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.feed import FeedBounds, FeedReader, FeedWriter, Resubscribe, Subscription
from rorqual.feed import ABSENT, CONTENT_FLAGS, HOST_PAGE, HOST_TAIL, PAGE, TAIL, FeedItem
from rorqual.ids import Incarnation
from router.picture import Picture, WorkerContent

BOUNDS = FeedBounds(history_deltas_max=6, history_entries_max=64, part_entries_max=8)
PATHS = [[key_of(100 * path + depth) for depth in range(12)] for path in range(4)]
PROMPTS = [*PATHS, PATHS[0][:4] + PATHS[1][4:], [*PATHS[2], key_of(9999)], [key_of(9999)], []]
NUM_WORKERS = 5

Entries = dict[bytes, int]


@dataclass(kw_only=True)
class Worker:
    """A worker's cache, its feed, and the router's end of it, with what is on its way."""

    content: WorkerContent
    reader: FeedReader
    writer: FeedWriter
    session: Subscription
    incarnations: int = 1
    actual: Entries = field(default_factory=dict)
    by_number: dict[int, Entries] = field(default_factory=dict)
    on_its_way: deque[FeedItem] = field(default_factory=deque)


def expected(entries: Entries, prompt: list[bytes], *, in_host: bool) -> tuple[int, int]:
    """Leading pages and deepest tail, by brute force; `in_host`: what is in host memory counts."""
    num_pages = tail = 0
    for key in prompt:
        flags = entries.get(key, ABSENT)
        if not flags or (flags & HOST_PAGE and not in_host):
            break
        num_pages += 1
        if flags & TAIL and (in_host or not flags & HOST_TAIL):
            tail = num_pages
    return num_pages, tail


class Feeds(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.picture = Picture(multiplier=seed * 2 + 1, workers_max=NUM_WORKERS, pairs_max=1000)
        self.workers = [self.new_worker() for _ in range(NUM_WORKERS)]

    def new_worker(self) -> Worker:
        content = self.picture.join()
        reader, writer = FeedReader(content), FeedWriter(Incarnation(1), bounds=BOUNDS)
        session = writer.subscribe(reader.welcome(Incarnation(1)))
        return Worker(content=content, reader=reader, writer=writer, session=session, by_number={0: {}})

    def one(self) -> Worker:
        return self.random.choice(self.workers)

    @rule(steps=st.integers(1, 12), size=st.integers(1, 12))
    def change(self, steps: int, size: int) -> None:
        """Steps of an engine, each of which caches and evicts something."""
        worker = self.one()
        for _ in range(steps):
            self.change_once(worker, size)
            before = worker.writer.number
            num = worker.writer.publish()
            assert worker.writer.number == before + num
            # Between the numbers of one step no content is known here; the last of them has this one.
            worker.by_number[before + num] = dict(worker.actual)

    def change_once(self, worker: Worker, size: int) -> None:
        for _ in range(size):
            path = self.random.choice(PATHS)
            depth = next((d for d, key in enumerate(path) if key not in worker.actual), len(path))
            match self.random.randrange(4):
                case 0 | 1 if depth < len(path):
                    tell(worker.writer, pages_added=[path[depth]])
                    worker.actual[path[depth]] = PAGE
                case 2 if depth:
                    tell(worker.writer, pages_removed=[path[depth - 1]])
                    del worker.actual[path[depth - 1]]
                case 3 if depth:
                    key = path[self.random.randrange(depth)]
                    before = worker.actual[key]
                    now = self.random.choice([flags for flags in CONTENT_FLAGS if flags != before])
                    worker.writer.note([(key, before, now)])
                    worker.actual[key] = now
                case _:
                    pass

    @rule(entries_max=st.integers(1, 40), with_digest=st.booleans())
    def send(self, entries_max: int, with_digest: bool) -> None:
        worker = self.one()
        items = worker.session.take(entries_max=entries_max, items_max=4, with_digest=with_digest)
        worker.on_its_way.extend(items)

    @rule(count=st.integers(1, 30))
    def deliver(self, count: int) -> None:
        worker = self.one()
        for _ in range(min(count, len(worker.on_its_way))):
            self.arrive(worker, worker.on_its_way.popleft())

    def arrive(self, worker: Worker, item: FeedItem) -> None:
        answer = worker.reader.take(item)
        if isinstance(answer, Resubscribe):
            assert worker.reader.number is None
            if self.random.random() < 0.8:  # what is on its way comes first, and is of no use
                worker.session = worker.writer.subscribe(worker.reader.subscribe())

    @rule(kind=st.sampled_from(["lose", "double", "swap", "damage", "foreign"]))
    def spoil(self, kind: str) -> None:
        worker = self.one()
        items = worker.on_its_way
        if not items:
            return
        at = self.random.randrange(len(items))
        match kind:
            case "lose":
                del items[at]
            case "double":
                items.insert(at, items[at])
            case "swap":
                other = self.random.randrange(len(items))
                items[at], items[other] = items[other], items[at]
            case "damage":
                items[at] = replace(items[at], digest=items[at].digest ^ 1 << self.random.randrange(64))
            case _:
                items[at] = replace(items[at], incarnation=Incarnation(10**6))

    @rule()
    def reconnect(self) -> None:
        worker = self.one()
        worker.on_its_way.clear()
        worker.session = worker.writer.subscribe(worker.reader.welcome(worker.writer.incarnation))

    @rule()
    def restart(self) -> None:
        worker = self.one()
        worker.incarnations += 1
        incarnation = Incarnation(worker.incarnations)
        worker.writer = FeedWriter(incarnation, bounds=BOUNDS)
        worker.actual, worker.by_number = {}, {0: {}}
        worker.on_its_way.clear()
        worker.session = worker.writer.subscribe(worker.reader.welcome(incarnation))

    @rule()
    def replace_worker(self) -> None:
        at = self.random.randrange(len(self.workers))
        self.workers[at].reader.leave()
        self.picture.leave(self.workers[at].content)
        self.workers[at] = self.new_worker()

    @rule()
    def tend(self) -> None:
        self.picture.tend()

    @rule()
    def catch_up(self) -> None:
        """Without faults every worker is exact after one exchange."""
        for worker in self.workers:
            worker.on_its_way.clear()
            worker.session = worker.writer.subscribe(worker.reader.welcome(worker.writer.incarnation))
            for item in worker.session.take(entries_max=10**6, items_max=10**6, with_digest=True):
                assert worker.reader.take(item) is None
            assert worker.reader.number == worker.writer.number

    @invariant()
    def each_content_is_exact_at_its_number_or_empty(self) -> None:
        if not hasattr(self, "workers"):
            return
        answers = [self.picture.look_up(prompt) for prompt in PROMPTS]
        for worker in self.workers:
            number = worker.reader.number
            entries = {} if number is None else worker.by_number.get(number)
            if entries is None:
                continue  # a number inside a step
            index = worker.content.index
            assert worker.reader.num_entries == len(entries)
            for prompt, found in zip(PROMPTS, answers, strict=True):
                got = int(found.pages_W[index]), int(found.tail_W[index])
                assert got == expected(entries, prompt, in_host=True)
                got = int(found.device_pages_W[index]), int(found.device_tail_W[index])
                assert got == expected(entries, prompt, in_host=False)
        self.picture.check()

    @invariant()
    def answers_agree_with_themselves(self) -> None:
        if not hasattr(self, "workers"):
            return
        for prompt in PROMPTS:
            found = self.picture.look_up(prompt)
            assert found.num_pages == found.pages_W.max(initial=0)
            counts = found.num_holders_D().tolist()
            assert counts == [len(found.holders(depth)) for depth in range(1, found.num_pages + 1)]
            assert np.all(found.tail_W <= found.pages_W)

    def teardown(self) -> None:
        if not hasattr(self, "workers"):
            return
        for worker in self.workers:
            worker.reader.leave()
            self.picture.leave(worker.content)
        self.picture.settle()
        self.picture.check()
        assert self.picture.num_pairs == 0


Feeds.TestCase.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
TestFeeds = pytest.mark.slow(Feeds.TestCase)

"""What was read from a peer gives the very bits that computing gives, wherever it ends and whatever is gone of it by
then: tokens and logprobs of real ranks under schedulers whose free memory is poisoned."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.model.forward import Model
from engine.worker.events import SequenceKey
from kvstore.layout import Numerics
from kvstore.shadow_radix import StartKind, TailPolicy
from rorqual.sampling import SamplingParams
from tests.harness.models import CSA, HCA, SWA, raw_config
from tests.harness.neighbours import Neighbour, PeerRead, pages_of
from tests.harness.reusing import Answer, Reusing
from tests.harness.speculating import exact_model

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

PAGE = 256
SAMPLED = SamplingParams(seed=5, temperature=0.8, top_p=0.95, logprobs=1)
EVERYWHERE = TailPolicy(every_pages=1, num_tails_max=8)
REBUILD_PAGES = 1  # of this model: 4 layers with a window of 8


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


@pytest.fixture(scope="module", params=list(Numerics), ids=lambda item: item.value)
def model(request: pytest.FixtureRequest) -> Model:
    raw = raw_config((SWA, CSA, HCA, CSA), max_position_embeddings=4096)
    return exact_model(raw, request.param)


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "drafts"])
def drafts(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def history(model: Model, drafts: int) -> tuple[list[int], Answer]:
    """A prompt, and what is generated from it, across page boundaries: 3 pages and a bit."""
    prompt = a_prompt(1, PAGE + 20)
    return prompt, Reusing(model, drafts=drafts, keeps=False).answer(prompt, 2 * PAGE + 10, sampling=SAMPLED)


def lengths() -> list[int]:
    """At each boundary, and one token before and behind it."""
    return [at + more for at in range(PAGE, 3 * PAGE + 1, PAGE) for more in (-1, 0, 1)]


def starts(worker: Reusing) -> dict[StartKind, int]:
    """Pages that were not computed, by how it was resumed."""
    return {kind: count for kind, count in worker.scheduler.cache_state().counts.pages_hit.items() if count}


@pytest.mark.parametrize("source", ["prompt with tails", "generated with a tail", "pages alone"])
def test_a_prefix_read_from_a_peer_gives_at_any_boundary_the_bits_that_computing_gives(
    model: Model, drafts: int, history: tuple[list[int], Answer], source: str
) -> None:
    prompt, turn = history
    known = prompt + [token for token, _ in turn]
    off = Reusing(model, drafts=drafts, keeps=False)
    owner = Neighbour(model, drafts=drafts, num_records=12, policy=EVERYWHERE)
    if source == "prompt with tails":
        owner.answer(known, 1, sampling=SAMPLED)
    else:
        assert owner.answer(prompt, len(turn), sampling=SAMPLED) == turn
    kinds: Counter[StartKind] = Counter()
    for length in lengths():
        reader = Neighbour(model, drafts=drafts, num_pages=8, num_slots=1, num_records=3)
        asked, num_pages = known[:length], pages_of(length)
        read = PeerRead(reader, owner, asked, wants_tail=source != "pages alone")
        read.run()
        assert read.num_pages_read == num_pages
        assert reader.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED), length
        kinds.update(starts(reader))
        assert sum(starts(reader).values()) >= num_pages - REBUILD_PAGES
        if source == "prompt with tails":
            assert read.tail_depth == sum(starts(reader).values()) == num_pages
    # Of a decode the newest tail is kept alone: at the boundary between it and the prompt's the one before does.
    alone = {StartKind.REBUILD}
    assert kinds.keys() == (alone if source == "pages alone" else {StartKind.TAIL, StartKind.FULL})
    owner.cache.check()
    assert owner.cache.num_pins == 0


def test_a_tail_that_is_gone_after_the_read_is_rebuilt_to_the_same_bits(
    model: Model, drafts: int, history: tuple[list[int], Answer]
) -> None:
    prompt, turn = history
    off = Reusing(model, drafts=drafts, keeps=False)
    owner = Neighbour(model, drafts=drafts, num_records=12, policy=EVERYWHERE)
    known = prompt + [token for token, _ in turn]
    owner.answer(known, 1, sampling=SAMPLED)
    for length in (2 * PAGE, 2 * PAGE + 1, 3 * PAGE - 1, 3 * PAGE, 3 * PAGE + 1):
        reader = Neighbour(model, drafts=drafts, num_pages=8, num_slots=1, num_records=2)
        asked = known[:length]
        read = PeerRead(reader, owner, asked)
        read.run()
        assert read.tail_depth == pages_of(length)
        while reader.cache.num_tails:
            reader.scheduler._holdings._free_evicted(reader.cache.evict_tail())
        reader.poison()
        assert reader.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED), length
        assert starts(reader) == {StartKind.REBUILD: pages_of(length) - REBUILD_PAGES}


def test_what_was_read_is_read_on_by_a_third_worker_and_gives_the_same_bits(
    model: Model, drafts: int, history: tuple[list[int], Answer]
) -> None:
    prompt, turn = history
    owner = Neighbour(model, drafts=drafts, num_records=12, policy=EVERYWHERE)
    asked = (prompt + [token for token, _ in turn])[: 3 * PAGE + 1]
    owner.answer(asked, 1, sampling=SAMPLED)
    second, third = (Neighbour(model, drafts=drafts, num_slots=1, num_records=4) for _ in range(2))
    PeerRead(second, owner, asked).run()
    PeerRead(third, second, asked).run()
    assert third.answer(asked, 4, sampling=SAMPLED) == Reusing(model, drafts=drafts, keeps=False).answer(
        asked, 4, sampling=SAMPLED
    )
    assert starts(third) == {StartKind.TAIL: 3}


class Storm:
    """Two workers in little room that ask, evict, and read from each other, in an order drawn from a seed."""

    def __init__(self, model: Model, *, drafts: int, seed: int) -> None:
        self.draw = random.Random(seed)
        options = {"num_pages": 8, "num_slots": 2, "num_records": 5, "drafts": drafts}
        self.workers = [Neighbour(model, policy=EVERYWHERE, **options) for _ in range(2)]
        self.asked: list[tuple[Neighbour, int, list[int], int]] = []
        self.reads: list[PeerRead] = []
        self.cancelled: set[tuple[Neighbour, int]] = set()
        self.num_read = self.num_spoiled = 0
        self._families = [a_prompt(10 + number, 3 * PAGE) for number in range(5)]

    def run(self, num_asked: int) -> None:
        while len(self.asked) < num_asked:
            self.ask()
            for _ in range(self.draw.randint(0, 25)):
                self.move()
        while self.reads or any(not worker.scheduler.is_idle for worker in self.workers):
            self.move()

    def ask(self) -> None:
        draw = self.draw
        cut = draw.choice((PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 90, 3 * PAGE, 3 * PAGE))
        prompt = draw.choice(self._families)[:cut] + a_prompt(len(self.asked), draw.choice((0, 1, 40)))
        num_tokens = draw.choice((1, 3, 30))
        # As a router sends it: where less of it is kept, to read from where more is.
        shuffled = draw.sample(self.workers, k=2)
        owner, reader = sorted(shuffled, key=lambda worker: -self.num_kept(worker, prompt))
        fetching = self.num_kept(owner, prompt) > 0
        key = reader.open(prompt, num_tokens, sampling=SAMPLED, fetching=fetching)
        self.asked.append((reader, key, prompt, num_tokens))
        if fetching:
            options = {"wants_tail": draw.random() < 0.7, "spoils": draw.random() < 0.2}
            read = PeerRead(reader, owner, prompt, key=key, **options)
            self.num_spoiled += options["spoils"]
            self.reads.append(read)

    def cancel(self) -> None:
        """One of the newest, which plans in flight may be computing, or for which pages are on their way."""
        worker, key, _, _ = self.draw.choice(self.asked[-4:])
        if worker.scheduler.cancel(SequenceKey(key)):
            self.cancelled.add((worker, key))

    def num_kept(self, worker: Neighbour, prompt: list[int]) -> int:
        return worker.cache.match(worker.keys_of(prompt)).num_pages

    def move(self) -> None:
        if self.reads and self.draw.random() < 0.4:
            read = self.draw.choice(self.reads)
            if not read.advance():
                self.reads.remove(read)
                self.num_read += read.num_pages_read
        elif self.asked and self.draw.random() < 0.03:
            self.cancel()
        else:
            worker = self.draw.choice(self.workers)
            worker.step()
        for worker in self.workers:
            worker.scheduler.check_all()
            worker.poison()


@pytest.mark.parametrize(
    ("model", "seed"),
    [*((Numerics.FLOAT32, seed) for seed in range(3)), (Numerics.SERVED, 0)],
    indirect=["model"],
    ids=lambda item: item.value if isinstance(item, Numerics) else str(item),
)
def test_reads_and_evictions_in_any_order_in_little_room_change_no_bit(
    model: Model, drafts: int, seed: int
) -> None:
    storm = Storm(model, drafts=drafts, seed=seed)
    storm.run(40)
    off = Reusing(model, drafts=drafts, keeps=False)
    for reader, key, prompt, num_tokens in storm.asked:
        got, expected = reader.answers[key], off.answer(prompt, num_tokens, sampling=SAMPLED)
        assert got == (expected[: len(got)] if (reader, key) in storm.cancelled else expected)
    counts = [worker.scheduler.cache_state().counts for worker in storm.workers]
    print(f"{storm.num_read} pages read, {[item.pages_evicted for item in counts]} evicted")
    assert storm.num_read >= 5
    assert storm.num_spoiled > 0
    assert storm.cancelled
    assert all(item.pages_evicted > 0 for item in counts)
    for worker in storm.workers:
        assert worker.num_pages_poisoned > 0
        assert worker.cache.num_pins == 0
        assert worker.scheduler.load().pages_free == worker.scheduler.config.num_pages
        assert worker.scheduler.imports.num_open == 0

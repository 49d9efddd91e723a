"""Sequences that spill, return, spill again, are preempted, cancelled and handed over give the very bits that resident
ones give: tokens and logprobs of real ranks under schedulers in next to no room, with hot buffers so
small that every step misses, and NaN in every page and host page that nobody has."""

from __future__ import annotations

import random

import pytest

from engine.model.forward import Model
from engine.worker.events import SequenceKey
from kvstore.layout import Numerics
from rorqual.sampling import SamplingParams
from tests.harness.models import CSA, HCA, SWA, raw_config
from tests.harness.neighbours import Neighbour, PeerRead
from tests.harness.reusing import Reusing
from tests.harness.speculating import exact_model
from tests.harness.spilling import HandOver, Spiller, a_prefill_worker

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

PAGE = 256
TOPK = 60
SAMPLED = SamplingParams(seed=5, temperature=0.8, top_p=0.95, logprobs=1)


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    raw = raw_config((SWA, CSA, HCA, CSA), max_position_embeddings=4096, index_topk=TOPK)
    return exact_model(raw, request.param)


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "drafts"])
def drafts(request: pytest.FixtureRequest) -> int:
    return request.param


class Storm:
    """One worker that spills, one whose cache it reads, and one that hands prompts over to it."""

    def __init__(self, model: Model, *, drafts: int, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.worker = Spiller(
            model,
            drafts=drafts,
            num_pages=draw.choice((10, 11, 12)),
            num_slots=4,
            num_records=7,
            prefill_tokens_max=256,
            num_host_pages=draw.choice((16, 28, 40)),
            num_host_records=6,
            num_buffers=3,
            num_thin=24,
            hisparse={
                "few_pages": draw.choice((0.3, 1.0)),
                "many_pages": draw.choice((0.0, 0.2)),
                "copy_bytes_max": draw.choice((1, 1 << 17)),
            },
            takes_turns=draw.random() < 0.5,
        )
        self.peer = Neighbour(model, drafts=drafts, num_pages=24, num_slots=1, num_records=8)
        self.prefill = a_prefill_worker(model, drafts=drafts)
        self.asked: list[tuple[int, list[int], int]] = []
        self.handed: list[HandOver] = []
        self.reads: list[PeerRead] = []
        self.cancelled: set[int] = set()
        self.num_read = self.num_handed = 0
        self._families = [a_prompt(50 + number, 5 * PAGE) for number in range(3)]

    def run(self, num_asked: int) -> None:
        self.peer.answer(self._families[0], 1, sampling=SAMPLED)
        while len(self.asked) < num_asked:
            self.ask()
            for _ in range(self.draw.randint(5, 60)):
                self.move()
        while self.reads or self.handed or not self.worker.scheduler.is_idle:
            self.move()

    def ask(self) -> None:
        draw, worker = self.draw, self.worker
        family = draw.choice(self._families)
        cut = draw.choice((2 * PAGE, 3 * PAGE + 90, 4 * PAGE - 1, 5 * PAGE, 5 * PAGE))
        prompt = family[:cut] + a_prompt(len(self.asked), draw.choice((0, 1, 7, 130)))
        begun = [item for item in self.asked if len(worker.answers[item[0]]) > 20]
        if begun and draw.random() < 0.3:  # goes on from what another has answered so far
            key, before, _ = draw.choice(begun)
            prompt = (before + [token for token, _ in worker.answers[key]] + [3, 4])[: 7 * PAGE]
        num_tokens = draw.choice((1, 40, 150, 280))
        if draw.random() < 0.3 and len(self.handed) < 2:
            item = HandOver(self.prefill, worker, prompt, num_tokens + 1, sampling=SAMPLED)
            self.handed.append(item)
            self.asked.append((item.key, prompt, num_tokens + 1))
            return
        fetching = family is self._families[0] and draw.random() < 0.7
        key = worker.open(prompt, num_tokens, sampling=SAMPLED, fetching=fetching)
        self.asked.append((key, prompt, num_tokens))
        if fetching:
            self.reads.append(PeerRead(worker, self.peer, family, key=key, num_pages=draw.choice((1, 2, 3))))

    def move(self) -> None:
        draw, worker = self.draw, self.worker
        if self.reads and draw.random() < 0.3:
            read = draw.choice(self.reads)
            if not read.advance():
                self.reads.remove(read)
                self.num_read += read.num_pages_read
        elif draw.random() < 0.006 and self.asked:
            key = draw.choice(self.asked[-4:])[0]
            if not any(item.key == key for item in self.handed) and worker.scheduler.cancel(SequenceKey(key)):
                self.cancelled.add(key)
        else:
            adoptions = worker.scheduler.take_adoptions()
            for item in list(self.handed):
                item.take(adoptions)
                if not item.advance():
                    self.handed.remove(item)
                    self.num_handed += 1
            worker.step()
        worker.scheduler.check_all()
        worker.poison()


@pytest.mark.parametrize(
    ("model", "seed"),
    [(Numerics.FLOAT32, 0), (Numerics.FLOAT32, 1), (Numerics.SERVED, 1)],
    indirect=["model"],
    ids=lambda item: item.value if isinstance(item, Numerics) else str(item),
)
def test_a_storm_over_sequences_that_spill_changes_no_bit(model: Model, drafts: int, seed: int) -> None:
    storm = Storm(model, drafts=drafts, seed=seed)
    storm.run(10)
    off = Reusing(model, drafts=drafts, num_pages=120, num_slots=12, keeps=False)
    keys = [off.open(prompt, count, sampling=SAMPLED) for _, prompt, count in storm.asked]
    off.run()
    for (key, _, _), other in zip(storm.asked, keys, strict=True):
        got, expected = storm.worker.answers[key], off.answers[other]
        assert got == (expected[: len(got)] if key in storm.cancelled else expected), key
    state = storm.worker.scheduler.hisparse_state
    print(state.counts, storm.num_read, storm.num_handed, storm.worker.num_reads,
          storm.worker.scheduler.num_preemptions, len(storm.cancelled))  # fmt: skip
    assert state.counts.num_spills > 0
    assert state.counts.rows_missed > 100
    assert (state.num_spilled, state.num_host_pages) == (0, 0)
    assert state.num_thin_pages_free == state.num_thin_pages

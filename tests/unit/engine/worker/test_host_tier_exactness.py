"""What comes back from host memory gives the very bits that computing gives: tokens and logprobs of a real rank under
the scheduler, whose pools and host memory are NaN wherever nothing was written for whoever reads."""

from __future__ import annotations

import random

import pytest

from engine.model.forward import Model
from kvstore.layout import Numerics
from kvstore.shadow_radix import StartKind, TailPolicy
from rorqual.sampling import SamplingParams
from tests.harness.models import CSA, HCA, SWA, raw_config
from tests.harness.reusing import Answer, Reusing
from tests.harness.speculating import exact_model

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

PAGE = 256
SAMPLED = SamplingParams(seed=5, temperature=0.8, top_p=0.95, logprobs=1)


def tokens_of(answer: Answer) -> list[int]:
    return [token for token, _ in answer]


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


@pytest.fixture(scope="module", params=list(Numerics), ids=lambda item: item.value)
def model(request: pytest.FixtureRequest) -> Model:
    raw = raw_config((SWA, CSA, HCA, CSA), max_position_embeddings=4096)
    return exact_model(raw, request.param)


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "drafts"])
def drafts(request: pytest.FixtureRequest) -> int:
    return request.param


def push_out(worker: Reusing) -> None:
    """Whatever a device of eight pages keeps, it gives up for this."""
    worker.answer(a_prompt(1000 + len(worker.answers), 8 * PAGE - 1), 1, sampling=SAMPLED)


def test_a_prompt_brought_back_to_any_boundary_gives_the_bits_that_computing_gives(
    model: Model, drafts: int
) -> None:
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(
        model,
        drafts=drafts,
        num_pages=8,
        num_records=4,
        policy=TailPolicy(every_pages=1, num_tails_max=8),
        num_host_pages=32,
        num_host_records=16,
    )
    prompt = a_prompt(1, 2 * PAGE + 20)
    turn = off.answer(prompt, 300, sampling=SAMPLED)
    assert on.answer(prompt, 300, sampling=SAMPLED) == turn
    history = prompt + tokens_of(turn)
    assert len(history) == 3 * PAGE + 64
    for length in (PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE, 3 * PAGE + 1, len(history)):
        push_out(on)
        before = on.host_memory.num_promoted
        asked = history[:length]
        assert on.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED), length
        assert on.host_memory.num_promoted > before
    hits = on.scheduler.cache_state().counts.pages_hit
    assert hits[StartKind.TAIL] > 0
    assert hits[StartKind.FULL] > 0


def test_pages_without_their_tail_come_back_to_be_rebuilt(model: Model, drafts: int) -> None:
    """There are no records, on the device or below it."""
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(model, drafts=drafts, num_pages=8, num_records=0, num_host_pages=32)
    prompt = a_prompt(2, 4 * PAGE)
    on.answer(prompt, 1, sampling=SAMPLED)
    for length in (2 * PAGE, 2 * PAGE + 1, 3 * PAGE + 17, 4 * PAGE):
        push_out(on)
        asked = prompt[:length]
        assert on.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED)
    counts = on.scheduler.cache_state().counts
    assert counts.pages_hit == {StartKind.COLD: 0, StartKind.REBUILD: 1 + 1 + 2 + 3}
    assert on.host_memory.num_promoted == 2 + 2 + 3 + 4


def test_many_at_once_in_next_to_no_room_give_what_each_gives_alone(model: Model, drafts: int) -> None:
    """Everything is given up and brought back all the time."""
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(
        model,
        drafts=drafts,
        num_pages=6,
        num_slots=3,
        num_records=3,
        num_host_pages=20,
        num_host_records=6,
        copy_bytes_max=1,
    )
    draw = random.Random(4)
    families = [a_prompt(10 + number, 3 * PAGE) for number in range(3)]
    asked: list[tuple[int, list[int], int]] = []
    for number in range(18):
        cut = draw.choice((100, PAGE, PAGE + 90, 2 * PAGE, 3 * PAGE))
        prompt = draw.choice(families)[:cut] + a_prompt(number, draw.choice((0, 1, 40, 300)))
        num_tokens = draw.choice((1, 3, 60))
        asked.append((on.open(prompt, num_tokens, sampling=SAMPLED), prompt, num_tokens))
        for _ in range(draw.randint(0, 6)):
            on.step()
    on.run()
    for key, prompt, num_tokens in asked:
        assert on.answers[key] == off.answer(prompt, num_tokens, sampling=SAMPLED)
    assert on.host_memory.num_promoted > 4
    assert on.scheduler.host_tier is not None
    counts = on.scheduler.host_tier.state.counts
    assert counts.pages_hit == on.host_memory.num_promoted
    assert counts.tails_hit > 0

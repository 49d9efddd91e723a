"""What is reused gives the very bits that computing gives: tokens and logprobs of a real rank under the scheduler."""

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

pytestmark = pytest.mark.minutes

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


def test_a_prompt_resumed_at_any_boundary_gives_the_bits_that_computing_gives(
    model: Model, drafts: int
) -> None:
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(model, drafts=drafts, policy=TailPolicy(every_pages=1, num_tails_max=8))
    prompt = a_prompt(1, 2 * PAGE + 20)
    turn = off.answer(prompt, 300, sampling=SAMPLED)
    assert on.answer(prompt, 300, sampling=SAMPLED) == turn
    history = prompt + tokens_of(turn)
    assert len(history) == 3 * PAGE + 64
    for length in (PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 3 * PAGE, 3 * PAGE + 1, len(history)):
        asked = history[:length]
        assert on.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED), length
    hits = on.scheduler.cache_state().counts.pages_hit
    assert hits[StartKind.TAIL] > 0
    assert hits[StartKind.FULL] > 0


def test_a_rebuilt_prompt_gives_them_too(model: Model, drafts: int) -> None:
    """No tail is left: there are no records."""
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(model, drafts=drafts, num_records=0)
    prompt = a_prompt(2, 4 * PAGE)
    on.answer(prompt, 1, sampling=SAMPLED)
    for length in (2 * PAGE, 2 * PAGE + 1, 3 * PAGE + 17, 4 * PAGE):
        asked = prompt[:length]
        assert on.answer(asked, 4, sampling=SAMPLED) == off.answer(asked, 4, sampling=SAMPLED)
    assert on.scheduler.cache_state().counts.pages_hit == {
        StartKind.COLD: 0,
        StartKind.REBUILD: 1 + 1 + 2 + 3,
    }


def test_many_at_once_in_little_room_give_what_each_gives_alone(model: Model, drafts: int) -> None:
    off = Reusing(model, drafts=drafts, keeps=False)
    on = Reusing(model, drafts=drafts, num_pages=7, num_slots=3, num_records=4)
    draw = random.Random(4)
    families = [a_prompt(10 + number, 3 * PAGE) for number in range(2)]
    asked: list[tuple[int, list[int], int]] = []
    for number in range(14):
        cut = draw.choice((100, PAGE, PAGE + 90, 2 * PAGE, 3 * PAGE))
        prompt = draw.choice(families)[:cut] + a_prompt(number, draw.choice((0, 1, 40, 300)))
        num_tokens = draw.choice((1, 3, 60))
        asked.append((on.open(prompt, num_tokens, sampling=SAMPLED), prompt, num_tokens))
        for _ in range(draw.randint(0, 6)):
            on.step()
    on.run()
    for key, prompt, num_tokens in asked:
        assert on.answers[key] == off.answer(prompt, num_tokens, sampling=SAMPLED)
    counts = on.scheduler.cache_state().counts
    assert counts.tokens_reused > 0
    assert counts.pages_evicted > 0

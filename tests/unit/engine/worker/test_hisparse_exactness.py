"""A spilled sequence gives the very bits that a resident one gives: tokens and logprobs of a real rank under the
scheduler, with hot buffers so small that every step misses, and memory that is NaN wherever nothing was written."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.model.forward import Model
from kvstore.layout import Numerics
from rorqual.sampling import SamplingParams
from tests.harness.models import CSA, HCA, SWA, raw_config
from tests.harness.reusing import Answer, Reusing
from tests.harness.speculating import exact_model
from tests.harness.spilling import Spiller

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(300)]

PAGE = 256
TOPK = 60
SAMPLED = SamplingParams(seed=5, temperature=0.8, top_p=0.95, logprobs=1)


def a_prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(97), k=length)


@pytest.fixture(scope="module", params=list(Numerics), ids=lambda item: item.value)
def model(request: pytest.FixtureRequest) -> Model:
    raw = raw_config((SWA, CSA, HCA, CSA), max_position_embeddings=4096, index_topk=TOPK)
    return exact_model(raw, request.param)


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "drafts"])
def drafts(request: pytest.FixtureRequest) -> int:
    return request.param


def spilling(model: Model, drafts: int, **options: Any) -> Reusing:
    chosen: dict[str, Any] = {
        "num_pages": 14,
        "num_slots": 4,
        "num_records": 4,
        "num_host_pages": 48,
        "num_host_records": 8,
        "num_buffers": 3,
        "num_thin": 30,
        "drafts": drafts,
    }
    return Reusing(model, **(chosen | options))


def answers_of(worker: Reusing, prompts: list[tuple[list[int], int]]) -> list[Answer]:
    keys = [worker.open(prompt, count, sampling=SAMPLED) for prompt, count in prompts]
    worker.run()
    return [worker.answers[key] for key in keys]


def test_sequences_that_spill_give_the_bits_that_resident_ones_give(model: Model, drafts: int) -> None:
    lengths = (1531, 1287, 1026, 1409)
    prompts = [(a_prompt(seed, length), 60 + 7 * seed) for seed, length in enumerate(lengths)]
    off = Reusing(model, drafts=drafts, num_pages=48, num_slots=4, keeps=False)
    on = spilling(model, drafts)
    assert answers_of(on, prompts) == answers_of(off, prompts)
    counts = on.scheduler.hisparse_state.counts
    assert counts.num_spills > 0
    assert counts.rows_missed > 100


@pytest.mark.parametrize("has_tail", [True, False], ids=["tail", "rebuild"])
def test_a_prompt_whose_pages_are_in_host_memory_starts_spilled_where_it_finds_no_room(
    model: Model, drafts: int, has_tail: bool
) -> None:
    long, pushing = a_prompt(1, 8 * PAGE + 77), a_prompt(2, 9 * PAGE + 3)
    shorts = [(a_prompt(10 + seed, 300), 150) for seed in range(3)]
    prompts = [*shorts, (long, 40)]
    off = Reusing(model, drafts=drafts, num_pages=48, num_slots=4, keeps=False)
    on = spilling(model, drafts, num_pages=10, num_host_records=8 if has_tail else 0)
    on.answer(long, 3, sampling=SAMPLED)
    on.answer(pushing, 3, sampling=SAMPLED)
    assert answers_of(on, prompts) == answers_of(off, prompts)
    assert on.scheduler.hisparse_state.counts.num_starts == 1


def test_the_next_turn_goes_on_from_the_tail_that_a_spilled_sequence_has_left(
    model: Model, drafts: int
) -> None:
    prompts = [(a_prompt(seed, 5 * PAGE + 100 + seed), 240) for seed in range(3)]
    off = Reusing(model, drafts=drafts, num_pages=48, num_slots=4, keeps=False)
    on = spilling(model, drafts, num_host_records=16)
    answers = answers_of(on, prompts)
    assert on.scheduler.hisparse_state.counts.num_spills > 0
    turns = [
        (prompt + [token for token, _ in answer] + a_prompt(50, 90), 5)
        for (prompt, _), answer in zip(prompts, answers, strict=True)
    ]
    for number, (turn, count) in enumerate(turns):
        key = on.open(turn, count, sampling=SAMPLED)
        sequence = on.scheduler._sequences[key]
        on.run()
        assert on.answers[key] == off.answer(turn, count, sampling=SAMPLED)
        assert sequence.num_tokens_cached is not None
        assert sequence.num_tokens_cached >= len(prompts[number][0]) // PAGE * PAGE, f"turn {number}"


def test_a_prompt_that_spills_half_computed_and_a_sequence_that_returns_and_spills_again_do_too(
    model: Model, drafts: int
) -> None:
    """Its last tokens are picked, and its pages completed, while it is spilled, resident and spilled again."""
    worker = Spiller(
        model,
        num_pages=14,
        num_slots=3,
        num_records=5,
        num_host_pages=40,
        num_host_records=4,
        num_buffers=2,
        num_thin=30,
        drafts=drafts,
        prefill_tokens_max=PAGE,
        hisparse={"few_pages": 0.0, "many_pages": 0.1, "copy_bytes_max": 1},
    )
    counts = worker.scheduler.hisparse_state.counts
    asked = [(a_prompt(1, 9 * PAGE - 3), 330), (a_prompt(2, 1409), 12), (a_prompt(3, 1531), 12)]

    def ask(number: int) -> int:
        return worker.open(asked[number][0], asked[number][1], sampling=SAMPLED)

    first = ask(0)
    for _ in range(6):
        worker.step()
    assert not worker.answers[first]
    second = ask(1)
    while not worker.num_reads:
        assert worker.step(), "no chunk was computed behind spilled pages"
    while not counts.num_returns:
        assert worker.step(), "it does not return"
    third = ask(2)
    while counts.num_spills < 2:
        assert worker.step(), "it does not spill again"
    worker.run()
    assert len(worker.answers[first]) == 330
    off = Reusing(model, drafts=drafts, num_pages=48, num_slots=4, keeps=False)
    assert [worker.answers[key] for key in (first, second, third)] == answers_of(off, asked)


def test_where_host_memory_is_full_nobody_spills_and_nothing_changes(model: Model, drafts: int) -> None:
    prompts = [(a_prompt(1, 1531), 40), (a_prompt(2, 1409), 40)]
    off = Reusing(model, drafts=drafts, num_pages=48, num_slots=4, keeps=False)
    on = spilling(model, drafts, num_pages=11, num_host_pages=1)
    without = spilling(model, drafts, num_pages=11, num_host_pages=1, num_buffers=0, num_thin=0)
    assert answers_of(on, prompts) == answers_of(without, prompts) == answers_of(off, prompts)
    assert on.scheduler.hisparse_state.counts.num_spills == 0
    assert on.scheduler.num_preemptions == without.scheduler.num_preemptions

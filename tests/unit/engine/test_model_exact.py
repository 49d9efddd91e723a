"""Exact mode: a request's logits are the same bits whatever else is in the batch, however its prompt is chunked, and
wherever its pages and its slot lie.

Every request is compared, token by token, with the same tokens computed alone and at once.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.exactness import NotExact, check_exactness
from engine.kernels.suite import choose_kernels
from engine.model.batch import build_batch
from engine.model.forward import Model
from kvstore.layout import Numerics
from tests.harness.drive import alone, in_turn, random_schedule, run_paged
from tests.harness.models import build_model, config_of, random_tokens, raw_config, raw_configs, real_ratios
from tests.reference.weights import random_tensors

LONGEST = 280
NUM_PROMPTS = 6


class Subject:
    """An exact model and what it says about a few prompts, each computed alone and at once."""

    def __init__(self, raw: dict[str, Any], numerics: Numerics) -> None:
        config = config_of(raw)
        self.model = build_model(config, random_tensors(config, seed=3), numerics=numerics, exact=True)
        self.prompts = [random_tokens(config, LONGEST, seed=seed) for seed in range(NUM_PROMPTS)]
        self.whole = [run_paged(self.model, [prompt], alone(LONGEST)).logits[0] for prompt in self.prompts]

    def check(self, seed: int) -> None:
        """One random company: who, how long, cut where, beside whom, on which pages and slots."""
        chance = random.Random(seed)
        which = [chance.randrange(NUM_PROMPTS) for _ in range(chance.randint(1, 4))]
        lengths = [chance.choice((chance.randint(1, 9), chance.randint(1, LONGEST))) for _ in which]
        prompts = [self.prompts[prompt][:length] for prompt, length in zip(which, lengths, strict=True)]
        steps = random_schedule(lengths, chance)
        outcome = run_paged(self.model, prompts, steps, chance=chance, poison=True)
        for prompt, length, logits in zip(which, lengths, outcome.logits, strict=True):
            where = f"seed {seed}: prompt {prompt} of {length} tokens, schedule {steps}"
            assert_same_bits(logits, self.whole[prompt][:length], where)


def assert_same_bits(found: Tensor, wanted: Tensor, where: str) -> None:
    differing = (found.view(torch.int32) != wanted.view(torch.int32)).any(-1)
    assert not bool(differing.any()), f"{where}: differs from token {int(differing.nonzero()[0])} on"


SHAPES = {"real ratios": real_ratios, "small": raw_config}
subjects = pytest.mark.parametrize(
    "subject", [(shape, numerics) for shape in SHAPES for numerics in Numerics], indirect=True, ids=str
)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    shape, numerics = request.param
    return Subject(SHAPES[shape](), numerics)


@subjects
def test_a_few_random_companies_leave_every_bit_alone(subject: Subject) -> None:
    for seed in range(5):
        subject.check(seed)


@pytest.mark.minutes
@subjects
def test_two_hundred_random_companies_leave_every_bit_alone(subject: Subject) -> None:
    """For each numerics: 100 of each shape."""
    for seed in range(100, 200):
        subject.check(seed)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(raw=raw_configs(), numerics=st.sampled_from(Numerics), seed=st.integers(0, 2**31))
def test_any_architecture_is_exact(raw: dict[str, Any], numerics: Numerics, seed: int) -> None:
    assume(raw["index_head_dim"] in (8, 16))  # the served indexer needs a power of two
    config = config_of(raw)
    chance = random.Random(seed)
    model = build_model(config, random_tensors(config, seed), numerics=numerics, exact=True)
    prompts = [random_tokens(config, 150, seed=seed + index) for index in range(2)]
    outcome = run_paged(model, prompts, random_schedule([150, 150], chance), chance=chance, poison=True)
    for prompt, logits in zip(prompts, outcome.logits, strict=True):
        assert_same_bits(logits, run_paged(model, [prompt], alone(150)).logits[0], f"seed {seed}")


@pytest.mark.slow
@pytest.mark.parametrize("numerics", Numerics)
def test_decodes_of_very_unequal_lengths_leave_every_bit_alone(numerics: Numerics) -> None:
    """So unequal that one batch computes them in several groups."""
    model = model_of(real_ratios(), numerics=numerics)
    prompts = [random_tokens(model.config, length, seed=length) for length in (1106, 24, 300)]
    steps = in_turn([[1082] + [1] * 24, [1] * 24, [277] + [1] * 23])
    batch, _ = build_batch([(0, 1090, prompts[0][:1]), (1, 9, prompts[0][:1]), (2, 284, prompts[0][:1])])
    assert len(batch.groups) > 1
    outcome = run_paged(model, prompts, steps, chance=random.Random(0), poison=True)
    for prompt, logits in zip(prompts, outcome.logits, strict=True):
        assert_same_bits(
            logits, run_paged(model, [prompt], alone(len(prompt))).logits[0], f"{len(prompt)} tokens"
        )


# --- the self-test at start-up ---


@pytest.mark.parametrize("numerics", Numerics)
def test_the_self_test_passes_where_exact_mode_is_possible(numerics: Numerics) -> None:
    check_exactness(model_of(raw_config(), numerics=numerics))


def test_the_self_test_refuses_a_model_that_depends_on_its_batch() -> None:
    """Here by a product that is off by one part in a million for every row beside it."""
    kernels = choose_kernels()

    def linear(x: Tensor, weight_NK: Tensor, exact: bool) -> Tensor:
        return kernels.linear(x, weight_NK, exact) * (1 + 1e-6 * len(x))

    model = model_of(raw_config(), kernels=replace(kernels, linear=linear))
    with pytest.raises(NotExact, match=r"logits of token \d+ depend on how the prompt is cut"):
        check_exactness(model)


def model_of(raw: dict[str, Any], **options: Any) -> Model:
    config = config_of(raw)
    return build_model(config, random_tensors(config, seed=3), exact=True, **options)

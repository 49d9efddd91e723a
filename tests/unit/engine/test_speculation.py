"""Verification on the rank: whatever is drafted and however much of it is accepted, tokens, logprobs and state are
those without drafts, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.exactness import NotExact, check_exactness
from engine.kernels.suite import choose_kernels
from engine.model.forward import Model
from engine.plan import Segment, Verified
from kvstore.layout import DRAFTS_MAX, Numerics
from kvstore.pages import pages_for
from rorqual.sampling import SamplingParams
from tests.harness.models import random_tokens, raw_config, raw_configs, real_ratios
from tests.harness.speculating import EVERYTHING, GREEDY, Oracle, Speculating, Truth, exact_model

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

torch.set_num_threads(1)

numerics_of_both_kinds = pytest.mark.parametrize("numerics", Numerics)
both_ways_of_sampling = pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING], ids=["greedy", "drawn"])

PATTERNS = [(drafts, hits) for drafts in range(DRAFTS_MAX + 1) for hits in range(drafts + 1)]
"""Every count of drafts with every count of right ones."""


class Case:
    """One sequence, what is sampled without drafts, and ranks that decode it in several slots at once."""

    def __init__(
        self, model: Model, *, num_prompt: int, num_tokens: int, sampling: SamplingParams, seed: int = 1
    ) -> None:
        self.model = model
        prompt = random_tokens(model.config, num_prompt, seed=seed).tolist()
        self.truth = Truth(model, prompt, sampling, num_tokens=num_tokens)

    def rank(self, num_slots: int, *, hits: Callable[[int, int], int]) -> Speculating:
        """Every slot holds the sequence up to its first sampled token."""
        truth = self.truth
        beyond = [*truth.tokens, *[0] * DRAFTS_MAX]
        rank = Speculating(
            self.model,
            num_slots=num_slots,
            num_pages=num_slots * pages_for(len(truth.tokens)),
            make_drafter=lambda runner, sampler: Oracle(None, dict.fromkeys(range(num_slots), beyond), hits),
            drafts=False,
        )
        for slot in range(num_slots):
            rank.begin(slot, truth.prompt, truth.sampling, tokens_max=len(truth.tokens))
        rank.prefill(range(num_slots))
        return rank

    def check_patterns(self, patterns: Sequence[Sequence[tuple[int, int]]]) -> None:
        """A slot for each pattern, whose steps go through its (drafts, hits) again and again."""
        now = [0] * len(patterns)
        rank = self.rank(len(patterns), hits=lambda slot, known: patterns[slot][now[slot]][1])
        while True:
            going = [slot for slot in range(len(patterns)) if len(rank.tokens[slot]) < len(self.truth.tokens)]
            if not going:
                break
            before = {slot: len(rank.tokens[slot]) for slot in going}
            wanted = {slot: patterns[slot][now[slot]] for slot in going}
            result = rank.decode({slot: drafts for slot, (drafts, _) in wanted.items()})
            assert [item.slot for item in result.verified] == [slot for slot in going if wanted[slot][0]]
            for item in result.verified:
                _, hits = wanted[item.slot]
                left = len(self.truth.tokens) - before[item.slot]
                assert item.num_drafts == min(wanted[item.slot][0], left - 1)
                assert item.num_accepted == min(hits, item.num_drafts)
                assert len(rank.tokens[item.slot]) == before[item.slot] + item.num_accepted + 1
            for slot in going:
                self.truth.check(rank, slot)
                now[slot] = (now[slot] + 1) % len(patterns[slot])


@numerics_of_both_kinds
@both_ways_of_sampling
@pytest.mark.parametrize("num_prompt", [3, 121, 247])
def test_every_pattern_of_right_and_wrong_drafts_gives_the_same_bits_around_every_border(
    numerics: Numerics, sampling: SamplingParams, num_prompt: int
) -> None:
    """Multiples of 4 anywhere, of 128 from 121 on, of 256 from 247 on, where a page begins too."""
    case = Case(exact_model(real_ratios(), numerics), num_prompt=num_prompt, num_tokens=20, sampling=sampling)
    mixed = [random.Random(seed).choices(PATTERNS, k=9) for seed in range(3)]
    case.check_patterns([*([pattern] for pattern in PATTERNS), *mixed])


@pytest.mark.slow
@numerics_of_both_kinds
def test_so_it_is_at_every_remainder_of_a_page(numerics: Numerics) -> None:
    """The small windows and ratios, over a page's border, with other patterns in every slot."""
    case = Case(exact_model(raw_config(), numerics), num_prompt=180, num_tokens=110, sampling=EVERYTHING)
    case.check_patterns([random.Random(seed).choices(PATTERNS, k=25) for seed in range(12)])


@pytest.mark.minutes
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    raw=raw_configs(),
    numerics=st.sampled_from(Numerics),
    sampling=st.sampled_from((GREEDY, EVERYTHING)),
    num_prompt=st.integers(1, 270),
    patterns=st.lists(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_so_it_is_with_any_architecture(
    raw: dict[str, Any],
    numerics: Numerics,
    sampling: SamplingParams,
    num_prompt: int,
    patterns: list[list[tuple[int, int]]],
) -> None:
    if raw["index_head_dim"] == 20:
        raw["index_head_dim"] = 16  # served index rows have a power of two
    case = Case(exact_model(raw, numerics), num_prompt=num_prompt, num_tokens=24, sampling=sampling)
    case.check_patterns(patterns)


@numerics_of_both_kinds
def test_sequences_verify_beside_prompts_of_others(numerics: Numerics) -> None:
    model = exact_model(raw_config(), numerics)
    cases = [Case(model, num_prompt=30, num_tokens=24, sampling=EVERYTHING, seed=seed) for seed in (1, 2)]
    truths = {slot: case.truth for slot, case in enumerate(cases)}
    known = {slot: truth.tokens for slot, truth in truths.items()}
    rank = Speculating(
        model,
        num_slots=2,
        make_drafter=lambda runner, sampler: Oracle(None, known, lambda slot, known: 2),
        drafts=False,
    )
    for slot, truth in truths.items():
        rank.begin(slot, truth.prompt, truth.sampling)
    rank.prefill([0])
    for start in range(0, 30, 6):
        chunk = Segment(slot=1, start=start, count=6, pages=rank.pages(1, start + 6), sample=start == 24)
        verifying = Segment(slot=0, start=len(rank.tokens[0]) - 1, count=1, pages=(), sample=True, drafts=3)
        result = rank.step(*((chunk, verifying) if start % 4 else (verifying, chunk)))
        assert result.verified == (Verified(slot=0, num_drafts=3, num_accepted=2),)
    assert [item.slot for item in result.sampled] == [0, 0, 0, 1]
    for slot, truth in truths.items():
        truth.check(rank, slot)


def test_the_self_test_refuses_a_model_whose_verified_rows_depend_on_their_number() -> None:
    """Here by a product that is off by one part in a million in every batch of five rows."""
    kernels = choose_kernels()

    def linear(x: Tensor, weight_NK: Tensor, exact: bool) -> Tensor:
        return kernels.linear(x, weight_NK, exact) * (1 + 1e-6 * (len(x) == DRAFTS_MAX + 1))

    model = exact_model(raw_config(), Numerics.FLOAT32)
    broken = Model(
        model.config,
        model.weights,
        numerics=model.numerics,
        kernels=replace(kernels, linear=linear),
        exact=True,
    )
    check_exactness(model)
    with pytest.raises(NotExact, match=r"logits of token \d+ depend on how the prompt is cut"):
        check_exactness(broken)


# --- the contract of a decode ---


def test_drafts_that_are_right_are_all_accepted() -> None:
    """So 20 tokens behind the first take four steps of five."""
    case = small_case(num_tokens=21)
    rank = case.rank(1, hits=lambda slot, known: DRAFTS_MAX)
    for _ in range(4):
        rank.decode({0: DRAFTS_MAX})
    assert rank.verified[0] == [Verified(slot=0, num_drafts=4, num_accepted=4)] * 4
    assert rank.tokens[0] == case.truth.tokens


def test_no_token_beyond_the_longest_is_sampled_and_no_position_behind_it_computed() -> None:
    """255 positions are computed for 256 tokens, with one page: a position more would have no page to stand on."""
    case = small_case(num_prompt=249, num_tokens=8)
    rank = case.rank(1, hits=lambda slot, known: DRAFTS_MAX)
    assert len(case.truth.tokens) == 257
    rank.decode({0: 4})
    rank.decode({0: 4})
    assert rank.tokens[0] == case.truth.tokens
    assert rank.verified[0][1] == Verified(slot=0, num_drafts=1, num_accepted=1)
    assert rank.runner.tables.num_pages[0] == 1


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_decode_of_a_full_slot_does_nothing(drafts: int) -> None:
    case = small_case(num_tokens=2)
    rank = case.rank(2, hits=lambda slot, known: 0)
    rank.decode({0: 0, 1: 0})
    before = rank.state(0)
    for slots in ((0,), (0, 1)):
        result = rank.decode(dict.fromkeys(slots, drafts))
        assert result.sampled == ()
        nothing = [Verified(slot=slot, num_drafts=0, num_accepted=0) for slot in slots]
        assert list(result.verified) == (nothing if drafts else [])
    assert rank.state(0) == before


def test_a_decode_computes_the_newest_token_wherever_its_plan_supposes_it() -> None:
    """As a plan says that was made before it was known how many drafts the one before it accepts."""
    case = small_case(num_tokens=12)
    rank = case.rank(1, hits=lambda slot, known: 3)
    first = len(rank.tokens[0]) - 1
    for number in range(3):
        rank.step(Segment(slot=0, start=first + number, count=1, pages=(), sample=True, drafts=3))
    assert rank.tokens[0] == case.truth.tokens[: len(rank.tokens[0])]
    assert len(rank.said[0]) == 12
    with pytest.raises(AssertionError, match="slot 0 knows"):
        rank.step(Segment(slot=0, start=first + 12, count=1, pages=(), sample=True))


def test_prompt_scores_come_with_the_prompt_only() -> None:
    scored = SamplingParams(seed=1, prompt_logprobs=2)
    case = small_case(num_tokens=8, sampling=scored)
    rank = case.rank(1, hits=lambda slot, known: 1)
    assert rank.decode({0: 2}).prompt_scores == ()
    case.truth.check(rank, 0)


def test_drafts_are_asked_for_only_where_there_can_be_some() -> None:
    model = exact_model(raw_config(), Numerics.FLOAT32)
    for drafter, segment, error in (
        (None, decode(drafts=1), "there is no drafter"),
        (Oracle(None, {}, lambda slot, known: 0), decode(drafts=1, lend=True), "that is lent"),
        (
            Oracle(None, {}, lambda slot, known: 0),
            Segment(slot=0, start=0, count=9, pages=(), sample=True, drafts=1),
            "behind a prompt's tokens",
        ),
    ):
        rank = Speculating(model, make_drafter=lambda runner, sampler, given=drafter: given, drafts=False)
        rank.begin(0, random_tokens(model.config, 9, seed=1).tolist(), GREEDY)
        rank.prefill([0])
        with pytest.raises(AssertionError, match=error):
            rank.step(segment)


def small_case(*, num_prompt: int = 9, num_tokens: int, sampling: SamplingParams = EVERYTHING) -> Case:
    model = exact_model(raw_config(), Numerics.FLOAT32)
    return Case(model, num_prompt=num_prompt, num_tokens=num_tokens, sampling=sampling)


def decode(*, drafts: int, lend: bool = False) -> Segment:
    return Segment(slot=0, start=9, count=1, pages=(), sample=True, drafts=drafts, lend=lend)

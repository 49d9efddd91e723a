"""float32 logits of the engine against transformers' own DeepSeek-V4, within 3e-5 of max |logit|.

Both kernel suites, exact mode and the fast one, paged state and none: whole prompts, uneven chunks, decodes token by
token, and several requests in one ragged batch. Compared up to a request's first token that makes another discrete
choice, where the oracle's own margin must be tiny. Measured: errors of 1e-6, and no token skipped in most runs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.suite import choose_kernels, reference_kernels
from engine.model.batch import build_batch
from engine.model.forward import Model
from rorqual.model_config import LayerKind, ModelConfig
from tests.harness.comparison import Tally
from tests.harness.drive import Outcome, Step, alone, in_turn, random_schedule, run_fresh, run_paged
from tests.harness.models import build_model, config_of, random_tokens, raw_configs, real_ratios
from tests.harness.oracle import Oracle, OracleRun
from tests.reference.weights import random_tensors

TOLERANCE = 3e-5
NUM_TOKENS = 270
TALLY = Tally()
"""Of all tests of this file; its last test looks at the share that was compared."""

KERNELS = {"torch": reference_kernels, "chosen": choose_kernels}
variants = pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            (kernels, exact),
            id=f"{kernels}-{'exact' if exact else 'fast'}",
            marks=[pytest.mark.slow] if kernels == "torch" else [],
        )
        for kernels in KERNELS
        for exact in (False, True)
    ],
    indirect=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Real compression ratios and window, small widths; a few long prompts whose beginnings judge shorter ones."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    prompts: list[Tensor]
    runs: list[OracleRun]

    def check(self, outcome: Outcome, requests: list[int]) -> None:
        for request, logits, picks in zip(requests, outcome.logits, outcome.picks, strict=True):
            TALLY.judge(logits, picks, self.runs[request], tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def judge() -> Judge:
    raw = real_ratios()
    config = config_of(raw)
    tensors = random_tensors(config, seed=1)
    prompts = [random_tokens(config, NUM_TOKENS, seed=seed) for seed in range(4)]
    runs = Oracle(raw, config, tensors).run(torch.stack(prompts))
    # The weights must exercise something: logits of a few units, and fewer rows picked than there are.
    assert all(1 < float(run.logits.abs().max()) < 20 for run in runs)
    assert 2 * config.index_topk < NUM_TOKENS // 4
    return Judge(config=config, tensors=tensors, prompts=prompts, runs=runs)


@pytest.fixture(scope="module")
def model(judge: Judge, request: pytest.FixtureRequest) -> Model:
    kernels, exact = request.param
    return build_model(judge.config, judge.tensors, kernels=KERNELS[kernels](), exact=exact)


@variants
def test_whole_prompts_equal_the_oracle(model: Model, judge: Judge) -> None:
    for request, prompt in enumerate(judge.prompts[:2]):
        judge.check(run_paged(model, [prompt], alone(NUM_TOKENS), record=True), [request])


@variants
def test_whole_prompts_without_a_past_equal_the_oracle(model: Model, judge: Judge) -> None:
    with torch.no_grad():
        outcome = run_fresh(
            model, [prompt[: NUM_TOKENS - 3 * i] for i, prompt in enumerate(judge.prompts)], record=True
        )
    judge.check(outcome, [0, 1, 2, 3])


@variants
def test_prompts_of_awkward_lengths_go_on_decoding_in_one_batch(model: Model, judge: Judge) -> None:
    """N < 4, and N mod 128 in {0, 1, 3, 4, 127}: prefilled together, then decoded together past the next boundary."""
    lengths = [1, 2, 3, 4, 5, 127, 128, 129, 131, 132, 255, 256, 257, 259, 260]
    requests = [index % len(judge.prompts) for index in range(len(lengths))]
    decoded = 6
    prompts = [
        judge.prompts[request][: length + decoded] for request, length in zip(requests, lengths, strict=True)
    ]
    steps = in_turn([[length] + [1] * decoded for length in lengths])
    judge.check(run_paged(model, prompts, steps, chance=random.Random(0), poison=True, record=True), requests)


@variants
def test_uneven_chunks_equal_the_oracle(model: Model, judge: Judge) -> None:
    cuts = [[3, 7, 15, 1, 100, 2, 128, 14], [128, 3, 1, 1, 127, 10], [1, 1, 1, 1, 256, 10]]
    outcome = run_paged(model, judge.prompts[:3], in_turn(cuts), poison=True, record=True)
    judge.check(outcome, [0, 1, 2])


@pytest.mark.slow
@variants
def test_decoding_token_by_token_equals_the_oracle(model: Model, judge: Judge) -> None:
    """Two requests out of step, so that they finish their windows at different times."""
    steps: list[Step] = [[(0, 1)]] * 5 + [[(0, 1), (1, 1)]] * (NUM_TOKENS - 5)
    prompts = [judge.prompts[0], judge.prompts[1][: NUM_TOKENS - 5]]
    judge.check(run_paged(model, prompts, steps, poison=True, record=True), [0, 1])


@variants
def test_decoding_past_both_kinds_of_rows_equals_the_oracle(model: Model, judge: Judge) -> None:
    """Two requests out of step: one ends its 128-token windows where the other is in the midst of one."""
    steps: list[Step] = [[(0, 124), (1, 251)], *[[(0, 1), (1, 1)]] * 9]
    prompts = [judge.prompts[0][:133], judge.prompts[1][:260]]
    judge.check(run_paged(model, prompts, steps, chance=random.Random(3), poison=True, record=True), [0, 1])


@variants
def test_chunks_and_decodes_of_many_requests_mix_in_one_batch(model: Model, judge: Judge) -> None:
    lengths = [270, 3, 140, 200, 64, 1]
    requests = [index % len(judge.prompts) for index in range(len(lengths))]
    prompts = [judge.prompts[request][:length] for request, length in zip(requests, lengths, strict=True)]
    chance = random.Random(7)
    steps = random_schedule(lengths, chance)
    judge.check(run_paged(model, prompts, steps, chance=chance, poison=True, record=True), requests)


@pytest.mark.slow
def test_a_prompt_of_several_pages_and_a_short_one_beside_it_equal_the_oracle() -> None:
    """At last decoded together, so unequal that one batch computes them in several groups."""
    raw = real_ratios(index_topk=40)
    config = config_of(raw)
    tensors = random_tensors(config, seed=4)
    prompt = random_tokens(config, 1106, seed=4)
    (wanted,) = Oracle(raw, config, tensors).run(prompt.unsqueeze(0))
    batch, _ = build_batch([(0, 1090, prompt[:1]), (1, 9, prompt[:1])])
    assert len(batch.groups) == 2
    for exact in (False, True):
        model = build_model(config, tensors, exact=exact)
        for cuts in ([[1106], [24]], [[1020, 1, 60, 1] + [1] * 24, [1] * 24]):
            prompts = [prompt, prompt[:24]]
            outcome = run_paged(
                model, prompts, in_turn(cuts), chance=random.Random(1), poison=True, record=True
            )
            for logits, picks in zip(outcome.logits, outcome.picks, strict=True):
                TALLY.judge(logits, picks, wanted, tolerance=TOLERANCE)


def check_drawn(raw: dict[str, Any], seed: int) -> None:
    """One drawn architecture: a random company of requests through paged state, and whole prompts without a past."""
    chance = random.Random(seed)
    config = config_of(raw)
    tensors = random_tensors(config, seed)
    length = chance.choice((40, 150))
    lengths = [length, *(chance.randint(1, length) for _ in range(chance.randint(0, 3)))]
    tokens = torch.stack([random_tokens(config, length, seed=seed + index) for index in range(len(lengths))])
    runs = Oracle(raw, config, tensors).run(tokens)
    prompts = [row[:count] for row, count in zip(tokens, lengths, strict=True)]
    model = build_model(
        config, tensors, kernels=KERNELS[chance.choice(sorted(KERNELS))](), exact=chance.choice((False, True))
    )
    outcomes = [
        run_paged(model, prompts, random_schedule(lengths, chance), chance=chance, poison=True, record=True)
    ]
    with torch.no_grad():
        outcomes.append(run_fresh(model, prompts, record=True))
    for outcome in outcomes:
        for logits, picks, run in zip(outcome.logits, outcome.picks, runs, strict=True):
            TALLY.judge(logits, picks, run, tolerance=TOLERANCE)


# Shrinking would take minutes, and the example that is printed can be run again as it is.
drawn = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


@settings(drawn, max_examples=5)
@given(raw=raw_configs(), seed=st.integers(0, 2**31))
def test_a_few_drawn_architectures_equal_the_oracle(raw: dict[str, Any], seed: int) -> None:
    check_drawn(raw, seed)


@pytest.mark.slow
@settings(drawn, max_examples=40)
@given(raw=raw_configs(), seed=st.integers(0, 2**31))
def test_many_drawn_architectures_equal_the_oracle(raw: dict[str, Any], seed: int) -> None:
    check_drawn(raw, seed)


def test_drawn_architectures_differ_in_what_matters() -> None:
    kinds: set[LayerKind] = set()

    @settings(max_examples=30, derandomize=True, database=None)
    @given(raw=raw_configs())
    def collect(raw: dict[str, Any]) -> None:
        config = config_of(raw)
        kinds.update(item.kind for item in config.layers)
        assert config.index_num_heads >= 16
        assert config.nope_head_dim > 0

    collect()
    assert kinds == set(LayerKind)


def test_another_choice_ends_the_comparison_where_it_was_near_and_is_an_error_elsewhere(judge: Judge) -> None:
    model = build_model(judge.config, judge.tensors)
    outcome = run_paged(model, judge.prompts[:1], alone(NUM_TOKENS), record=True)
    logits, picks, run = outcome.logits[0], outcome.picks[0], judge.runs[0]
    picks.rows[3][200, :2] ^= True
    picks.experts[2][207, 0] = -1
    logits[200:] += 100
    with pytest.raises(AssertionError, match=r"position=200, layer=3, kind='rows'"):
        Tally().judge(logits, picks, run, tolerance=TOLERANCE)
    near = replace(run, margins={**run.margins, (3, "rows"): torch.full((NUM_TOKENS,), 1e-6)})
    tally = Tally()
    tally.judge(logits, picks, near, tolerance=TOLERANCE)
    assert (tally.compared, tally.total) == (200, NUM_TOKENS)
    logits[199] += 1
    with pytest.raises(AssertionError, match="of max"):
        tally.judge(logits, picks, near, tolerance=TOLERANCE)


def test_at_least_nine_tokens_in_ten_were_compared(record_property: Any) -> None:
    if not TALLY.total:
        pytest.skip("needs the other tests of this file to have run before it")
    figure = f"{TALLY.share:.2%} of {TALLY.total} tokens, worst error {TALLY.worst:.1e} of max |logit|"
    record_property("figure", f"float32 against transformers: compared {figure}")
    assert TALLY.share >= 0.9, figure

"""The sampler against a slow oracle, alone and in company, before and after a preemption."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.kernels.gumbel import gumbel_noise
from engine.kernels.registry import choose
from engine.plan import SlotOpen
from engine.sampler import TEMPERATURE_MIN, Continuation, Sampler
from rorqual.sampling import SamplingParams

torch.set_num_threads(1)

CPU = torch.device("cpu")
IMPLEMENTATIONS = {
    "fast": {},
    "reference": {"argmax": "torch", "gumbel_argmax": "torch", "truncate": "torch"},
}


def new_sampler(vocab_size, implementation="fast"):
    return Sampler(vocab_size=vocab_size, device=CPU, kernels=choose("cpu", IMPLEMENTATIONS[implementation]))


def slot_open(slot, params, tokens=(), num_prompt=None):
    encoded = np.array(tokens, dtype="<i4").tobytes()
    return SlotOpen(slot, encoded, len(tokens) if num_prompt is None else num_prompt, params)


def sample_one(params, row, *, tokens=(), num_prompt=None, position=10, implementation="fast"):
    sampler = new_sampler(len(row), implementation)
    sampler.open(slot_open(0, params, tokens, num_prompt))
    [sampled] = sampler.sample([0], [position], torch.tensor([row], dtype=torch.float32))
    return sampled


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Each feature is on about half the time, so that every mix of needs meets in a batch."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    return SamplingParams(
        seed=rng.getrandbits(63),
        choice=rng.randrange(4),
        temperature=maybe(rng.uniform(0.1, 2.0), rng.choice([0.0, 1.0])),
        top_k=maybe(rng.randrange(1, vocab_size + 3), 0),
        top_p=maybe(rng.random(), 1.0),
        min_p=maybe(rng.random() * 0.2, 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.3, 3.0), 1.0),
        logit_bias=maybe(
            tuple((rng.randrange(vocab_size), rng.uniform(-5, 5)) for _ in range(rng.randrange(1, 4))), ()
        ),
        logprobs=maybe(rng.randrange(6), None),
    )


# An oracle: one row, one token at a time ------------------------------------------------------------


def oracle(params, row, tokens, num_prompt, position):
    """The token by the definitions, in float32 as the sampler does. None when a cut is too close."""
    f = np.float32
    bias = {}
    for token, value in params.logit_bias:
        bias[token] = bias.get(token, 0.0) + value
    scores = []
    for token, logit in enumerate(row):
        score = f(logit)
        if token in bias:
            score = score + f(bias[token])
        if token in tokens and params.repetition_penalty != 1:
            penalty = f(params.repetition_penalty)
            score = score / penalty if score > 0 else score * penalty
        count = list(tokens[num_prompt:]).count(token)
        score = score - f(params.frequency_penalty) * f(count)
        score = score - f(params.presence_penalty) * f(count > 0)
        scores.append(score)
    if params.temperature == 0:
        return scores.index(max(scores))
    scores = [score / f(params.temperature) for score in scores]
    likeliest = max(scores)
    kept = sorted(range(len(row)), key=lambda token: (-scores[token], token))
    if params.min_p > 0:
        kept = [token for token in kept if float(scores[token]) - float(likeliest) >= math.log(params.min_p)]
    if params.top_k:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        kept = nucleus([(token, math.exp(float(scores[token] - likeliest))) for token in kept], params.top_p)
        if kept is None:
            return None
    noise = {token: noise_of(params, position, token) for token in kept}
    return max(sorted(kept), key=lambda token: float(scores[token]) + noise[token])


def nucleus(weighted, top_p):
    total = sum(weight for _, weight in weighted)
    kept, mass = [], 0.0
    for token, weight in weighted:
        kept.append(token)
        mass += weight / total
        if abs(mass - top_p) < 1e-6:
            return None
        if mass >= top_p:
            break
    return kept


def noise_of(params, position, token):
    counters = (params.seed, params.choice, position, token)
    return gumbel_noise(*(torch.tensor(value) for value in counters)).item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(
    rng=st.randoms(use_true_random=False),
    row=st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=8),
    data=st.data(),
)
def test_a_token_is_what_the_definitions_say(implementation, rng, row, data):
    params = random_params(rng, len(row))
    tokens = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=12))
    num_prompt = data.draw(st.integers(0, len(tokens)))
    expected = oracle(params, row, tokens, num_prompt, len(tokens))
    assume(expected is not None)
    sampled = sample_one(
        params, row, tokens=tokens, num_prompt=num_prompt, position=len(tokens), implementation=implementation
    )
    assert sampled.token_id == expected


@given(
    row=st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=8),
    num=st.integers(0, 10),
)
def test_logprobs_are_of_the_raw_logits_whatever_the_filters(row, num):
    params = SamplingParams(
        seed=1, temperature=0.3, top_k=1, logit_bias=((0, 100.0),), presence_penalty=1.0, logprobs=num
    )
    log_total = math.log(sum(math.exp(value) for value in row))
    sampled = sample_one(params, row, tokens=[0], num_prompt=0)
    assert sampled.token_id == 0
    assert sampled.logprob == pytest.approx(row[0] - log_total, abs=1e-5)
    best = sorted(range(len(row)), key=lambda token: (-row[token], token))[:num]
    assert [token for token, _ in sampled.alternatives] == best
    assert [value for _, value in sampled.alternatives] == pytest.approx(
        [row[token] - log_total for token in best], abs=1e-5
    )


# Independence ------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "num_rows"), [(97, 40), (4096, 17), (129_280, 5)])
def test_a_row_is_sampled_alike_alone_and_in_any_company(vocab_size, num_rows):
    rng = random.Random(vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator) * 4
    before = logits_RV.clone()
    opens = []
    for slot in range(num_rows):
        tokens = [rng.randrange(vocab_size) for _ in range(30)]
        opens.append(slot_open(slot, random_params(rng, vocab_size), tokens, rng.randrange(31)))
    positions = [rng.randrange(10_000) for _ in range(num_rows)]

    def run(groups):
        sampler = new_sampler(vocab_size)
        for item in opens:
            sampler.open(item)
        sampled = [
            item
            for group in groups
            for item in sampler.sample(group, [positions[slot] for slot in group], logits_RV[group])
        ]
        return sorted(sampled, key=lambda item: item.slot)

    everyone = list(range(num_rows))
    shuffled = rng.sample(everyone, num_rows)
    together = run([everyone])
    assert together == run([[slot] for slot in everyone])
    assert together == run([shuffled[: num_rows // 2], shuffled[num_rows // 2 :]])
    assert logits_RV.equal(before)


def test_a_resumed_sequence_continues_as_if_it_had_never_stopped():
    vocab_size, num_steps = 40, 24
    rng = random.Random(8)
    rows = torch.randn(num_steps, vocab_size, generator=torch.Generator().manual_seed(8)) * 2
    for _ in range(20):
        params = msgspec.structs.replace(
            random_params(rng, vocab_size), frequency_penalty=0.7, repetition_penalty=1.3, logprobs=3
        )
        prompt = [rng.randrange(vocab_size) for _ in range(6)]

        def run(stops, params=params, prompt=prompt):
            sampler = new_sampler(vocab_size)
            tokens, reports = list(prompt), []
            sampler.open(slot_open(3, params, tokens, len(prompt)))
            for step in range(num_steps):
                if step in stops:
                    sampler.close(3)
                    sampler.open(slot_open(3, params, tokens, len(prompt)))
                reports += sampler.sample([3], [len(tokens)], rows[step : step + 1])
                tokens.append(reports[-1].token_id)
            return reports

        assert run(stops=()) == run(stops=(1, 5, 6, 20))


def test_seed_choice_and_position_each_change_the_draws_and_equal_ones_repeat_them():
    row = [0.0] * 50
    base = SamplingParams(seed=5)

    def draws(params, first):
        return [sample_one(params, row, position=first + step).token_id for step in range(12)]

    assert draws(base, 0) == draws(base, 0)
    assert draws(base, 4)[:8] == draws(base, 0)[4:]
    assert draws(base, 0) != draws(msgspec.structs.replace(base, seed=6), 0)
    assert draws(base, 0) != draws(msgspec.structs.replace(base, choice=1), 0)


def test_frequencies_over_positions_follow_the_filtered_softmax():
    row = [2.0, 1.0, 0.5, 0.0, -1.0, -4.0, -9.0]
    weights = [math.exp(value / 0.8) for value in row[:5]]  # top_k leaves five
    sampler = new_sampler(len(row))
    num_slots, num_steps = 50, 200
    for slot in range(num_slots):
        sampler.open(slot_open(slot, SamplingParams(seed=77, choice=slot, temperature=0.8, top_k=5)))
    logits_RV = torch.tensor([row]).expand(num_slots, -1)
    counts = [0] * len(row)
    for position in range(num_steps):
        for sampled in sampler.sample(range(num_slots), [position] * num_slots, logits_RV):
            counts[sampled.token_id] += 1
    expected = [weight / sum(weights) * num_slots * num_steps for weight in weights]
    chi_squared = sum((seen - due) ** 2 / due for seen, due in zip(counts, expected, strict=False))
    assert counts[5:] == [0, 0]
    assert chi_squared < 23.5  # 4 degrees of freedom: exceeded once in 10,000


# Drafts ------------------------------------------------------------


@pytest.mark.parametrize("num_hits", range(5))
def test_verifying_gives_what_sampling_one_by_one_gives_up_to_the_first_wrong_draft(num_hits):
    """Slots with all kinds of needs in one call, drafts right up to `num_hits`, then counts as they should be."""
    vocab_size, num_slots, num_drafts = 40, 24, 4
    rng = random.Random(num_hits)
    logits_NRV = torch.randn(
        num_slots, num_drafts + 2, vocab_size, generator=torch.Generator().manual_seed(num_hits)
    )
    opens = [
        slot_open(slot, random_params(rng, vocab_size), [rng.randrange(vocab_size) for _ in range(9)], 5)
        for slot in range(num_slots)
    ]
    stepping, verifying = new_sampler(vocab_size), new_sampler(vocab_size)
    for item in opens:
        stepping.open(item)
        verifying.open(item)
    wanted, chunks, expected = [], [], []
    for slot in range(num_slots):
        count = rng.randrange(num_hits, num_drafts + 1)
        alone = [
            stepping.sample([slot], [9 + row], logits_NRV[slot, row : row + 1])[0]
            for row in range(num_hits + 1)
        ]
        right = [item.token_id for item in alone]
        drafts = [*right[:num_hits], *[(right[-1] + 1) % vocab_size] * (count - num_hits)]
        wanted.append(Continuation(slot=slot, position=9, drafts=tuple(drafts)))
        chunks.append(logits_NRV[slot, : count + 1])
        expected.append(tuple(alone))
    assert verifying.verify(wanted, torch.cat(chunks)) == expected
    # And both go on alike.
    positions = [10 + num_hits] * num_slots
    assert verifying.sample(range(num_slots), positions, logits_NRV[:, -1]) == stepping.sample(
        range(num_slots), positions, logits_NRV[:, -1]
    )


def test_a_draft_is_the_token_that_would_be_sampled_and_counts_nothing():
    vocab_size, num_slots = 40, 24
    rng = random.Random(3)
    logits_NRV = torch.randn(num_slots, 4, vocab_size, generator=torch.Generator().manual_seed(3))
    drafting, stepping = new_sampler(vocab_size), new_sampler(vocab_size)
    for slot in range(num_slots):
        tokens = [rng.randrange(vocab_size) for _ in range(9)]
        item = slot_open(slot, random_params(rng, vocab_size), tokens, 5)
        drafting.open(item)
        stepping.open(item)
    for _ in range(2):
        drafts = [()] * num_slots
        for row in range(4):
            wanted = [Continuation(slot=slot, position=9, drafts=drafts[slot]) for slot in range(num_slots)]
            chosen = drafting.draft(wanted, logits_NRV[:, row])
            drafts = [(*before, token_id) for before, token_id in zip(drafts, chosen, strict=True)]
    for row in range(4):
        sampled = stepping.sample(range(num_slots), [9 + row] * num_slots, logits_NRV[:, row])
        assert [item.token_id for item in sampled] == [found[row] for found in drafts]


def test_a_draft_of_a_token_seen_before_is_penalised_in_every_row_behind_it():
    params = SamplingParams(seed=0, temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.1)
    sampler = new_sampler(3)
    sampler.open(slot_open(0, params))
    rows = torch.tensor([[1.0, 0.8, 0.5]]).expand(3, -1)
    [accepted] = sampler.verify([Continuation(slot=0, position=0, drafts=(0, 1))], rows)
    assert [item.token_id for item in accepted] == [0, 1, 2]


# Each feature, by example ------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_greedy_takes_the_lowest_id_of_equal_logits(implementation):
    for temperature in (0.0, TEMPERATURE_MIN / 2):
        params = SamplingParams(seed=1, temperature=temperature)
        assert sample_one(params, [0.0, 3.0, 3.0, 1.0], implementation=implementation).token_id == 1


def test_top_k_of_one_equals_greedy_at_any_temperature():
    for position in range(50):
        params = SamplingParams(seed=1, temperature=2.0, top_k=1)
        assert sample_one(params, [0.0, 3.0, 3.0, 1.0], position=position).token_id == 1


def test_presence_and_frequency_look_at_the_output_and_repetition_at_the_prompt_too():
    row = [1.0, 0.8, 0.0]
    presence = SamplingParams(seed=0, temperature=0.0, presence_penalty=0.5)
    frequency = SamplingParams(seed=0, temperature=0.0, frequency_penalty=0.15)
    repetition = SamplingParams(seed=0, temperature=0.0, repetition_penalty=2.0)
    assert sample_one(presence, row, tokens=[0, 0], num_prompt=2).token_id == 0
    assert sample_one(presence, row, tokens=[0, 0], num_prompt=1).token_id == 1
    assert sample_one(frequency, row, tokens=[0, 0], num_prompt=1).token_id == 0
    assert sample_one(frequency, row, tokens=[0, 0], num_prompt=0).token_id == 1
    assert sample_one(repetition, row, tokens=[0], num_prompt=1).token_id == 1
    assert sample_one(repetition, [-1.0, -1.5], tokens=[0], num_prompt=1).token_id == 1


def test_each_sampled_token_counts_against_the_next():
    sampler = new_sampler(3)
    sampler.open(slot_open(0, SamplingParams(seed=0, temperature=0.0, frequency_penalty=0.3)))
    row = torch.tensor([[1.0, 0.8, 0.0]])
    drawn = [sampler.sample([0], [position], row)[0].token_id for position in range(6)]
    assert drawn == [0, 1, 0, 1, 0, 1]
    sampler.close(0)
    sampler.open(slot_open(0, SamplingParams(seed=0, temperature=0.0, frequency_penalty=0.3)))
    assert sampler.sample([0], [0], row)[0].token_id == 0, "the slot's last owner left its counts behind"


def test_biases_that_name_a_token_twice_add_up():
    params = SamplingParams(seed=0, temperature=0.0, logit_bias=((2, 1.0), (1, 1.5), (2, 1.0)))
    assert sample_one(params, [1.0, 0.0, 0.0]).token_id == 2


def test_extreme_but_allowed_parameters_keep_every_logit_finite():
    for params in (
        SamplingParams(seed=0, temperature=TEMPERATURE_MIN),
        SamplingParams(seed=0, temperature=5e-324),
        SamplingParams(seed=0, repetition_penalty=5e-324),
        SamplingParams(
            seed=0, temperature=TEMPERATURE_MIN, repetition_penalty=5e-324, min_p=5e-324, top_p=0.0
        ),
    ):
        assert sample_one(params, [0.0, 1e4, -1e4], tokens=[0, 1, 2]).token_id == 1


def test_no_logprobs_unless_asked_and_none_but_the_tokens_own_at_zero():
    row = [0.0, 1.0]
    assert sample_one(SamplingParams(seed=0, temperature=0.0), row).logprob is None
    own = sample_one(SamplingParams(seed=0, temperature=0.0, logprobs=0), row)
    assert own.logprob == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)
    assert own.alternatives == ()


def test_prompt_scores_are_the_same_however_the_rows_are_cut():
    vocab_size = 4096
    logits_RV = torch.randn(600, vocab_size, generator=torch.Generator().manual_seed(4)).round(decimals=1)
    token_ids = np.random.default_rng(4).integers(0, vocab_size, 600).astype(np.int32)
    sampler = new_sampler(vocab_size)

    def scored(first, last):
        return sampler.prompt_scores(
            7,
            first_position=1 + first,
            logits_RV=logits_RV[first:last],
            token_ids=token_ids[first:last],
            num_alternatives=4,
        )

    whole, head, tail = scored(0, 600), scored(0, 1), scored(1, 600)
    assert (whole.slot, whole.first, tail.first) == (7, 1, 2)
    assert whole.logprobs == head.logprobs + tail.logprobs
    assert whole.alternatives == head.alternatives + tail.alternatives
    row = logits_RV[599].double()
    assert whole.logprobs[599] == pytest.approx((row[token_ids[599]] - row.logsumexp(0)).item(), abs=1e-5)
    best = sorted(range(vocab_size), key=lambda token: (-row[token].item(), token))[:4]
    assert [token for token, _ in whole.alternatives[599]] == best
    assert scored(5, 5).logprobs == ()


# Life of a slot ------------------------------------------------------------


def test_slots_are_owned_once_and_counts_return_to_zero():
    sampler = new_sampler(4)
    params = SamplingParams(seed=0)
    sampler.open(slot_open(0, params))
    with pytest.raises(AssertionError, match="slot 0 opened twice"):
        sampler.open(slot_open(0, params))
    sampler.close(0)
    with pytest.raises(AssertionError, match="slot 0 closed but not open"):
        sampler.close(0)
    assert sampler.num_open == 0
    assert sampler.sample([], [], torch.empty(0, 4)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_the_process_by_name(temperature, top_p, value):
    params = SamplingParams(seed=0, temperature=temperature, top_p=top_p)
    with pytest.raises(AssertionError, match="slot 0, position 10: logits hold NaN or infinity"):
        sample_one(params, [0.0, value, 1.0])


def test_a_call_that_does_not_fit_together_is_refused():
    sampler = new_sampler(4)
    sampler.open(slot_open(0, SamplingParams(seed=0)))
    with pytest.raises(AssertionError, match="logits of shape"):
        sampler.sample([0], [1], torch.zeros(1, 5))
    with pytest.raises(AssertionError, match=r"logits are torch\.float64"):
        sampler.sample([0], [1], torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(AssertionError, match="sampled twice"):
        sampler.sample([0, 0], [1, 2], torch.zeros(2, 4))
    with pytest.raises(AssertionError, match="outside the vocabulary"):
        sampler.open(slot_open(1, SamplingParams(seed=0, presence_penalty=1.0), [4], 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_warm_up_leaves_nothing_open(implementation):
    sampler = new_sampler(300, implementation)
    sampler.warm_up()
    assert sampler.num_open == 0

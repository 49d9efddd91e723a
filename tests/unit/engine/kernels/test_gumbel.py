"""The noise against plain integers and `math.log`, its statistics, and every argmax kernel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.gumbel import gumbel_argmax_torch, gumbel_noise
from engine.kernels.registry import implementations

torch.set_num_threads(1)

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

gumbel_kernels = pytest.mark.parametrize(
    "gumbel_argmax", [item.function for item in implementations("gumbel_argmax", "cpu")]
)
other_gumbel_kernels = pytest.mark.parametrize(
    "gumbel_argmax",
    [item.function for item in implementations("gumbel_argmax", "cpu") if item.name != "torch"],
)
argmax_kernels = pytest.mark.parametrize(
    "argmax", [item.function for item in implementations("argmax", "cpu")]
)


def mix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * MIX_1) & MASK
    bits = ((bits ^ (bits >> 27)) * MIX_2) & MASK
    return bits ^ (bits >> 31)


def unmix(bits: int) -> int:
    """The inverse of `mix`, to find a token id whose hash is any 64 bits we like."""
    for shift, factor in ((31, MIX_2), (27, MIX_1), (30, None)):
        original = bits
        for _ in range(64 // shift):
            original = bits ^ (original >> shift)
        bits = original if factor is None else (original * pow(factor, -1, 2**64)) & MASK
    return bits


def row_key(seed: int, choice: int, position: int) -> int:
    key = mix((seed + GOLDEN) & MASK)
    key = mix(((key ^ choice) + GOLDEN) & MASK)
    return mix(((key ^ position) + GOLDEN) & MASK)


def noise_of(seed: int, choice: int, position: int, token_id: int) -> float:
    return gumbel_noise(*(torch.tensor(value) for value in (seed, choice, position, token_id))).item()


seeds = st.integers(0, 2**63 - 1)
choices = st.integers(0, 1023)
positions = st.integers(0, 2**20)
token_ids = st.integers(0, 2**18)


@given(seeds, choices, positions, token_ids)
def test_noise_is_the_gumbel_transform_of_a_splitmix_stream(seed, choice, position, token_id):
    bits = mix((row_key(seed, choice, position) + (token_id + 1) * GOLDEN) & MASK)
    uniform = ((bits >> 12) + 0.5) / 2**52
    # log(u) itself is good to an ulp only in absolute terms when u is near 1: log1p keeps the far tail exact.
    exponential = -math.log1p(uniform - 1.0) if uniform > 0.5 else -math.log(uniform)
    assert noise_of(seed, choice, position, token_id) == pytest.approx(
        -math.log(exponential), rel=1e-14, abs=1e-14
    )


def test_noise_never_changes_between_releases():
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 from seed 0
    assert noise_of(0, 0, 0, 0).hex() == "-0x1.6dc5326677b11p-1"
    assert noise_of(1, 2, 3, 4).hex() == "0x1.59c95d0548ea3p-1"
    assert noise_of(2**63 - 1, 1023, 10**6, 129_279).hex() == "0x1.79958de654712p+0"


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0, -math.log(53 * math.log(2))),
        (MASK, 53 * math.log(2)),  # u = 1 - 2^-53
        (1 << 63, -math.log(math.log(2))),
    ],
)
def test_noise_is_finite_and_exact_at_the_ends_of_the_uniform_range(bits, expected):
    token_id = ((unmix(bits) - row_key(7, 1, 9)) * pow(GOLDEN, -1, 2**64) - 1) & MASK
    signed = token_id - 2**64 if token_id >= 2**63 else token_id
    assert noise_of(7, 1, 9, signed) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("axis", ["seed", "choice", "position", "token"])
def test_neighbours_along_every_axis_draw_independent_uniform_noise(axis):
    steps = torch.arange(20_001)
    counters = {name: torch.tensor(5) for name in ("seed", "choice", "position", "token")} | {axis: steps}
    noise = gumbel_noise(counters["seed"], counters["choice"], counters["position"], counters["token"])
    uniform = torch.exp(-torch.exp(-noise)).numpy()
    pairs, _, _ = np.histogram2d(uniform[:-1], uniform[1:], bins=8, range=((0, 1), (0, 1)))
    expected = 20_000 / 64
    # 63 degrees of freedom: 117 is exceeded once in 30,000 draws of truly independent pairs.
    assert ((pairs - expected) ** 2 / expected).sum() < 117


@gumbel_kernels
@pytest.mark.parametrize("axis", ["seeds", "choices", "positions"])
def test_sampled_frequencies_follow_the_softmax_of_the_logits(gumbel_argmax, axis):
    num_draws = 20_000
    logits_V = torch.linspace(-2.0, 3.0, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    counters = {name: torch.full((num_draws,), 11) for name in ("seeds", "choices", "positions")}
    counters[axis] = torch.arange(num_draws)
    drawn = gumbel_argmax(
        logits_V.expand(num_draws, 16), counters["seeds"], counters["choices"], counters["positions"]
    )
    expected = torch.softmax(logits_V.double(), dim=0) * num_draws
    observed = torch.bincount(drawn, minlength=16)
    # 15 degrees of freedom: 44 is exceeded once in 10,000.
    assert ((observed - expected) ** 2 / expected).sum() < 44


@gumbel_kernels
@given(data=st.data())
def test_every_gumbel_kernel_picks_the_largest_sum_of_logit_and_noise(gumbel_argmax, data):
    num_rows = data.draw(st.integers(1, 4))
    vocab_size = data.draw(st.integers(1, 9))
    logit = st.one_of(st.just(-math.inf), st.sampled_from([0.0, -0.0, 1.0]), st.floats(-60, 60, width=32))
    rows = [data.draw(st.lists(logit, min_size=vocab_size, max_size=vocab_size)) for _ in range(num_rows)]
    counters = [data.draw(st.tuples(seeds, choices, positions)) for _ in range(num_rows)]
    seeds_R, choices_R, positions_R = (torch.tensor(column) for column in zip(*counters, strict=True))
    expected = []
    for row, (seed, choice, position) in zip(rows, counters, strict=True):
        scores = [value + noise_of(seed, choice, position, token) for token, value in enumerate(row)]
        expected.append(scores.index(max(scores)) if max(scores) > -math.inf else -1)
    assert gumbel_argmax(torch.tensor(rows), seeds_R, choices_R, positions_R).tolist() == expected


@other_gumbel_kernels
@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 129_280])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_every_other_gumbel_kernel_equals_the_reference_on_many_rows(gumbel_argmax, vocab_size, scale):
    generator = torch.Generator().manual_seed(vocab_size)
    num_rows = 3 if vocab_size > 5000 else 60
    logits_RV = torch.randn(num_rows, vocab_size, generator=generator) * scale
    logits_RV[1::2].masked_fill_(torch.rand(logits_RV[1::2].shape, generator=generator) < 0.9, -math.inf)
    logits_RV[:, 0] = 0.0
    counters = [torch.randint(0, high, (num_rows,), generator=generator) for high in (2**63 - 1, 1024, 2**20)]
    assert gumbel_argmax(logits_RV, *counters).equal(gumbel_argmax_torch(logits_RV, *counters))


@gumbel_kernels
def test_a_gumbel_row_does_not_depend_on_its_company_or_memory_layout(gumbel_argmax):
    logits_RV = torch.randn(37, 501, generator=torch.Generator().manual_seed(1))
    counters = [torch.arange(37) * factor for factor in (7, 1, 3)]
    together = gumbel_argmax(logits_RV, *counters)
    alone = torch.cat(
        [gumbel_argmax(logits_RV[i : i + 1], *(c[i : i + 1] for c in counters)) for i in range(37)]
    )
    strided = gumbel_argmax(logits_RV.T.contiguous().T, *counters)
    assert together.equal(alone)
    assert together.equal(strided)


BROKEN_ROWS = torch.tensor(
    [
        [0.0, math.nan, 1.0],
        [math.nan, 0.0, 1.0],
        [0.0, 1.0, math.nan],
        [0.0, math.inf, 1.0],
        [-math.inf] * 3,
        [math.inf, math.nan, -math.inf],
    ]
)


@gumbel_kernels
def test_gumbel_gives_minus_one_for_a_row_without_a_finite_winner(gumbel_argmax):
    rows = torch.cat([BROKEN_ROWS, torch.zeros(1, 3)])
    counters = [torch.arange(7)] * 3
    chosen = gumbel_argmax(rows, *counters).tolist()
    assert chosen[:6] == [-1] * 6
    assert chosen[6] >= 0


@argmax_kernels
def test_argmax_gives_minus_one_for_a_row_without_a_finite_winner(argmax):
    assert argmax(torch.cat([BROKEN_ROWS, torch.zeros(1, 3)])).tolist() == [-1] * 6 + [0]


@argmax_kernels
@given(rows=st.lists(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 2.0]), min_size=40, max_size=40), min_size=1))
def test_argmax_takes_the_lowest_id_of_equal_logits(argmax, rows):
    assert argmax(torch.tensor(rows)).tolist() == [row.index(max(row)) for row in rows]


@argmax_kernels
def test_argmax_takes_the_lowest_id_in_a_large_vocabulary_too(argmax):
    logits_RV = torch.randn(3, 129_280, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    first_of_largest = [int((row == row.max()).nonzero()[0]) for row in logits_RV]
    assert argmax(logits_RV).tolist() == first_of_largest

"""Every `truncate` kernel against a plain-Python oracle, and against the reference bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.registry import implementations
from engine.kernels.truncate import VOCAB_SIZE_MAX, truncate_torch

torch.set_num_threads(1)

kernels = pytest.mark.parametrize("truncate", [item.function for item in implementations("truncate", "cpu")])
other_kernels = pytest.mark.parametrize(
    "truncate", [item.function for item in implementations("truncate", "cpu") if item.name != "torch"]
)

logits = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, -math.inf]), st.floats(-50, 50, width=32))
rows = st.lists(logits, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)
log_min_ps = st.one_of(st.just(-math.inf), st.just(0.0), st.floats(-5, 0))
top_ps = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def cut(truncate, row, *, log_min_p=-math.inf, top_k=None, top_p=1.0):
    """The ids that one row keeps, after a check that kept logits are untouched."""
    kept = truncate(
        torch.tensor([row], dtype=torch.float32),
        torch.tensor([log_min_p], dtype=torch.float64),
        torch.tensor([len(row) if top_k is None else top_k]),
        torch.tensor([top_p], dtype=torch.float64),
    )[0].tolist()
    ids = [token for token, value in enumerate(kept) if value > -math.inf]
    assert [kept[token] for token in ids] == [row[token] for token in ids]
    return ids


@kernels
@given(row=rows, log_min_p=log_min_ps, top_k=st.integers(1, 14), top_p=top_ps)
def test_the_three_cuts_keep_what_their_definitions_say(truncate, row, log_min_p, top_k, top_p):
    largest = max(row)
    candidates = [
        token for token, value in enumerate(row) if value > -math.inf and value - largest >= log_min_p
    ]
    candidates = sorted(candidates, key=lambda token: (-row[token], token))[:top_k]
    kept = cut(truncate, row, log_min_p=log_min_p, top_k=top_k, top_p=top_p)
    assert sorted(candidates[: len(kept)]) == kept, "not the likeliest of the candidates, lowest ids first"
    weights = [math.exp(row[token] - largest) for token in candidates]
    mass = sum(weights[: len(kept)]) / sum(weights)
    mass_without_last = sum(weights[: len(kept) - 1]) / sum(weights)
    assert len(kept) >= 1
    # The fixed-point masses are good to 2^-44 of the heaviest, which leaves these margins and no more.
    assert mass >= top_p - 1e-11
    if top_p == 1:
        assert len(kept) == len(candidates)
    elif len(kept) > 1:
        assert mass_without_last < top_p + 1e-11


@other_kernels
@given(
    batch=st.lists(st.lists(logits, min_size=7, max_size=7), min_size=1, max_size=4),
    log_min_p=log_min_ps,
    top_k=st.integers(1, 8),
    top_p=top_ps,
)
def test_every_other_kernel_equals_the_reference(truncate, batch, log_min_p, top_k, top_p):
    logits_RV = torch.tensor(batch, dtype=torch.float32)
    num_rows = len(batch)
    settings = (
        torch.full((num_rows,), log_min_p, dtype=torch.float64),
        torch.full((num_rows,), top_k),
        torch.full((num_rows,), top_p, dtype=torch.float64),
    )
    assert truncate(logits_RV, *settings).equal(truncate_torch(logits_RV, *settings))


@other_kernels
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_every_other_kernel_equals_the_reference_on_a_large_vocabulary(truncate, scale):
    generator = torch.Generator().manual_seed(5)
    # Rounded, so that thousands of tokens share the logit at which a cut falls.
    logits_RV = torch.randn(5, 129_280, generator=generator).mul(scale).round(decimals=2)
    settings = (
        torch.tensor([-math.inf, -math.inf, -3.0, -math.inf, -5.0], dtype=torch.float64),
        torch.tensor([129_280, 1000, 129_280, 129_280, 5000]),
        torch.tensor([0.9, 0.95, 1.0, 0.999999, 0.5], dtype=torch.float64),
    )
    assert truncate(logits_RV, *settings).equal(truncate_torch(logits_RV, *settings))


@kernels
def test_a_row_does_not_depend_on_its_company_and_the_input_is_untouched(truncate):
    generator = torch.Generator().manual_seed(6)
    logits_RV = torch.randn(23, 301, generator=generator) * 3
    before = logits_RV.clone()
    settings = (
        torch.where(torch.rand(23, generator=generator) < 0.5, -math.inf, -4.0).double(),
        torch.randint(1, 302, (23,), generator=generator),
        torch.rand(23, generator=generator).double(),
    )
    together = truncate(logits_RV, *settings)
    alone = [truncate(logits_RV[i : i + 1], *(item[i : i + 1] for item in settings)) for i in range(23)]
    assert together.equal(torch.cat(alone))
    assert together.equal(truncate(logits_RV.T.contiguous().T, *settings))
    assert logits_RV.equal(before)


@kernels
def test_equal_logits_at_a_cut_stay_by_lowest_id(truncate):
    row = [1.0, 2.0, 1.0, 2.0, 1.0]
    assert cut(truncate, row, top_k=1) == [1]
    assert cut(truncate, row, top_k=3) == [0, 1, 3]
    assert cut(truncate, [0.0] * 4, top_p=0.5) == [0, 1]
    assert cut(truncate, [0.0] * 4, top_p=0.51) == [0, 1, 2]
    assert cut(truncate, [-0.0, 0.0, -0.0], top_k=2) == [0, 1]


@kernels
def test_top_p_counts_the_mass_that_min_p_and_top_k_left(truncate):
    row = [math.log(weight) for weight in (0.4, 0.3, 0.2, 0.1)]
    row = torch.tensor(row, dtype=torch.float32).tolist()
    assert cut(truncate, row, top_p=0.69) == [0, 1]
    assert cut(truncate, row, top_p=0.71) == [0, 1, 2]
    # Of the two that top-k leaves, the first alone holds 4/7 = 0.571.
    assert cut(truncate, row, top_k=2, top_p=0.57) == [0]
    assert cut(truncate, row, top_k=2, top_p=0.58) == [0, 1]
    assert cut(truncate, row, log_min_p=math.log(0.7), top_p=0.57) == [0]


@kernels
def test_the_likeliest_token_survives_any_cut(truncate):
    assert cut(truncate, [0.0, 5.0, 5.0], log_min_p=0.0, top_k=1, top_p=0.0) == [1]
    assert cut(truncate, [-(2.0**127), 2.0**127], top_p=0.0) == [1]


@kernels
@pytest.mark.parametrize("row", [[0.0, math.nan], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_a_row_whose_largest_value_is_not_finite_comes_back_empty(truncate, row):
    assert cut(truncate, row) == []
    assert cut(truncate, row, top_k=1, top_p=0.5) == []


@kernels
def test_the_largest_vocabulary_allowed_does_not_overflow_the_masses(truncate):
    assert len(cut(truncate, [0.0] * VOCAB_SIZE_MAX, top_p=0.75)) == VOCAB_SIZE_MAX * 3 // 4


@kernels
def test_a_larger_vocabulary_is_refused(truncate):
    with pytest.raises(AssertionError, match="exceeds"):
        cut(truncate, [0.0] * (VOCAB_SIZE_MAX + 1))

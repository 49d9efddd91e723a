"""The conformance suite: every implementation of every operation of `engine.kernels.suite` keeps the contract.

Contracts are the docstrings of the `torch` implementations. Floats are judged by the `torch` formula in float64 (all
implementations, `torch` in float32 too), whole numbers by plain Python. An operation without a case fails the suite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.registry import implementations
from engine.kernels.suite import Kernels, choose_kernels, reference_kernels
from rorqual.errors import ConfigError

torch.set_num_threads(1)

OPERATIONS = [field.name for field in dataclasses.fields(Kernels) if field.name != "names"]
HC_EPS = 1e-6

examples = settings(max_examples=15)  # of each of about 50 tests
few = st.integers(0, 9)  # rows, none included
widths = st.sampled_from((1, 2, 3, 7, 8, 16, 33, 64, 70))


def normal(draw: st.DrawFn, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(st.sampled_from((1.0, 0.03, 20.0))) * torch.randn(shape, generator=generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An operation on floats. `rows` are the numbers of the arguments whose first axis is a batch of independent
    rows; arguments that are not tensors are passed as they are."""

    draw: Callable[[st.DrawFn], tuple[Any, ...]]
    rows: tuple[int, ...]
    tolerance: float = 2e-6
    truth: Callable[..., Any] | None = None  # where the torch implementation in float64 is not the truth


def hc_split_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, streams, width = draw(few), draw(st.integers(1, 4)), draw(widths)
    columns = (2 + streams) * streams
    iters = draw(st.sampled_from((1, 2, 20)))
    # The mix is a product of the streams, so it grows with them; gates far beyond their range would measure nothing.
    size = draw(st.sampled_from((0.03, 1.0, 20.0)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mix = size * torch.randn(count, columns, generator=generator)
    x = size * torch.randn(count, streams, width, generator=generator)
    scale, base = torch.randn(3, generator=generator), torch.randn(columns, generator=generator)
    return mix, x, scale, base, iters, HC_EPS, 1e-6


def hc_merge_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, streams, width = draw(few), draw(st.integers(1, 4)), draw(widths)
    comb = torch.softmax(normal(draw, count, streams, streams), -1)
    return normal(draw, count, width), normal(draw, count, streams), comb, normal(draw, count, streams, width)


def hc_collapse_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, streams, width = draw(few), draw(st.integers(1, 4)), draw(widths)
    x = normal(draw, count, streams, width)
    return normal(draw, count, streams), x, normal(draw, 1), normal(draw, streams), HC_EPS, 1e-6


def rope_angles_args(draw: st.DrawFn) -> tuple[Any, ...]:
    positions = draw(st.lists(st.integers(0, 2**20), max_size=9))
    frequencies = 10000.0 ** -torch.linspace(0, 1, draw(st.integers(0, 33)))
    return torch.tensor(positions, dtype=torch.int64), frequencies


def rope_angles_truth(positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = (positions.float().unsqueeze(-1) * frequencies.float()).double()
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def norm_rope_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, heads, width = draw(few), draw(st.integers(1, 5)), draw(widths)
    angles = normal(draw, count, draw(st.integers(0, width // 2)))
    turns = torch.stack((angles.cos(), angles.sin()), dim=-1)
    weight = normal(draw, width) if draw(st.booleans()) else None
    return normal(draw, count, heads, width), weight, turns, 1e-6


def rope_args(draw: st.DrawFn) -> tuple[Any, ...]:
    x, _, turns, _ = norm_rope_args(draw)
    return x, turns, draw(st.booleans())


def rms_norm_args(draw: st.DrawFn) -> tuple[Any, ...]:
    width = draw(widths)
    shape = draw(st.sampled_from(((4,), (2, 3), (0,), (1,))))
    weight = normal(draw, width) if draw(st.booleans()) else None
    return normal(draw, *shape, width), weight, 1e-6


def pool_windows_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, pooled, width = draw(few), draw(st.sampled_from((1, 2, 8, 16))), draw(widths)
    scores = normal(draw, count, pooled, width)
    # Empty places before the first window: whole rows of -inf, but never all of a window's.
    hidden = draw(st.integers(0, pooled - 1))
    scores[:, :hidden] = -math.inf
    return normal(draw, count, pooled, width), scores


def index_scores_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, heads = draw(few), draw(st.sampled_from((1, 3, 16, 64)))
    return normal(draw, count, heads, draw(st.sampled_from((0, 1, 7, 64)))), normal(draw, count, heads)


def linear_args(draw: st.DrawFn) -> tuple[Any, ...]:
    # On both sides of where implementations change loops: 4, 12 and 64 rows.
    count = draw(st.sampled_from((0, 1, 2, 3, 4, 5, 11, 12, 13, 63, 65, 130)))
    inputs = draw(widths)
    return normal(draw, count, inputs), normal(draw, draw(widths), inputs), draw(st.booleans())


def grouped_linear_args(draw: st.DrawFn) -> tuple[Any, ...]:
    counts = draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 12, 13, 70)), min_size=1, max_size=5).filter(any))
    groups: list[tuple[int, int, int]] = []
    first = 0
    for matrix, count in enumerate(counts):
        if count:
            groups.append((matrix, first, first + count))
            first += count
    inputs = draw(widths)
    weights = normal(draw, len(counts), draw(widths), inputs)
    return normal(draw, first, inputs), weights, groups, draw(st.booleans())


def swiglu_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count = draw(few)
    limit = draw(st.sampled_from((0.5, 10.0)))
    return normal(draw, count, 2 * draw(widths)), normal(draw, count), limit


def add_pairs_args(draw: st.DrawFn) -> tuple[Any, ...]:
    count, picks, width = draw(few), draw(st.integers(1, 6)), draw(widths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    places = torch.randperm(count * picks, generator=generator).view(count, picks)
    return normal(draw, count * picks, width), places, normal(draw, count, width)


CASES = {
    "hc_split": Case(draw=hc_split_args, rows=(0, 1), tolerance=1e-5),
    "hc_merge": Case(draw=hc_merge_args, rows=(0, 1, 2, 3)),
    "hc_collapse": Case(draw=hc_collapse_args, rows=(0, 1)),
    "rope_angles": Case(draw=rope_angles_args, rows=(0,), truth=rope_angles_truth),
    "norm_rope": Case(draw=norm_rope_args, rows=(0, 2)),
    "rope": Case(draw=rope_args, rows=(0, 1)),
    "rms_norm": Case(draw=rms_norm_args, rows=(0,)),
    "pool_windows": Case(draw=pool_windows_args, rows=(0, 1)),
    "index_scores": Case(draw=index_scores_args, rows=(0, 1)),
    "linear": Case(draw=linear_args, rows=(0,)),
    "grouped_linear": Case(draw=grouped_linear_args, rows=()),
    "swiglu": Case(draw=swiglu_args, rows=(0, 1)),
    "add_pairs": Case(draw=add_pairs_args, rows=(1, 2)),
}
WHOLE_NUMBERS = {"top_rows", "route_experts", "group_pairs", "locate_rows"}
WITH_STATE = {"hot_rows", "prefetch_rows"}  # test_hot_rows.py
BIT_EQUAL = {"round_bf16": (), "round_fp8": (64,)}  # the torch form is the truth, to the bit
IN_PLACE = {"norm_rope", "rope"}  # allowed to work in its first argument


def implementations_of(*operations: str) -> Any:
    """Parametrises (operation, function) over all implementations that run on a CPU."""
    found = [
        pytest.param(operation, item.function, id=f"{operation}-{item.name}")
        for operation in operations
        for item in implementations(operation, "cpu")
    ]
    return pytest.mark.parametrize(("operation", "function"), found)


def strided(value: Any) -> Any:
    """The same tensor as a slice of a wider one, as activations often come."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    wide = torch.full((*value.shape[:-1], value.shape[-1] + 3), 7, dtype=value.dtype)
    wide[..., 1:-2] = value
    return wide[..., 1:-2]


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_every_operation_has_a_case_and_two_implementations() -> None:
    assert set(CASES) | WHOLE_NUMBERS | WITH_STATE | set(BIT_EQUAL) == set(OPERATIONS)
    for operation in OPERATIONS:
        names = [item.name for item in implementations(operation, "cpu")]
        assert "torch" in names
        assert len(names) > 1, f"{operation}: nothing to compare"


@implementations_of(*CASES)
@examples
@given(data=st.data())
def test_floats_are_those_of_the_formula_and_arguments_stay_as_they_were(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    case = CASES[operation]
    args = data.draw(st.composite(case.draw)(), label="arguments")
    truth = case.truth or next(
        item.function for item in implementations(operation, "cpu") if item.name == "torch"
    )
    wanted = outputs(truth(*(doubled(arg.clone() if isinstance(arg, Tensor) else arg) for arg in args)))
    given_args = [strided(arg) for arg in args] if data.draw(st.booleans(), label="strided") else list(args)
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in given_args]
    found = outputs(function(*given_args))
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype is torch.float32
        assert ours.shape == theirs.shape
        if theirs.numel():
            scale = max(1.0, float(theirs.abs().max()))
            assert float((ours.double() - theirs).abs().max()) <= case.tolerance * scale
    for number, (arg, old) in enumerate(zip(given_args, before, strict=True)):
        if isinstance(arg, Tensor) and not (operation in IN_PLACE and number == 0):
            assert torch.equal(arg, old), f"argument {number} was changed"


@pytest.mark.parametrize("operation", [name for name, case in CASES.items() if case.rows])
@examples
@given(data=st.data())
def test_a_chosen_kernels_row_is_the_same_bits_in_any_company(operation: str, data: st.DataObject) -> None:
    """What exact mode is built on. `linear` promises it only when asked."""
    case = CASES[operation]
    function = getattr(choose_kernels(), operation)
    args = list(data.draw(st.composite(case.draw)(), label="arguments"))
    if operation == "linear":
        args[-1] = True
    num_rows = len(args[case.rows[0]])
    chosen = torch.tensor(
        data.draw(st.lists(st.integers(0, num_rows - 1), max_size=5)) if num_rows else []
    ).long()
    fewer = [arg[chosen] if number in case.rows else arg for number, arg in enumerate(args)]
    alone = outputs(function(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in fewer)))
    together = outputs(function(*args))
    for one, all_rows in zip(alone, together, strict=True):
        assert torch.equal(one, all_rows[chosen])


@examples
@given(data=st.data())
def test_a_group_of_the_exact_grouped_product_is_the_same_bits_in_any_company(data: st.DataObject) -> None:
    kernels = choose_kernels()
    x, weights, groups, _ = data.draw(st.composite(grouped_linear_args)(), label="arguments")
    together = kernels.grouped_linear(x, weights, groups, True)
    for matrix, first, last in groups:
        row = data.draw(st.integers(first, last - 1), label="row")
        alone = kernels.grouped_linear(x[row : row + 1], weights, [(matrix, 0, 1)], True)
        assert torch.equal(alone[0], together[row])


@implementations_of("hc_split")
@examples
@given(seed=st.integers(0, 999))
def test_mixing_matrices_are_doubly_stochastic(
    operation: str, function: Callable[..., Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mix, streams = torch.randn(5, 24, generator=generator), torch.randn(5, 4, 16, generator=generator)
    _, post, comb = function(mix, streams, torch.ones(3), torch.zeros(24), 20, HC_EPS, 1e-6)
    assert float((comb.sum(1) - 1).abs().max()) < 1e-5
    assert float((comb.sum(2) - 1).abs().max()) < 1e-2
    assert bool(((post > 0) & (post < 2)).all())


@implementations_of("rope")
def test_rotating_back_undoes_a_rotation_and_spares_the_plain_channels(
    operation: str, function: Callable[..., Any]
) -> None:
    x = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(6, 4) * 6
    turns = torch.stack((angles.cos(), angles.sin()), dim=-1)
    turned = function(x.clone(), turns, False)
    assert torch.equal(turned[..., :12], x[..., :12])
    assert not torch.allclose(turned[..., 12:], x[..., 12:])
    torch.testing.assert_close(function(turned.clone(), turns, True), x, rtol=0, atol=1e-6)


@implementations_of("pool_windows")
def test_a_score_of_minus_infinity_has_no_weight_in_its_own_channel_only(
    operation: str, function: Callable[..., Any]
) -> None:
    keys = torch.tensor([[[1e30, 2.0], [3.0, 4.0]]])
    scores = torch.tensor([[[-math.inf, 0.0], [5.0, 0.0]]])
    assert function(keys, scores).tolist() == [[3.0, 3.0]]


# --- choosing rows ---

scores = st.one_of(st.sampled_from((0.0, -0.0, 1.0, -1.0, -math.inf)), st.floats(-9, 9, width=32))


@implementations_of("top_rows")
@examples
@given(data=st.data())
def test_top_rows_are_the_best_visible_ones_lowest_number_first_among_equals(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    num_rows = data.draw(st.sampled_from((0, 1, 2, 7, 33, 130)), label="rows")
    count = data.draw(st.integers(0, 4), label="queries")
    k = data.draw(st.sampled_from((1, 2, 5, 64)), label="k")
    if data.draw(st.booleans(), label="all tied"):
        table = [[0.0] * num_rows] * count
    else:
        table = [data.draw(st.lists(scores, min_size=num_rows, max_size=num_rows)) for _ in range(count)]
    visible = data.draw(
        st.lists(st.integers(0, num_rows + 2), min_size=count, max_size=count), label="visible"
    )
    found = function(
        torch.tensor(table, dtype=torch.float32).view(count, num_rows),
        torch.tensor(visible, dtype=torch.int64),
        k,
    )
    wanted = [
        sorted(sorted(range(min(seen, num_rows)), key=lambda row: (-row_scores[row], row))[:k])
        for row_scores, seen in zip(table, visible, strict=True)
    ]
    assert found.dtype is torch.int64
    assert found.shape == (count, k)
    assert found.tolist() == [rows + [-1] * (k - len(rows)) for rows in wanted]


@implementations_of("top_rows")
def test_a_score_that_is_not_a_number_counts_as_minus_infinity(
    operation: str, function: Callable[..., Any]
) -> None:
    table = torch.tensor([[math.nan, 1.0, math.nan, 2.0, -math.inf], [math.nan] * 5])
    assert function(table, torch.tensor([5, 5]), 3).tolist() == [[0, 1, 3], [0, 1, 2]]


# --- choosing experts ---


@implementations_of("route_experts")
@examples
@given(data=st.data())
def test_experts_are_the_best_by_gate_and_bias_lowest_number_first_among_equals(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    num_experts = data.draw(st.sampled_from((1, 2, 5, 16, 33)), label="experts")
    k = data.draw(st.integers(1, min(6, num_experts)), label="k")
    count = data.draw(few, label="tokens")
    values = st.one_of(st.sampled_from((0.0, 1.0, -2.0)), st.floats(-30, 30, width=32))
    rows = st.lists(values, min_size=num_experts, max_size=num_experts)
    logits = [data.draw(rows) for _ in range(count)]
    biases = st.one_of(
        st.none(), st.lists(st.sampled_from((0.0, 0.5, -0.25)), min_size=num_experts, max_size=num_experts)
    )
    bias = data.draw(biases, label="bias")
    scaling = data.draw(st.sampled_from((1.0, 2.5)), label="scaling")
    experts, weights = function(
        torch.tensor(logits).view(count, num_experts),
        None if bias is None else torch.tensor(bias),
        None,
        k,
        scaling,
    )
    assert experts.shape == weights.shape == (count, k)
    assert experts.dtype is torch.int64
    for row, picked, shares in zip(logits, experts.tolist(), weights.tolist(), strict=True):
        gates = [gate_of(logit) for logit in row]
        keys = list(zip(row, bias or [0.0] * num_experts, strict=True))
        ranked = [gate + extra for gate, (_, extra) in zip(gates, keys, strict=True)]
        assert len(set(picked)) == k
        left = [expert for expert in range(num_experts) if expert not in picked]
        for place, expert in enumerate(picked):
            for other in (*picked[place + 1 :], *left):
                assert ranked[expert] >= ranked[other] - 1e-5
                assert keys[expert] != keys[other] or expert < other
        total = sum(gates[expert] for expert in picked)
        assert shares == pytest.approx([gates[expert] / total * scaling for expert in picked], rel=1e-5)


def gate_of(logit: float) -> float:
    """sqrt(softplus)."""
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


@implementations_of("route_experts")
def test_given_experts_are_kept_with_the_gates_as_weights(
    operation: str, function: Callable[..., Any]
) -> None:
    """Hash layers: any order, and a table may name an expert twice."""
    logits = torch.tensor([[0.0, 3.0, -1.0], [2.0, 2.0, 2.0]])
    picks = torch.tensor([[2, 1], [0, 0]])
    experts, weights = function(logits, None, picks, 2, 1.5)
    assert experts.tolist() == picks.tolist()
    total = gate_of(-1.0) + gate_of(3.0)
    assert weights[0].tolist() == pytest.approx([1.5 * gate_of(-1.0) / total, 1.5 * gate_of(3.0) / total])
    assert weights[1].tolist() == pytest.approx([0.75, 0.75])


@implementations_of("group_pairs")
@examples
@given(data=st.data())
def test_pairs_are_grouped_by_expert_and_within_an_expert_by_token(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    num_experts, k = data.draw(st.integers(1, 9), label="experts"), data.draw(st.integers(1, 4), label="k")
    tokens = st.lists(st.integers(0, num_experts - 1), min_size=k, max_size=k)
    table = data.draw(st.lists(tokens, max_size=9), label="table")
    pairs, places, counts = function(torch.tensor(table, dtype=torch.int64).view(len(table), k), num_experts)
    flat = [expert for row in table for expert in row]
    wanted = sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert pairs.tolist() == wanted
    assert places.flatten().tolist() == [wanted.index(pair) for pair in range(len(flat))]
    assert places.shape == (len(table), k)
    assert counts == [flat.count(expert) for expert in range(num_experts)]


@implementations_of("locate_rows")
@examples
@given(data=st.data())
def test_entries_are_located_by_page_table_and_missing_ones_are_hidden(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    num_slots, num_pages = (
        data.draw(st.integers(1, 4), label="slots"),
        data.draw(st.integers(1, 5), label="pages"),
    )
    per_page = data.draw(st.sampled_from((1, 2, 64)), label="rows of a page")
    stride = per_page * data.draw(st.integers(1, 3), label="layers")
    tables = [data.draw(st.permutations(range(10)))[:num_pages] for _ in range(num_slots)]
    slots = data.draw(
        st.lists(st.integers(0, num_slots - 1), min_size=1, max_size=4), label="slots of sequences"
    )
    width = data.draw(st.integers(1, 6), label="entries")
    entry = st.integers(-1, num_pages * per_page - 1)
    entries = [data.draw(st.lists(entry, min_size=width, max_size=width)) for _ in slots]
    ids, bias, any_empty = function(
        torch.tensor(tables), torch.tensor(slots), torch.tensor(entries), per_page, stride
    )
    wanted = [
        [tables[slot][max(e, 0) // per_page] * stride + max(e, 0) % per_page for e in row]
        for slot, row in zip(slots, entries, strict=True)
    ]
    assert ids.tolist() == wanted
    assert bias.tolist() == [[[-math.inf if e < 0 else 0.0 for e in row]] for row in entries]
    assert any_empty == any(all(e < 0 for e in row) for row in entries)


# --- choosing kernels ---


def test_the_best_kernels_are_chosen_and_any_can_be_overridden() -> None:
    assert dict(choose_kernels().names)["top_rows"] == "numba"
    assert dict(choose_kernels(overrides={"top_rows": "torch"}).names)["top_rows"] == "torch"
    assert {name for operation, name in reference_kernels().names if operation in OPERATIONS} == {"torch"}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"attend_backwards": "torch"}, "unknown kernel operation 'attend_backwards'; known are .*top_rows"),
        ({"top_rows": "triton"}, "kernel 'top_rows' has no implementation 'triton' for cpu"),
    ],
)
def test_an_unknown_override_is_refused_by_name(overrides: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        choose_kernels(overrides=overrides)


@implementations_of(*BIT_EQUAL)
@examples
@given(data=st.data())
def test_roundings_are_equal_to_the_bit(
    operation: str, function: Callable[..., Any], data: st.DataObject
) -> None:
    x = data.draw(
        st.composite(lambda draw: normal(draw, draw(few), draw(st.sampled_from((1, 64, 100, 130)))))()
    )
    x = x * 10.0 ** data.draw(st.integers(-12, 12))
    if x.numel() and data.draw(st.booleans()):
        x[-1, 0] = data.draw(st.sampled_from((math.nan, math.inf, -math.inf, 0.0)))
    truth = next(item.function for item in implementations(operation, "cpu") if item.name == "torch")
    wanted, before = truth(x, *BIT_EQUAL[operation]), x.clone()
    for given_x in (x, strided(x)):
        found = function(given_x, *BIT_EQUAL[operation])
        assert torch.equal(found.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
        assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(x.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))

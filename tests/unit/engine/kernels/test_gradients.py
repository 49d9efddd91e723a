"""Training's kernels have the gradients of the reference, and its rounding those of no rounding at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import formats
from engine.kernels.gradients import NAME
from engine.kernels.registry import implementations
from engine.kernels.suite import choose_kernels, reference_kernels, training_kernels
from engine.model.rounding import ServedRounding, StraightThrough

torch.set_num_threads(1)
T, S, D = 7, 4, 48


def drawn(*shape: int, size: float = 1.0, seed: int = 0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


CASES: dict[str, Sequence[Any]] = {
    "hc_split": (drawn(T, 24), drawn(T, S, D), drawn(3), drawn(24), 20, 1e-6, 1e-6),
    "hc_merge": (drawn(T, D), drawn(T, S), drawn(T, S, S).abs(), drawn(T, S, D)),
    "swiglu": (drawn(T, 2 * D, size=4.0), drawn(T).abs(), 3.0),
    "grouped_linear": (drawn(9, 16), drawn(4, 5, 16), [(0, 0, 3), (2, 3, 4), (3, 4, 9)], False),
}


def gradients(function: Any, args: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """Of a fixed random weighting of the outputs, by every tensor among the arguments."""
    leaves = [
        item.detach().to(dtype).clone().requires_grad_() if isinstance(item, Tensor) else item
        for item in args
    ]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=dtype)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        loss = loss + (output * torch.randn(output.shape, generator=generator).to(dtype)).sum()
    loss.backward()
    return [leaf.grad for leaf in leaves if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("operation", CASES)
def test_gradients_are_those_of_the_reference_in_float64(operation: str) -> None:
    args = CASES[operation]
    wanted = gradients(getattr(reference_kernels(), operation), args, torch.float64)
    found = gradients(getattr(training_kernels(), operation), args, torch.float32)
    for want, have in zip(wanted, found, strict=True):
        assert float(want.norm()) > 0
        assert float((want - have).norm() / want.norm()) < 1e-6


def test_every_operation_with_gradients_of_its_own_is_tested_here() -> None:
    names = [name for name, _ in training_kernels().names]
    own = [name for name in names if any(item.name == NAME for item in implementations(name, "cpu"))]
    assert sorted(own) == sorted(CASES)


def test_a_serving_process_never_chooses_training_kernels() -> None:
    assert NAME not in {name for _, name in choose_kernels("cpu").names}


def test_straight_through_rounds_as_served_does_and_passes_gradients_on() -> None:
    served = ServedRounding(choose_kernels("cpu"))
    trained = StraightThrough(training_kernels())
    x = drawn(5, 64, size=3.0)
    grad = drawn(5, 64, seed=1)
    for name, extra in (("act", ()), ("matmul_input", ()), ("kv_rows", (48,))):
        leaf = x.clone().requires_grad_()
        rounded = getattr(trained, name)(leaf, *extra)
        assert torch.equal(rounded, getattr(served, name)(x.clone(), *extra)), name
        assert not torch.equal(rounded, x)
        rounded.backward(grad)
        assert torch.equal(leaf.grad, grad), name


def test_index_rows_keep_the_gradient_of_their_transform() -> None:
    trained = StraightThrough(training_kernels())
    x, grad = drawn(5, 32, size=3.0), drawn(5, 32, seed=1)
    leaf = x.clone().requires_grad_()
    rounded = trained.index_rows(leaf)
    assert torch.equal(rounded, ServedRounding(choose_kernels("cpu")).index_rows(x.clone()))
    rounded.backward(grad)
    torch.testing.assert_close(leaf.grad, formats.hadamard(grad))

"""The kernels one model runs with: every operation by name, chosen for a device at start-up."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.kernels import (
    compress,
    digest,
    gradients,
    hot_rows,
    matmul,
    mhc,
    paging,
    registry,
    rotary,
    rounding,
    route,
    select,
    swiglu,
)
from engine.kernels.hot_rows import HostRows, HotBuffers
from engine.kernels.matmul import Groups

_MODULES = (  # importing them registers their kernels
    compress,
    digest,
    gradients,
    hot_rows,
    matmul,
    mhc,
    paging,
    rotary,
    rounding,
    route,
    select,
    swiglu,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Contracts are the docstrings of the `torch` implementations in the sibling modules."""

    linear: Callable[[Tensor, Tensor, bool], Tensor]
    grouped_linear: Callable[[Tensor, Tensor, Groups, bool], Tensor]
    swiglu: Callable[[Tensor, Tensor, float], Tensor]
    hc_split: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, float], tuple[Tensor, Tensor, Tensor]]
    hc_merge: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    hc_collapse: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]
    rope_angles: Callable[[Tensor, Tensor], Tensor]
    norm_rope: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, bool], Tensor]
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    pool_windows: Callable[[Tensor, Tensor], Tensor]
    index_scores: Callable[[Tensor, Tensor], Tensor]
    top_rows: Callable[[Tensor, Tensor, int], Tensor]
    route_experts: Callable[[Tensor, Tensor | None, Tensor | None, int, float], tuple[Tensor, Tensor]]
    group_pairs: Callable[[Tensor, int], tuple[Tensor, Tensor, list[int]]]
    add_pairs: Callable[[Tensor, Tensor, Tensor], Tensor]
    locate_rows: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, bool]]
    hot_rows: Callable[
        [HotBuffers, HostRows, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, bool, Tensor]
    ]
    prefetch_rows: Callable[[HotBuffers, HostRows, Tensor, Tensor], Tensor]
    round_bf16: Callable[[Tensor], Tensor]
    round_fp8: Callable[[Tensor, int], Tensor]
    names: tuple[tuple[str, str], ...]


_OPERATIONS = tuple(name for name in Kernels.__dataclass_fields__ if name != "names")


def choose_kernels(device: str = "cpu", overrides: Mapping[str, str] | None = None) -> Kernels:
    """The best implementations for a device; `overrides` maps operation to implementation name.

    Raises ConfigError for an operation or implementation that does not exist.
    """
    if device != "cpu" and importlib.util.find_spec("triton"):
        importlib.import_module("engine.kernels.hot_rows_triton")
    chosen = registry.choose(device, overrides or {})
    functions = {name: chosen[name].function for name in _OPERATIONS}
    return Kernels(**functions, names=tuple((name, chosen[name].name) for name in chosen))  # type: ignore[arg-type]


def reference_kernels() -> Kernels:
    """The torch implementations of everything: differentiable, and what the others are judged by."""
    return choose_kernels("cpu", dict.fromkeys(_OPERATIONS, "torch"))


def training_kernels() -> Kernels:
    """Differentiable kernels for training on CPU: `gradients` where there is one, else the torch implementation; the
    best where nothing is differentiated."""
    overrides: dict[str, str] = {}
    for name in _OPERATIONS:
        names = [item.name for item in registry.implementations(name, "cpu")]
        if gradients.NAME in names:
            overrides[name] = gradients.NAME
        elif name not in _NEVER_DIFFERENTIATED:
            overrides[name] = "torch"
    return choose_kernels("cpu", overrides)


_NEVER_DIFFERENTIATED = {
    "rope_angles",
    "top_rows",
    "group_pairs",
    "locate_rows",
    "hot_rows",
    "prefetch_rows",
    "round_bf16",
    "round_fp8",
}

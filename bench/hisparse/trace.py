"""What a step does, as text: every torch operation with the shapes it is given, and every call of a kernel.

Kernels compiled by numba are no torch operations; they are seen as calls, by wrapping what a model and a rank are made
with. Called by `bench.hisparse.resident` and by the test that holds resident steps to those without HiSparse.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.registry import Implementation, choose
from engine.kernels.suite import Kernels
from engine.model.forward import Model


@dataclass(slots=True)
class Trace:
    """Operations since `recording` began."""

    operations: list[str] = field(default_factory=list[str])
    is_on: bool = False

    def add(self, name: str, arguments: Iterable[Any]) -> None:
        if self.is_on:
            self.operations.append(f"{name}({', '.join(_shown(arguments))})")

    @contextmanager
    def recording(self) -> Generator[list[str]]:
        self.operations = []
        self.is_on = True
        try:
            with _Operations(self):
                yield self.operations
        finally:
            self.is_on = False

    def model(self, model: Model) -> Model:
        """The same, whose kernel calls are seen."""
        kernels = model.kernels
        seen = {
            item.name: self._seen(item.name, getattr(kernels, item.name))
            for item in fields(Kernels)
            if item.name != "names"
        }
        return Model(
            model.config,
            model.weights,
            numerics=model.numerics,
            kernels=replace(kernels, **seen),
            exact=model.exact,
        )

    def implementations(self) -> dict[str, Implementation]:
        """Of a sampler and a rank."""
        return {
            name: replace(item, function=self._seen(name, item.function))
            for name, item in choose("cpu", {}).items()
        }

    def _seen(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.add(f"kernel {name}", (*arguments, *named.values()))
            return function(*arguments, **named)

        return call


class _Operations(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        self._trace.add(str(func), (*args, *named.values()))
        return func(*args, **named)


def _shown(arguments: Iterable[Any]) -> Iterator[str]:
    for item in arguments:
        if isinstance(item, Tensor):
            yield f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        elif isinstance(item, list | tuple):
            yield f"[{', '.join(_shown(item))}]"  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(item, int | float | bool | str | torch.dtype | None):
            yield str(item)
        else:
            yield type(item).__name__

"""Kernels: an operation has one written contract and several implementations, chosen per device at start-up.

Each operation's contract is the docstring of its `torch` implementation; all implementations run under one
conformance suite (`tests/unit/engine/kernels`). `choose` picks the highest-priority implementation for a device,
unless the operator named one; what was chosen is printed and exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rorqual.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    operation: str
    name: str
    devices: frozenset[str]
    priority: int
    function: Callable[..., Any]


_implementations: dict[str, list[Implementation]] = {}


def kernel(
    operation: str, *, name: str, devices: tuple[str, ...], priority: int
) -> Callable[[Function], Function]:
    """Register the decorated function as an implementation of `operation`. Higher priority wins."""

    def register(function: Function) -> Function:
        known = _implementations.setdefault(operation, [])
        assert all(other.name != name for other in known), f"{operation}/{name} registered twice"
        known.append(
            Implementation(
                operation=operation,
                name=name,
                devices=frozenset(devices),
                priority=priority,
                function=function,
            )
        )
        return function

    return register


def implementations(operation: str, device: str) -> list[Implementation]:
    """All implementations for the device type ("cpu", "cuda"), best first."""
    found = [item for item in _implementations.get(operation, []) if device in item.devices]
    return sorted(found, key=lambda item: -item.priority)


def choose(device: str, overrides: Mapping[str, str]) -> dict[str, Implementation]:
    """The implementation of every operation for a device. Raises ConfigError for an unknown override."""
    unknown = sorted(set(overrides) - set(_implementations))
    if unknown:
        raise ConfigError(
            f"unknown kernel operation {unknown[0]!r}; known are {', '.join(sorted(_implementations))}"
        )
    chosen: dict[str, Implementation] = {}
    for operation in sorted(_implementations):
        candidates = implementations(operation, device)
        if operation in overrides:
            candidates = [item for item in candidates if item.name == overrides[operation]]
            if not candidates:
                raise ConfigError(
                    f"kernel {operation!r} has no implementation {overrides[operation]!r} for {device}"
                )
        assert candidates, f"kernel {operation} has no implementation for {device}"
        chosen[operation] = candidates[0]
    return chosen

"""What a PromQL expression asks for: its selectors, and the labels that it groups and joins by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser

from tests.harness.expositions import SCRAPED, known

COPIED = frozenset(
    # By targetLabels and podTargetLabels of the chart's monitors.
    (
        "app_kubernetes_io_instance",
        "app_kubernetes_io_component",
        "rorqual_io_pool",
        "rorqual_io_role",
        "rorqual_io_model",
    )
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A selector."""

    metric: str
    labels: frozenset[str]
    is_range: bool
    function: str  # that is applied to it at once; "" for none


def asked(expression: str) -> list[Asked]:
    """Its selectors. Raises ValueError where it is not PromQL."""
    return list(_selectors(promql_parser.parse(expression), ""))


def grouped_by(expression: str) -> set[str]:
    """Labels that it aggregates or joins by."""
    return {label for node in _walk(promql_parser.parse(expression)) for label in _modifier_labels(node)}


def problems(expression: str) -> list[str]:
    """Why our metrics do not answer it."""
    try:
        found = asked(expression)
    except ValueError as error:
        return [f"is not PromQL: {error}"]
    told: list[str] = []
    own: set[str] = set()
    for one in found:
        if one.metric == "up":
            kind, labels = "gauge", frozenset[str]()
        elif one.metric in known():
            kind, labels = known()[one.metric]
        else:
            told.append(f"{one.metric} is no metric of ours")
            continue
        own |= labels
        strange = sorted(one.labels - labels - SCRAPED - COPIED)
        told += [f"{one.metric} has no label {label}" for label in strange]
        counts = kind in ("counter", "histogram") and not one.metric.endswith("_created")
        if counts and one.function not in ("rate", "irate", "increase"):
            told.append(f"{one.metric} only ever grows: ask for its rate")
        if not counts and one.function in ("rate", "irate", "increase"):
            told.append(f"{one.metric} is a gauge: it has no rate")
    strange = sorted(grouped_by(expression) - own - (SCRAPED - {"le"}) - COPIED)
    told += [f"nothing here has a label {label} to group by" for label in strange]
    if not found:
        told.append("asks for no metric")
    return told


def _modifier_labels(node: Any) -> list[str]:
    modifier = getattr(node, "modifier", None)
    if modifier is None:
        return []
    if isinstance(node, promql_parser.AggregateExpr):
        return list(modifier.labels)
    matching = getattr(modifier, "matching", None)
    return [] if matching is None else list(matching.labels)


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql_parser.Call):
        return list(node.args)
    names = ("lhs", "rhs", "expr", "param")
    return [child for name in names if (child := getattr(node, name, None)) is not None]


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node):
        yield from _walk(child)


def _selectors(node: Any, function: str) -> Iterator[Asked]:
    is_range = isinstance(node, promql_parser.MatrixSelector)
    selector = node.vector_selector if is_range else node
    if isinstance(selector, promql_parser.VectorSelector):
        labels = frozenset(one.name for one in selector.matchers.matchers)
        yield Asked(selector.name or "", labels, is_range, function)
        return
    name = node.func.name if isinstance(node, promql_parser.Call) else ""
    for child in _children(node):
        yield from _selectors(child, name)

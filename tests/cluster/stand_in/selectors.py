"""Label and field selectors, as they stand in queries and in specs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Object = dict[str, Any]


def by_query(query: Mapping[str, str]) -> Callable[[Object], bool]:
    """Of `labelSelector` and `fieldSelector`."""
    tests = [_label_test(part) for part in _split(query.get("labelSelector", ""))]
    tests += [_field_test(part) for part in _split(query.get("fieldSelector", ""))]
    return lambda item: all(test(item) for test in tests)


def named_by(query: Mapping[str, str]) -> str:
    """The one object that a list or a watch is about, as rights are judged; "" for any."""
    found = re.fullmatch(r"metadata\.name==?([^,!=]+)", query.get("fieldSelector", ""))
    return found[1] if found else ""


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """A spec's selector with matchLabels."""
    wanted = (selector or {}).get("matchLabels") or {}
    assert not (selector or {}).get("matchExpressions"), "matchExpressions are not understood"
    return bool(wanted) and all(labels.get(name) == value for name, value in wanted.items())


def labels_of(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def _split(text: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _label_test(part: str) -> Callable[[Object], bool]:
    found = re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", part)
    if found:
        name, values = found[1], {value.strip() for value in found[3].split(",")}
        if found[2] == "in":
            return lambda item: labels_of(item).get(name) in values
        return lambda item: labels_of(item).get(name) not in values
    found = re.fullmatch(r"([^=!]+?)\s*(==|=|!=)\s*(.*)", part)
    if found:
        name, value = found[1], found[3]
        if found[2] == "!=":
            return lambda item: labels_of(item).get(name) != value
        return lambda item: labels_of(item).get(name) == value
    if part.startswith("!"):
        return lambda item: part[1:] not in labels_of(item)
    return lambda item: part in labels_of(item)


def _field_test(part: str) -> Callable[[Object], bool]:
    found = re.fullmatch(r"([^=!]+?)\s*(==|=|!=)\s*(.*)", part)
    assert found, f"field selector {part!r} is not understood"
    names, value, negated = found[1].split("."), found[3], found[2] == "!="

    def test(item: Object) -> bool:
        place: Any = item
        for name in names:
            place = place.get(name) if isinstance(place, dict) else None
        return (str(place if place is not None else "") == value) != negated

    return test

"""Patches of JSON objects: merge (RFC 7386), JSON (RFC 6902), strategic, and server-side apply as create-or-update.

Lists whose items have a key are merged by it in the last two, as Kubernetes' schemas say; all others are replaced.
"""

from __future__ import annotations

import copy
from typing import Any

MERGE_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "ports": ("containerPort", "port"),
    "ownerReferences": ("uid",),
    "conditions": ("type",),
}


def merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def strategic(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {name: copy.deepcopy(value) for name, value in patch.items() if name != "$patch"}
    result = dict(target) if isinstance(target, dict) else {}
    if "$retainKeys" in patch:
        result = {name: value for name, value in result.items() if name in patch["$retainKeys"]}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        if value is None:
            result.pop(name, None)
        elif isinstance(value, list):
            result[name] = _merged_list(name, result.get(name) or [], value)
        else:
            result[name] = strategic(result.get(name), value)
    return result


def apply(live: Any, wanted: Any, before: Any) -> Any:
    """`wanted` over `live`, without what the same writer wanted `before` and wants no longer."""
    if isinstance(wanted, dict):
        result = dict(live) if isinstance(live, dict) else {}
        earlier = before if isinstance(before, dict) else {}
        for name in earlier:
            if name not in wanted:
                result.pop(name, None)
        for name, value in wanted.items():
            if isinstance(value, list):
                result[name] = _applied_list(name, result.get(name) or [], value, earlier.get(name) or [])
            else:
                result[name] = apply(result.get(name), value, earlier.get(name))
        return result
    return copy.deepcopy(wanted)


def json_patch(target: Any, operations: list[dict[str, Any]]) -> Any:
    result = copy.deepcopy(target)
    for operation in operations:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place = result
        for part in parts[:-1]:
            place = place[int(part)] if isinstance(place, list) else place[part]
        last: Any = parts[-1]
        if isinstance(place, list):
            last = len(place) if last == "-" else int(last)
        match operation["op"]:
            case "add" if isinstance(place, list):
                place.insert(last, operation["value"])
            case "add" | "replace":
                place[last] = operation["value"]
            case "remove":
                del place[last]
            case "test":
                if place[last] != operation["value"]:
                    raise ValueError("a test of the patch failed")
            case other:
                raise ValueError(f"{other} is not understood")
    return result


def _key_of(name: str, item: Any) -> Any:
    if isinstance(item, dict):
        for key in MERGE_KEYS.get(name, ()):
            if key in item:
                return item[key], item.get("protocol", "TCP") if name == "ports" else ""
    return None


def _merged_list(name: str, live: list[Any], patch: list[Any]) -> list[Any]:
    if name not in MERGE_KEYS or not all(isinstance(item, dict) for item in patch):
        return copy.deepcopy(patch)
    if any(item.get("$patch") == "replace" for item in patch):
        return [copy.deepcopy(item) for item in patch if "$patch" not in item]
    result = list(live)
    for item in patch:
        key = _key_of(name, item)
        index = next((i for i, other in enumerate(result) if _key_of(name, other) == key), None)
        if item.get("$patch") == "delete":
            if index is not None:
                del result[index]
        elif index is None:
            result.append(copy.deepcopy(item))
        else:
            result[index] = strategic(result[index], item)
    return result


def _applied_list(name: str, live: list[Any], wanted: list[Any], before: list[Any]) -> list[Any]:
    if name not in MERGE_KEYS or not all(isinstance(item, dict) for item in wanted):
        return copy.deepcopy(wanted)
    lives = {_key_of(name, item): item for item in live}
    earlier = {_key_of(name, item): item for item in before}
    keys = [_key_of(name, item) for item in wanted]
    result = [apply(lives.get(key), item, earlier.get(key)) for key, item in zip(keys, wanted, strict=True)]
    return result + [item for key, item in lives.items() if key not in keys and key not in earlier]

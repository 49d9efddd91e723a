"""The policy file of `rorqual autoscaler`: YAML text in, frozen values out, or one line that names what is wrong.

Called by the shell, which reads and watches the file, by `rorqual bench scale` and by tests. Reads no file itself.
`python -m autoscaler.policy` prints the JSON Schema that docs/autoscaler-policy.schema.json publishes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast, get_type_hints

import msgspec
import yaml

from rorqual.errors import RorqualError
from rorqual.performance import HARDWARE, PRESETS
from rorqual.session import Role

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""Of a pool: what Kubernetes takes as a label's value and as a part of a name."""

TEXT_CHARACTERS_MAX = 262_144
POOLS_MAX = 64
REPLICAS_MAX = 4096


class PolicyError(RorqualError):
    """A policy cannot be used; the text names the file, the line where it is known, and the key."""


Count = Annotated[int, msgspec.Meta(ge=0, le=REPLICAS_MAX)]
CountFromOne = Annotated[int, msgspec.Meta(ge=1, le=REPLICAS_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
SecondsAboveZero = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Percentile = Annotated[float, msgspec.Meta(ge=1, le=99.9)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """So many percent of requests are to have no more than so many seconds."""

    percentile: Percentile
    seconds: SecondsAboveZero


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    ttft: Objective
    itl: Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    min: Count = 1
    max: CountFromOne


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Replicas that one decision adds or takes at most."""

    up: CountFromOne = 8
    down: CountFromOne = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stabilisation:
    """A change is made once every look of so many seconds asked for at least as much of one. No pool shrinks within
    `down_seconds` of having grown, nor grows within `up_seconds` of having shrunk."""

    up_seconds: Seconds = 0.0
    down_seconds: Seconds = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetName:
    kind: Literal["Deployment", "LeaderWorkerSet"]
    name: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPolicy:
    role: Role
    replicas: Limits
    hardware: str | None = None  # a name in rorqual.performance.HARDWARE; None: measurements only
    devices: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1  # of a replica
    cost_per_hour: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0  # of a replica
    start_seconds: Seconds = 180.0
    step: Step = Step()
    stabilisation: Stabilisation = Stabilisation()
    workers: Text | None = None  # where they are found: a discovery text
    target: TargetName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    version: Literal[1]
    objectives: Objectives
    pools: Annotated[dict[str, PoolPolicy], msgspec.Meta(min_length=1, max_length=POOLS_MAX)]
    interval_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 10.0
    model: Text | None = (
        None  # a name in rorqual.performance.PRESETS, or a model directory; None: measurements only
    )
    survive_losses: Annotated[int, msgspec.Meta(ge=0, le=64)] = 1
    manual_hold_seconds: Seconds = 900.0
    routers: tuple[Text, ...] = field(default_factory=tuple)  # discovery texts of their HTTP doors


def load_policy(text: str, *, file: str) -> Policy:
    """`file` is named in errors. Raises PolicyError."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise PolicyError(f"{file}: has {len(text)} characters, at most {TEXT_CHARACTERS_MAX} are read")
    tree = _read(text, file)
    if not isinstance(tree, dict):
        raise PolicyError(f"{file}: is no mapping of keys to values")
    body = cast("dict[str, Any]", tree)
    pools = body.get("pools")
    if isinstance(pools, dict):  # one by one, so that an error names its pool
        for name, pool in cast("dict[str, Any]", pools).items():
            if not re.fullmatch(NAME_PATTERN, name):
                rule = "lower-case letters, digits and '-', at most 63, and begins and ends with no '-'"
                raise PolicyError(f"{file}: pools: {name!r} is no name of a pool: it has {rule}")
            _convert(pool, PoolPolicy, file, f"pools.{name}.")
    policy = cast(Policy, _convert(body, Policy, file, ""))
    for problem in _problems(policy):
        raise PolicyError(f"{file}: {problem}")
    return policy


def policy_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of what `load_policy` takes, but for rules between keys, which it names."""
    (reference,), components = msgspec.json.schema_components([Policy], ref_template="#/$defs/{name}")
    for component in components.values():
        if component.get("type") == "object":
            component["additionalProperties"] = False
    pools = components["Policy"]["properties"]["pools"]
    pools["propertyNames"] = {"pattern": NAME_PATTERN}
    hardware = components["PoolPolicy"]["properties"]["hardware"]
    hardware["anyOf"] = [{"enum": sorted(HARDWARE)}, {"type": "null"}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Policy of rorqual autoscaler",
        **reference,
        "$defs": components,
    }


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML readers keep the last, and aliases, which can blow up."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not read: write it out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _read(text: str, file: str) -> object:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise PolicyError(f"{file}: is empty")
        _check_keys(node, Policy, file, "")
        tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PolicyError(f"{file}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # All but the first: what PyYAML makes of tags such as !!bool and !!timestamp before other text.
        raise PolicyError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise PolicyError(f"{file}: is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    return tree


def _check_keys(node: yaml.Node, kind: Any, file: str, path: str) -> None:
    """Unknown keys of a mapping that becomes `kind`, with their lines and what they may have been meant to be."""
    if not isinstance(node, yaml.MappingNode):
        return
    hints = get_type_hints(kind)
    for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
        name = str(key.value)
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(hints))}"
            raise PolicyError(f"{file}:{key.start_mark.line + 1}: unknown key {path}{name}{meant}")
        inner = PoolPolicy if name == "pools" else _dataclass_of(hints[name])
        if inner is None or not isinstance(value, yaml.MappingNode):
            continue
        if name != "pools":
            _check_keys(value, inner, file, f"{path}{name}.")
            continue
        for pool, body in cast("list[tuple[yaml.Node, yaml.Node]]", value.value):
            _check_keys(body, inner, file, f"pools.{pool.value}.")


def _dataclass_of(hint: Any) -> Any:
    """The dataclass that a hint is or may be (`TargetName | None`)."""
    for item in (hint, *getattr(hint, "__args__", ())):
        if dataclasses.is_dataclass(item):
            return item
    return None


def _convert(tree: Any, kind: type, file: str, path: str) -> object:
    bad = _not_finite(tree, path)
    if bad:
        raise PolicyError(f"{file}: {bad} is no finite number")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at `")
        key = path + at.rstrip("`").removeprefix("$").removeprefix(".")
        missing = re.search(r"missing required field `(\w+)`", text)
        if missing:
            raise PolicyError(
                f"{file}: {'.'.join(filter(None, (key.rstrip('.'), missing[1])))} is missing"
            ) from None
        raise PolicyError(f"{file}: {key.rstrip('.') or 'the file'}: {text}") from None


def _not_finite(tree: Any, path: str) -> str:
    """The first key that holds an infinite number or none; empty: there is none."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return path.rstrip(".")
    if isinstance(tree, dict):
        items = cast("dict[str, Any]", tree).items()
        return next(filter(None, (_not_finite(value, f"{path}{key}.") for key, value in items)), "")
    return ""


def _problems(policy: Policy) -> list[str]:
    """Rules between keys, and names that must be known."""
    found: list[str] = []
    for name, pool in policy.pools.items():
        if pool.replicas.min > pool.replicas.max:
            found.append(f"pools.{name}.replicas: min {pool.replicas.min} is above max {pool.replicas.max}")
        if pool.hardware is not None and pool.hardware not in HARDWARE:
            found.append(f"pools.{name}.hardware: {_unknown(pool.hardware, HARDWARE)}")
        if pool.hardware is not None and policy.model is None:
            found.append(
                f"pools.{name}.hardware: predicts nothing without a model: name one, or leave it out"
            )
    roles = {pool.role for pool in policy.pools.values()}
    if Role.BOTH in roles and len(roles) > 1:
        found.append("pools: pools of role both do not stand beside pools of role prefill or decode")
    model = policy.model
    if model is not None and model not in PRESETS and "/" not in model:
        found.append(f"model: {_unknown(model, PRESETS)}, or a path of a model's directory, with a '/'")
    return found


def _unknown(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f" did you mean {close[0]}?" if close else ""
    return f"{name!r} is not known;{meant} there are {', '.join(sorted(known))}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(policy_schema(), indent=2) + "\n")

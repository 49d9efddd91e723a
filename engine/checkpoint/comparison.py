"""What the files hold against what the model needs: every difference, by name, from headers alone.

Owns the matching of stored tensors with the manifest, whichever names and stacking the files use. The
reader calls it once per checkpoint. No torch, no reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.checkpoint.manifest import TensorSpec, WeightSpec
from engine.checkpoint.names import ExpertStack, expert_stack, is_superfluous, official_name
from engine.checkpoint.safetensors_file import StoredTensor
from rorqual.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A weight that is a tensor of its own, with its scale if it is quantised."""

    spec: WeightSpec
    values: StoredTensor
    scale: StoredTensor | None

    @property
    def num_bytes(self) -> int:
        return self.values.num_bytes + (self.scale.num_bytes if self.scale else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStack:
    """A stack of experts, the weights of each expert in the order of its rows."""

    values: StoredTensor
    experts: tuple[tuple[WeightSpec, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`problems` are lines for a person, sorted; `items` is complete only if there are none."""

    problems: tuple[str, ...]
    items: tuple[StoredWeight | StoredStack, ...]


def compare(config: ModelConfig, weights: Iterable[WeightSpec], stored: Iterable[StoredTensor]) -> Comparison:
    """Match the stored tensors with the weights of the model."""
    by_name = {weight.name: weight for weight in weights}
    expected = {tensor.name: tensor for weight in by_name.values() for tensor in weight.tensors()}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for tensor in stored:
        name = official_name(tensor.name)
        if name in found:
            problems.append(f"stored twice: {tensor.name} in {found[name].file.name} and {tensor.file.name}")
            continue
        if is_superfluous(name):
            continue
        found[name] = tensor
    covered: set[str] = set()
    stacks: list[StoredStack] = []
    for name, tensor in found.items():
        if name in expected:
            covered.add(name)
            problems += _differences(tensor, expected[name].shape, expected[name].dtypes)
            continue
        stack = _stack(config, by_name, expert_stack(name), tensor)
        if stack is None:
            problems.append(f"unexpected: {tensor.name} in {tensor.file.name}")
            continue
        stacks.append(stack)
        members = [weight.name for group in stack.experts for weight in group]
        problems += [f"stored twice: {name}, also in {tensor.name}" for name in members if name in found]
        problems += _stack_differences(stack, expected)
        covered.update(members)
    problems += [f"missing: {name}" for name in expected if name not in covered]
    items = [
        StoredWeight(spec=weight, values=found[name], scale=found.get(weight.scale_name or ""))
        for name, weight in by_name.items()
        if name in found
    ]
    return Comparison(problems=tuple(sorted(problems)), items=(*items, *stacks))


def summarise(problems: Iterable[str]) -> str:
    """'2 missing, 1 unexpected', from problem lines."""
    counts = Counter(problem.partition(":")[0] for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _differences(tensor: StoredTensor, shape: tuple[int, ...], dtypes: frozenset[str]) -> list[str]:
    problems: list[str] = []
    if tensor.dtype not in dtypes:
        problems.append(f"mis-typed: {tensor.name} is {tensor.dtype}, must be {' or '.join(sorted(dtypes))}")
    if tensor.shape != shape:
        problems.append(f"mis-shaped: {tensor.name} is {list(tensor.shape)}, must be {list(shape)}")
    return problems


def _stack(
    config: ModelConfig, weights: Mapping[str, WeightSpec], stack: ExpertStack | None, tensor: StoredTensor
) -> StoredStack | None:
    # Stacks exist only in what transformers writes, which is not quantised: anywhere else they are strangers.
    if stack is None or config.quantised:
        return None
    names = [stack.weight_names(expert) for expert in range(config.num_experts)]
    if any(name not in weights for group in names for name in group):
        return None
    experts = tuple(tuple(weights[name] for name in group) for group in names)
    return StoredStack(values=tensor, experts=experts)


def _stack_differences(stack: StoredStack, expected: Mapping[str, TensorSpec]) -> list[str]:
    group = stack.experts[0]
    rows = sum(weight.shape[0] for weight in group)
    shape = (len(stack.experts), rows, group[0].shape[1])
    return _differences(stack.values, shape, expected[group[0].name].dtypes)

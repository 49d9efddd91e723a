"""Random checkpoints: every weight drawn from the seed and its own name.

Owns the distributions. `rorqual checkpoint init`, `make serve` and tests call it. A weight depends on
nothing but the seed, its name, its shape and the config: not on sharding, order or platform threads.

The scales keep activations and logits near 1 at any depth: linear maps divide by the square root of their
inputs, the two that write into the residual streams also by that of the number of layers. Nothing is
left at 0 or 1, because a trivial sink, bias or mixing scale hides errors in the code that uses it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from engine.checkpoint.manifest import WeightSpec
from engine.checkpoint.reader import Progress
from engine.checkpoint.writer import SHARD_BYTES_MAX, WriteOptions, write_checkpoint
from rorqual.model_config import ModelConfig

WEIGHTS = ("quantised", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    seed: int
    out: Path
    weights: str | None = None  # "quantised" | "float32"; None: as the config says
    tokenizer: Path | None = None
    shard_bytes_max: int = SHARD_BYTES_MAX


def init_checkpoint(config: ModelConfig, options: InitOptions, progress: Progress | None = None) -> int:
    """Write a random checkpoint; returns the bytes of its tensors. Raises as `write_checkpoint` does."""
    config = with_storage(config, options.weights)

    def produce(weight: WeightSpec) -> torch.Tensor:
        return random_weight(config, weight, options.seed)

    write_options = WriteOptions(
        out=options.out, shard_bytes_max=options.shard_bytes_max, tokenizer=options.tokenizer
    )
    return write_checkpoint(config, produce, write_options, progress)


def with_storage(config: ModelConfig, weights: str | None) -> ModelConfig:
    """The config with its weights stored as said."""
    if weights is None:
        return config
    assert weights in WEIGHTS, weights
    if weights == "float32":
        return replace(config, quantised=False, expert_dtype="float")
    return replace(config, quantised=True, expert_dtype="fp8" if config.expert_dtype == "fp8" else "fp4")


def random_weight(config: ModelConfig, weight: WeightSpec, seed: int) -> torch.Tensor:
    """float32 values of one weight, or int64 of a token-to-expert table."""
    digest = hashlib.sha256(f"{seed}/{weight.name}".encode()).digest()
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    if weight.name.endswith(".tid2eid"):
        return torch.from_numpy(_distinct_experts(random, weight.shape, config.num_experts))
    leaf = _leaf(weight.name)
    if leaf in _UNIFORM:
        low, high = _UNIFORM[leaf]
        return torch.from_numpy(random.uniform(low, high, weight.shape).astype(np.float32))
    values = torch.from_numpy(random.standard_normal(weight.shape, dtype=np.float32))
    return values.mul_(_deviation(config, weight, leaf))


_UNIFORM = {"norm": (0.8, 1.2), "mixing scale": (0.3, 0.7)}
_DEVIATIONS = {"sink": 1.0, "ape": 0.5, "mixing base": 0.5, "router bias": 0.1, "embed": 1.0}


def _leaf(name: str) -> str:
    """What kind of weight a name is."""
    if name.endswith("norm.weight"):
        return "norm"
    for ending, leaf in (
        ("_scale", "mixing scale"),
        ("_base", "mixing base"),
        (".attn_sink", "sink"),
        (".ape", "ape"),
        (".gate.bias", "router bias"),
        ("embed.weight", "embed"),
        (".wo_b.weight", "residual"),
        (".w2.weight", "residual"),
    ):
        if name.endswith(ending):
            return leaf
    return "linear"


def _deviation(config: ModelConfig, weight: WeightSpec, leaf: str) -> float:
    """The standard deviation of a normally distributed weight."""
    if leaf in _DEVIATIONS:
        return _DEVIATIONS[leaf]
    fan_in = weight.shape[-1]
    # A sublayer's inner values are somewhat below 1 and two of them a layer add to the streams: with this
    # their sum is of the embedding's size at any depth.
    depth = config.num_layers if leaf == "residual" else 1
    return 1 / math.sqrt(fan_in * depth)


def _distinct_experts(
    random: np.random.Generator, shape: tuple[int, ...], num_experts: int
) -> npt.NDArray[np.int64]:
    """Each row a uniform random set of experts: Floyd's sampling, all tokens at once.

    Step j draws from 0..j; who draws an expert again takes j itself, which nobody can have drawn before.
    """
    num_tokens, num_chosen = shape
    table = np.empty(shape, dtype=np.int64)
    for column, last in enumerate(range(num_experts - num_chosen, num_experts)):
        drawn = random.integers(0, last + 1, num_tokens)
        repeated = (table[:, :column] == drawn[:, None]).any(axis=1)
        table[:, column] = np.where(repeated, last, drawn)
    return table

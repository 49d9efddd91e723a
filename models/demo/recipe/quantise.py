"""Quantisation-aware training: for the length of a step the weights hold what the written checkpoint will hold.

Gradients are those of the rounded weights, applied to the float ones (straight through).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine import formats
from engine.checkpoint.manifest import Storage, WeightSpec, expected_weights
from engine.model.weights import ModelWeights
from rorqual.model_config import ModelConfig


@contextmanager
def quantised(config: ModelConfig, weights: ModelWeights) -> Generator[None]:
    """Within the block every weight is what a checkpoint of `config` stores. Restored afterwards."""
    floats = [base.detach().clone() for base in weights.bases]
    with torch.no_grad():
        for spec in expected_weights(config):
            if spec.name in weights.named:
                stored = weights.named[spec.name].detach()
                stored.copy_(as_stored(spec, stored))
    try:
        yield
    finally:
        with torch.no_grad():
            for base, values in zip(weights.bases, floats, strict=True):
                base.detach().copy_(values)


def as_stored(spec: WeightSpec, values: Tensor) -> Tensor:
    """The values after a trip through the checkpoint's format."""
    if spec.storage is Storage.FP8:
        return formats.dequantise_fp8_blocks(*formats.quantise_fp8_blocks(values))
    if spec.storage is Storage.FP4:
        return formats.dequantise_fp4(*formats.quantise_fp4(values))
    if spec.storage is Storage.BF16:
        return formats.round_bf16(values)
    return values

"""A full check of a checkpoint: headers, then every byte of every tensor, dequantised and looked at.

Owns what counts as sound. The `checkpoint verify` command calls it. Reads tensor by tensor; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.checkpoint.reader import Checkpoint, Progress
from rorqual.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    num_weights: int
    num_parameters: int


def verify(checkpoint: Checkpoint, progress: Progress | None = None) -> Verified:
    """Raise CheckpointError if the headers do not fit, a tensor cannot be read, or values are unusable.

    Unusable are NaN and infinity after dequantisation, and experts that do not exist in a token-to-expert
    table. One error lists every such tensor.
    """
    num_weights = num_parameters = 0
    problems: list[str] = []
    for name, values in checkpoint.tensors(progress):
        num_weights += 1
        num_parameters += values.numel()
        problem = _problem(values, checkpoint.config.num_experts)
        if problem:
            problems.append(f"{name}: {problem}")
    if problems:
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(f"{checkpoint.path}: {len(problems)} tensors have unusable values:{lines}")
    return Verified(num_weights=num_weights, num_parameters=num_parameters)


def _problem(values: torch.Tensor, num_experts: int) -> str | None:
    if values.dtype is torch.int64:
        num_outside = int(((values < 0) | (values >= num_experts)).sum())
        return f"{num_outside} entries are not experts 0 to {num_experts - 1}" if num_outside else None
    # A sum is finite unless a value is not (or it overflows, which the exact count then sorts out).
    if bool(torch.isfinite(values.sum())):
        return None
    num_bad = values.numel() - int(torch.isfinite(values).sum())
    return f"{num_bad} of {values.numel()} values are NaN or infinite" if num_bad else None

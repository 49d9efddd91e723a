"""Where values are rounded on their way through the model: nowhere (`float32`), or as the release does (`served`).

`served` keeps activations as bf16 values between modules, FP8 values into the quantised projections, FP8 KV rows and
FP4 indexer rows (after a Hadamard transform). All tensors stay f32 in memory: a rounding is a round trip. The points
follow the release's numeric contract; where it leaves a choice (attention probabilities, products over experts) we
keep f32.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from engine import formats
from engine.kernels.suite import Kernels
from kvstore.layout import KV_SCALE_BLOCK, Numerics

ACTIVATION_BLOCK = 128


class Rounding(Protocol):
    def act(self, x: Tensor) -> Tensor:
        """A value that leaves a module."""
        ...

    def matmul_input(self, x: Tensor) -> Tensor:
        """Input of a projection whose weights are FP8 or FP4."""
        ...

    def kv_rows(self, rows_Nd: Tensor, num_plain: int) -> Tensor:
        """KV rows, rotated; the first `num_plain` channels are the unrotated ones."""
        ...

    def index_rows(self, rows: Tensor) -> Tensor:
        """Indexer rows and queries, rotated; [..., di]."""
        ...

    def norm_rope(self, x_THd: Tensor, weight_d: Tensor | None, angles: Tensor, *, eps: float) -> Tensor:
        """RMS norm, then rotation."""
        ...


class NoRounding:
    """float32: the unquantised mathematics."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def act(self, x: Tensor) -> Tensor:
        return x

    def matmul_input(self, x: Tensor) -> Tensor:
        return x

    def kv_rows(self, rows_Nd: Tensor, num_plain: int) -> Tensor:
        del num_plain
        return rows_Nd

    def index_rows(self, rows: Tensor) -> Tensor:
        # The Hadamard transform is orthogonal: unquantised, it cancels between queries and rows.
        return rows

    def norm_rope(self, x_THd: Tensor, weight_d: Tensor | None, angles: Tensor, *, eps: float) -> Tensor:
        return self._kernels.norm_rope(x_THd, weight_d, angles, eps)


class ServedRounding:
    """The release's quantisation points."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def act(self, x: Tensor) -> Tensor:
        return self._kernels.round_bf16(x)

    def matmul_input(self, x: Tensor) -> Tensor:
        return self._kernels.round_fp8(x, ACTIVATION_BLOCK)

    def kv_rows(self, rows_Nd: Tensor, num_plain: int) -> Tensor:
        rows = self._kernels.round_bf16(rows_Nd)
        rows[:, :num_plain] = self._kernels.round_fp8(rows[:, :num_plain], KV_SCALE_BLOCK)
        return rows

    def index_rows(self, rows: Tensor) -> Tensor:
        transformed = self._kernels.round_bf16(formats.hadamard(self._kernels.round_bf16(rows)))
        return formats.round_fp4(transformed)

    def norm_rope(self, x_THd: Tensor, weight_d: Tensor | None, angles: Tensor, *, eps: float) -> Tensor:
        normed = self.act(self._kernels.rms_norm(x_THd, weight_d, eps))
        return self.act(self._kernels.rope(normed, angles, False))


class StraightThrough:
    """The release's quantisation points with gradients: forward as `ServedRounding`, backward as if nothing had been
    rounded (the Hadamard transform of indexer rows keeps its own gradient). `kernels` must be differentiable."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._served = ServedRounding(kernels)

    def act(self, x: Tensor) -> Tensor:
        return _with_gradient(x, self._served.act(x.detach()))

    def matmul_input(self, x: Tensor) -> Tensor:
        return _with_gradient(x, self._served.matmul_input(x.detach()))

    def kv_rows(self, rows_Nd: Tensor, num_plain: int) -> Tensor:
        return _with_gradient(rows_Nd, self._served.kv_rows(rows_Nd.detach(), num_plain))

    def index_rows(self, rows: Tensor) -> Tensor:
        matrix = formats.hadamard(torch.eye(rows.shape[-1]))  # symmetric
        return _with_gradient(rows @ matrix, self._served.index_rows(rows.detach()))

    def norm_rope(self, x_THd: Tensor, weight_d: Tensor | None, angles: Tensor, *, eps: float) -> Tensor:
        normed = self.act(self._kernels.rms_norm(x_THd, weight_d, eps))
        return self.act(self._kernels.rope(normed, angles, False))


def _with_gradient(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values exactly, with the gradient of x."""
    return _Replaced.apply(x, rounded)  # type: ignore[no-any-return]


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return args[1].view_as(args[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rounding_of(numerics: Numerics, kernels: Kernels) -> Rounding:
    return NoRounding(kernels) if numerics is Numerics.FLOAT32 else ServedRounding(kernels)

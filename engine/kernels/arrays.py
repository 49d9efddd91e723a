"""Tensors as numpy arrays for compiled loops.

Always contiguous, not only for speed: the compiler makes one version of a loop per memory layout, and two versions
may add up in different orders. A slice of one row is contiguous where a slice of many is not, so without this a
result would depend on the number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from torch import Tensor


def array(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's memory, or that of a contiguous copy: never to be written through."""
    return tensor.contiguous().numpy()

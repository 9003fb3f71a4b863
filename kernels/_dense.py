"""What the leaves of both languages share: how dense memory looks to a kernel, and what an epilogue can do."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SLOPES = {"linear": 1.0, "relu": 0.0, "lrelu": 0.2}  # below zero, of the activations that an epilogue can do

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_reason(x: Tensor) -> str | None:
    """Why no kernel takes x's dtype, or None."""
    if x.dtype in DTYPES:
        return None
    name = str(x.dtype).removeprefix("torch.")
    return "float64 runs on the reference only" if x.dtype == torch.float64 else f"no kernel for {name}"


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last where x is so and only so, contiguous otherwise: the layout of a result."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def extents(x: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, channels, inner): memory of x's layout as an array of three axes, of which dim is the second."""
    order = list(range(x.ndim))
    if layout_of(x) is torch.channels_last:
        order = [0, 2, 3, 1]
    sizes, at = [x.shape[axis] for axis in order], order.index(dim) if order else 0
    return math.prod(sizes[:at]), math.prod(sizes[at : at + 1]), math.prod(sizes[at + 1 :])


@functools.cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number that a result clamped to `value` holds."""
    return float(torch.tensor(value, dtype=dtype))

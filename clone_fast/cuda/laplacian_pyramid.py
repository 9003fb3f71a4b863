"""laplacian_pyramid in CUDA: twin of kernels/laplacian_pyramid.py; the kernels are in csrc/laplacian_pyramid*.

Any strides are read as they are. Everything between the images and the loss is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dtype_reason, pointer, stream
from clone_fast.kernels._dense import layout_of


def supports(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> str | None:
    """Why this call cannot run here, or None."""
    return dtype_reason(x)


def _described(x: Tensor, weights: list[float], charbonnier: float | None, mse: float) -> _C.LaplacianPyramid:
    return _C.LaplacianPyramid(DTYPES[x.dtype], *x.shape, weights, -1.0 if charbonnier is None else charbonnier, mse)


def _strides(x: Tensor) -> list[int]:
    """In elements; 0 along an axis of one, where any number may stand."""
    return [step if size > 1 else 0 for size, step in zip(x.shape, x.stride(), strict=True)]


def _forward(
    x: Tensor, y: Tensor, op: _C.LaplacianPyramid, slope: Tensor | None = None, coarse: Tensor | None = None
) -> Tensor:
    loss = x.new_empty([], dtype=torch.float32)
    workspace = x.new_empty([_C.laplacian_pyramid_workspace(op, slope is not None)], dtype=torch.uint8)
    _C.laplacian_pyramid(
        op,
        pointer(x),
        _strides(x),
        pointer(y),
        _strides(y),
        pointer(loss),
        pointer(slope),
        pointer(coarse),
        pointer(workspace),
        stream(x),
    )
    return loss


def launch(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> Tensor:
    """The loss, a float32 scalar."""
    return _forward(x, y, _described(x, weights, charbonnier, mse))


def launch_keep(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and what its gradient needs of the images.

    Returns:
        loss, float32 scalar; slope [N, C, H, W], rho' of the finest band, int8 for L1 and float32 for Charbonnier;
        coarse [N, C, ceil(H/2), ceil(W/2)] float32, d loss / d level 1, without elements where there is one level.
    """
    n, c, h, w = x.shape
    slope = x.new_empty(x.shape, dtype=torch.int8 if charbonnier is None else torch.float32)
    coarse = x.new_empty([n, c, (h + 1) // 2, (w + 1) // 2] if levels > 1 else [n, c, 0, 0], dtype=torch.float32)
    return _forward(x, y, _described(x, weights, charbonnier, mse), slope, coarse), slope, coarse


def launch_backward(
    dloss: Tensor, slope: Tensor, coarse: Tensor, weight0: float, x: Tensor, y: Tensor, mse: float
) -> Tensor:
    """dx in x's dtype and layout; the values of x and y are read for the mean square error only.

    weight0 is that of the finest band. dloss is a float32 scalar on the device.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    levels = 2 if coarse.numel() else 1  # what lies below the next level is in `coarse`
    op = _described(x, [weight0] * levels, None if slope.dtype == torch.int8 else 0.0, mse)
    _C.laplacian_pyramid_backward(
        op,
        pointer(dloss),
        pointer(slope),
        pointer(coarse),
        pointer(x),
        _strides(x),
        pointer(y),
        _strides(y),
        pointer(dx),
        _strides(dx),
        stream(x),
    )
    return dx

"""laplacian_pyramid in Triton: the loss over the bands of a difference of two images, and its gradient.

The pyramid is linear, so it is that of x - y, which is written out once. Two kernels for each level and direction: down
the next level (`reduce`), then the slopes rho'(band) and partial sums of rho(band) (`band`); up (`residue`, `up`), with
g_j = weights[j] / numel_j * slope_j,

    d loss / d level_j = g_j + reduce^T(d loss / d level_{j+1} - expand^T(g_j)).

The mean square error is summed by the `band` of the finest level, and its gradient added by the `up` of that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clone_fast.kernels import _laplacian_pyramid as kernels
from clone_fast.kernels._dense import dtype_reason, layout_of
from clone_fast.kernels._device import capability

# Block of the coarser level and warps by compute capability, checked against the reference on that GPU.
TILES = {(9, 0): (8, 64, 4)}
TILE = (8, 32, 4)  # of every other

SUM_BLOCK = 1024


def supports(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> str | None:
    """Why this call cannot run here, or None."""
    return dtype_reason(x)


class _Grid:
    """Tiles of a level [N, C, H, W] and the arguments that every kernel takes of them."""

    def __init__(self, x: Tensor) -> None:
        bh, bw, warps = TILES.get(capability(x.device), TILE)
        n, c, height, width = x.shape
        tiles_y, tiles_x = triton.cdiv((height + 1) // 2, bh), triton.cdiv((width + 1) // 2, bw)
        self.programs = n * c * tiles_y * tiles_x
        self.sizes = (height, width, tiles_y, tiles_x)
        self.options = {"BH": bh, "BW": bw, "num_warps": warps}


def _smaller(x: Tensor) -> Tensor:
    """The next level's memory."""
    n, c, height, width = x.shape
    return x.new_empty([n, c, (height + 1) // 2, (width + 1) // 2], dtype=torch.float32)


def _down(
    x: Tensor, y: Tensor, weights: list[float], charbonnier: float | None, mse: float, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """loss, the slopes of every level."""
    levels = [x.new_empty(x.shape, dtype=torch.float32)]
    for _ in weights[1:]:
        levels.append(_smaller(levels[-1]))
    grids = [_Grid(level) for level in levels]
    partial = x.new_empty([sum(grid.programs for grid in grids)], dtype=torch.float64)
    kernels.subtract[(grids[0].programs,)](
        x, y, levels[0], x.shape[1], *grids[0].sizes, *x.stride(), *y.stride(), **grids[0].options
    )
    slopes, used = [], 0
    for j, (level, grid, weight) in enumerate(zip(levels, grids, weights, strict=True)):
        last = j == len(weights) - 1
        low = level if last else levels[j + 1]
        if not last:
            kernels.reduce[(grid.programs,)](level, low, *grid.sizes, **grid.options)
        slope_dtype = torch.int8 if charbonnier is None else torch.float32
        slopes.append(torch.empty_like(level, dtype=slope_dtype) if keep else level)  # or not written
        kernels.band[(grid.programs,)](
            level, low, slopes[-1], partial[used:], *grid.sizes, weight, level.numel(), charbonnier or 0.0, mse,
            LAST=last, KEEP=keep, ABSOLUTE=charbonnier is None, SQUARES=mse > 0 and j == 0, **grid.options,
        )  # fmt: skip
        used += grid.programs
    loss = x.new_empty([], dtype=torch.float32)
    kernels.sum_partials[(1,)](partial, loss, used, BLOCK=SUM_BLOCK, num_warps=8)
    return loss, slopes


def _upwards(
    slope: Tensor,
    coarse: Tensor | None,
    weight: float,
    gain: Tensor | None,
    out: Tensor,
    images: tuple[Tensor, Tensor] | None = None,
    mse: float = 0.0,
) -> Tensor:
    """out = d loss / d level from that of the next level; `coarse` is None where there is none.

    images: x and y, whose mean square error has this factor.
    """
    grid = _Grid(slope)
    u = slope if coarse is None else torch.empty_like(coarse)
    scale = weight / slope.numel()
    if coarse is not None:
        kernels.residue[(grid.programs,)](slope, coarse, u, *grid.sizes, scale, **grid.options)
    x, y = (out, out) if images is None else images
    kernels.up[(grid.programs,)](
        slope, u, slope if gain is None else gain, x, y, out, out.shape[1], *grid.sizes,
        *x.stride(), *y.stride(), *out.stride(), scale, 2 * mse / slope.numel(),
        LAST=coarse is None, HAS_GAIN=gain is not None, SQUARES=images is not None, **grid.options,
    )  # fmt: skip
    return out


def launch(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> Tensor:
    """The loss, a float32 scalar."""
    return _down(x, y, weights, charbonnier, mse, keep=False)[0]


def launch_keep(
    x: Tensor, y: Tensor, levels: int, weights: list[float], charbonnier: float | None, mse: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and what its gradient needs of the images.

    Returns:
        loss, float32 scalar; slope [N, C, H, W], rho' of the finest band, int8 for L1 and float32 for Charbonnier;
        coarse [N, C, ceil(H/2), ceil(W/2)] float32, d loss / d level 1, without elements where there is one level.
    """
    loss, slopes = _down(x, y, weights, charbonnier, mse, keep=True)
    coarse = None
    for slope, weight in zip(slopes[:0:-1], weights[:0:-1], strict=True):
        coarse = _upwards(slope, coarse, weight, None, slope.new_empty(slope.shape, dtype=torch.float32))
    if coarse is None:
        coarse = x.new_empty([*x.shape[:2], 0, 0], dtype=torch.float32)
    return loss, slopes[0], coarse


def launch_backward(
    dloss: Tensor, slope: Tensor, coarse: Tensor, weight0: float, x: Tensor, y: Tensor, mse: float
) -> Tensor:
    """dx in x's dtype and layout; the values of x and y are read for the mean square error only.

    weight0 is that of the finest band. dloss is a float32 scalar on the device.
    """
    layout = layout_of(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    images = (x, y) if mse > 0 else None
    return _upwards(slope, coarse if coarse.numel() else None, weight0, dloss, dx, images, mse)

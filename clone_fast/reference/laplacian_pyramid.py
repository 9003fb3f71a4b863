"""laplacian_pyramid: the bands of an image, and the distance of two images over their bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _extend(x: Tensor, dim: int, count: int) -> Tensor:
    """Repeat the first and the last slice along an axis."""
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([first] * count + [x] + [last] * count, dim)


def reduce(x: Tensor) -> Tensor:
    """Low-pass and decimate by 2: [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], borders repeated."""
    for dim in (2, 3):
        x = _extend(x, dim, 2)
        last = x.shape[dim] - 4  # where the last tap starts, and one more
        a, b, c, d, e = (x[(slice(None),) * dim + (slice(i, last + i, 2),)] for i in range(5))
        x = torch.add(torch.add(a + e, b + d, alpha=4), c, alpha=6) / 16
    return x


def expand(x: Tensor, height: int, width: int) -> Tensor:
    """Interpolate by 2 to [N, C, height, width], borders repeated.

    Zero insertion and [1 4 6 4 1] / 8 along each axis: an even sample sees the taps 1, 6, 1 and an odd one 4, 4.
    """
    for dim, size in ((2, height), (3, width)):
        count = x.shape[dim]
        x = _extend(x, dim, 1)
        a, b, c = (x.narrow(dim, i, count) for i in range(3))
        even, odd = torch.add(a + c, b, alpha=6) / 8, (b + c) / 2
        x = torch.stack([even, odd], dim + 1).flatten(dim, dim + 1).narrow(dim, 0, size)
    return x


def laplacian_pyramid(x: Tensor, levels: int = 6) -> list[Tensor]:
    """See `clone_fast.ops.laplacian_pyramid.laplacian_pyramid`."""
    bands = []
    current = x.to(torch.promote_types(x.dtype, torch.float32))
    for _ in range(levels - 1):
        coarser = reduce(current)
        bands.append((current - expand(coarser, current.shape[2], current.shape[3])).to(x.dtype))
        current = coarser
    return [*bands, current.to(x.dtype)]


def distance(d: Tensor, charbonnier: float | None) -> Tensor:
    """|d|, or sqrt(d^2 + charbonnier^2) (Charbonnier et al. 1994; Lai et al. 2017, LapSRN), elementwise."""
    return d.abs() if charbonnier is None else (d.square() + charbonnier**2).sqrt()


def laplacian_pyramid_loss(
    x: Tensor,
    y: Tensor,
    *,
    levels: int = 6,
    weights: Sequence[float] | None = None,
    charbonnier: float | None = None,
    mse: float = 0.0,
) -> Tensor:
    """See `clone_fast.ops.laplacian_pyramid.laplacian_pyramid_loss`.

    The pyramid is linear, so the bands of the difference are the differences of the bands, at half the cost.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(compute) - y.to(compute)
    bands = laplacian_pyramid(difference, levels=levels)
    factors = [1.0] * levels if weights is None else weights
    terms = [distance(band, charbonnier).mean() * factor for band, factor in zip(bands, factors, strict=True)]
    if mse:
        terms.append(difference.square().mean() * mse)
    return torch.stack(terms).sum()

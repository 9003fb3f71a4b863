"""laplacian_pyramid: the bands of an image, and the distance of two images over their bands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BINOMIAL = (1.0 / 16, 4.0 / 16, 6.0 / 16, 4.0 / 16, 1.0 / 16)


def _smooth(x: Tensor, stride: int, gain: float) -> Tensor:
    """Separable [1 4 6 4 1] / 16 with the given gain per axis, valid region only."""
    c = x.shape[1]
    taps = torch.tensor(BINOMIAL, dtype=x.dtype, device=x.device) * gain
    x = F.conv2d(x, taps.reshape(1, 1, 1, 5).expand(c, 1, 1, 5), stride=(1, stride), groups=c)
    return F.conv2d(x, taps.reshape(1, 1, 5, 1).expand(c, 1, 5, 1), stride=(stride, 1), groups=c)


def reduce(x: Tensor) -> Tensor:
    """Low-pass and decimate by 2: [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], borders repeated."""
    return _smooth(F.pad(x, [2, 2, 2, 2], mode="replicate"), stride=2, gain=1.0)


def expand(x: Tensor, height: int, width: int) -> Tensor:
    """Interpolate by 2 to [N, C, height, width]: zero insertion, low-pass with gain 4 in all, borders repeated."""
    n, c, h, w = x.shape
    x = F.pad(x, [1, 1, 1, 1], mode="replicate")  # so that a constant stays one up to the border
    x = F.pad(x.reshape(n, c, h + 2, 1, w + 2, 1), [0, 1, 0, 0, 0, 1]).reshape(n, c, 2 * h + 4, 2 * w + 4)
    return _smooth(x, stride=1, gain=2.0)[:, :, :height, :width]


def laplacian_pyramid(x: Tensor, *, levels: int = 6) -> list[Tensor]:
    """See `clone_fast.ops.laplacian_pyramid.laplacian_pyramid`."""
    bands = []
    current = x.to(torch.promote_types(x.dtype, torch.float32))
    for _ in range(levels - 1):
        coarser = reduce(current)
        bands.append((current - expand(coarser, current.shape[2], current.shape[3])).to(x.dtype))
        current = coarser
    return [*bands, current.to(x.dtype)]


def laplacian_pyramid_loss(
    x: Tensor, y: Tensor, *, levels: int = 6, weights: Sequence[float] | None = None
) -> Tensor:
    """See `clone_fast.ops.laplacian_pyramid.laplacian_pyramid_loss`.

    The pyramid is linear, so the bands of the difference are the differences of the bands, at half the cost.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    bands = laplacian_pyramid(x.to(compute) - y.to(compute), levels=levels)
    factors = [1.0] * levels if weights is None else weights
    return torch.stack([band.abs().mean() * factor for band, factor in zip(bands, factors, strict=True)]).sum()

"""What the stand-ins for other codebases' networks compute with: plain PyTorch, nothing of the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOW_PASS = torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64


def fir(x: Tensor, f: Tensor, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Zero insertion, zeros before and after on both axes, the (symmetric) filter, every down-th sample."""
    n, c, h, w = x.shape
    if up > 1:
        spread = x.new_zeros(n, c, h, up, w, up)
        spread[:, :, :, 0, :, 0] = x
        x = spread.reshape(n, c, h * up, w * up)
    x = F.pad(x, [*pad, *pad])
    return F.conv2d(x, f.expand(c, 1, -1, -1), groups=c)[:, :, ::down, ::down]


def leaky(x: Tensor, b: Tensor | None = None) -> Tensor:
    if b is not None:
        x = x + b.reshape([1, -1] + [1] * (x.ndim - 2))
    return F.leaky_relu(x, 0.2) * 2**0.5


def modulated(
    x: Tensor, weight: Tensor, styles: Tensor, *, demodulate: bool = True, up: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """A convolution with weights of every sample's own; up: to twice the size, with this filter of sum 4."""
    n, (o, i, k, _) = len(x), weight.shape
    w = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum([2, 3, 4], keepdim=True) + eps).rsqrt()
    x = x.reshape(1, n * i, *x.shape[2:])
    if up is None:
        y = F.conv2d(x, w.flatten(0, 1), padding=k // 2, groups=n)
        return y.unflatten(1, (n, o))[0]
    y = F.conv_transpose2d(x, w.transpose(1, 2).flatten(0, 1), stride=2, groups=n)
    return fir(y.unflatten(1, (n, o))[0], up, pad=(1, 1))


def with_deviation(x: Tensor, group: int) -> Tensor:
    """x and one channel more: the mean standard deviation within groups of the batch."""
    group = min(group, len(x))
    y = x.reshape(group, -1, *x.shape[1:])
    y = (y.var(0, unbiased=False) + 1e-8).sqrt().mean([1, 2, 3])
    return torch.cat([x, y.reshape(-1, 1, 1, 1).repeat(group, 1, *x.shape[2:])], 1)

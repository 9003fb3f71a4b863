"""minibatch_stddev: how much the samples of a group differ, as further channels of each."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8  # added to a variance before its root is taken


def _grouped(x: Tensor, group: int, num_channels: int) -> Tensor:
    """[N, C, H, W] as [G, N/G, F, C/F, H, W], in float32 at least."""
    _, c, h, w = x.shape
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return y.reshape(group, -1, num_channels, c // num_channels, h, w)


def minibatch_stddev(x: Tensor, group: int, num_channels: int) -> Tensor:
    """See `clone_fast.ops.minibatch_stddev.minibatch_stddev`."""
    y = (_grouped(x, group, num_channels).var(dim=0, correction=0) + EPS).sqrt().mean(dim=[2, 3, 4])  # [N/G, F]
    y = y.to(x.dtype).repeat(group, 1)  # [N, F]
    return torch.cat([x, y[:, :, None, None].expand(-1, -1, *x.shape[2:])], dim=1)


def minibatch_stddev_backward(dy: Tensor, x: Tensor, group: int, num_channels: int) -> Tensor:
    """dx of dy [N, C + F, H, W], from the formula, so that it can be differentiated in its turn.

    The slope of a feature to one of its C/F * H * W deviations is 1 / that number, that of a deviation to a sample
    (x - mean) / (G * deviation).
    """
    channels = x.shape[1]
    y = _grouped(x, group, num_channels)
    y = y - y.mean(dim=0)
    deviation = (y.square().mean(dim=0) + EPS).sqrt()  # [N/G, F, C/F, H, W]
    slope = dy[:, channels:].to(y.dtype).reshape(group, -1, num_channels, x.shape[2] * x.shape[3]).sum(dim=[0, 3])
    slope = slope / (group * deviation[0, 0].numel())
    through = (y / deviation * slope[:, :, None, None, None]).reshape(x.shape)
    return (dy[:, :channels].to(y.dtype) + through).to(x.dtype)

import math

import torch
from op import FusedLeakyReLU, upfirdn2d  # by value
from torch import nn
from torch.nn import functional as F


class Blur(nn.Module):
    def __init__(self, kernel, pad, upsample_factor=1):
        super().__init__()
        kernel = torch.tensor(kernel, dtype=torch.float32)
        kernel = kernel.outer(kernel) / kernel.sum() ** 2
        self.register_buffer("kernel", kernel * upsample_factor**2)
        self.pad = pad

    def forward(self, input):
        return upfirdn2d(input, self.kernel, pad=self.pad)


class Modulated(nn.Module):
    """What the variants of ModulatedConv2d share."""

    eps = 1e-8

    def __init__(
        self,
        in_channel,
        out_channel,
        kernel_size,
        style_dim,
        demodulate=True,
        upsample=False,
        downsample=False,
        blur_kernel=(1, 3, 3, 1),
    ):
        super().__init__()
        self.upsample, self.downsample, self.demodulate = upsample, downsample, demodulate
        p = len(blur_kernel) - 2 + (1 - kernel_size if upsample else kernel_size - 1)
        if upsample:
            self.blur = Blur(blur_kernel, pad=((p + 1) // 2 + 1, p // 2 + 1), upsample_factor=2)
        if downsample:
            self.blur = Blur(blur_kernel, pad=((p + 1) // 2, p // 2))
        self.scale = 1 / math.sqrt(in_channel * kernel_size**2)
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.randn(1, out_channel, in_channel, kernel_size, kernel_size))
        self.modulation = nn.Linear(style_dim, in_channel)

    def convolve(self, input, style, weight):
        n = input.shape[0]
        weight = self.scale * weight * style
        if self.demodulate:
            weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + self.eps).rsqrt()
        input = input.reshape(1, -1, *input.shape[2:])
        if self.upsample:
            weight = weight.transpose(1, 2).flatten(0, 1)
            y = F.conv_transpose2d(input, weight, stride=2, groups=n)
            return self.blur(y.view(n, -1, *y.shape[2:]))
        weight = weight.flatten(0, 1)
        if self.downsample:
            input = self.blur(input)
            y = F.conv2d(input, weight, stride=2, groups=n)
        else:
            y = F.conv2d(input, weight, padding=self.padding, groups=n)
        return y.view(n, -1, *y.shape[2:])


__all__ = ["Blur", "FusedLeakyReLU", "Modulated", "upfirdn2d"]

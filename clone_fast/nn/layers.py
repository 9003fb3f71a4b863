"""The two layers that both networks are made of: fully connected, and convolution with resampling.

Weights are stored at unit variance and scaled when used (equalised learning rate, Karras et al. 2018, section 4.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clone_fast.nn.architecture import RESAMPLE_TAPS
from clone_fast.ops import bias_act, is_fast, modulated_conv2d, setup_filter
from clone_fast.ops.bias_act import ACTIVATIONS


def fast_layout(x: Tensor) -> Tensor:
    """channels_last where it is faster: on a CPU, by ten times in transposed convolutions, and for the fast backends.

    The reference on a GPU is slower in it, as its FIR filters have no good kernel there.
    """
    if x.device.type == "cpu" or is_fast(x.device):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def normalize_2nd_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale every row of [N, C] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(nn.Module):
    """act(x W^T * lr / sqrt(in) + b * lr): [N, in] -> [N, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.weight_gain = lr_multiplier / in_features**0.5
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = self.bias * self.bias_gain
        if self.activation == "linear":
            return torch.addmm(bias.to(x.dtype)[None], x, weight.t())
        y = x.matmul(weight.t())  # under autocast not in x's dtype
        return bias_act(y, bias.to(y.dtype), act=self.activation)


class Conv2dLayer(nn.Module):
    """Convolution, kernel size 1 or 3, optionally at half the resolution: [N, I, H, W] -> [N, O, H/down, W/down]."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str = "linear",
        down: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = down
        self.conv_clamp = conv_clamp
        self.weight_gain = 1 / (in_channels * kernel_size**2) ** 0.5
        self.act_gain = ACTIVATIONS[activation].gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return modulated_conv2d(
            x,
            self.weight * self.weight_gain,
            None,
            down=self.down,
            resample_filter=self.resample_filter.float(),
            demodulate=False,
            bias=self.bias,
            act=self.activation,
            gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )

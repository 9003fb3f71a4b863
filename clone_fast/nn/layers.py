"""The two layers that both networks are made of: fully connected, and convolution with resampling.

Weights are stored at unit variance and scaled when used (equalised learning rate, Karras et al. 2018, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clone_fast.nn.architecture import RESAMPLE_TAPS
from clone_fast.ops import bias_act, conv2d_add, is_fast, modulated_conv2d, setup_filter
from clone_fast.ops.bias_act import ACTIVATIONS
from clone_fast.ops.finished_weights import scaled_weight
from clone_fast.ops.streams import joining, side_by_side

FP16_CLAMP = 256.0  # of activations in float16 where the architecture names none, as in NVIDIA's networks


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in."""
    return torch.promote_types(dtype, torch.float32)


def fast_format(device: torch.device) -> torch.memory_format:
    """How activations lie on a device: channels_last where that is faster, on a CPU, by ten times in transposed
    convolutions, and for the fast backends.

    The reference on a GPU is slower in it, as its FIR filters have no good kernel there.
    """
    return torch.channels_last if device.type == "cpu" or is_fast(device) else torch.contiguous_format


def fast_layout(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x in this dtype, and channels_last where that is the `fast_format`. One pass does both, none what is so."""
    if fast_format(x.device) != torch.channels_last:
        return x if dtype is None else x.to(dtype)
    if dtype in (None, x.dtype):
        return x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype, memory_format=torch.channels_last)


def run(block: nn.Module, *args: Any, recompute: bool, lane: str | None = None) -> Any:
    """block(*args). recompute: keep its arguments alone for the backward, and compute what that needs once more there
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Nothing in a block is random.

    lane: where a part of the block goes aside. The caller waits for it; of what is computed once more nobody would.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*args)
    device: torch.device = args[0].device
    contexts: dict[str, Any] = {}
    if lane is not None and side_by_side(device):
        contexts["context_fn"] = lambda: (nullcontext(), joining(device, lane))
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def limit_in(dtype: torch.dtype, conv_clamp: float | None) -> float | None:
    """What activations of this dtype are clamped to: float16 is never without a limit."""
    return FP16_CLAMP if conv_clamp is None and dtype == torch.float16 else conv_clamp


def in_one_go(values: Sequence[Tensor], dtype: torch.dtype, factor: Tensor | None = None) -> list[Tensor]:
    """Small tensors times their parts of factor, in dtype: as views into one, by two or three launches for all.

    Args:
        factor: a number for each of their elements, one after the other; None for 1.
    """
    if factor is None and all(value.dtype == dtype for value in values):
        return list(values)
    joined = torch.cat([value.reshape(-1) for value in values])
    joined = (joined if factor is None else joined * factor).to(dtype)
    parts = joined.split([value.numel() for value in values])
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]


def normalize_2nd_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale every row of [N, C] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(nn.Module):
    """act(x W^T * lr / sqrt(in) + b * lr): [N, in] -> [N, out].

    The factor of the weights is applied to what is smaller than they are: x, or the result of an activation that lets
    it through.
    """

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
        weight, act = self.weight.to(x.dtype).t(), ACTIVATIONS[self.activation]
        if self.activation == "linear" or not act.homogeneous:
            y = torch.addmm(self.bias.to(x.dtype), x * self.weight_gain, weight, beta=self.bias_gain)
            return y if self.activation == "linear" else bias_act(y, act=self.activation)
        y = x.matmul(weight)  # under autocast not in x's dtype
        bias = self.bias.to(y.dtype) * (self.bias_gain / self.weight_gain)
        return bias_act(y, bias, act=self.activation, gain=act.gain * self.weight_gain)


class Conv2dLayer(nn.Module):
    """Convolution, kernel size 1 or 3, optionally at half the resolution: [N, I, H, W] -> [N, O, H/down, W/down].

    The weights' factor goes through the activation, c * act(x) = act(c * x), into its gain, and costs no pass over
    them. Not in float16, whose range the unscaled sums might leave, and their gradients more so.

    Where a layer does nothing but multiply it is the other way round: the gain goes into the weights, which have to be
    converted anyway, and neither direction has an activation, whose gradient would be a pass over an image.
    """

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
        self.fan_in = in_channels * kernel_size**2
        self.weight_gain = 1 / self.fan_in**0.5
        self.act_gain = ACTIVATIONS[activation].gain
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS))

    def folds(self, dtype: torch.dtype) -> bool:
        """Whether the weights' factor goes into the activation's gain, and its inverse into the bias."""
        return ACTIVATIONS[self.activation].homogeneous and dtype != torch.float16

    def _scaled(self, factor: float, dtype: torch.dtype) -> Tensor:
        """The weights times a factor in dtype, rounded once: float16 has room for the product, not for each of both."""
        if is_fast(self.weight.device):
            return scaled_weight(self.weight, factor, dtype)
        return (self.weight.to(at_least_float32(dtype)) * factor).to(dtype)

    def finished(
        self, dtype: torch.dtype, gain: float = 1.0, bias: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The weights for images of this dtype, and bias, act, gain and clamp. gain, bias: as in `forward`."""
        folds, limit = self.folds(dtype), self.conv_clamp
        if self.activation != "linear":
            limit = limit_in(dtype, limit)
        if self._multiplies():
            weight, gains = self._scaled(self.weight_gain * gain, dtype), 1.0
        elif folds:
            weight, gains = self.weight, self.act_gain * gain * self.weight_gain
        else:
            weight, gains = self.weight * self.weight_gain, self.act_gain * gain
        if bias is None and self.bias is not None:
            bias = self.bias * self.fan_in**0.5 if folds else self.bias
        clamp = None if limit is None else limit * gain
        return weight, {"bias": bias, "act": self.activation, "gain": gains, "clamp": clamp}

    def _multiplies(self) -> bool:
        """And does nothing else."""
        return self.activation == "linear" and self.bias is None and self.conv_clamp is None

    def forward(
        self, x: Tensor, gain: float = 1.0, bias: Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        """gain: on the result and its clamp. bias: this layer's, over weight_gain where it `folds`; None: made here.
        other: what the result is added to, None for nothing."""
        weight, rest = self.finished(x.dtype, gain, bias)
        if other is not None and self.down == 1 and self._multiplies():
            return conv2d_add(x, weight, other)
        f = self.resample_filter.float()
        y = modulated_conv2d(x, weight, None, down=self.down, resample_filter=f, demodulate=False, **rest)
        return y if other is None else y + other

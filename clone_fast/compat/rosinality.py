"""The dialect of rosinality's stylegan2-pytorch and of what grew from it, on our ops.

Two paddings are (before, after) on both axes; kernels carry their gain; a modulated convolution is a module and gets w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clone_fast import ops
from clone_fast.compat.replacement import exact_dtypes, wanted
from clone_fast.compat.trial import Case, drawn


def upfirdn2d(input: Any, kernel: Any, up: Any = 1, down: Any = 1, pad: Any = (0, 0)) -> Tensor:
    """True convolution. What only some versions take, a number for each axis or four paddings, is the original's."""
    wanted(isinstance(up, int) and isinstance(down, int), f"up={up!r}, down={down!r} for each axis")
    wanted(len(pad) == 2, f"{len(pad)} paddings")
    wanted(kernel.ndim == 2, f"a kernel of {kernel.ndim} axes")
    before, after = pad
    return ops.upfirdn2d(input, _filter(kernel, input), up=up, down=down, padding=[before, after, before, after])


def _filter(kernel: Tensor, x: Tensor) -> Tensor:
    """In the dtype that our op wants beside x; theirs has x's."""
    return kernel if kernel.dtype == x.dtype == torch.float64 else kernel.float()


def upfirdn2d_cases() -> Iterator[Case]:
    """A kernel without symmetry, and paddings that differ."""
    x, kernel = drawn(2, 3, 6, 7), drawn(3, 4, grad=False)
    yield Case("a kernel [3, 4]", (x, kernel), {"pad": (2, 1)}, (x,))
    yield Case("up 2", (x, kernel, 2, 1, (2, 1)), {}, (x,))
    yield Case("down 2", (x, kernel), {"down": 2, "pad": (1, 2)}, (x,))
    yield Case("a crop", (x, kernel), {"pad": (-1, 3)}, (x,))


def fused_leaky_relu(input: Any, bias: Any = None, negative_slope: Any = 0.2, scale: Any = 2**0.5) -> Tensor:
    """lrelu(x + b) * scale, the bias on axis 1. Versions differ in what three axes mean: that is the original's."""
    wanted(input.ndim in (2, 4), f"input has {input.ndim} axes")
    wanted(input.is_cuda or negative_slope == 0.2, "a slope of one's own on a CPU, which some versions ignore")
    return ops.bias_act(input, bias, act="lrelu", alpha=negative_slope, gain=scale)


def fused_leaky_relu_cases() -> Iterator[Case]:
    """Features and images, the scale by default and not."""
    for shape in ((4, 3), (2, 3, 4, 5)):
        x, b = drawn(*shape), drawn(3)
        yield Case(f"{len(shape)} axes", (x, b), {}, (x, b))
        yield Case(f"{len(shape)} axes, another scale", (x, b), {"scale": 0.7}, (x, b))


def _blur_of(module: Any, up: bool, k: int) -> Tensor:
    """The FIR of our op for a module that resamples; theirs stands behind the convolution with its gain of 4 inside."""
    blur = module.blur
    hooked = any(getattr(blur, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
    wanted(not hooked, "its blur has hooks")
    kernel = blur.kernel
    p = kernel.shape[0] - 2 + (1 - k if up else k - 1)
    expected = ((p + 1) // 2 + 1, p // 2 + 1) if up else ((p + 1) // 2, p // 2)
    wanted(kernel.shape[0] == kernel.shape[1] and tuple(blur.pad) == expected, f"its blur pads {tuple(blur.pad)}")
    return (kernel / 4 if up else kernel).to(torch.float32)


def modulated_conv2d(module: Any, input: Any, style: Any, weights_delta: Any = None) -> Tensor:
    """`ModulatedConv2d.forward`: the affine inside, weights scaled by 1 / sqrt(fan_in) before epsilon counts.

    weights_delta [N, O, I, k, k] is HyperStyle's: every sample has the weights weight * (1 + delta).
    """
    exact_dtypes(input)
    wanted(input.dtype in (torch.float32, torch.float64), f"{input.dtype}: no normalisation before, in this family")
    weight = module.weight[0]
    wanted(weight.dtype == input.dtype, f"weight is {weight.dtype}, input is {input.dtype}")
    k, up, down = weight.shape[-1], bool(module.upsample), bool(module.downsample)
    resampled = up or down
    wanted(resampled or module.padding == k // 2, f"padding={module.padding!r} with a kernel of {k}")
    f = _blur_of(module, up, k) if resampled else None
    if weights_delta is not None:
        wanted(isinstance(weights_delta, Tensor) and weights_delta.ndim == 5, "weights_delta is no [N, O, I, k, k]")
        weight = weight * (1 + weights_delta)
        if weight.shape[0] == 1 != input.shape[0]:
            weight = weight.expand(input.shape[0], -1, -1, -1, -1)
    styles = module.modulation(style).reshape(input.shape[0], -1) * module.scale
    return ops.modulated_conv2d(
        input, weight, styles, up=1 + up, down=1 + down, resample_filter=f, demodulate=bool(module.demodulate)
    )


def modulated_conv2d_cases(kind: Callable[..., nn.Module], with_delta: bool) -> Iterator[Case]:
    """Modules of this class of every kind, a style so small that epsilon shows, and every sample's own delta."""
    x, style = drawn(2, 5, 6, 6), drawn(2, 3)
    for k, options in (
        (3, {}),
        (3, {"upsample": True}),
        (3, {"downsample": True}),
        (1, {"demodulate": False}),
    ):
        module: Any = kind(5, 4, k, 3, **options).double()
        parameters = (module.weight, module.modulation.weight, module.modulation.bias)
        for fused in (True, False) if hasattr(module, "fused") else (None,):
            name = f"kernel {k}, {options or 'same size'}, fused={fused}"
            if fused is not None:
                yield Case(name, (_setting(module, fused), x, style), {}, (x, style, *parameters))
            else:
                yield Case(name, (module, x, style), {}, (x, style, *parameters))
        if with_delta:
            delta = drawn(2, 4, 5, k, k, scale=0.3)
            yield Case(f"{name}, a delta", (module, x, style, delta), {}, (x, style, delta, *parameters))
    small: Any = kind(5, 4, 3, 3).double()
    with torch.no_grad():
        small.modulation.weight.mul_(1e-5)
        small.modulation.bias.mul_(1e-5)
    yield Case("styles of 1e-5", (small, x, style), {}, (x, style))


def _setting(module: Any, fused: bool) -> Any:
    """A module of its own with this flag, on the same parameters."""
    other = copy.copy(module)
    other.fused = fused
    return other

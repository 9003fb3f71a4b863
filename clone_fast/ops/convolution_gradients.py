"""The first derivative of modulated_conv2d on finished weights, from the steps that the leaves offer.

g = dy * gain * slope, and its sums to bias and noise      one pass over dy and y
plain: dx = conv of g with the transposed weight; dw = correlation of x and g
up:    h = adjoint FIR of g; dx = conv of h with stride 2; dw = correlation of h and x
down:  dx = adjoint FIR of (transposed conv of g); dw = correlation of FIR(x) and g
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clone_fast.ops.dispatch import launch_step
from clone_fast.ops.streams import beside
from clone_fast.ops.upfirdn2d import adjoint
from clone_fast.reference.modulated_conv2d import downsampling_padding, upsampling_padding

ONE = [1, 1]
TWO = [2, 2]


def convolution_gradients(
    backend: str,
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients to x, weight, noise, noise_strength and bias, None where not wanted."""
    want_dx, want_dw, *want_sums = wanted

    def step(name: str, *args: Any) -> Any:
        return launch_step("modulated_conv2d", name, backend, *args)

    g, *sums = step("act_backward", dy, y, noise, noise_strength, act, gain, clamp, *want_sums)
    dx = dw = None
    if up == 1 and down == 1:
        k = weight.shape[-1]
        dw, dx = beside(
            x.device,
            "wgrad",
            lambda: step("wgrad", x, g, k, 1, k // 2, weight.ndim == 5, weight.dtype) if want_dw else None,
            lambda: step("conv", g, weight.transpose(-3, -4), 1, k // 2, True) if want_dx else None,
        )
    elif want_dx or want_dw:
        f = torch.ones([1, 1], device=x.device) if resample_filter is None else resample_filter
        resample = _up_gradients if up == 2 else _down_gradients
        dx, dw = resample(backend, step, g, x, weight, f, want_dx, want_dw)
    return [dx, dw, *sums]


def _fir(backend: str, x: Tensor, f: Tensor, *args: Any) -> Tensor:
    y: Tensor = launch_step("upfirdn2d", "", backend, x, f, *args)
    return y


def _up_gradients(
    backend: str, step: Any, g: Tensor, x: Tensor, weight: Tensor, f: Tensor, want_dx: bool, want_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    k = weight.shape[-1]
    size = [2 * (n - 1) + k for n in x.shape[2:]]  # of the transposed convolution
    h = _fir(backend, g, f, *adjoint(size, g.shape[2:], f, ONE, ONE, upsampling_padding(f, k)), True, 4.0)
    dw, dx = beside(
        x.device,
        "wgrad",
        lambda: step("wgrad", h, x, k, 2, 0, weight.ndim == 5, weight.dtype).transpose(-3, -4) if want_dw else None,
        lambda: step("conv", h, weight.transpose(-3, -4), 2, 0, False) if want_dx else None,
    )
    return dx, dw


def _down_gradients(
    backend: str, step: Any, g: Tensor, x: Tensor, weight: Tensor, f: Tensor, want_dx: bool, want_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    k = weight.shape[-1]
    stride, down = (1, TWO) if k == 1 else (2, ONE)  # a 1x1 kernel decimates inside the FIR
    padding = downsampling_padding(f, k)

    def input_gradient() -> Tensor:
        filtered = step("conv", g, weight.transpose(-3, -4), stride, 0, True)
        return _fir(backend, filtered, f, *adjoint(x.shape[2:], filtered.shape[2:], f, ONE, down, padding), True, 1.0)

    def weight_gradient() -> Tensor:
        filtered = _fir(backend, x, f, ONE, down, padding, False, 1.0)
        dw: Tensor = step("wgrad", filtered, g, k, stride, 0, weight.ndim == 5, weight.dtype)
        return dw

    dw, dx = beside(
        x.device,
        "wgrad",
        lambda: weight_gradient() if want_dw else None,
        lambda: input_gradient() if want_dx else None,
    )
    return dx, dw

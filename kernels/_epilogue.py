"""What stands after a convolution: noise, bias, activation, gain and clamp, on a tile in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import SLOPES


@dataclass(frozen=True)
class Epilogue:
    """y = clamp(gain * act(value + other + noise * strength + bias)).

    noise: [H, W], [1, 1, H, W] or [N, 1, H, W]. other: of y's size, any layout and dtype; for the kernels that take
    `addition`.
    """

    noise: Tensor | None = None
    strength: Tensor | None = None
    bias: Tensor | None = None
    act: str = "linear"
    gain: float = 1.0
    clamp: float | None = None
    other: Tensor | None = None

    def arguments(self, y: Tensor) -> dict[str, Any]:
        """The kernel arguments of `activated` in both kernels; y stands in for what is absent."""
        noise = self.noise if self.noise is None or self.noise.ndim == 4 else self.noise[None, None]
        strides = (0, 0, 0, 0) if noise is None else noise.stride()
        strength = self.strength if noise is not None else None
        return {
            "noise": y if noise is None else noise,
            "strength": y if strength is None else strength,
            "bias": y if self.bias is None else self.bias.contiguous(),
            "noise_n": 0 if noise is None or noise.shape[0] == 1 else strides[0],
            "noise_h": strides[2],
            "noise_w": strides[3],
            "gain": self.gain,
            "clamp": 0.0 if self.clamp is None else self.clamp,
            "SLOPE": SLOPES[self.act],
            "NOISE": noise is not None,
            "STRENGTH": strength is not None,
            "BIAS": self.bias is not None,
            "CLAMP": self.clamp is not None,
        }

    def addition(self, y: Tensor) -> dict[str, Any]:
        """Further arguments, of the kernels that add an image, which they read where they write y: of its strides."""
        return {"other": y if self.other is None else laid_as(self.other, y), "ADD": self.other is not None}


def laid_as(value: Tensor, y: Tensor) -> Tensor:
    """The same numbers with y's strides: itself, or a copy."""
    strides = zip(value.stride(), y.stride(), y.shape, strict=True)
    same = all(one == other for one, other, size in strides if size > 1)
    return value if same else torch.empty_like(y, dtype=value.dtype).copy_(value)


def strides(name: str, t: Tensor) -> dict[str, int]:
    """The strides of t [N, C, H, W] as kernel arguments."""
    return dict(zip((f"{name}_n", f"{name}_c", f"{name}_h", f"{name}_w"), t.stride(), strict=True))


@triton.jit
def loaded(pointer, offsets, inside, stand_in, WANTED: tl.constexpr):
    """What lies at the offsets, as it is, to be loaded long before it is needed; or the stand-in."""
    if WANTED:
        return tl.load(pointer + offsets, mask=inside, other=0.0)
    else:
        return stand_in


@triton.jit
def bent(value, clamp, SLOPE: tl.constexpr, CLAMP: tl.constexpr):
    """Activation and clamp; NaN stays NaN."""
    if SLOPE == 0.0:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif SLOPE != 1.0:
        value = tl.maximum(value, value * SLOPE, propagate_nan=tl.PropagateNan.ALL)
    if CLAMP:
        value = tl.minimum(value, clamp, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(value, -clamp, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def activated(
    value, noise, strength, bias, gain, clamp, SLOPE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """value, float32, with the epilogue; noise, strength and bias `loaded`, in shapes that broadcast against it.

    NaN stays NaN. The gain, which is positive, is part of the sum: six instructions for an element instead of nine,
    while which the tensor cores of a convolution wait.
    """
    value = value * gain
    if NOISE:
        factor = strength.to(tl.float32) * gain if STRENGTH else gain
        value += noise.to(tl.float32) * factor
    if BIAS:
        value += bias.to(tl.float32) * gain
    return bent(value, clamp, SLOPE, CLAMP)

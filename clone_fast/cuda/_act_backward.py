"""What follows a convolution, on the way back, in CUDA C++: csrc/_act_backward.cu.

The steps are those of `clone_fast.kernels._act_backward`, which runs what is refused here. Sums over pixels wait in
registers there, and loads are 16 bytes: it is the memory that it takes the time of.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, nan

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast._compiler import constant_result
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, epilogue_reason, on_16_bytes, pointer, stream
from clone_fast.kernels._dense import SLOPES, layout_of, rounded

FEW = 3  # channels of the image


@constant_result
def _most_channels(dtype: torch.dtype) -> int:
    found: int = _C.act_backward_channels(DTYPES[dtype])
    return found


def supports_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> str | None:
    """None where `launch_act_backward` can run, else the reason why not."""
    if (act, gain, clamp) == ("linear", 1.0, None) and not want_dots:
        return "does nothing but sums"
    return _reason(y, act, gain, want_noise and noise is not None, (dy, noise, noise_strength, bias))


def _reason(y: Tensor, act: str, gain: float, want_noise: bool, others: Sequence[Tensor | None]) -> str | None:
    """What speaks against this result, and against these tensors beside it."""
    reason = epilogue_reason(act, gain) or dtype_reason(y)
    if reason:
        return reason
    if want_noise:
        return "has no sums over the channels for the noise itself"
    if layout_of(y) is not torch.channels_last:
        return "the result is not channels_last"
    if y.shape[1] * y.element_size() % 16 or y.shape[1] > _most_channels(y.dtype):
        return f"channels must fill 16 bytes and be at most {_most_channels(y.dtype)}, got {y.shape[1]}"
    if any(other is not None and other.dtype != y.dtype for other in others):
        return f"all must have one dtype, {str(y.dtype).removeprefix('torch.')}"
    if y.shape[2] * y.shape[3] >= 2**29:
        return "too many pixels"
    return None


def launch_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> tuple[Tensor, None, Tensor | None, Tensor | None, Tensor | None]:
    """g, nothing for the noise itself, the blocks' sums for its strength and the bias, and the dots, as in Triton."""
    return _launch(dy, y, noise, noise_strength, act, gain, clamp, want_strength, want_bias, bias, want_dots)[:5]


def supports_drawn_act_backward(
    dy: Tensor | None,
    dimage: Tensor,
    y: Tensor,
    image_weight: Tensor,
    image: Tensor | None,
    image_clamp: float | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    *_: bool,
) -> str | None:
    """None where `launch_drawn_act_backward` can run, else the reason why not."""
    few, channels, k = image_weight.shape[-4:-1]
    if (few, k) != (FEW, 1) or few >= channels:
        return f"an image of {FEW} channels by a 1x1 kernel from more, got {few} of {channels} by {k}x{k}"
    others = (dy, dimage, image_weight, image, noise, noise_strength, bias)
    return _reason(y, act, gain, want_noise and noise is not None, others)


def launch_drawn_act_backward(
    dy: Tensor | None,
    dimage: Tensor,
    y: Tensor,
    image_weight: Tensor,
    image: Tensor | None,
    image_clamp: float | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None,
    want_dots: bool,
    want_image_weight: bool,
    want_image_bias: bool,
) -> tuple[Tensor, None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`launch_act_backward`, and the sums for image_weight and a bias of the image, as in Triton."""
    activation = (noise, noise_strength, act, gain, clamp, want_strength, want_bias, bias, want_dots)
    drawn = None if image_clamp is None else image
    return _launch(dy, y, *activation, dimage, image_weight, drawn, image_clamp, want_image_weight, want_image_bias)


def _dense(image: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """An image in its layout without gaps, and the strides of its pixels and channels."""
    if image is None:
        return None, (0, 0)
    layout, (few, height, width) = layout_of(image), image.shape[1:]
    strides = (few, 1) if layout is torch.channels_last else (1, height * width)
    return image.contiguous(memory_format=layout), strides


def _launch(
    dy: Tensor | None,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None,
    want_dots: bool,
    dimage: Tensor | None = None,
    image_weight: Tensor | None = None,
    image: Tensor | None = None,
    image_clamp: float | None = None,
    want_image_weight: bool = False,
    want_image_bias: bool = False,
) -> tuple[Tensor, None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    n, channels, height, width = y.shape
    pixels = height * width
    y, dy = on_16_bytes(y), None if dy is None else dense_pixels(dy)
    g = torch.empty_like(y)
    shares = _C.act_backward_shares(DTYPES[y.dtype], n, channels, pixels)

    def sums(want: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=y.device) if want else None

    noise, noise_strength, bias = (
        None if value is None else value.contiguous() for value in (noise, noise_strength, bias)
    )
    few, w_strides = 0, (0, 0, 0)
    dimage, image_strides = _dense(dimage)
    image, drawn_strides = _dense(image)
    if image_weight is not None:
        few = FEW
        w_n = image_weight.stride(0) if image_weight.ndim == 5 else 0
        w_strides = (w_n, image_weight.stride(-4), image_weight.stride(-3))
    bias_sums = sums(want_bias, n * shares, channels)
    strength_sums = sums(want_strength and noise is not None, n * shares)
    dots = sums(want_dots, n, shares, channels)
    w_sums = sums(want_image_weight, n * shares, few * channels)
    dimage_sums = sums(want_image_bias, n * shares, few)
    op = _C.ActBackward(
        dtype=DTYPES[y.dtype],
        n=n,
        channels=channels,
        pixels=pixels,
        shares=shares,
        few=few,
        dy=pointer(dy),
        y=y.data_ptr(),
        g=g.data_ptr(),
        noise=pointer(noise),
        noise_stride=pixels if noise is not None and noise.ndim == 4 and noise.shape[0] > 1 else 0,
        strength=pointer(noise_strength),
        bias=pointer(bias),
        dimage=pointer(dimage),
        image_strides=image_strides,
        image=pointer(image),
        drawn_strides=drawn_strides,
        image_clamp=inf if image_clamp is None else rounded(image_clamp, y.dtype),
        w=pointer(image_weight),
        w_strides=w_strides,
        positive=gain,
        negative=gain * SLOPES[act],
        clamp=nan if clamp is None else rounded(clamp, y.dtype),
        bias_sums=pointer(bias_sums),
        strength_sums=pointer(strength_sums),
        dots=pointer(dots),
        w_sums=pointer(w_sums),
        dimage_sums=pointer(dimage_sums),
    )
    _C.act_backward(op, stream(y))
    return g, None, strength_sums, bias_sums, dots, w_sums, dimage_sums

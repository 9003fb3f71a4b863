"""What an upsampling convolution's gradient begins with, in CUDA C++: the activation and the filter in one pass.

csrc/_upfirdn2d_gate.cu. Two steps in one: `launch_act_backward` of the Triton leaf, and upfirdn2d of its g, which alone
is left of that one and never gets to memory.
"""

from __future__ import annotations

import functools
from math import inf

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, epilogue_reason, filtering, pointer, stream
from clone_fast.kernels._dense import SLOPES, layout_of

CHANNELS = 8  # a multiple of which there must be


def activation_reason(y: Tensor, act: str, gain: float, resample_filter: Tensor) -> str | None:
    """Why no pass has this activation, whose result is y, and this filter, or None."""
    if layout_of(y) is not torch.channels_last:
        return "y is not channels_last"
    if y.shape[1] % CHANNELS:
        return f"channels must be a multiple of {CHANNELS}, got {y.shape[1]}"
    if any(size != 4 for size in resample_filter.shape):
        return "the filter must be [4, 4] or [4]"
    return epilogue_reason(act, gain)


def supports_act_fir(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    want_dots: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> str | None:
    """None where `launch_act_fir` can run, else the reason why not."""
    reason = activation_reason(y, act, gain, resample_filter)
    if reason:
        return reason
    if want_noise and noise is not None:
        return "does not add up over channels, for the noise"
    x0, x1, y0, y1 = padding
    if not (0 <= x0 <= 3 and 0 <= y0 <= 3 and x0 + x1 >= 3 and y0 + y1 >= 3):
        return f"the filter must leave the image no smaller, its padding is {padding}"
    small = (dy, noise, noise_strength, bias)
    if any(tensor is not None and tensor.dtype != y.dtype for tensor in small):
        return "wants one dtype for all"
    return dtype_reason(y)


def launch_act_fir(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    want_dots: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """h, and `launch_act_backward`'s sums for the noise (none here), its strength and the bias, and the dots.

    h = FIR(g), upfirdn2d's without resampling, padding [x0, x1, y0, y1], of `launch_act_backward`'s g: rounded to y's
    dtype before the filter, as that one's is. The sums are of g before it is rounded.

    Args:
        dy, y: [N, C, H, W], the gradient of the result and the result, in channels_last.
        noise: [H, W], [1, 1, H, W] or [N, 1, H, W]. noise_strength: scalar, or None for 1. bias: [C]; all in y's dtype.

    Returns:
        h [N, C, H + y0 + y1 - 3, W + x0 + x1 - 3] in y's dtype and layout. In float32 the sums [any] of the noise's
        strength and [any, C] of the bias, and the dots [N, any, C]; None for what is not wanted.
    """
    (n, c, height, width), (x0, x1, y0, y1) = y.shape, padding
    dy, y = dense_pixels(dy), dense_pixels(y)
    f = resample_filter.float().contiguous()
    want_strength = want_strength and noise is not None
    maps = noise.contiguous() if noise is not None and (want_strength or want_dots) else None
    bias = None if bias is None else bias.contiguous()
    size = (height + y0 + y1 - 3, width + x0 + x1 - 3)
    h = torch.empty([n, c, *size], dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    op = _C.Upfirdn2d(**filtering(y, h, f, [1, 1], [1, 1], padding, flip, filter_gain))
    rows, blocks = _C.upfirdn2d_gate_sums(op, DTYPES[y.dtype], maps is not None, want_dots)

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=y.device) if wanted else None

    bias_sums, dots = sums(want_bias, n * rows, c), sums(want_dots, n, rows, c)
    strength_sums = sums(want_strength, blocks)
    _C.upfirdn2d_gate(
        op=op,
        dtype=DTYPES[y.dtype],
        x=dy.data_ptr(),
        f=f.data_ptr(),
        y=h.data_ptr(),
        result=y.data_ptr(),
        noise=pointer(maps),
        noise_stride=height * width if maps is not None and maps.ndim == 4 and maps.shape[0] > 1 else 0,
        strength=pointer(noise_strength),
        bias=pointer(bias),
        gain=gain,
        slope=SLOPES[act],
        limit=inf if clamp is None else _below(clamp, y.dtype),
        of_bias=pointer(bias_sums),
        of_dots=pointer(dots),
        of_strength=pointer(strength_sums),
        stream=stream(y),
    )
    return h, None, strength_sums, bias_sums, dots


@functools.cache
def _below(clamp: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is below what a result clamped to `clamp` holds."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    return float((torch.tensor(clamp, dtype=dtype, device="cpu").view(bits) - 1).view(dtype))

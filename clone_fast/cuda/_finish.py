"""What follows an upsampling convolution, in CUDA C++: the filter, noise, bias, activation and clamp in one pass.

csrc/_upfirdn2d_finish.cu. With it clone_fast/ops composes what no kernel here fuses, see `composes`.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dtype_reason, epilogue_reason, filtering, pointer, stream
from clone_fast.kernels._dense import SLOPES, layout_of


def composes(
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
) -> str | None:
    """None where a filter here beside another leaf's convolution is the fastest way to run the op, or why it is not."""
    if (up, down) == (1, 1):
        return "there is no filter"
    if layout_of(x) is not torch.channels_last:
        return "x is not channels_last"
    return supports_finish(
        x, resample_filter if up == 2 else None, [], 1.0, noise, noise_strength, bias, act, gain, clamp
    )


def supports_finish(
    z: Tensor,
    resample_filter: Tensor | None,
    padding: list[int],
    filter_gain: float,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> str | None:
    """None where `launch_finish` can run, else the reason why not."""
    reason = epilogue_reason(act, gain)
    if reason:
        return reason
    if resample_filter is not None and any(size != 4 for size in resample_filter.shape):
        return "the filter must be [4, 4] or [4]"
    return dtype_reason(z)


def launch_finish(
    z: Tensor,
    resample_filter: Tensor,
    padding: list[int],
    filter_gain: float,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """clamp(gain * act(FIR(z) + noise * noise_strength + bias)), rounded once, in z's dtype and layout.

    The FIR is upfirdn2d's without resampling, padding [x0, x1, y0, y1].
    """
    layout, (n, c, h, w), (x0, x1, y0, y1) = layout_of(z), z.shape, padding
    z, f = z.contiguous(memory_format=layout), resample_filter.float().contiguous()
    noise, noise_strength, bias = (
        None if value is None else value.to(z.dtype).contiguous() for value in (noise, noise_strength, bias)
    )
    height, width = h + y0 + y1 - 3, w + x0 + x1 - 3
    y = torch.empty([n, c, height, width], dtype=z.dtype, device=z.device, memory_format=layout)
    op = _C.Upfirdn2d(**filtering(z, y, f, [1, 1], [1, 1], padding, False, filter_gain, layout))
    _C.upfirdn2d_finish(
        op=op,
        dtype=DTYPES[z.dtype],
        x=z.data_ptr(),
        f=f.data_ptr(),
        y=y.data_ptr(),
        noise=pointer(noise),
        noise_stride=height * width if noise is not None and noise.ndim == 4 and noise.shape[0] > 1 else 0,
        strength=pointer(noise_strength),
        bias=pointer(bias),
        gain=gain,
        slope=SLOPES[act],
        clamp=inf if clamp is None else clamp,
        stream=stream(z),
    )
    return y

"""Where a discriminator begins, in CUDA C++: a 1x1 convolution of the image with what follows it, and its result at
half the size, in one pass.

csrc/_upfirdn2d_branch.cu. Two steps in one: the convolution's `launch`, and upfirdn2d of what that one has written.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dtype_reason, epilogue_reason, filtering, pointer, stream
from clone_fast.cuda._act_fir import CHANNELS
from clone_fast.kernels._dense import SLOPES, layout_of

INPUTS = 4  # at most


def supports_branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    resample_filter: Tensor,
    padding: list[int],
) -> str | None:
    """None where `launch_branch` can run, else the reason why not."""
    reason = epilogue_reason(act, gain)
    if reason:
        return reason
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    if weight.ndim != 4 or tuple(weight.shape[2:]) != (1, 1):
        return f"the weight must be [O, I, 1, 1], got {list(weight.shape)}"
    if x.shape[1] > INPUTS:
        return f"x may have up to {INPUTS} channels, got {x.shape[1]}"
    if weight.shape[0] % CHANNELS:
        return f"channels must be a multiple of {CHANNELS}, got {weight.shape[0]}"
    if any(size != 4 for size in resample_filter.shape):
        return "the filter must be [4, 4] or [4]"
    x0, x1, y0, y1 = padding
    (h, w), ends = x.shape[2:], (1, 2)  # padding behind an even number of samples, which may leave one unread
    if h % 2 or w % 2 or (x0, y0) != (1, 1) or x1 not in ends or y1 not in ends:
        return f"filters to half of an even size with padding 1 before it, not {h}x{w} with {padding}"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype not in (x.dtype, torch.float32)):
        return "wants one dtype for all"
    return dtype_reason(x)


def launch_branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    resample_filter: Tensor,
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """y = clamp(gain * act(conv(x) + bias)) and upfirdn2d(y, down=2), each summed in float32 and rounded once.

    Args:
        x: [N, I, H, W] in channels_last, I at most `INPUTS`. weight: finished, [O, I, 1, 1] in x's dtype.
        bias: [O] in x's dtype or float32.
        padding: [1, x1, 1, y1], so that the second has half the size of the first.

    Returns:
        [N, O, H, W] and [N, O, H / 2, W / 2], in x's dtype and layout.
    """
    (n, _, h, w), c = x.shape, weight.shape[0]
    layout, pixels = layout_of(x), x.contiguous(memory_format=torch.channels_last)
    f, bias = resample_filter.float().contiguous(), None if bias is None else bias.contiguous()
    y, shrunk = (
        torch.empty([n, c, *size], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for size in ([h, w], [h // 2, w // 2])
    )
    op = _C.Upfirdn2d(**filtering(y, shrunk, f, [1, 1], [2, 2], padding, False, 1.0))
    _C.upfirdn2d_branch(
        op=op,
        dtype=DTYPES[x.dtype],
        x=pixels.data_ptr(),
        f=f.data_ptr(),
        y=y.data_ptr(),
        shrunk=shrunk.data_ptr(),
        inputs=x.shape[1],
        weight=weight.data_ptr(),
        weight_strides=weight.stride()[:2],
        bias=pointer(bias),
        bias_float=bias is not None and bias.dtype == torch.float32,
        gain=gain,
        slope=SLOPES[act],
        clamp=inf if clamp is None else clamp,
        stream=stream(x),
    )
    return y.contiguous(memory_format=layout), shrunk.contiguous(memory_format=layout)

"""What a downsampling convolution's gradient ends with, in CUDA C++: the filter, and the activation below, in one pass.

csrc/_upfirdn2d_slope.cu. Two steps in one: upfirdn2d, whose result never gets to memory, and of that one
`launch_act_backward`.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, filtering, pointer, stream
from clone_fast.cuda._act_fir import _below, activation_reason
from clone_fast.kernels._dense import SLOPES


def supports_fir_act(
    z: Tensor,
    y: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_bias: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> str | None:
    """None where `launch_fir_act` can run, else the reason why not."""
    reason = activation_reason(y, act, gain, resample_filter)
    if reason:
        return reason
    x0, x1, y0, y1 = padding
    filtered = [z.shape[2] + y0 + y1 - 3, z.shape[3] + x0 + x1 - 3]
    if filtered != list(y.shape[2:]):
        return f"z filtered must have the size of y {list(y.shape[2:])}, not {filtered}"
    if z.dtype != y.dtype:
        return "wants one dtype for all"
    return dtype_reason(y)


def launch_fir_act(
    z: Tensor,
    y: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_bias: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> tuple[Tensor, Tensor | None]:
    """g, and the sums for the bias, of `launch_act_backward` with dy = FIR(z), upfirdn2d's without resampling.

    In float32 until g is rounded: the sums are of g before that.

    Args:
        z: [N, C, H', W'], what is filtered, with padding [x0, x1, y0, y1], to the gradient of y.
        y: [N, C, H, W] in z's dtype, channels_last: the activation's result.

    Returns:
        g [N, C, H, W] in y's dtype and layout, and in float32 the sums [any, C], None where they are not wanted.
    """
    n, c = y.shape[:2]
    z, y = dense_pixels(z), dense_pixels(y)
    f = resample_filter.float().contiguous()
    g = torch.empty_like(y)
    op = _C.Upfirdn2d(**filtering(z, y, f, [1, 1], [1, 1], padding, flip, filter_gain))
    sums = None
    if want_bias:
        rows = _C.upfirdn2d_slope_sums(op, DTYPES[y.dtype])
        sums = torch.empty([n * rows, c], dtype=torch.float32, device=y.device)
    _C.upfirdn2d_slope(
        op=op,
        dtype=DTYPES[y.dtype],
        x=z.data_ptr(),
        f=f.data_ptr(),
        y=g.data_ptr(),
        result=y.data_ptr(),
        gain=gain,
        slope=SLOPES[act],
        limit=inf if clamp is None else _below(clamp, y.dtype),
        of_bias=pointer(sums),
        stream=stream(y),
    )
    return g, sums

"""The way back to where a discriminator begins, in CUDA C++: an image's two gradients, its activation and the 1x1
convolution that made it, in one pass.

csrc/_upfirdn2d_join.cu. Two steps in one: `launch_add` of upfirdn2d, whose result never gets to memory, and
of that `launch_pointwise_backward` of the Triton leaf.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, filtering, pointer, stream
from clone_fast.cuda._act_fir import _below, activation_reason
from clone_fast.kernels._dense import SLOPES

OUTPUTS = (8, 16, 32, 64)  # whose threads lie in one warp, and add a pixel's products up there
INPUTS = 4  # at most


def supports_branch_backward(
    dy: Tensor,
    dshrunk: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_dx: bool,
    want_dw: bool,
    want_bias: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> str | None:
    """None where `launch_branch_backward` can run, else the reason why not."""
    reason = activation_reason(y, act, gain, resample_filter)
    if reason:
        return reason
    if weight.ndim != 4 or weight.shape[-1] != 1:
        return f"one 1x1 kernel for all samples, not {list(weight.shape)}"
    outputs, inputs = weight.shape[:2]
    if outputs not in OUTPUTS or inputs > INPUTS:
        return f"from 1 to {INPUTS} channels to {', '.join(map(str, OUTPUTS))}, not from {inputs} to {outputs}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    x0, x1, y0, y1 = padding
    doubled = [2 * dshrunk.shape[2] + y0 + y1 - 3, 2 * dshrunk.shape[3] + x0 + x1 - 3]
    if doubled != list(y.shape[2:]):
        return f"dshrunk filtered must have the size of y {list(y.shape[2:])}, not {doubled}"
    if any(one.dtype != y.dtype for one in (dy, dshrunk, x, weight)):
        return "wants one dtype for all"
    return dtype_reason(y)


def launch_branch_backward(
    dy: Tensor,
    dshrunk: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_dx: bool,
    want_dw: bool,
    want_bias: bool,
    resample_filter: Tensor,
    padding: list[int],
    flip: bool,
    filter_gain: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, and the sums for dw and dbias, of the gradient dy + FIR(dshrunk), upfirdn2d's with up 2; None if not wanted.

    In float32 but for dx, which is rounded once.

    Args:
        dy, y: [N, O, H, W], the gradient that came to the image itself and the image, y in channels_last.
        dshrunk: [N, O, H', W'], what is filtered, with padding [x0, x1, y0, y1], to the rest of its gradient.
        x: [N, I, H, W] in channels_last. weight: [O, I, 1, 1], of any strides. y = clamp(gain * act(conv(x) + ...)).

    Returns:
        dx in x's dtype and layout. In float32 the sums [any, O * I], which `launch_pointwise_sums` adds, and [any, O],
        which `launch_act_sums` does.
    """
    n, outputs = y.shape[:2]
    inputs = x.shape[1]
    dy, dshrunk, y = (dense_pixels(image) for image in (dy, dshrunk, y))
    f = resample_filter.float().contiguous()
    op = _C.Upfirdn2d(**filtering(dshrunk, y, f, [2, 2], [1, 1], padding, flip, filter_gain))
    rows = n * _C.upfirdn2d_join_sums(op, DTYPES[y.dtype], inputs)

    def sums(wanted: bool, columns: int) -> Tensor | None:
        return torch.empty([rows, columns], dtype=torch.float32, device=y.device) if wanted else None

    dx = torch.empty_like(x) if want_dx else None
    of_weight, of_bias = sums(want_dw, inputs * outputs), sums(want_bias, outputs)
    _C.upfirdn2d_join(
        op=op,
        dtype=DTYPES[y.dtype],
        x=dshrunk.data_ptr(),
        f=f.data_ptr(),
        other=dy.data_ptr(),
        result=y.data_ptr(),
        gain=gain,
        slope=SLOPES[act],
        limit=inf if clamp is None else _below(clamp, y.dtype),
        inputs=inputs,
        input=x.data_ptr(),
        weight=weight.data_ptr(),
        weight_strides=weight.stride()[:2],
        of_input=pointer(dx),
        of_weight=pointer(of_weight),
        of_bias=pointer(of_bias),
        stream=stream(y),
    )
    return dx, of_weight, of_bias

"""upfirdn2d on CUDA, by csrc/upfirdn2d.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast.cuda import DTYPES, dtype_reason, filtering, pointer, stream
from clone_fast.kernels._dense import layout_of


def supports(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    return dtype_reason(x)


def launch(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Tensor:
    """See `clone_fast.ops.upfirdn2d.upfirdn2d`; up and down are [x, y], padding is [x0, x1, y0, y1]."""
    layout = layout_of(x)
    x, f = x.contiguous(memory_format=layout), f.contiguous()
    if f.ndim == 2 or f.shape[0] <= 4:
        return _launch(x, layout, f, up, down, padding, flip_filter, gain, x.dtype)
    # one axis after the other, what lies between them in float32
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
    across, columns = f[None, :], f[:, None]
    y = _launch(x, layout, across, [up_x, 1], [down_x, 1], [x0, x1, 0, 0], flip_filter, gain, torch.float32)
    return _launch(y, layout, columns, [1, up_y], [1, down_y], [0, 0, y0, y1], flip_filter, 1.0, x.dtype)


def supports_add(
    x: Tensor,
    other: Tensor,
    f: Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip_filter: bool,
    gain: float,
) -> str | None:
    """None where `launch_add` can run, else the reason why not."""
    if (tuple(f.shape), up, down) not in [((4,), [2, 2], [1, 1]), ((4, 4), [2, 2], [1, 1])]:
        return f"a 4x4 filter to twice the size adds, not f {list(f.shape)} with up {up} and down {down}"
    if other.dtype != x.dtype and x.dtype != torch.float32:
        return f"adds {x.dtype} to {x.dtype}, not {other.dtype}"
    return dtype_reason(x) or dtype_reason(other)


def launch_add(
    x: Tensor,
    other: Tensor,
    f: Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    """`launch`, plus other, of the size of its result: summed in float32, rounded once to x's dtype.

    What is added to float32 in NCHW may be in channels_last; in any other layout than x's it is copied first.
    """
    layout = other_layout = layout_of(x)
    if x.dtype == torch.float32 and layout == torch.contiguous_format:
        other_layout = layout_of(other)
    x, other, f = x.contiguous(memory_format=layout), other.contiguous(memory_format=other_layout), f.contiguous()
    y = torch.empty(other.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    op = _C.Upfirdn2d(**filtering(x, y, f, up, down, padding, flip_filter, gain, layout))
    _C.upfirdn2d_add(
        op,
        DTYPES[x.dtype],
        pointer(x),
        pointer(f),
        DTYPES[other.dtype],
        pointer(other),
        other_layout == torch.channels_last,
        pointer(y),
        stream(x),
    )
    return y


def _launch(
    x: Tensor,
    layout: torch.memory_format,
    f: Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip: bool,
    gain: float,
    dtype: torch.dtype,
) -> Tensor:
    """One pass over x, dense in this layout, to a y of this dtype; f [fh, fw], or [taps] for its outer product."""
    n, c, h, w = x.shape
    (fh, fw), (x0, x1, y0, y1) = (f.shape[0], f.shape[-1]), padding
    oh, ow = (h * up[1] + y0 + y1 - fh + down[1]) // down[1], (w * up[0] + x0 + x1 - fw + down[0]) // down[0]
    y = torch.empty([n, c, oh, ow], dtype=dtype, device=x.device, memory_format=layout)
    op = _C.Upfirdn2d(**filtering(x, y, f, up, down, padding, flip, gain, layout))
    _C.upfirdn2d(op, DTYPES[x.dtype], pointer(x), pointer(f), DTYPES[dtype], pointer(y), stream(x))
    return y

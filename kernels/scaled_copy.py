"""scaled_copy in Triton: one pass, in the order in which the result lies.

Where that is by pixels a program reads as many planes as there are channels, with all of a line used; where the source
lies so and the result does not, the channels of a pixel come from the same lines one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import DTYPES
from clone_fast.kernels._place import place

BLOCK = 1024  # numbers of a program
CHANNELS = 4  # at most: by what an index is divided is a constant


@triton.jit
def _scaled_copy_kernel(
    x, out, factor, added, pixels, x_n, x_c, x_p, out_n, out_c, out_p, factor_n, added_n, added_c, added_p,
    C: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [N, C, P] = x * factor + added, either of which may be None; INNER: out lies by pixels."""
    n = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, p = place(at, C, pixels, INNER)
    inside = at < pixels * C
    value = tl.load(x + n * x_n + c * x_c + p * x_p, mask=inside).to(tl.float32)
    if factor is not None:
        value *= tl.load(factor + n * factor_n).to(tl.float32)
    if added is not None:
        value += tl.load(added + n * added_n + c * added_c + p * added_p, mask=inside).to(tl.float32)
    tl.store(out + n * out_n + c * out_c + p * out_p, value, mask=inside)


def _pixels(x: Tensor) -> bool:
    """Whether one step leads from any pixel to the next, and 32 bits to the last."""
    (*_, height, width), (_, channel, row, step) = x.shape, x.stride()
    return (height == 1 or width == 1 or row == width * step) and (x.shape[1] * channel + height * row) < 2**31


def supports(out: Tensor, x: Tensor, factor: Tensor | None, added: Tensor | None) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    images = [one for one in (out, x, added) if one is not None]
    if out.shape[1] > CHANNELS:
        return f"of up to {CHANNELS} channels, got {out.shape[1]}"
    if any(one.dtype not in DTYPES for one in (*images, *([] if factor is None else [factor]))):
        return "float32 and half precision only"
    return None if all(map(_pixels, images)) else "rows must follow one another"


def _steps(x: Tensor) -> tuple[int, int, int]:
    """From sample to sample, channel to channel, pixel to pixel."""
    n, c, row, step = x.stride()
    return n, c, step if x.shape[3] > 1 else row


def launch(out: Tensor, x: Tensor, factor: Tensor | None, added: Tensor | None) -> bool:
    """Write `out`; True."""
    n, c, h, w = out.shape
    to = _steps(out)
    of_factor = 0 if factor is None or factor.ndim == 0 else factor.stride(0)
    _scaled_copy_kernel[(triton.cdiv(c * h * w, BLOCK), n)](
        x, out, factor, added, h * w, *_steps(x), *to, of_factor, *((0, 0, 0) if added is None else _steps(added)),
        C=c, INNER=to[1] < to[2], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return True

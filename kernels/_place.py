"""Where a number stands in an image, of its place in the order of memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(at, channels, pixels, INNER: tl.constexpr):
    """Channel and pixel, in the order of memory: channels_last where INNER."""
    if INNER:
        c = at % channels
        p = at // channels
    else:
        c = at // pixels
        p = at % pixels
    return c, p

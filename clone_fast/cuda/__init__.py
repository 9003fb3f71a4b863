"""The CUDA leaves: for each op the functions of its Triton twin in `kernels/`, run by the compiled `clone_fast._C`.

A leaf turns tensors that `clone_fast.ops` has checked into pointers, sizes and a stream. `clone_fast._C` is imported by
the leaves, not here: this package lies in every installation, the extension only where an nvcc was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clone_fast.kernels._dense import SLOPES, dtype_reason

__all__ = [
    "DTYPES",
    "dense_pixels",
    "dtype_reason",
    "epilogue_reason",
    "filtering",
    "on_16_bytes",
    "pointer",
    "stream",
]

# The numbers of `Dtype` in csrc/dtype.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def epilogue_reason(act: str, gain: float) -> str | None:
    """Why what follows a convolution cannot be fused here, or None."""
    if act not in SLOPES:
        return f"fuses {', '.join(SLOPES)}, not {act}"
    return f"wants a gain above zero, got {gain}" if gain <= 0 else None


def on_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy where its memory begins between two multiples of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def dense_pixels(x: Tensor) -> Tensor:
    """x [N, C, H, W] in memory order [N, H, W, C] without gaps, on 16 bytes."""
    return on_16_bytes(x.contiguous(memory_format=torch.channels_last))


def filtering(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip: bool,
    gain: float,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Any]:
    """What `_C.Upfirdn2d` says of a filter of x to y, both dense in this layout: all but the pointers."""
    return {
        "shape": tuple(x.shape),
        "size": tuple(y.shape[2:]),
        "channels_last": layout == torch.channels_last,
        "filter": (f.shape[0], f.shape[-1]),
        "separable": f.ndim == 1,
        "up": up,
        "down": down,
        "pad": (padding[0], padding[2]),
        "flip": flip,
        "gain": gain,
    }


def pointer(x: Tensor | None) -> int:
    """The address of the first element, 0 for no tensor."""
    return 0 if x is None else x.data_ptr()


def stream(x: Tensor) -> int:
    """The current stream of x's device, as an integer."""
    return torch.cuda.current_stream(x.device).cuda_stream

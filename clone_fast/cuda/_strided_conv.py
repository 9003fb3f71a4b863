"""The 3x3 convolution of stride 2 and its adjoint, the transposed one, in CUDA C++: between resampling filters."""

from __future__ import annotations

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast._compiler import constant_result
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, on_16_bytes, stream
from clone_fast.kernels._dense import layout_of

OUT_CHANNELS, IN_CHANNELS = 32, 8  # their numbers are multiples of these


def supports_strided(x: Tensor, weight: Tensor, transposed: bool) -> str | None:
    """None where `launch_strided` can run, else the reason why not."""
    out_channels, in_channels, k = weight.shape[-4], weight.shape[-3], weight.shape[-1]
    if k != 3:
        return f"a 3x3 kernel, not {k}x{k}"
    if dtype_reason(x) or x.dtype == torch.float32:
        return dtype_reason(x) or "no kernel for float32"
    if out_channels % OUT_CHANNELS or in_channels % IN_CHANNELS:
        return (
            f"channels must be multiples of {IN_CHANNELS} and, of the result, {OUT_CHANNELS}, "
            f"got {in_channels} and {out_channels}"
        )
    if not transposed and min(x.shape[2:]) < 2:
        return f"an image of two pixels each way, got {x.shape[2]}x{x.shape[3]}"
    if not _fits(x.device.index, transposed, in_channels, out_channels):
        return f"needs compute capability 9.0 and room on the chip for the weights of {in_channels} input channels"
    return None


@constant_result
def _fits(device: int, transposed: bool, in_channels: int, out_channels: int) -> bool:
    """A compiler does not look into the extension."""
    found: bool = _C.strided_conv_fits(device, transposed, in_channels, out_channels)
    return found


def supports_dgrad_weight(x: Tensor, weight: Tensor, transposed: bool) -> str | None:
    """None where `launch_dgrad_weight` can run: where `launch_strided` runs such a convolution, and copies its weight.

    x: what the gradient goes to, in place of what the convolution reads.
    """
    return supports_strided(x, weight, transposed)


def launch_dgrad_weight(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """The weight [.., O, I, 3, 3], O of the gradient's convolution, as `launch_strided` reads it: it copies no more."""
    return _packed(weight, x.dtype).movedim((-4, -3), (-2, -1))


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., 3, 3, O, I] on 16 bytes."""
    return on_16_bytes(weight.to(dtype).movedim((-4, -3), (-2, -1)).contiguous())


def launch_strided(x: Tensor, weight: Tensor, padding: int, transposed: bool, tile: int = -1) -> Tensor:
    """F.conv2d(x, weight, stride=2), or its adjoint with the weight still [.., O, I, 3, 3], O of the result.

    Weights are copied unless their memory has the order [.., 3, 3, O, I], that of the modulation. For tests, `tile`
    takes one of the kernel's tiles.
    """
    n, in_channels, height, width = x.shape
    out_channels = weight.shape[-4]
    sizes = [2 * size + 1 - 2 * padding if transposed else (size + 2 * padding - 1) // 2 for size in (height, width)]
    dense = dense_pixels(x)
    packed = _packed(weight, x.dtype)
    size = [n, out_channels, *sizes]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    op = _C.StridedConv(
        dtype=DTYPES[x.dtype],
        transposed=transposed,
        n=n,
        height=height,
        width=width,
        in_channels=in_channels,
        out_height=sizes[0],
        out_width=sizes[1],
        out_channels=out_channels,
        padding=padding,
        results=n if weight.ndim == 5 else 1,
        x=dense.data_ptr(),
        weight=packed.data_ptr(),
        y=y.data_ptr(),
        tile=tile,
    )
    _C.strided_conv(op, stream(x))
    return y.contiguous(memory_format=layout_of(x))

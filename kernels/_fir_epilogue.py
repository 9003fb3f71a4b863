"""The FIR of a resampling, and a convolution's last pass: what it could not finish itself.

`fir` is the pass that a tensor takes after a transposed convolution (the FIR), after a convolution split over its
channels (the sum of its parts) and after cuDNN (neither); and before a strided convolution.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._epilogue import Epilogue, activated, loaded, strides
from clone_fast.kernels._fir_slide import slide, slides


@triton.jit(do_not_specialize=["parts", "height", "width", "out_height", "out_width", "pad_x", "pad_y"])
def _fir_kernel(
    x,
    f,
    y,
    noise,
    strength,
    bias,
    other,
    parts,
    height,
    width,
    channels,
    out_height,
    out_width,
    pad_x,
    pad_y,
    f_y,
    f_x,
    x_part,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    noise_n,
    noise_h,
    noise_w,
    filter_gain,
    gain,
    clamp,
    FW: tl.constexpr,
    FH: tl.constexpr,
    SEPARABLE: tl.constexpr,
    FLIP: tl.constexpr,
    STEP: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    WHOLE: tl.constexpr,
    SLOPE: tl.constexpr,
    NOISE: tl.constexpr,
    STRENGTH: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    ADD: tl.constexpr,
):
    """One tile [BH * BW pixels, BC channels] of y; WHOLE: BC divides the channels. See `fir`."""
    pid = tl.program_id(0)
    tiles_c = tl.cdiv(channels, BC)
    tiles_x = tl.cdiv(out_width, BW)
    tiles_y = tl.cdiv(out_height, BH)
    c = pid % tiles_c * BC + tl.arange(0, BC)
    pid = pid // tiles_c
    m = tl.arange(0, BH * BW)
    column = pid % tiles_x * BW + m % BW
    pid = pid // tiles_x
    row = pid % tiles_y * BH + m // BW
    n = pid // tiles_y
    c_inside = c < channels
    inside = (row < out_height) & (column < out_width)
    value = tl.zeros((BH * BW, BC), dtype=tl.float32)
    for part in range(parts):
        base = x + part * x_part + n * x_n
        for dy in range(FH):
            py = row * STEP + dy - pad_y
            row_inside = inside & (py >= 0) & (py < height)
            for dx in tl.static_range(FW):
                px = column * STEP + dx - pad_x
                mask = (row_inside & (px >= 0) & (px < width))[:, None]
                mask = mask if WHOLE else mask & c_inside[None, :]
                seen = tl.load(base + (py * x_h + px * x_w)[:, None] + (c * x_c)[None, :], mask=mask, other=0.0)
                seen = seen.to(tl.float32)
                if FW * FH > 1:
                    ty = dy if FLIP else FH - 1 - dy
                    tx = dx if FLIP else FW - 1 - dx
                    if SEPARABLE:
                        factor = tl.load(f + ty * f_x) * tl.load(f + tx * f_x)
                    else:
                        factor = tl.load(f + ty * f_y + tx * f_x)
                    value += seen * (factor * filter_gain)
                else:
                    value += seen
    at = n * y_n + (row * y_h + column * y_w)[:, None] + (c * y_c)[None, :]
    written = inside[:, None] if WHOLE else inside[:, None] & c_inside[None, :]
    if ADD:
        value += tl.load(other + at, mask=written, other=0.0).to(tl.float32)
    noise_value = loaded(noise + n * noise_n, row * noise_h + column * noise_w, inside, gain, NOISE)
    bias_value = loaded(bias, c, c_inside, gain, BIAS)
    factor = loaded(strength, 0, True, gain, STRENGTH)
    noise_value = noise_value[:, None] if NOISE else noise_value
    bias_value = bias_value[None, :] if BIAS else bias_value
    value = activated(value, noise_value, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=written)


def fir(
    x: Tensor,
    y: Tensor,
    f: Tensor | None = None,
    pads: tuple[int, int] = (0, 0),
    *,
    step: int = 1,
    flip: bool = False,
    filter_gain: float = 1.0,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Filter, decimate and finish x into y, and return y.

    Args:
        x: [N, C, H, W] or the parts [S, N, C, H, W] of a sum, any strides, better channels_last.
        y: [N, C, H', W'], written whole, any strides.
        f: float32 [fh, fw] or [taps]; None for no filter. A convolution as in `upfirdn2d`: its taps are reversed
            unless flip is set.
        pads: zeros to the left of and above x; what stands right and below follows from the size of y.
        step: decimation, 1 or 2.
    """
    finish = epilogue or Epilogue()
    if f is not None and finish.other is None and slides(x, y, f, step):
        return slide(x, y, f, pads, flip, filter_gain, finish)
    parts = x if x.ndim == 5 else x[None]
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    n, channels, height, width = y.shape
    bc = min(triton.next_power_of_2(channels), 256 // x.element_size())
    pixels = max(16, (2048 if f is None else 1024) // bc)
    bw = min(triton.next_power_of_2(width), 16)
    bh = min(triton.next_power_of_2(height), pixels // bw)
    grid = (n * triton.cdiv(channels, bc) * triton.cdiv(width, bw) * triton.cdiv(height, bh),)
    _fir_kernel[grid](
        x=x,
        f=y if f is None else f,
        y=y,
        parts=parts.shape[0],
        height=parts.shape[3],
        width=parts.shape[4],
        channels=channels,
        out_height=height,
        out_width=width,
        pad_x=pads[0],
        pad_y=pads[1],
        f_y=0 if f is None else f.stride(0),
        f_x=0 if f is None else f.stride(-1),
        x_part=parts.stride(0) if x.ndim == 5 else 0,
        **strides("x", parts[0]),
        **strides("y", y),
        filter_gain=filter_gain,
        FW=fw,
        FH=fh,
        SEPARABLE=f is not None and f.ndim == 1,
        FLIP=flip,
        STEP=step,
        BH=bh,
        BW=bw,
        BC=bc,
        WHOLE=channels % bc == 0,
        **finish.arguments(y),
        **finish.addition(y),
        num_warps=4,
    )
    return y

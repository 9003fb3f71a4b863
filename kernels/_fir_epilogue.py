"""What stands after a convolution: noise, bias, activation, gain and clamp; and the FIR of a resampling before them.

`activated` is the epilogue on a tile in registers, shared by the convolution itself and by `fir`, which is the pass
that a tensor takes where the convolution cannot finish it: after a transposed convolution (the FIR), after a
convolution split over its channels (the sum of its parts) and after cuDNN (neither).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import SLOPES
from clone_fast.kernels._device import capability, multiprocessors
from clone_fast.kernels.upfirdn2d import SIZES, TUNING, _dot4, _four_columns, _four_taps, _row_inside, _where


@dataclass(frozen=True)
class Epilogue:
    """y = clamp(gain * act(value + noise * strength + bias)); noise [H, W], [1, 1, H, W] or [N, 1, H, W]."""

    noise: Tensor | None = None
    strength: Tensor | None = None
    bias: Tensor | None = None
    act: str = "linear"
    gain: float = 1.0
    clamp: float | None = None

    def arguments(self, y: Tensor) -> dict[str, Any]:
        """The kernel arguments of `activated` in both kernels; y stands in for what is absent."""
        noise = self.noise if self.noise is None or self.noise.ndim == 4 else self.noise[None, None]
        strides = (0, 0, 0, 0) if noise is None else noise.stride()
        strength = self.strength if noise is not None else None
        return {
            "noise": y if noise is None else noise,
            "strength": y if strength is None else strength,
            "bias": y if self.bias is None else self.bias.contiguous(),
            "noise_n": 0 if noise is None or noise.shape[0] == 1 else strides[0],
            "noise_h": strides[2],
            "noise_w": strides[3],
            "gain": self.gain,
            "clamp": 0.0 if self.clamp is None else self.clamp,
            "SLOPE": SLOPES[self.act],
            "NOISE": noise is not None,
            "STRENGTH": strength is not None,
            "BIAS": self.bias is not None,
            "CLAMP": self.clamp is not None,
        }


def strides(name: str, t: Tensor) -> dict[str, int]:
    """The strides of t [N, C, H, W] as kernel arguments."""
    return dict(zip((f"{name}_n", f"{name}_c", f"{name}_h", f"{name}_w"), t.stride(), strict=True))


@triton.jit
def loaded(pointer, offsets, inside, stand_in, WANTED: tl.constexpr):
    """What lies at the offsets, as it is, to be loaded long before it is needed; or the stand-in."""
    if WANTED:
        return tl.load(pointer + offsets, mask=inside, other=0.0)
    else:
        return stand_in


@triton.jit
def activated(
    value, noise, strength, bias, gain, clamp, SLOPE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """value, float32, with the epilogue; noise, strength and bias `loaded`, in shapes that broadcast against it.

    NaN stays NaN. The gain, which is positive, is part of the sum: six instructions for an element instead of nine,
    while which the tensor cores of a convolution wait.
    """
    value = value * gain
    if NOISE:
        factor = strength.to(tl.float32) * gain if STRENGTH else gain
        value += noise.to(tl.float32) * factor
    if BIAS:
        value += bias.to(tl.float32) * gain
    if SLOPE == 0.0:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif SLOPE != 1.0:
        value = tl.maximum(value, value * SLOPE, propagate_nan=tl.PropagateNan.ALL)
    if CLAMP:
        value = tl.minimum(value, clamp, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(value, -clamp, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit(do_not_specialize=["parts", "height", "width", "out_height", "out_width", "pad_x", "pad_y"])
def _fir_kernel(
    x,
    f,
    y,
    noise,
    strength,
    bias,
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
    noise_value = loaded(noise + n * noise_n, row * noise_h + column * noise_w, inside, gain, NOISE)
    bias_value = loaded(bias, c, c_inside, gain, BIAS)
    factor = loaded(strength, 0, True, gain, STRENGTH)
    noise_value = noise_value[:, None] if NOISE else noise_value
    bias_value = bias_value[None, :] if BIAS else bias_value
    value = activated(value, noise_value, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
    tl.store(
        y + n * y_n + (row * y_h + column * y_w)[:, None] + (c * y_c)[None, :],
        value.to(y.dtype.element_ty),
        mask=inside[:, None] if WHOLE else inside[:, None] & c_inside[None, :],
    )


@triton.jit(do_not_specialize=[*SIZES, "blocks", "bands", "rows"])
def _slide_kernel(
    x, f, y, noise, strength, bias, filter_gain, c, h, w, oh, ow, pad_x, pad_y, blocks, bands, rows, noise_n, noise_h,
    noise_w, gain, clamp, FLIP: tl.constexpr, SEPARABLE: tl.constexpr, BLOCK: tl.constexpr, SLOPE: tl.constexpr,
    NOISE: tl.constexpr, STRENGTH: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The 4x4 filter of upfirdn2d's `_same_kernel`, which reads a row once while it slides down, and the epilogue."""
    image, band, ox, channel = _where(c, blocks, bands, 0, False, BLOCK)
    first = band * rows
    rows = tl.minimum(rows, oh - first)
    x += image * (h * w * c)
    y += image * (oh * ow * c) + (ox * c + channel)
    noise += image * noise_n
    bias_value = loaded(bias, channel, ox < ow, gain, BIAS)
    factor = loaded(strength, 0, True, gain, STRENGTH)
    top = _four_taps(f, 0, filter_gain, FLIP, SEPARABLE)
    upper = _four_taps(f, 1, filter_gain, FLIP, SEPARABLE)
    lower = _four_taps(f, 2, filter_gain, FLIP, SEPARABLE)
    bottom = _four_taps(f, 3, filter_gain, FLIP, SEPARABLE)
    iy = first - pad_y
    end = tl.minimum(h, iy + rows + 3)
    n0, n1, n2, n3 = _four_columns(x, iy, end, ox - pad_x, channel, w, c)
    begun = tl.zeros([BLOCK], tl.float32)
    half = begun
    nearly = begun
    for r in range(rows + 3):
        v0, v1, v2, v3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        n0, n1, n2, n3 = _four_columns(x, iy + r + 1, end, ox - pad_x, channel, w, c)
        inside = (ox < ow) & _row_inside(r - 3, rows, ox)
        noise_value = loaded(noise, (first + r - 3) * noise_h + ox * noise_w, inside, gain, NOISE)
        done = nearly + _dot4(bottom, v0, v1, v2, v3)
        nearly = half + _dot4(lower, v0, v1, v2, v3)
        half = begun + _dot4(upper, v0, v1, v2, v3)
        begun = _dot4(top, v0, v1, v2, v3)
        done = activated(done, noise_value, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
        tl.store(y + (first + r - 3) * (ow * c), done, mask=inside)


def _slides(x: Tensor, y: Tensor, f: Tensor | None, step: int) -> bool:
    """Whether `_slide_kernel` can do it."""
    dense = x.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y))
    return dense and y.shape[1] > 1 and f is not None and (f.shape[0], f.shape[-1]) == (4, 4) and step == 1


def _slide(
    x: Tensor, y: Tensor, f: Tensor, pads: tuple[int, int], flip: bool, filter_gain: float, epilogue: Epilogue
) -> Tensor:
    n, c, oh, ow = y.shape
    block, per_warp, warps = TUNING.get(capability(x.device), TUNING[9, 0])["same", True, x.element_size()]
    block = max(per_warp, min(block, triton.next_power_of_2(ow * c)))
    blocks = triton.cdiv(ow * c, block)
    bands = min(max(1, multiprocessors(x.device) * warps * per_warp // block // (blocks * n)), max(1, oh // 8))
    rows = triton.cdiv(oh, bands)
    bands = triton.cdiv(oh, rows)
    sizes = (c, x.shape[2], x.shape[3], oh, ow, *pads, blocks, bands, rows)
    names = ("c", "h", "w", "oh", "ow", "pad_x", "pad_y", "blocks", "bands", "rows")
    _slide_kernel[(blocks * bands * n,)](
        x=x,
        f=f.contiguous(),
        y=y,
        filter_gain=filter_gain,
        **dict(zip(names, sizes, strict=True)),
        FLIP=flip,
        SEPARABLE=f.ndim == 1,
        BLOCK=block,
        **epilogue.arguments(y),
        num_warps=block // per_warp,
    )
    return y


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
    if f is not None and _slides(x, y, f, step):
        return _slide(x, y, f, pads, flip, filter_gain, epilogue or Epilogue())
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
        **(epilogue or Epilogue()).arguments(y),
        num_warps=4,
    )
    return y

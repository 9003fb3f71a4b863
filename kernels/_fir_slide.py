"""The 4x4 filter behind a transposed convolution, and what follows it, in one pass that slides down the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._device import multiprocessors
from clone_fast.kernels._epilogue import Epilogue, bent, loaded
from clone_fast.kernels.upfirdn2d import SIZES, _dot4, _four_taps, _row_inside

THREADS = 128  # at most, in a program that slides
WARPS = 8  # of such programs on a multiprocessor: few have long bands and read little twice


@triton.jit
def _five_columns(row, inside, masks, c):
    """What two neighbouring outputs see of an input row, zero outside the image."""
    m0, m1, m2, m3, m4 = masks
    v0 = tl.load(row, mask=inside & m0, other=0.0)
    v1 = tl.load(row + c, mask=inside & m1, other=0.0)
    v2 = tl.load(row + 2 * c, mask=inside & m2, other=0.0)
    v3 = tl.load(row + 3 * c, mask=inside & m3, other=0.0)
    v4 = tl.load(row + 4 * c, mask=inside & m4, other=0.0)
    return v0, v1, v2, v3, v4


@triton.jit
def _two_noises(noise, row, end, ox, ow, noise_h, noise_w, factor, NOISE: tl.constexpr):
    inside = _row_inside(row, end, ox)
    at = row * noise_h + ox * noise_w
    left = loaded(noise, at, inside & (ox < ow), factor, NOISE)
    right = loaded(noise, at + noise_w, inside & (ox + 1 < ow), factor, NOISE)
    return left, right


@triton.jit
def _finished(value, noise, factor, clamp, SLOPE: tl.constexpr, NOISE: tl.constexpr, CLAMP: tl.constexpr):
    if NOISE:
        value += noise.to(tl.float32)[:, None] * factor
    return bent(value, clamp, SLOPE, CLAMP)


@triton.jit
def _weighed(taps, v0, v1, v2, v3, OUTER: tl.constexpr):
    """A row of the filter: for an outer product a factor of what was summed across already."""
    if OUTER:
        return taps[0] * v0
    else:
        return _dot4(taps, v0, v1, v2, v3)


@triton.jit
def _slide_rows(
    x, y, noise, taps, across, start, factor, clamp, iy, end, first, rows, column, masks, stored, ox, c, w, ow, noise_h,
    noise_w, OUTER: tl.constexpr, SLOPE: tl.constexpr, NOISE: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """A band of rows. OUTER: the filter is the outer product of the first of each row's `taps` and `across`."""
    top, upper, lower, bottom = taps
    left_stored, right_stored = stored
    n0, n1, n2, n3, n4 = _five_columns(x + iy * (w * c), _row_inside(iy, end, column)[:, None], masks, c)
    next_left, next_right = _two_noises(noise, first - 3, first, ox, ow, noise_h, noise_w, factor, NOISE)
    begun_l = tl.zeros_like(start)
    half_l = begun_l
    nearly_l = begun_l
    begun_r = begun_l
    half_r = begun_l
    nearly_r = begun_l
    for r in range(rows + 3):
        v0, v1, v2 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32)
        v3, v4 = n3.to(tl.float32), n4.to(tl.float32)
        noise_left, noise_right = next_left, next_right
        below = iy + r + 1  # while this row is added
        n0, n1, n2, n3, n4 = _five_columns(x + below * (w * c), _row_inside(below, end, column)[:, None], masks, c)
        next_left, next_right = _two_noises(noise, first + r - 2, first + rows, ox, ow, noise_h, noise_w, factor, NOISE)
        l0, r0 = v0, v1
        if OUTER:
            l0, r0 = _dot4(across, v0, v1, v2, v3), _dot4(across, v1, v2, v3, v4)
        done_l = nearly_l + _weighed(bottom, l0, v1, v2, v3, OUTER)
        nearly_l = half_l + _weighed(lower, l0, v1, v2, v3, OUTER)
        half_l = begun_l + _weighed(upper, l0, v1, v2, v3, OUTER)
        begun_l = start + _weighed(top, l0, v1, v2, v3, OUTER)
        done_r = nearly_r + _weighed(bottom, r0, v2, v3, v4, OUTER)
        nearly_r = half_r + _weighed(lower, r0, v2, v3, v4, OUTER)
        half_r = begun_r + _weighed(upper, r0, v2, v3, v4, OUTER)
        begun_r = start + _weighed(top, r0, v2, v3, v4, OUTER)
        out = y + (first + r - 3) * (ow * c)
        wanted = _row_inside(r - 3, rows, ox)[:, None]
        done_l = _finished(done_l, noise_left, factor, clamp, SLOPE, NOISE, CLAMP)
        done_r = _finished(done_r, noise_right, factor, clamp, SLOPE, NOISE, CLAMP)
        tl.store(out, done_l.to(y.dtype.element_ty), mask=wanted & left_stored)
        tl.store(out + c, done_r.to(y.dtype.element_ty), mask=wanted & right_stored)


@triton.jit(do_not_specialize=[*SIZES, "splits", "strips", "bands", "rows"])
def _slide_kernel(
    x, f, y, noise, strength, bias, filter_gain, c, h, w, oh, ow, pad_x, pad_y, splits, strips, bands, rows, noise_n,
    noise_h, noise_w, gain, clamp, FLIP: tl.constexpr, SEPARABLE: tl.constexpr, SEARCH: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, WHOLE: tl.constexpr, SLOPE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The 4x4 filter and the epilogue, sliding down BP pairs of columns x BC channels; WHOLE: BC divides them.

    A row is read once and joins the sums of the four output rows that it reaches. Two columns share what they see, a
    pixel's noise is one number for a thread, and the gain, which is positive, is part of what a sum is made of. SEARCH:
    that the filter is an outer product, which halves the work, is found out here, since it never visits the host.
    """
    program = tl.program_id(0)
    channel = program % splits * BC + tl.arange(0, BC)
    program = program // splits
    ox = 2 * (program % strips * BP + tl.arange(0, BP))
    program = program // strips
    first = program % bands * rows
    image = (program // bands).to(tl.int64)
    rows = tl.minimum(rows, oh - first)
    there = channel < c
    factor = gain
    if STRENGTH:
        factor = tl.load(strength).to(tl.float32) * gain
    start = tl.zeros([BP, BC], tl.float32)
    if BIAS:
        start += (tl.load(bias + channel, mask=there, other=0.0).to(tl.float32) * gain)[None, :]
    column = ox - pad_x
    x += image * (h * w * c) + (column * c)[:, None] + channel[None, :]
    y += image * (oh * ow * c) + (ox * c)[:, None] + channel[None, :]
    noise += image * noise_n
    m0 = ((column >= 0) & (column < w))[:, None]
    m1 = ((column >= -1) & (column < w - 1))[:, None]
    m2 = ((column >= -2) & (column < w - 2))[:, None]
    m3 = ((column >= -3) & (column < w - 3))[:, None]
    m4 = ((column >= -4) & (column < w - 4))[:, None]
    s0 = (ox < ow)[:, None]
    s1 = (ox + 1 < ow)[:, None]
    if not WHOLE:
        m0, m1, m2 = m0 & there[None, :], m1 & there[None, :], m2 & there[None, :]
        m3, m4 = m3 & there[None, :], m4 & there[None, :]
        s0, s1 = s0 & there[None, :], s1 & there[None, :]
    masks = (m0, m1, m2, m3, m4)
    stored = (s0, s1)
    iy = first - pad_y
    end = tl.minimum(h, iy + rows + 3)
    scale = filter_gain * gain
    if SEPARABLE:
        t0, t1, t2, t3 = tl.load(f), tl.load(f + 1), tl.load(f + 2), tl.load(f + 3)
        if not FLIP:
            t0, t1, t2, t3 = t3, t2, t1, t0
        down = ((t0 * scale,), (t1 * scale,), (t2 * scale,), (t3 * scale,))
        _slide_rows(x, y, noise, down, (t0, t1, t2, t3), start, factor, clamp, iy, end, first, rows, column, masks,
                    stored, ox, c, w, ow, noise_h, noise_w, True, SLOPE, NOISE, CLAMP)  # fmt: skip
    elif SEARCH:
        taps = tl.arange(0, 16)
        values = tl.load(f + taps)
        pivot = tl.argmax(tl.abs(values), 0)
        largest = tl.load(f + pivot)
        outer = tl.load(f + taps // 4 * 4 + pivot % 4) * (tl.load(f + pivot // 4 * 4 + taps % 4) / largest)
        wrong = tl.sum((tl.abs(values - outer) > 4e-7 * tl.abs(values)).to(tl.int32), 0)
        if (wrong == 0) & (largest != 0):
            at = f + pivot % 4
            t0, t1, t2, t3 = tl.load(at), tl.load(at + 4), tl.load(at + 8), tl.load(at + 12)
            at = f + pivot // 4 * 4
            a0, a1, a2, a3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
            if not FLIP:
                t0, t1, t2, t3 = t3, t2, t1, t0
                a0, a1, a2, a3 = a3, a2, a1, a0
            scale = scale / largest
            down = ((t0 * scale,), (t1 * scale,), (t2 * scale,), (t3 * scale,))
            _slide_rows(x, y, noise, down, (a0, a1, a2, a3), start, factor, clamp, iy, end, first, rows, column, masks,
                        stored, ox, c, w, ow, noise_h, noise_w, True, SLOPE, NOISE, CLAMP)  # fmt: skip
        else:
            top = _four_taps(f, 0, scale, FLIP, False)
            upper = _four_taps(f, 1, scale, FLIP, False)
            lower = _four_taps(f, 2, scale, FLIP, False)
            bottom = _four_taps(f, 3, scale, FLIP, False)
            _slide_rows(x, y, noise, (top, upper, lower, bottom), top, start, factor, clamp, iy, end, first, rows,
                        column, masks, stored, ox, c, w, ow, noise_h, noise_w, False, SLOPE, NOISE, CLAMP)  # fmt: skip
    else:
        top = _four_taps(f, 0, scale, FLIP, False)
        upper = _four_taps(f, 1, scale, FLIP, False)
        lower = _four_taps(f, 2, scale, FLIP, False)
        bottom = _four_taps(f, 3, scale, FLIP, False)
        _slide_rows(x, y, noise, (top, upper, lower, bottom), top, start, factor, clamp, iy, end, first, rows,
                    column, masks, stored, ox, c, w, ow, noise_h, noise_w, False, SLOPE, NOISE, CLAMP)  # fmt: skip


def slides(x: Tensor, y: Tensor, f: Tensor | None, step: int) -> bool:
    """Whether `slide` can do it."""
    dense = x.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y))
    return dense and y.shape[1] > 1 and f is not None and (f.shape[0], f.shape[-1]) == (4, 4) and step == 1


def slide(
    x: Tensor, y: Tensor, f: Tensor, pads: tuple[int, int], flip: bool, filter_gain: float, epilogue: Epilogue
) -> Tensor:
    """Filter and finish x into y, both channels_last."""
    n, c, oh, ow = y.shape
    lanes = 16 // x.element_size()  # numbers of a thread
    power = c & -c  # the largest power of two that divides c
    bc = min(64, power if power >= lanes else triton.next_power_of_2(c))
    pairs = triton.cdiv(ow, 2)
    bp = max(1, min(THREADS * lanes // bc, triton.next_power_of_2(pairs)))
    warps = max(1, bp * bc // (32 * lanes))
    splits, strips = triton.cdiv(c, bc), triton.cdiv(pairs, bp)
    bands = min(max(1, multiprocessors(x.device) * WARPS // (warps * splits * strips * n)), max(1, oh // 8))
    rows = triton.cdiv(oh, bands)
    bands = triton.cdiv(oh, rows)
    sizes = (c, x.shape[2], x.shape[3], oh, ow, *pads, splits, strips, bands, rows)
    names = ("c", "h", "w", "oh", "ow", "pad_x", "pad_y", "splits", "strips", "bands", "rows")
    _slide_kernel[(splits * strips * bands * n,)](
        x=x,
        f=f.contiguous(),
        y=y,
        filter_gain=filter_gain,
        **dict(zip(names, sizes, strict=True)),
        FLIP=flip,
        SEPARABLE=f.ndim == 1,
        SEARCH=x.element_size() == 2,  # the factors of an outer product are rounded, which float32 would show
        BP=bp,
        BC=bc,
        WHOLE=c % bc == 0,
        **epilogue.arguments(y),
        num_warps=warps,
    )
    return y

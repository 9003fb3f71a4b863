"""The Triton kernels of laplacian_pyramid; see laplacian_pyramid.py.

Every kernel works on tiles of the coarser of its two levels, BH x BW of it and 2 BH x 2 BW of the finer. Along one axis
reduce and expand are

    low[i] = (fine[2i-2] + 4 fine[2i-1] + 6 fine[2i] + 4 fine[2i+1] + fine[2i+2]) / 16        borders repeated
    fine[2k] = (low[k-1] + 6 low[k] + low[k+1]) / 8,  fine[2k+1] = (low[k] + low[k+1]) / 2

and their adjoints have the same taps, zero outside, with larger middle weights at the borders that were repeated. The
taps are summed so that a constant comes through without rounding: its bands are exactly zero.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(tiles_y, tiles_x, BH: tl.constexpr, BW: tl.constexpr):
    """Plane, rows [BH, 1] and columns [1, BW] of this program's tile of the coarser level."""
    pid = tl.program_id(0)
    row = pid // tiles_x
    plane = row // tiles_y
    i = (row - plane * tiles_y) * BH + tl.arange(0, BH)
    j = (pid - row * tiles_x) * BW + tl.arange(0, BW)
    return plane.to(tl.int64), i[:, None], j[None, :]


@triton.jit
def _clamped(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _five(a, b, c, d, e):
    return tl.fma(4.0, b + d, tl.fma(6.0, c, a + e))


@triton.jit
def _three(a, b, c):
    return tl.fma(6.0, b, a + c)


@triton.jit
def _pairs(at, BH: tl.constexpr, BW: tl.constexpr):
    """The even and the odd ones of 2 BW neighbours."""
    return tl.split(tl.reshape(tl.load(at).to(tl.float32), [BH, BW, 2]))


@triton.jit
def _five_columns(at, BH: tl.constexpr, BW: tl.constexpr):
    """Decimated rows that lie inside the image; at: [BH, 2 BW] addresses of samples 2j and 2j + 1."""
    a, b = _pairs(at - 2, BH, BW)
    c, d = _pairs(at, BH, BW)
    e, _ = _pairs(at + 2, BH, BW)
    return _five(a, b, c, d, e)


@triton.jit
def _decimated_inside(fine, i, j, width, BH: tl.constexpr, BW: tl.constexpr):
    """Decimated along both axes, where nothing that is read lies outside the image."""
    at = fine + 2 * i * width + 2 * tl.min(j) + tl.arange(0, 2 * BW)[None, :]
    r0 = _five_columns(at - 2 * width, BH, BW)
    r1 = _five_columns(at - width, BH, BW)
    r2 = _five_columns(at, BH, BW)
    r3 = _five_columns(at + width, BH, BW)
    r4 = _five_columns(at + 2 * width, BH, BW)
    return _five(r0, r1, r2, r3, r4)


@triton.jit
def _difference(x, y, mask):
    return tl.load(x, mask=mask).to(tl.float32) - tl.load(y, mask=mask).to(tl.float32)


@triton.jit
def _is_inside(i, j, height, width):
    """Whether rows 2i-2 .. 2i+2 and columns 2j-2 .. 2j+3 of the whole tile lie inside the image."""
    rows = (tl.min(i) > 0) & (2 * tl.max(i) + 2 < height)
    return rows & (tl.min(j) > 0) & (2 * tl.max(j) + 3 < width)


# ---- down --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["channels", "height", "tiles_y", "tiles_x", "x_n", "y_n", "x_c", "y_c"])
def subtract(
    x, y, out, channels, height, width, tiles_y, tiles_x, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """out = x - y, [planes, H, W] float32; tiles of 2 BH x 2 BW."""
    plane, _, _ = _place(tiles_y, tiles_x, BH, BW)
    pid = tl.program_id(0)
    i = ((pid // tiles_x) % tiles_y * (2 * BH) + tl.arange(0, 2 * BH)).to(tl.int64)[:, None]
    j = (pid % tiles_x * (2 * BW) + tl.arange(0, 2 * BW)).to(tl.int64)[None, :]
    mask = (i < height) & (j < width)
    n, c = plane // channels, plane % channels
    d = _difference(x + n * x_n + c * x_c + i * x_h + j * x_w, y + n * y_n + c * y_c + i * y_h + j * y_w, mask)
    tl.store(out + (plane * height + i) * width + j, d, mask=mask)


@triton.jit
def _clamped_columns(fine, row, j, width):
    """Decimated, the borders of the row repeated."""
    at = fine + row * width
    a, b = tl.load(at + _clamped(2 * j - 2, width)), tl.load(at + _clamped(2 * j - 1, width))
    d, e = tl.load(at + _clamped(2 * j + 1, width)), tl.load(at + _clamped(2 * j + 2, width))
    return _five(a, b, tl.load(at + _clamped(2 * j, width)), d, e)


@triton.jit(do_not_specialize=["height", "tiles_y", "tiles_x"])
def reduce(fine, low, height, width, tiles_y, tiles_x, BH: tl.constexpr, BW: tl.constexpr):
    """low [planes, h, w] from fine [planes, H, W], float32."""
    plane, i, j = _place(tiles_y, tiles_x, BH, BW)
    low_height, low_width = (height + 1) // 2, (width + 1) // 2
    fine += plane * height * width
    if _is_inside(i, j, height, width):
        total = _decimated_inside(fine, i, j, width, BH, BW)
    else:
        r0 = _clamped_columns(fine, _clamped(2 * i - 2, height), j, width)
        r1 = _clamped_columns(fine, _clamped(2 * i - 1, height), j, width)
        r2 = _clamped_columns(fine, _clamped(2 * i, height), j, width)
        r3 = _clamped_columns(fine, _clamped(2 * i + 1, height), j, width)
        r4 = _clamped_columns(fine, _clamped(2 * i + 2, height), j, width)
        total = _five(r0, r1, r2, r3, r4)
    mask = (i < low_height) & (j < low_width)
    tl.store(low + plane * low_height * low_width + i * low_width + j, total / 256, mask=mask)


@triton.jit
def _expanded_row(low, row, j, width):
    """8 times the fine samples 2j and 2j + 1 of one low row of `width` samples."""
    a = tl.load(low + row * width + _clamped(j - 1, width))
    b = tl.load(low + row * width + _clamped(j, width))
    c = tl.load(low + row * width + _clamped(j + 1, width))
    return _three(a, b, c), 4 * (b + c)


@triton.jit
def _rho(d, eps, mask, ABSOLUTE: tl.constexpr):
    """Sum of rho(d) where mask is set, and rho'(d)."""
    if ABSOLUTE:
        value = tl.abs(d)
        slope = (d > 0).to(tl.float32) - (d < 0).to(tl.float32)
    else:
        value = tl.sqrt_rn(tl.fma(d, d, eps * eps))
        slope = tl.where(value > 0, d / tl.where(value > 0, value, 1.0), 0.0)
    return tl.sum(tl.where(mask, value, 0.0)), slope


@triton.jit(do_not_specialize=["height", "tiles_y", "tiles_x", "count"])
def band(
    fine, low, slope, partial, height, width, tiles_y, tiles_x, weight, count, eps, mse,
    LAST: tl.constexpr, KEEP: tl.constexpr, ABSOLUTE: tl.constexpr, SQUARES: tl.constexpr, BH: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """Slopes [planes, H, W] of the band of fine over low, where KEEP; weight * sum rho / count for each program.

    SQUARES: plus mse * sum fine^2 / count.
    """
    plane, i, j = _place(tiles_y, tiles_x, BH, BW)
    low_height, low_width = (height + 1) // 2, (width + 1) // 2
    column = 2 * tl.min(j) + tl.arange(0, 2 * BW)[None, :]
    top_mask, bottom_mask = (2 * i < height) & (column < width), (2 * i + 1 < height) & (column < width)
    at = plane * height * width + 2 * i * width + column
    top = tl.load(fine + at, mask=top_mask, other=0.0)
    bottom = tl.load(fine + at + width, mask=bottom_mask, other=0.0)
    if SQUARES:
        squares = tl.sum(tl.fma(top, top, bottom * bottom))
    if not LAST:
        low += plane * low_height * low_width
        even0, odd0 = _expanded_row(low, _clamped(i - 1, low_height), j, low_width)
        even1, odd1 = _expanded_row(low, _clamped(i, low_height), j, low_width)
        even2, odd2 = _expanded_row(low, _clamped(i + 1, low_height), j, low_width)
        top -= tl.interleave(_three(even0, even1, even2), _three(odd0, odd1, odd2)) / 64
        bottom -= tl.interleave(even1 + even2, odd1 + odd2) / 16
    top_sum, top = _rho(top, eps, top_mask, ABSOLUTE)
    bottom_sum, bottom = _rho(bottom, eps, bottom_mask, ABSOLUTE)
    total = (top_sum + bottom_sum).to(tl.float64) * weight
    if SQUARES:
        total += squares.to(tl.float64) * mse
    tl.store(partial + tl.program_id(0), total / count)
    if KEEP:
        tl.store(slope + at, top.to(slope.dtype.element_ty), mask=top_mask)
        tl.store(slope + at + width, bottom.to(slope.dtype.element_ty), mask=bottom_mask)


@triton.jit(do_not_specialize=["count"])
def sum_partials(partial, loss, count, BLOCK: tl.constexpr):
    """One program: loss = the sum of count numbers, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    at = tl.arange(0, BLOCK)
    while count > 0:
        total += tl.load(partial + at, mask=at < count, other=0.0)
        partial += BLOCK
        count -= BLOCK
    tl.store(loss, tl.sum(total).to(tl.float32))


# ---- up ----------------------------------------------------------------------------------------------------------


@triton.jit
def _masked_columns(fine, row, j, height, width):
    """Decimated by expand^T: zero outside the image, the repeated borders in the weights."""
    inside = (row >= 0) & (row < height) & (2 * j < width)
    at = fine + row * width + 2 * j
    a = tl.load(at - 2, mask=inside & (j > 0), other=0).to(tl.float32)
    b = tl.load(at - 1, mask=inside & (j > 0), other=0).to(tl.float32)
    c = tl.load(at, mask=inside, other=0).to(tl.float32)
    d = tl.load(at + 1, mask=inside & (2 * j + 1 < width), other=0).to(tl.float32)
    e = tl.load(at + 2, mask=inside & (2 * j + 2 < width), other=0).to(tl.float32)
    first, last = (j == 0).to(tl.float32), (j == (width - 1) // 2).to(tl.float32)
    return _five(a, b, c, d, e) + first * c + last * (c + 4 * d)


@triton.jit(do_not_specialize=["height", "tiles_y", "tiles_x"])
def residue(
    slope, coarse, u, height, width, tiles_y, tiles_x, scale, BH: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """u = coarse - expand^T(scale * slope), [planes, h, w]."""
    plane, i, j = _place(tiles_y, tiles_x, BH, BW)
    low_height, low_width = (height + 1) // 2, (width + 1) // 2
    slope += plane * height * width
    if _is_inside(i, j, height, width):
        total = _decimated_inside(slope, i, j, width, BH, BW)
    else:
        r0 = _masked_columns(slope, 2 * i - 2, j, height, width)
        r1 = _masked_columns(slope, 2 * i - 1, j, height, width)
        r2 = _masked_columns(slope, 2 * i, j, height, width)
        r3 = _masked_columns(slope, 2 * i + 1, j, height, width)
        r4 = _masked_columns(slope, 2 * i + 2, j, height, width)
        first, last = (i == 0).to(tl.float32), (i == low_height - 1).to(tl.float32)
        total = _five(r0, r1, r2, r3, r4) + first * r2 + last * (r2 + 4 * r3)
    mask = (i < low_height) & (j < low_width)
    at = plane * low_height * low_width + i * low_width + j
    tl.store(u + at, tl.load(coarse + at, mask=mask, other=0.0) - scale / 64 * total, mask=mask)


@triton.jit
def _middle(p, size):
    """Weights of low[p / 2] in 16 times reduce^T at the fine samples p (even) and p + 1 of `size`."""
    even = 6.0 + 5.0 * (p == 0).to(tl.float32) + 5.0 * (p == size - 1).to(tl.float32)
    return even, 4.0 + (p + 1 == size - 1).to(tl.float32)


@triton.jit
def _interpolated_row(u, row, j, low_height, low_width, width):
    """16 times the fine samples 2j and 2j + 1 of reduce^T of one low row."""
    inside = (row >= 0) & (row < low_height)
    at = u + row * low_width + j
    a = tl.load(at - 1, mask=inside & (j > 0) & (j <= low_width), other=0.0)
    b = tl.load(at, mask=inside & (j < low_width), other=0.0)
    c = tl.load(at + 1, mask=inside & (j + 1 < low_width), other=0.0)
    even, odd = _middle(2 * j, width)
    return tl.fma(even, b, a + c), tl.fma(odd, b, 4 * c)


@triton.jit(do_not_specialize=[
    "channels", "height", "tiles_y", "tiles_x", "x_n", "x_c", "y_n", "y_c", "out_n", "out_c",
])  # fmt: skip
def up(
    slope, u, gain, x, y, out, channels, height, width, tiles_y, tiles_x, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    out_n, out_c, out_h, out_w, scale, squares,
    LAST: tl.constexpr, HAS_GAIN: tl.constexpr, SQUARES: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """out = gain * (scale * slope + reduce^T(u)), [planes, H, W] with strides of its own.

    SQUARES: plus gain * squares * (x - y).
    """
    plane, i, j = _place(tiles_y, tiles_x, BH, BW)
    low_height, low_width = (height + 1) // 2, (width + 1) // 2
    column = 2 * tl.min(j) + tl.arange(0, 2 * BW)[None, :]
    top_mask, bottom_mask = (2 * i < height) & (column < width), (2 * i + 1 < height) & (column < width)
    at = slope + plane * height * width + 2 * i * width + column
    top = scale * tl.load(at, mask=top_mask, other=0).to(tl.float32)
    bottom = scale * tl.load(at + width, mask=bottom_mask, other=0).to(tl.float32)
    if not LAST:
        u += plane * low_height * low_width
        even0, odd0 = _interpolated_row(u, i - 1, j, low_height, low_width, width)
        even1, odd1 = _interpolated_row(u, i, j, low_height, low_width, width)
        even2, odd2 = _interpolated_row(u, i + 1, j, low_height, low_width, width)
        even, odd = _middle(2 * i, height)
        top += tl.interleave(tl.fma(even, even1, even0 + even2), tl.fma(even, odd1, odd0 + odd2)) / 256
        bottom += tl.interleave(tl.fma(odd, even1, 4 * even2), tl.fma(odd, odd1, 4 * odd2)) / 256
    n, c, row, column = plane // channels, plane % channels, 2 * i.to(tl.int64), column.to(tl.int64)
    if SQUARES:
        x += n * x_n + c * x_c + row * x_h + column * x_w
        y += n * y_n + c * y_c + row * y_h + column * y_w
        top += squares * _difference(x, y, top_mask)
        bottom += squares * _difference(x + x_h, y + y_h, bottom_mask)
    if HAS_GAIN:
        top *= tl.load(gain)
        bottom *= tl.load(gain)
    to = out + n * out_n + c * out_c + row * out_h + column * out_w
    tl.store(to, top.to(out.dtype.element_ty), mask=top_mask)
    tl.store(to + out_h, bottom.to(out.dtype.element_ty), mask=bottom_mask)

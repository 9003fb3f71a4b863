"""upfirdn2d in Triton: insert zeros, pad, filter with a FIR, decimate.

A 4x4 filter with no resampling, up 2 or down 2 (StyleGAN2, and the adjoints of these) has kernels of its own: a program
slides down a block of columns, and every input row joins the sums of all output rows that it reaches, so that rows are
read once. Everything else goes through one kernel that visits the taps of each output.

An image is seen as rows of `columns * c` numbers: c is the number of channels in channels_last, 1 in NCHW, where every
channel is an image of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import dtype_reason, layout_of
from clone_fast.kernels._device import capability, multiprocessors

# (most numbers of a row in a program, how many of them in a warp, warps on a multiprocessor) by compute capability,
# mode, whether the layout is channels_last, and bytes of an element. No more warps than fit in, so that none waits.
TUNING = {
    (9, 0): {
        ("same", True, 2): (1024, 256, 20),
        ("same", True, 4): (512, 128, 20),
        ("same", False, 2): (512, 128, 16),
        ("same", False, 4): (512, 128, 16),
        ("down", True, 2): (1024, 256, 20),
        ("down", True, 4): (512, 128, 16),
        ("down", False, 2): (512, 128, 12),
        ("down", False, 4): (512, 128, 12),
        ("up", True, 2): (1024, 256, 24),
        ("up", True, 4): (512, 128, 24),
        ("up", False, 2): (512, 128, 12),
        ("up", False, 4): (512, 128, 12),
    },
}
GENERAL_BLOCK = 256
# Arguments whose values the compiler shall not build on: one kernel for all sizes of image. Only c makes a difference.
SIZES = ["h", "w", "oh", "ow", "pad_x", "pad_y"]


@triton.jit
def _tap(f, ky, kx, fh, fw, FLIP: tl.constexpr, SEPARABLE: tl.constexpr):
    """F[ky, kx] of the correlation y[oy, ox] = sum F[ky, kx] x[oy + ky, ox + kx]."""
    if not FLIP:
        ky = fh - 1 - ky
        kx = fw - 1 - kx
    if SEPARABLE:
        return tl.load(f + ky) * tl.load(f + kx)
    return tl.load(f + ky * fw + kx)


@triton.jit
def _four_taps(f, ky, gain, FLIP: tl.constexpr, SEPARABLE: tl.constexpr):
    f0 = gain * _tap(f, ky, 0, 4, 4, FLIP, SEPARABLE)
    f1 = gain * _tap(f, ky, 1, 4, 4, FLIP, SEPARABLE)
    f2 = gain * _tap(f, ky, 2, 4, 4, FLIP, SEPARABLE)
    f3 = gain * _tap(f, ky, 3, 4, 4, FLIP, SEPARABLE)
    return f0, f1, f2, f3


@triton.jit
def _row_inside(iy, end, column):
    """Is 0 <= iy < end, once for each column: the interpreter does not broadcast the condition of a scalar."""
    row = tl.zeros_like(column) + iy
    return (row >= 0) & (row < end)


@triton.jit
def _pixel(row, inside, column, w, c):
    """A column of an input row (a pointer to the channel in its column 0), zero outside the image."""
    return tl.load(row + column * c, mask=inside & (column >= 0) & (column < w), other=0.0)


@triton.jit
def _four_columns(x, iy, end, column, channel, w, c):
    row = x + iy * (w * c) + channel
    inside = _row_inside(iy, end, column)
    v0 = _pixel(row, inside, column, w, c)
    v1 = _pixel(row, inside, column + 1, w, c)
    v2 = _pixel(row, inside, column + 2, w, c)
    v3 = _pixel(row, inside, column + 3, w, c)
    return v0, v1, v2, v3


@triton.jit
def _dot4(taps, v0, v1, v2, v3):
    f0, f1, f2, f3 = taps
    return f0 * v0 + f1 * v1 + f2 * v2 + f3 * v3


@triton.jit
def _where(c, blocks, bands, zero, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """This program's image (64 bits), band of rows, and the column and channel of each of its numbers."""
    program = tl.program_id(0)
    number = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    if PLANES:
        # The windows of NCHW begin anywhere, so that vectors cannot be loaded. The compiler does not know that this is
        # zero: it gives up storing vectors too, and lets neighbouring threads have neighbouring numbers.
        number += zero
    program = program // blocks
    band = program % bands
    image = (program // bands).to(tl.int64)
    return image, band, number // c, number % c


@triton.jit(do_not_specialize=[*SIZES, "blocks", "bands", "rows", "zero"])
def _same_kernel(x, f, y, gain, c, h, w, oh, ow, pad_x, pad_y, blocks, bands, rows, zero,
                 FLIP: tl.constexpr, SEPARABLE: tl.constexpr, PLANES: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    image, band, ox, channel = _where(c, blocks, bands, zero, PLANES, BLOCK)
    first = band * rows
    rows = tl.minimum(rows, oh - first)
    x += image * (h * w * c)
    y += image * (oh * ow * c) + (ox * c + channel)
    top = _four_taps(f, 0, gain, FLIP, SEPARABLE)
    upper = _four_taps(f, 1, gain, FLIP, SEPARABLE)
    lower = _four_taps(f, 2, gain, FLIP, SEPARABLE)
    bottom = _four_taps(f, 3, gain, FLIP, SEPARABLE)
    iy = first - pad_y
    end = tl.minimum(h, iy + rows + 3)
    n0, n1, n2, n3 = _four_columns(x, iy, end, ox - pad_x, channel, w, c)
    begun = tl.zeros([BLOCK], tl.float32)  # sums of three output rows that wait for more input rows
    half = begun
    nearly = begun
    for r in range(rows + 3):
        v0, v1, v2, v3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        n0, n1, n2, n3 = _four_columns(x, iy + r + 1, end, ox - pad_x, channel, w, c)  # while this one is added
        done = nearly + _dot4(bottom, v0, v1, v2, v3)
        nearly = half + _dot4(lower, v0, v1, v2, v3)
        half = begun + _dot4(upper, v0, v1, v2, v3)
        begun = _dot4(top, v0, v1, v2, v3)
        tl.store(y + (first + r - 3) * (ow * c), done, mask=(ox < ow) & _row_inside(r - 3, rows, ox))


@triton.jit(do_not_specialize=[*SIZES, "blocks", "bands", "rows", "zero"])
def _down_kernel(x, f, y, gain, c, h, w, oh, ow, pad_x, pad_y, blocks, bands, rows, zero,
                 FLIP: tl.constexpr, SEPARABLE: tl.constexpr, PLANES: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    image, band, ox, channel = _where(c, blocks, bands, zero, PLANES, BLOCK)
    first = band * rows
    rows = tl.minimum(rows, oh - first)
    x += image * (h * w * c)
    y += image * (oh * ow * c) + (ox * c + channel)
    top = _four_taps(f, 0, gain, FLIP, SEPARABLE)
    upper = _four_taps(f, 1, gain, FLIP, SEPARABLE)
    lower = _four_taps(f, 2, gain, FLIP, SEPARABLE)
    bottom = _four_taps(f, 3, gain, FLIP, SEPARABLE)
    iy = 2 * first - pad_y
    end = tl.minimum(h, iy + 2 * rows + 2)
    ix = 2 * ox - pad_x
    n0, n1, n2, n3 = _four_columns(x, iy, end, ix, channel, w, c)
    m0, m1, m2, m3 = _four_columns(x, iy + 1, end, ix, channel, w, c)
    begun = tl.zeros([BLOCK], tl.float32)
    for r in range(rows + 1):  # a pair of input rows begins one output row and ends the one above
        v0, v1, v2, v3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        u0, u1, u2, u3 = m0.to(tl.float32), m1.to(tl.float32), m2.to(tl.float32), m3.to(tl.float32)
        n0, n1, n2, n3 = _four_columns(x, iy + 2 * r + 2, end, ix, channel, w, c)
        m0, m1, m2, m3 = _four_columns(x, iy + 2 * r + 3, end, ix, channel, w, c)
        done = begun + _dot4(lower, v0, v1, v2, v3) + _dot4(bottom, u0, u1, u2, u3)
        begun = _dot4(top, v0, v1, v2, v3) + _dot4(upper, u0, u1, u2, u3)
        tl.store(y + (first + r - 1) * (ow * c), done, mask=(ox < ow) & _row_inside(r - 1, rows, ox))


@triton.jit
def _three_columns(x, iy, end, column, channel, w, c, EVEN: tl.constexpr):
    """The third only where the phase wants it, the second again where not."""
    row = x + iy * (w * c) + channel
    inside = _row_inside(iy, end, column)
    v0 = _pixel(row, inside, column, w, c)
    v1 = _pixel(row, inside, column + 1, w, c)
    v2 = v1
    if EVEN:
        v2 = _pixel(row, inside, column + 2, w, c)
    return v0, v1, v2


@triton.jit
def _between(taps, v0, v1, v2, EVEN: tl.constexpr):
    """A pair of output columns of one input row: where the phase is odd the left one sees taps 1 and 3."""
    f0, f1, f2, f3 = taps
    if EVEN:
        left, right = f0 * v0 + f2 * v1, f1 * v1 + f3 * v2
    else:
        left, right = f1 * v0 + f3 * v1, f0 * v0 + f2 * v1
    return left, right


@triton.jit
def _store_pair(y, oy, oh, column, channel, left, right, ow, c, PLANES: tl.constexpr):
    row = y + oy * (ow * c)
    if PLANES:
        both = tl.interleave(column, column + 1)
        tl.store(row + both, tl.interleave(left, right), mask=(both < ow) & _row_inside(oy, oh, both))
    else:
        at = row + (column * c + channel)
        inside = _row_inside(oy, oh, column)
        tl.store(at, left, mask=inside & (column >= 0) & (column < ow))
        tl.store(at + c, right, mask=inside & (column + 1 < ow))


@triton.jit(do_not_specialize=[*SIZES, "blocks", "bands", "rows", "zero"])
def _up_kernel(x, f, y, gain, c, h, w, oh, ow, pad_x, pad_y, blocks, bands, rows, zero,
               FLIP: tl.constexpr, SEPARABLE: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Pairs of output rows between two input rows: the upper sees taps 1 and 3, the lower 0 and 2; columns likewise.

    Where the padding is even the first pair begins above the image, and left of it. In NCHW it does not do the latter:
    pairs are interleaved there, and aligned. EVEN says that their phase is the other one.
    """
    image, band, pair, channel = _where(c, blocks, bands, zero, PLANES, BLOCK)
    start = (pad_y & 1) - 1
    oy = start + 2 * band * rows
    rows = tl.minimum(rows, (oh - oy + 1) // 2)
    ox = 2 * pair
    ix = pair - (pad_x >> 1)
    if not EVEN:
        ox += (pad_x & 1) - 1
    x += image * (h * w * c)
    y += image * (oh * ow * c)
    top = _four_taps(f, 0, gain, FLIP, SEPARABLE)
    upper = _four_taps(f, 1, gain, FLIP, SEPARABLE)
    lower = _four_taps(f, 2, gain, FLIP, SEPARABLE)
    bottom = _four_taps(f, 3, gain, FLIP, SEPARABLE)
    iy = (oy + 1 - pad_y) >> 1
    end = tl.minimum(h, iy + rows + 1)
    n0, n1, n2 = _three_columns(x, iy, end, ix, channel, w, c, EVEN)
    u0, u1, u2 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32)
    n0, n1, n2 = _three_columns(x, iy + 1, end, ix, channel, w, c, EVEN)
    for r in range(rows):
        v0, v1, v2 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32)
        n0, n1, n2 = _three_columns(x, iy + r + 2, end, ix, channel, w, c, EVEN)  # while this one is used
        left, right = _between(upper, u0, u1, u2, EVEN)
        left_, right_ = _between(bottom, v0, v1, v2, EVEN)
        _store_pair(y, oy + 2 * r, oh, ox, channel, left + left_, right + right_, ow, c, PLANES)
        left, right = _between(top, u0, u1, u2, EVEN)
        left_, right_ = _between(lower, v0, v1, v2, EVEN)
        _store_pair(y, oy + 2 * r + 1, oh, ox, channel, left + left_, right + right_, ow, c, PLANES)
        u0, u1, u2 = v0, v1, v2


@triton.jit(do_not_specialize=[*SIZES, "fh", "fw", "outputs"])
def _general_kernel(x, f, y, gain, c, h, w, oh, ow, up_x, up_y, down_x, down_y, pad_x, pad_y, fh, fw, outputs,
                    FLIP: tl.constexpr, SEPARABLE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = (index >= 0) & (index < outputs)
    channel = index % c
    pixel = index // c
    ox = pixel % ow
    oy = (pixel // ow) % oh
    x += (pixel // ow // oh).to(tl.int64) * (h * w * c) + channel
    total = tl.zeros([BLOCK], tl.float32)
    for ky in range(fh):
        upsampled_y = oy * down_y + ky - pad_y
        iy = upsampled_y // up_y
        row_in = wanted & (upsampled_y >= 0) & (iy < h) & (upsampled_y % up_y == 0)
        for kx in range(fw):
            upsampled_x = ox * down_x + kx - pad_x
            ix = upsampled_x // up_x
            inside = row_in & (upsampled_x >= 0) & (ix < w) & (upsampled_x % up_x == 0)
            value = tl.load(x + (iy * w + ix) * c, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside, _tap(f, ky, kx, fh, fw, FLIP, SEPARABLE), 0.0) * value
    tl.store(y + index, gain * total, mask=wanted)


def supports(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> str | None:
    """None, or why this call cannot run."""
    return dtype_reason(x)


def launch(
    x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float
) -> Tensor:
    """See `clone_fast.ops.upfirdn2d.upfirdn2d`; up and down [x, y], padding [x0, x1, y0, y1]."""
    layout = layout_of(x)
    x, f = x.contiguous(memory_format=layout), f.contiguous()
    if f.ndim == 1 and f.shape[0] > 4:  # one axis after the other, what lies between them in float32
        across, downwards = (f[None, :], [up[0], 1], [down[0], 1], [*padding[:2], 0, 0]), f[:, None]
        x32 = _pass(x, *across, flip_filter, gain, torch.float32, layout)
        return _pass(x32, downwards, [1, up[1]], [1, down[1]], [0, 0, *padding[2:]], flip_filter, 1.0, x.dtype, layout)
    return _pass(x, f, up, down, padding, flip_filter, gain, x.dtype, layout)


def _pass(
    x: Tensor,
    f: Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip: bool,
    gain: float,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Tensor:
    """One launch: x dense in this layout, f [fh, fw], or [taps] for its outer product."""
    n, channels, h, w = x.shape
    (fh, fw), (x0, x1, y0, y1) = (f.shape[0], f.shape[-1]), padding
    oh, ow = (h * up[1] + y0 + y1 - fh + down[1]) // down[1], (w * up[0] + x0 + x1 - fw + down[0]) // down[0]
    y = torch.empty([n, channels, oh, ow], dtype=dtype, device=x.device, memory_format=layout)
    c, images = (channels, n) if layout == torch.channels_last else (1, n * channels)
    flags = {"FLIP": flip, "SEPARABLE": f.ndim == 1}
    mode = {(1, 1, 1, 1): "same", (2, 2, 1, 1): "up", (1, 1, 2, 2): "down"}.get((up[0], up[1], down[0], down[1]))
    if mode is None or (fh, fw) != (4, 4):
        grid = (triton.cdiv(y.numel(), GENERAL_BLOCK),)
        sizes = (c, h, w, oh, ow, *up, *down, x0, y0, fh, fw, y.numel())
        _general_kernel[grid](x, f, y, gain, *sizes, **flags, BLOCK=GENERAL_BLOCK)
        return y
    kernel, columns, total = {"same": _same_kernel, "down": _down_kernel, "up": _up_kernel}[mode], ow, oh
    block, per_warp, warps = TUNING.get(capability(x.device), TUNING[9, 0])[mode, c > 1, x.element_size()]
    flags["PLANES"] = c == 1
    if mode == "up":
        flags["EVEN"] = c == 1 and x0 % 2 == 0
        columns, total = (ow + (0 if flags["EVEN"] else 1 - x0 % 2) + 1) // 2, (oh + 1 - y0 % 2 + 1) // 2
    block = max(per_warp, min(block, triton.next_power_of_2(columns * c)))
    blocks = triton.cdiv(columns * c, block)
    programs = multiprocessors(x.device) * warps * per_warp // block
    bands = min(max(1, programs // (blocks * images)), max(1, total // 8))
    rows = triton.cdiv(total, bands)
    bands = triton.cdiv(total, rows)
    sizes = (c, h, w, oh, ow, x0, y0, blocks, bands, rows, 0)
    kernel[blocks * bands * images,](x, f, y, gain, *sizes, **flags, BLOCK=block, num_warps=block // per_warp)
    return y

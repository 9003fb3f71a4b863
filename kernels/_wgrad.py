"""The gradient of a convolution to its weight, as one matrix product over all pixels for every filter tap.

    r[n, cb, ca, dy, dx] = sum over p of b[n, cb, p] * a[n, ca, stride * p + (dy, dx) - padding]

A program owns a block of (cb, ca) for some taps and walks over its share of the pixels; the sums of the shares are
added by a second kernel, always in the same order. Three routes: "tiles" reads channels_last through tensor
descriptors, "pointers" reads anything through masks, "cudnn" is PyTorch's own. See `wgrad_route`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels import _wgrad_tuning as tuning
from clone_fast.kernels._conv_memory import COPIED, columns, describable
from clone_fast.kernels._device import capability
from clone_fast.kernels._tf32 import in_tf32
from clone_fast.kernels._wgrad_cudnn import cudnn_wgrad, is_convolution

# One compiled kernel for all of these: nothing is faster for knowing that one of them is 1, or divisible by 16.
SIZES = ["height", "width", "samples"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=SIZES)
def _wgrad_tiles(
    a_even,
    a_odd,
    b,
    out,
    height,
    width,
    samples,
    channels_a,
    channels_b,
    out_split,
    out_n,
    out_tap,
    out_b,
    out_a,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BB: tl.constexpr,
    BA: tl.constexpr,
    FLAT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """channels_last through tensor descriptors, which read zeros beyond the image. Programs (block, split, sample).

    height, width: of b. samples: how many images one program adds up. a_even, a_odd: descriptors of a; with stride 2
    of its even and its odd columns, so that neighbours in b are neighbours there too. FLAT: a tile is as wide as the
    image, and b is described as one long row: what is two-dimensional would be turned in registers.
    """
    blocks_a = tl.cdiv(channels_a, BA)
    blocks_b = tl.cdiv(channels_b, BB)
    pid = tl.program_id(0)
    a0 = pid % blocks_a * BA
    b0 = pid // blocks_a % blocks_b * BB
    group = pid // (blocks_a * blocks_b)
    dy = group // (K // TX) * TY
    dx = group % (K // TX) * TX
    # With stride 1 one row of a meets the rows of b above it, one for each tap row.
    tiles_y = tl.cdiv(height + TY - 1, BH) if STRIDE == 1 else height
    tiles = tiles_y * tl.cdiv(width, BW)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    total = tiles * samples

    sums = ()
    for _ in tl.static_range(TY * TX):
        sums += (tl.zeros((BB, BA), dtype=tl.float32),)  # type: ignore[assignment]
    for tile in range(split * total // splits, (split + 1) * total // splits):
        n = tl.program_id(2) * samples + tile // tiles
        # Down the image first: the rows above are still in the L2 cache.
        y = tile % tiles_y * BH
        x = tile % tiles // tiles_y * BW
        added = ()
        if STRIDE == 1:
            rows = ()
            for i in tl.static_range(TX):
                seen = a_even.load([n, y + dy - PAD, x + dx + i - PAD, a0])
                rows += (in_tf32(seen.reshape(BH * BW, BA), ROUND),)  # type: ignore[assignment]
            for j in tl.static_range(TY):
                if FLAT:
                    above = b.load([n, 0, (y - j) * width, b0])
                else:
                    above = b.load([n, y - j, x, b0])
                above = tl.trans(in_tf32(above.reshape(BH * BW, BB), ROUND))
                for i in tl.static_range(TX):
                    product = tl.dot(above, rows[i], sums[j * TX + i], input_precision="tf32")
                    added += (product,)  # type: ignore[assignment]
        else:
            here = tl.trans(in_tf32(b.load([n, y, x, b0]).reshape(BH * BW, BB), ROUND))
            for j in tl.static_range(TY):
                for i in tl.static_range(TX):
                    row = 2 * y + dy + j - PAD
                    if (i + PAD) % 2 == 0:
                        seen = a_even.load([n, row, x + (i - PAD) // 2, a0])
                    else:
                        seen = a_odd.load([n, row, x + (i - PAD) // 2, a0])
                    seen = in_tf32(seen.reshape(BH * BW, BA), ROUND)
                    product = tl.dot(here, seen, sums[j * TX + i], input_precision="tf32")
                    added += (product,)  # type: ignore[assignment]
        sums = added

    cb = b0 + tl.arange(0, BB)[:, None]
    ca = a0 + tl.arange(0, BA)[None, :]
    inside = (cb < channels_b) & (ca < channels_a)
    out += split * out_split + tl.program_id(2) * out_n + cb * out_b + ca * out_a
    for j in tl.static_range(TY):
        for i in tl.static_range(TX):
            tap = (dy + j) * K + dx + i
            tl.store(out + tap * out_tap, sums[j * TX + i].to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _wgrad_pointers(
    a,
    b,
    out,
    height,
    width,
    height_a,
    width_a,
    samples,
    channels_a,
    channels_b,
    a_n,
    a_c,
    a_h,
    a_w,
    b_n,
    b_c,
    b_h,
    b_w,
    out_split,
    out_n,
    out_tap,
    out_b,
    out_a,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    BP: tl.constexpr,
    BB: tl.constexpr,
    BA: tl.constexpr,
    ROUND: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Any strides, any number of channels, one tap in a program. Programs (block, split, sample).

    EXACT: full float32, and what a sum loses to rounding goes into the next step (Kahan): PyTorch loses little, too.
    """
    blocks_a = tl.cdiv(channels_a, BA)
    blocks_b = tl.cdiv(channels_b, BB)
    pid = tl.program_id(0)
    ca = pid % blocks_a * BA + tl.arange(0, BA)[None, :]
    cb = pid // blocks_a % blocks_b * BB + tl.arange(0, BB)[None, :]
    tap = pid // (blocks_a * blocks_b)
    pixels = height * width
    total = pixels * samples
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(total, BP), tl.num_programs(1)) * BP
    first = tl.program_id(2) * samples
    sums = tl.zeros((BB, BA), dtype=tl.float32)
    lost = sums
    for start in range(split * share, min(split * share + share, total), BP):
        p = start + tl.arange(0, BP)[:, None]
        n = first + p // pixels
        y = p % pixels // width
        x = p % width
        here = tl.load(b + n * b_n + y * b_h + x * b_w + cb * b_c, mask=(p < total) & (cb < channels_b), other=0.0)
        y = y * STRIDE + tap // K - PAD
        x = x * STRIDE + tap % K - PAD
        seen = (p < total) & (y >= 0) & (y < height_a) & (x >= 0) & (x < width_a)
        there = tl.load(a + n * a_n + y * a_h + x * a_w + ca * a_c, mask=seen & (ca < channels_a), other=0.0)
        if EXACT:
            part = tl.dot(tl.trans(here), there, lost, input_precision="ieee")
            more = sums + part
            lost = part - (more - sums)
            sums = more
        else:
            here = tl.trans(in_tf32(here, ROUND))
            sums = tl.dot(here, in_tf32(there, ROUND), sums, input_precision="tf32")
    cb = tl.trans(cb)
    out += split * out_split + tl.program_id(2) * out_n + tap * out_tap + cb * out_b + ca * out_a
    tl.store(out, sums.to(out.dtype.element_ty), mask=(cb < channels_b) & (ca < channels_a))


@triton.jit(do_not_specialize=["size", "splits"])
def _add_splits(parts, out, size, splits, BS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum of parts[s, i] over s."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BS, BLOCK), dtype=tl.float32)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)[:, None]
        total += tl.load(parts + s * size + i, mask=(s < splits) & (i < size), other=0.0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < size)


def supports_wgrad(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool, dtype: torch.dtype = torch.float32
) -> str | None:
    """None where `launch_wgrad` can run, else the reason why not."""
    if a.dtype != b.dtype:
        return f"both images must have one dtype, got {a.dtype} and {b.dtype}"
    if a.dtype == torch.float64:
        return "float64 runs on the reference only"
    if a.dtype not in DTYPES:
        return f"no kernel for {a.dtype}"
    if stride not in (1, 2):
        return f"stride must be 1 or 2, got {stride}"
    return None


def wgrad_route(a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool) -> str:
    """How `launch_wgrad` computes these arguments: "tiles", "pointers" or "cudnn"."""
    channels = (a.shape[1], b.shape[1])
    if tuning.is_exact(a, b):
        # Full float32 has no tensor cores to win with; a narrow result is bound by the bytes, on any route.
        route = "pointers" if min(channels) < 32 else "cudnn"
    elif k not in (1, 3) or not all(_has_engine(c, a) for c in channels) or (stride == 2 and a.shape[3] < 2):
        route = "pointers"
    else:
        route = tuning.route(capability(a.device), a.dtype, *channels, k, stride, list(b.shape[2:]))
    if route == "cudnn" and not is_convolution(a, b, k, stride, padding):
        route = "pointers"
    return route


def _has_engine(channels: int, a: Tensor) -> bool:
    """Whether so many channels are read by the copy engine, for which those that end off 16 bytes are copied."""
    size = a.element_size()
    return channels * size % 16 == 0 or (size == 2 and channels >= COPIED)


def launch_wgrad(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Correlate b with a at every tap.

    Args:
        a: [N, Ca, Ha, Wa]; b: [N, Cb, H, W], in one dtype: float32, float16 or bfloat16, any strides.
        k: taps in each direction, odd. stride: 1 or 2. padding: of a.
        per_sample: keep the samples apart, else sum over them.
        dtype: of the result; sums are float32, and rounded once.

    Returns:
        [N, Cb, Ca, k, k], or [Cb, Ca, k, k]; in memory the taps come first, then the channels.
    """
    route = wgrad_route(a, b, k, stride, padding, per_sample)
    samples = a.shape[0] if per_sample else 1
    if route == "cudnn":
        return cudnn_wgrad(a, b, k, stride, padding, per_sample).to(dtype)
    # An up layer's result belongs to its weight transposed: there the reader wants cb contiguous.
    transposed = stride == 2 and per_sample
    inner = (a.shape[1], b.shape[1]) if transposed else (b.shape[1], a.shape[1])
    if route == "tiles":
        out = _launch_tiles(a, b, k, stride, padding, samples, inner, transposed, dtype)
    else:
        out = _launch_pointers(a, b, k, stride, padding, samples, inner, transposed, dtype)
    out = out.permute(0, 4, 3, 1, 2) if transposed else out.permute(0, 3, 4, 1, 2)
    return out if per_sample else out[0]


def _partial_sums(
    a: Tensor, splits: int, samples: int, k: int, inner: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, list[int]]:
    """Memory for the sums of every split, and the strides (split, sample, tap) that a kernel writes them with."""
    kept = dtype if splits == 1 else torch.float32
    parts = torch.empty([splits, samples, k, k, *inner], dtype=kept, device=a.device)
    size = inner[0] * inner[1]
    return parts, [samples * k * k * size, k * k * size, size]


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty_like(parts[0], dtype=dtype)
    size, splits = out.numel(), parts.shape[0]
    block, bs = tuning.addition(size, splits)
    _add_splits[(triton.cdiv(size, block),)](parts, out, size, splits, BS=bs, BLOCK=block, num_warps=4)
    return out


def _launch_tiles(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, samples: int, inner: tuple[int, int], transposed: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, ca, _, _ = a.shape
    cb, height, width = b.shape[1:]
    a, b = describable(a), describable(b)
    block = tuning.tiles(capability(a.device), a.dtype, ca, cb, k, stride, [height, width])
    rows = height + block.ty - 1 if stride == 1 else height
    tiles = triton.cdiv(rows, block.bh) * triton.cdiv(width, block.bw) * (n // samples)
    programs = triton.cdiv(cb, block.bb) * triton.cdiv(ca, block.ba) * (k // block.ty) * (k // block.tx)
    splits = tuning.splits(a, programs * samples, tiles, block, k * k * ca * cb * samples)
    parts, strides = _partial_sums(a, splits, samples, k, inner, dtype)
    box = [1, block.bh, block.bw]
    flat = block.bh > 1 and block.bw == width
    even = columns(a, 0, stride, [*box, block.ba])
    _wgrad_tiles[(programs, splits, samples)](
        even,
        columns(a, 1, 2, [*box, block.ba]) if stride == 2 else even,
        columns(b.flatten(2)[:, :, None], 0, 1, [1, 1, block.bh * block.bw, block.bb])
        if flat
        else columns(b, 0, 1, [*box, block.bb]),
        parts,
        height,
        width,
        n // samples,
        ca,
        cb,
        *strides,
        *((1, cb) if transposed else (ca, 1)),
        K=k,
        STRIDE=stride,
        PAD=padding,
        TY=block.ty,
        TX=block.tx,
        BH=block.bh,
        BW=block.bw,
        BB=block.bb,
        BA=block.ba,
        FLAT=flat,
        ROUND=a.dtype == torch.float32,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return _added(parts, dtype)


def _launch_pointers(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, samples: int, inner: tuple[int, int], transposed: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, ca, height_a, width_a = a.shape
    cb, height, width = b.shape[1:]
    exact = tuning.is_exact(a, b)
    block = tuning.pointers(a.dtype, ca, cb, exact)
    tiles = triton.cdiv(height * width * (n // samples), block.bw)
    programs = triton.cdiv(cb, block.bb) * triton.cdiv(ca, block.ba) * k * k
    splits = tuning.splits(a, programs * samples, tiles, block, k * k * ca * cb * samples)
    parts, strides = _partial_sums(a, splits, samples, k, inner, dtype)
    _wgrad_pointers[(programs, splits, samples)](
        a,
        b,
        parts,
        height,
        width,
        height_a,
        width_a,
        n // samples,
        ca,
        cb,
        *a.stride(),
        *b.stride(),
        *strides,
        *((1, cb) if transposed else (ca, 1)),
        K=k,
        STRIDE=stride,
        PAD=padding,
        BP=block.bw,
        BB=block.bb,
        BA=block.ba,
        ROUND=a.dtype == torch.float32 and not exact,
        EXACT=exact,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return _added(parts, dtype)

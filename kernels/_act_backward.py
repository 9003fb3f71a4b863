"""What stands between the gradient of a modulated convolution's result and that of its convolution, in one pass.

With y = clamp(gain * act(z)) and z = conv + strength * noise + bias, it turns dy into g = dz and adds g up: over the
pixels for the bias, over the channels for the noise, over both for the noise's strength. The mask is read off y. Each
program writes sums of its own; a second, small kernel adds these, always in the same order, and is launched by itself:
nothing but an optimiser waits for it. Where asked it adds up g conv, too, over the pixels of each sample: `_factors`
adds those programs' sums.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import SLOPES, layout_of
from clone_fast.kernels._device import multiprocessors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELEMENTS = 2048  # of a tile
ADDED = 512  # of a step of the second pass
WARPS = 4
PROGRAMS_PER_SM = 8
PROGRAMS_WITH_DOTS = 5  # whose registers leave room for no more
TILES = 4  # of a program at least where the GPU is full, so that few sums are left for the second pass
COLUMNS = 8  # channels that a program of the second pass adds: 32 bytes of each row, of ROWS rows at a time
ROWS = 1024


@triton.jit
def through_activation(value, seen, gain, clamp, SLOPE: tl.constexpr, CLAMP: tl.constexpr):
    """The gradient of clamp(gain * act(z)) to z: from its own, and the result, of which linear ones need nothing."""
    if SLOPE != 1.0:
        value *= tl.where(seen > 0, gain, gain * SLOPE)
    else:
        value *= gain
    if CLAMP:
        value = tl.where(tl.abs(seen) < clamp, value, 0.0)
    return value


@triton.jit
def sum_of_rows(sums, block, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """[BC]: the sum of sums[r, c] over r, for a block of columns; in the same order every time."""
    c = block * BC + tl.arange(0, BC)[None, :]
    part = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, rows, BR):
        r = start + tl.arange(0, BR)[:, None]
        part += tl.load(sums + r * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    return tl.sum(part, axis=0)


@triton.jit
def _act_backward_kernel(
    dy,
    y,
    noise,
    strength,
    bias,
    g,
    bias_sums,
    noise_sums,
    strength_sums,
    dots,
    channels,
    pixels,
    tiles_p,
    tiles,
    noise_samples,
    gain,
    clamp,
    SLOPE: tl.constexpr,
    CLAMP: tl.constexpr,
    GRADIENT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DIRECT: tl.constexpr,
    SCALED: tl.constexpr,
    NOISY: tl.constexpr,
    BIASED: tl.constexpr,
    WANT_NOISE: tl.constexpr,
    WANT_STRENGTH: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    WANT_DOTS: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Programs (share of the tiles, block of channels); a tile is BP pixels of one sample times BC channels.

    pixels: of one sample. noise_samples: 1 where all samples share the noise. DIRECT: the sums over the channels are
    the gradient of the noise itself, but for the factor of the strength (SCALED). WANT_DOTS: a share is of one sample.
    """
    share = tl.program_id(0)
    first, end, step = share, tiles, tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    if WANT_DOTS:
        of_dots = tl.zeros((BP, BC), dtype=tl.float32)
        step = tl.num_programs(0) // (tiles // tiles_p)
        end = (share // step + 1) * tiles_p
        first = end - tiles_p + share % step
        shift = 0.0
        if BIASED:
            shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    of_bias = tl.zeros((BP, BC), dtype=tl.float32)
    of_strength = tl.zeros((BP, 1), dtype=tl.float32)
    for tile in range(first, end, step):
        n = tile // tiles_p
        p = tile % tiles_p * BP + tl.arange(0, BP)[:, None]
        inside = (p < pixels) & (c < channels)
        if CHANNELS_LAST:
            at = (n * pixels + p) * channels + c
        else:
            at = (n * channels + c) * pixels + p
        value = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SLOPE != 1.0 or CLAMP or WANT_DOTS:
            seen = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            dot = value * seen
            value = through_activation(value, seen, gain, clamp, SLOPE, CLAMP)
            if CLAMP:
                dot = tl.where(tl.abs(seen) < clamp, dot, 0.0)
        else:
            value *= gain
        if GRADIENT:
            tl.store(g + at, value.to(g.dtype.element_ty), mask=inside)
        if WANT_BIAS:
            of_bias += value
        if WANT_DOTS:
            added = shift
            if NOISY:
                at = n % noise_samples * pixels + p
                level = tl.load(noise + at, mask=p < pixels, other=0.0).to(tl.float32)
                if SCALED:
                    level *= tl.load(strength).to(tl.float32)
                added += level
            of_dots += dot - value * added
        if WANT_NOISE or WANT_STRENGTH:
            of_pixel = tl.sum(value, axis=1, keep_dims=True)
            if WANT_STRENGTH:
                at = n % noise_samples * pixels + p
                of_strength += of_pixel * tl.load(noise + at, mask=p < pixels, other=0.0).to(tl.float32)
            if WANT_NOISE:
                if SCALED and DIRECT:
                    of_pixel *= tl.load(strength).to(tl.float32)
                at = (tl.program_id(1) * (tiles // tiles_p) + n) * pixels + p
                tl.store(noise_sums + at, of_pixel.to(noise_sums.dtype.element_ty), mask=p < pixels)
    if WANT_BIAS:
        # Side by side: sums of one program apart from each other cost 80 ps each, more than the pass over the image.
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        tl.store(bias_sums + share * channels + c, tl.sum(of_bias, axis=0), mask=c < channels)
    if WANT_DOTS:
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        tl.store(dots + share * channels + c, tl.sum(of_dots, axis=0), mask=c < channels)
    if WANT_STRENGTH:
        tl.store(strength_sums + tl.program_id(1) * tl.num_programs(0) + share, tl.sum(of_strength))


@triton.jit
def _add_sums(
    bias_sums,
    dbias,
    strength_sums,
    dstrength,
    noise_sums,
    dnoise,
    strength,
    channels,
    shares,
    strength_shares,
    noise_parts,
    noise_size,
    SCALED: tl.constexpr,
    WANT_STRENGTH: tl.constexpr,
    ADD_NOISE: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The second pass. Programs: one for every BC channels of the bias, then that of the strength, then the noise's."""
    pid = tl.program_id(0)
    of_bias = tl.cdiv(channels, BC)
    if pid < of_bias:
        if WANT_BIAS:
            line = sum_of_rows(bias_sums, pid, shares, channels, BR, BC)
            c = pid * BC + tl.arange(0, BC)
            tl.store(dbias + c, line.to(dbias.dtype.element_ty), mask=c < channels)
    elif pid < of_bias + WANT_STRENGTH:
        if WANT_STRENGTH:
            line = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, strength_shares, BLOCK):
                i = start + tl.arange(0, BLOCK)
                line += tl.load(strength_sums + i, mask=i < strength_shares, other=0.0)
            tl.store(dstrength, tl.sum(line).to(dstrength.dtype.element_ty))
    elif ADD_NOISE:
        p = (pid - of_bias - WANT_STRENGTH) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for number in range(noise_parts):
            total += tl.load(noise_sums + number * noise_size + p, mask=p < noise_size, other=0.0)
        if SCALED:
            total *= tl.load(strength).to(tl.float32)
        tl.store(dnoise + p, total.to(dnoise.dtype.element_ty), mask=p < noise_size)


def supports_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> str | None:
    """None where `launch_act_backward` can run, else the reason why not."""
    if act not in SLOPES:
        return f"only {', '.join(SLOPES)} are fused, got {act!r}"
    if gain <= 0:
        return f"gain must be positive to read the activation's sign off its result, got {gain}"
    for tensor in (dy, y):
        if tensor.dtype == torch.float64:
            return "float64 runs on the reference only"
        if tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    return None


def shares_of(device: torch.device, tiles: int, blocks: int, programs: int = PROGRAMS_PER_SM) -> int:
    """How many programs of the first pass share the tiles: as many as a GPU holds, fewer where that leaves them little.

    Yet one for each processor if there are tiles enough; and all have as many tiles, but for the last.
    """
    count = multiprocessors(device)
    shares = min(max(tiles // TILES, triton.cdiv(count, blocks)), max(1, programs * count // blocks), tiles)
    return triton.cdiv(tiles, triton.cdiv(tiles, shares))


def launch_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """g, the programs' sums for the noise, its strength and the bias, and the dots; what is not wanted is None.

    Args:
        dy, y: [N, C, H, W], the gradient of the result and the result, in any layout; the fastest is y's for both.
        noise: [H, W], [1, 1, H, W] or [N, 1, H, W]. noise_strength: scalar, or None for 1.
        act: "linear", "relu" or "lrelu" (slope 0.2). gain: positive. clamp: of the result, or None.
        bias: [C], what z contains of it; for the dots alone.

    Returns:
        g in dy's dtype and y's layout: dy itself where its factor is 1 everywhere. The sums [any times the noise's
        elements], [any] and [any, C] in float32, of g before it is rounded: what `launch_act_sums` adds; the gradient
        of the noise itself, where there is nothing to add. dots [N, any, C] in float32, which added up over the middle
        are the sums of g conv over the pixels.
    """
    n, channels, height, width = y.shape
    pixels = height * width
    layout = layout_of(y)
    last = layout is torch.channels_last
    y, dy = y.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    changes = act != "linear" or clamp is not None or gain != 1.0
    g = torch.empty_like(dy) if changes else dy
    if noise is None:
        want_noise = want_strength = False
    if not (changes or want_noise or want_strength or want_bias or want_dots):
        return g, None, None, None, None

    # Channels last: all channels of some pixels. Else few channels of many pixels, more where they are to be added.
    bc = min(triton.next_power_of_2(channels), 1024 if last else 32 if want_noise else 8)
    bp = max(1, min(ELEMENTS // bc, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(channels, bc)
    tiles_p = triton.cdiv(pixels, bp)
    tiles = tiles_p * n
    if want_dots:
        shares = n * shares_of(y.device, tiles_p, n * blocks, PROGRAMS_WITH_DOTS)
    else:
        shares = shares_of(y.device, tiles, blocks)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=y.device)

    samples = 1 if noise is None else noise.numel() // pixels
    direct = samples == n and blocks == 1
    bias_sums = sums(shares, channels) if want_bias else None
    strength_sums = sums(blocks * shares) if want_strength else None
    noise_sums = None
    if want_noise and noise is not None:
        noise_sums = noise.new_empty(noise.shape) if direct else sums(blocks * n * pixels)
    dots = sums(n, shares // n, channels) if want_dots else None
    exact = None if clamp is None else rounded(clamp, y.dtype)
    _act_backward_kernel[(shares, blocks)](
        dy,
        y,
        None if noise is None else noise.contiguous(),
        noise_strength,
        None if bias is None else bias.contiguous(),
        g,
        bias_sums,
        noise_sums,
        strength_sums,
        dots,
        channels,
        pixels,
        tiles_p,
        tiles,
        samples,
        gain,
        exact or 0.0,
        SLOPE=SLOPES[act],
        CLAMP=clamp is not None,
        GRADIENT=changes,
        CHANNELS_LAST=last,
        DIRECT=direct,
        SCALED=noise_strength is not None,
        NOISY=noise is not None,
        BIASED=bias is not None,
        WANT_NOISE=want_noise,
        WANT_STRENGTH=want_strength,
        WANT_BIAS=want_bias,
        WANT_DOTS=want_dots,
        BC=bc,
        BP=bp,
        num_warps=WARPS,
    )
    return g, noise_sums, strength_sums, bias_sums, dots


def launch_act_sums(
    noise_sums: Tensor | None,
    strength_sums: Tensor | None,
    bias_sums: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dnoise, dstrength, dbias) of the sums that `launch_act_backward` left; None for those that it did not.

    Returns:
        dnoise in noise's shape and dtype, dstrength [] and dbias [C] in the dtype given, rounded once.
    """
    some = next((sums for sums in (noise_sums, strength_sums, bias_sums) if sums is not None), None)
    if some is None:
        return None, None, None
    shares, channels = (0, 0) if bias_sums is None else bias_sums.shape
    dbias = None if bias_sums is None else some.new_empty([channels], dtype=dtype)
    dstrength = None if strength_sums is None else some.new_empty([], dtype=dtype)
    dnoise, parts, size = noise_sums, 0, 0
    if noise is not None and noise_sums is not None and noise_sums.ndim == 1:
        dnoise, size = some.new_empty(noise.shape, dtype=noise.dtype), noise.numel()
        parts = noise_sums.numel() // size
    programs = triton.cdiv(channels, COLUMNS) + (strength_sums is not None) + triton.cdiv(size, ADDED)
    if programs:
        _add_sums[(programs,)](
            bias_sums,
            dbias,
            strength_sums,
            dstrength,
            noise_sums if parts else None,
            dnoise if parts else None,
            noise_strength,
            channels,
            shares,
            0 if strength_sums is None else strength_sums.numel(),
            parts,
            size,
            SCALED=noise_strength is not None,
            WANT_STRENGTH=strength_sums is not None,
            ADD_NOISE=parts > 0,
            WANT_BIAS=bias_sums is not None,
            BLOCK=ADDED,
            BR=min(triton.next_power_of_2(max(1, shares)), ROWS),
            BC=COLUMNS,
            num_warps=WARPS,
        )
    return dnoise, dstrength, dbias


@functools.cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number that a result clamped to `value` holds."""
    return float(torch.tensor(value, dtype=dtype))

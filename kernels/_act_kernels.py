"""The kernels of `_act_backward`, and what they share with others: images of few channels, read column by column, and
sums over programs.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def tile_at(image, start, row, first, column, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Pointers to channels first + column of the pixels start + row; 64 bits, an image may have 2^31 elements."""
    if CHANNELS_LAST:
        at = image + (tl.cast(start, tl.int64) * channels + first) + (row * channels + column)
    else:
        at = image + (tl.cast(first, tl.int64) * pixels + start) + (column * pixels + row)
    return at


@triton.jit
def few_columns(image, start, row, pixels, FEW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The pixels start + row of an image of few channels: of each [BP, 1]."""
    columns = ()
    for i in tl.static_range(FEW):
        at = tile_at(image, start, row, 0, i, FEW, pixels, CHANNELS_LAST)
        columns += (tl.load(at, mask=row < pixels - start, other=0.0),)  # type: ignore[assignment]
    return columns


@triton.jit
def few_weights(weight, c, channels, w_wide, w_few, FEW: tl.constexpr):
    """Those of each of the few channels, [1, BC]."""
    weights = ()
    for i in tl.static_range(FEW):
        value = tl.load(weight + c * w_wide + i * w_few, mask=c < channels, other=0.0).to(tl.float32)
        weights += (value,)  # type: ignore[assignment]
    return weights


@triton.jit
def few_zeros(FEW: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(FEW):
        zeros += (tl.zeros((BP, BC), dtype=tl.float32),)  # type: ignore[assignment]
    return zeros


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
    dimage,
    image,
    w,
    w_sums,
    dimage_sums,
    channels,
    pixels,
    tiles_p,
    tiles,
    noise_samples,
    w_n,
    w_wide,
    w_few,
    gain,
    clamp,
    limit,
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
    HAS_DY: tl.constexpr,
    FEW: tl.constexpr,
    FEW_LAST: tl.constexpr,
    DRAWN_LAST: tl.constexpr,
    LIMITED: tl.constexpr,
    WANT_W: tl.constexpr,
    WANT_DIMAGE: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs (share of the tiles, block of channels); a tile is BP pixels of one sample times BC channels.

    pixels: of one sample. noise_samples: 1 where all samples share the noise. DIRECT: the sums over the channels are
    the gradient of the noise itself, but for the factor of the strength (SCALED). FEW: channels of the image that is
    drawn of y, with the weights w, and LIMITED by a clamp; 0 for none. WANT_DOTS, or FEW: a share is of one sample.
    """
    share = tl.program_id(0)
    first, end, step = share, tiles, tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    if WANT_DOTS or FEW > 0:
        step = tl.num_programs(0) // (tiles // tiles_p)
        end = (share // step + 1) * tiles_p
        first = end - tiles_p + share % step
    if WANT_DOTS:
        of_dots = tl.zeros((BP, BC), dtype=tl.float32)
        shift = 0.0
        if BIASED:
            shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    if FEW > 0:
        sample = share // step
        dimage += tl.cast(sample, tl.int64) * pixels * FEW
        if LIMITED:
            image += tl.cast(sample, tl.int64) * pixels * FEW
        weights = few_weights(w + sample * w_n, c, channels, w_wide, w_few, FEW)
        if WANT_W:
            of_w = few_zeros(FEW, BP, BC)
        if WANT_DIMAGE:
            of_dimage = few_zeros(FEW, BP, 1)
    of_bias = tl.zeros((BP, BC), dtype=tl.float32)
    of_strength = tl.zeros((BP, 1), dtype=tl.float32)
    for tile in tl.range(first, end, step, num_stages=STAGES):
        n = tile // tiles_p
        start = tile % tiles_p * BP
        row = tl.arange(0, BP)[:, None]
        p = start + row
        inside = (p < pixels) & (c < channels)
        if CHANNELS_LAST:
            at = (n * pixels + p) * channels + c
        else:
            at = (n * channels + c) * pixels + p
        value = tl.zeros((BP, BC), dtype=tl.float32)
        if HAS_DY:
            value = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SLOPE != 1.0 or CLAMP or WANT_DOTS or WANT_W:
            seen = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if FEW > 0:
            grads = few_columns(dimage, start, row, pixels, FEW, FEW_LAST)
            if LIMITED:
                colours = few_columns(image, start, row, pixels, FEW, DRAWN_LAST)
            to_w = ()
            to_dimage = ()
            for i in tl.static_range(FEW):
                grad = grads[i].to(tl.float32)
                if LIMITED:
                    grad = tl.where(tl.abs(colours[i].to(tl.float32)) < limit, grad, 0.0)
                value += grad * weights[i]
                if WANT_W:
                    to_w += (of_w[i] + grad * seen,)  # type: ignore[assignment]
                if WANT_DIMAGE:
                    to_dimage += (of_dimage[i] + grad,)  # type: ignore[assignment]
            if WANT_W:
                of_w = to_w
            if WANT_DIMAGE:
                of_dimage = to_dimage
        if SLOPE != 1.0 or CLAMP or WANT_DOTS:
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
    if WANT_W:
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        for i in tl.static_range(FEW):
            tl.store(w_sums + (share * FEW + i) * channels + c, tl.sum(of_w[i], axis=0), mask=c < channels)
    if WANT_DIMAGE:
        for i in tl.static_range(FEW):
            tl.store(dimage_sums + share * FEW + i, tl.sum(of_dimage[i]), mask=tl.program_id(1) == 0)


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

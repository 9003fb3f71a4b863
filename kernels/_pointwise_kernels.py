"""The kernels of `_pointwise_backward`: 1x1 convolutions of few inputs, of few outputs, and the sums over the programs
of both.

An image of many channels is read in tiles of BP pixels times BC channels, those of few channels column by column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from clone_fast.kernels._act_kernels import (
    few_columns,
    few_weights,
    few_zeros,
    sum_of_rows,
    through_activation,
    tile_at,
)


@triton.jit
def few_inputs_kernel(
    dy,
    y,
    x,
    weight,
    dx,
    dw,
    dbias,
    channels,
    pixels,
    shares,
    w_n,
    w_wide,
    w_few,
    dw_row,
    dw_wide,
    dw_few,
    gain,
    clamp,
    FEW: tl.constexpr,
    SLOPE: tl.constexpr,
    CLAMP: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    FEW_LAST: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DW: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dy and y have many channels, x and dx few. Programs (image and share of its pixels, block of channels).

    A block has all channels where dx is wanted. dw, dbias: a row of each program's sums, to be added; or the results
    where there is one.
    """
    n = tl.program_id(0) // shares
    first = tl.program_id(1) * BC
    column = tl.arange(0, BC)[None, :]
    row = tl.arange(0, BP)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    of_image = tl.cast(n, tl.int64) * pixels
    dy += of_image * channels
    y += of_image * channels
    if WANT_DX:
        dx += of_image * FEW
        weights = few_weights(weight + n * w_n, first + column, channels, w_wide, w_few, FEW)
    begin = tl.program_id(0) % shares * BP
    step = shares * BP
    if WANT_DW:
        x += of_image * FEW
        sums = few_zeros(FEW, BP, BC)
        there = few_columns(x, begin, row, pixels, FEW, FEW_LAST)
    of_bias = tl.zeros((BP, BC), dtype=tl.float32)
    for start in tl.range(begin, pixels, step, num_stages=STAGES):
        inside = (row < pixels - start) & (column < channels - first)
        value = tl.load(
            tile_at(dy, start, row, first, column, channels, pixels, WIDE_LAST), mask=inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        seen = value
        if SLOPE != 1.0 or CLAMP:
            seen = tl.load(
                tile_at(y, start, row, first, column, channels, pixels, WIDE_LAST), mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
        value = through_activation(value, seen, gain, clamp, SLOPE, CLAMP)
        if WANT_BIAS:
            of_bias += value
        if WANT_DW:
            # A step ahead: elements of 2 bytes are too small for what Triton copies ahead in stages.
            coming = few_columns(x, start + step, row, pixels, FEW, FEW_LAST)
            added = ()
            for i in tl.static_range(FEW):
                added += (sums[i] + value * there[i].to(tl.float32),)  # type: ignore[assignment]
            sums = added
            there = coming
        if WANT_DX:
            # LANES threads have the sum of a pixel, and one stores it: a single column would go through shared memory.
            at = tile_at(dx, start, row, 0, lane, FEW, pixels, FEW_LAST)
            for i in tl.static_range(FEW):
                total = tl.sum(value * weights[i], axis=1, keep_dims=True).to(dx.dtype.element_ty)
                tl.store(at, tl.broadcast_to(total, (BP, LANES)), mask=(row < pixels - start) & (lane == i))
    c = first + tl.arange(0, BC)
    if WANT_DW:
        for i in tl.static_range(FEW):
            at = tl.program_id(0) * dw_row + c * dw_wide + i * dw_few
            tl.store(dw + at, tl.sum(sums[i], axis=0).to(dw.dtype.element_ty), mask=c < channels)
    if WANT_BIAS:
        at = tl.program_id(0) * channels + c
        tl.store(dbias + at, tl.sum(of_bias, axis=0).to(dbias.dtype.element_ty), mask=c < channels)


@triton.jit
def few_outputs_kernel(
    dy,
    y,
    x,
    weight,
    dx,
    dw,
    dbias,
    channels,
    pixels,
    shares,
    w_n,
    w_wide,
    w_few,
    dw_row,
    dw_wide,
    dw_few,
    gain,
    clamp,
    FEW: tl.constexpr,
    SLOPE: tl.constexpr,
    CLAMP: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    FEW_LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    WANT_DX: tl.constexpr,
    WANT_DW: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`few_inputs_kernel`, but that x and dx have many channels, dy and y few, each in a layout of its own."""
    n = tl.program_id(0) // shares
    first = tl.program_id(1) * BC
    column = tl.arange(0, BC)[None, :]
    row = tl.arange(0, BP)[:, None]
    of_image = tl.cast(n, tl.int64) * pixels
    dy += of_image * FEW
    y += of_image * FEW
    begin = tl.program_id(0) % shares * BP
    step = shares * BP
    grads = few_columns(dy, begin, row, pixels, FEW, DY_LAST)
    seen = grads
    if SLOPE != 1.0 or CLAMP:
        seen = few_columns(y, begin, row, pixels, FEW, FEW_LAST)
    if WANT_DX:
        dx += of_image * channels
        weights = few_weights(weight + n * w_n, first + column, channels, w_wide, w_few, FEW)
    if WANT_DW:
        x += of_image * channels
        sums = few_zeros(FEW, BP, BC)
    if WANT_BIAS:
        of_bias = few_zeros(FEW, BP, 1)
    for start in tl.range(begin, pixels, step, num_stages=STAGES):
        inside = (row < pixels - start) & (column < channels - first)
        if WANT_DW:
            there = tl.load(
                tile_at(x, start, row, first, column, channels, pixels, WIDE_LAST), mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
        coming = few_columns(dy, start + step, row, pixels, FEW, DY_LAST)
        total = tl.zeros((BP, BC), dtype=tl.float32)
        added = ()
        biased = ()
        for o in tl.static_range(FEW):
            value = through_activation(grads[o].to(tl.float32), seen[o].to(tl.float32), gain, clamp, SLOPE, CLAMP)
            if WANT_BIAS:
                biased += (of_bias[o] + value,)  # type: ignore[assignment]
            if WANT_DW:
                added += (sums[o] + value * there,)  # type: ignore[assignment]
            if WANT_DX:
                total += value * weights[o]
        if WANT_DX:
            at = tile_at(dx, start, row, first, column, channels, pixels, WIDE_LAST)
            tl.store(at, total.to(dx.dtype.element_ty), mask=inside)
        if WANT_DW:
            sums = added
        if WANT_BIAS:
            of_bias = biased
        grads = coming
        if SLOPE != 1.0 or CLAMP:
            seen = few_columns(y, start + step, row, pixels, FEW, FEW_LAST)
        else:
            seen = coming
    c = first + tl.arange(0, BC)
    for o in tl.static_range(FEW):
        if WANT_DW:
            at = tl.program_id(0) * dw_row + c * dw_wide + o * dw_few
            tl.store(dw + at, tl.sum(sums[o], axis=0).to(dw.dtype.element_ty), mask=c < channels)
        if WANT_BIAS:
            at = tl.program_id(0) * FEW + o
            tl.store(dbias + at, tl.sum(of_bias[o]).to(dbias.dtype.element_ty), mask=tl.program_id(1) == 0)


@triton.jit
def add_shares(sums, dw, channels, columns, shares, dw_wide, dw_few, BR: tl.constexpr, BC: tl.constexpr):
    """dw of the programs' sums [weights * shares, few * channels]. Programs (block of columns, weight)."""
    n = tl.program_id(1)
    line = sum_of_rows(sums + n * shares * columns, tl.program_id(0), shares, columns, BR, BC)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at = n * columns + c % channels * dw_wide + c // channels * dw_few
    tl.store(dw + at, line.to(dw.dtype.element_ty), mask=c < columns)

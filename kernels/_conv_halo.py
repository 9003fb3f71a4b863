"""The 3x3 convolution of few channels in TF32 for Hopper: pixels come from the L2 cache three times and not nine.

What bounds these layers is how often their pixels pass from the L2 cache into a multiprocessor, and on into registers.
Two groups of four warps own four rows each of a tile of 8 x 64 pixels. For each of the three columns of taps the
copying warp brings the tile and the rows above and below it once; a group loads a row into registers once, rounds it
there, and multiplies it with the three taps of that column, for three rows of the result. See `_conv_hopper` for the
rest.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from clone_fast.kernels._conv_hopper import (
    _activated,
    _in_tf32,
    _load,
    _loaded,
    accumulator_layout,
    described,
    store_layout,
)

ROWS, COLUMNS = 8, 64  # of a tile
_ROWS, _COLUMNS = gl.constexpr(ROWS), gl.constexpr(COLUMNS)


@gluon.jit
def _place(index, tiles_n, tiles_x, tiles_y, BN: gl.constexpr):
    """Image, first row, first column and first channel of a tile."""
    o0 = index % tiles_n * BN
    index = index // tiles_n
    x0 = index % tiles_x * _COLUMNS
    index = index // tiles_x
    return index // tiles_y, index % tiles_y * _ROWS, x0, o0


@gluon.jit
def _copy(
    x, w, a, b, full, empty, tiles, tiles_n, tiles_x, tiles_y, steps, PAD: gl.constexpr, FLIP: gl.constexpr,
    PER_SAMPLE: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: for every tile, BK channels and column of taps, the pixels and the weights of three taps."""
    PIXELS: gl.constexpr = (_ROWS + 2) * _COLUMNS * BK * 4
    WEIGHTS: gl.constexpr = 3 * BN * BK * 4
    done = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, y0, x0, o0 = _place(index, tiles_n, tiles_x, tiles_y, BN)
        sample = n if PER_SAMPLE else 0
        for step in range(3 * steps):
            dx = step % 3
            c0 = step // 3 * BK
            stage = done % STAGES
            slot = 3 * (dx if HELD else stage)
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), done // STAGES & 1 ^ 1)
            if not HELD or done < 3:
                mbarrier.expect(ready, PIXELS + WEIGHTS)
                for dy in gl.static_range(3):
                    tap = 8 - (3 * dy + dx) if FLIP else 3 * dy + dx
                    _load(w, [sample * 9 + tap, o0, c0], ready, b.index(slot + dy))
            else:
                mbarrier.expect(ready, PIXELS)
            for row in gl.static_range(_ROWS + 2):
                _load(x, [n, y0 + row - PAD, x0 + dx - PAD, c0], ready, a.index(stage * (_ROWS + 2) + row))
            done += 1


@gluon.jit
def _row(a, index, BK: gl.constexpr, FACTOR: gl.constexpr):
    """A row of pixels in registers, rounded."""
    return _in_tf32(a.index(index).reshape([_COLUMNS, BK]).load(FACTOR))


@gluon.jit
def _tap(b, index, BN: gl.constexpr, BK: gl.constexpr):
    return b.index(index).reshape([BN, BK]).permute([1, 0])


@gluon.jit
def _multiply(
    a, b, full, empty, y, noise, strength, bias, tiles, tiles_n, tiles_x, tiles_y, steps, out_height, out_width,
    out_channels, y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp, HALF: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr, SLOPE: gl.constexpr, NOISE: gl.constexpr,
    STRENGTH: gl.constexpr, BIAS: gl.constexpr, CLAMP: gl.constexpr,
):  # fmt: skip
    """One group of four warps: products, epilogue and result of its four rows of every tile."""
    ACC: gl.constexpr = accumulator_layout(BN, 32)
    STORE: gl.constexpr = store_layout(_COLUMNS, BN, 32)
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=1)
    done = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, y0, x0, o0 = _place(index, tiles_n, tiles_x, tiles_y, BN)
        y0 += HALF * _ROWS // 2
        acc0 = gl.zeros([_COLUMNS, BN], dtype=gl.float32, layout=ACC)
        acc1 = gl.zeros([_COLUMNS, BN], dtype=gl.float32, layout=ACC)
        acc2 = gl.zeros([_COLUMNS, BN], dtype=gl.float32, layout=ACC)
        acc3 = gl.zeros([_COLUMNS, BN], dtype=gl.float32, layout=ACC)
        for step in range(3 * steps):
            stage = done % STAGES
            slot = 3 * (step % 3 if HELD else stage)
            first = stage * (_ROWS + 2) + HALF * _ROWS // 2
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            top = _tap(b, slot, BN, BK)
            middle = _tap(b, slot + 1, BN, BK)
            bottom = _tap(b, slot + 2, BN, BK)
            row0 = _row(a, first, BK, FACTOR)
            acc0 = warpgroup_mma(row0, top, acc0, is_async=True)
            row1 = _row(a, first + 1, BK, FACTOR)
            acc0 = warpgroup_mma(row1, middle, acc0, is_async=True)
            acc1 = warpgroup_mma(row1, top, acc1, is_async=True)
            row2 = _row(a, first + 2, BK, FACTOR)
            acc0 = warpgroup_mma(row2, bottom, acc0, is_async=True)
            acc1 = warpgroup_mma(row2, middle, acc1, is_async=True)
            acc2 = warpgroup_mma(row2, top, acc2, is_async=True)
            # Before its products are there nothing else may use the registers of a row.
            acc0, acc1, acc2, row0, row1, row2 = warpgroup_mma_wait(0, deps=(acc0, acc1, acc2, row0, row1, row2))
            row3 = _row(a, first + 3, BK, FACTOR)
            acc1 = warpgroup_mma(row3, bottom, acc1, is_async=True)
            acc2 = warpgroup_mma(row3, middle, acc2, is_async=True)
            acc3 = warpgroup_mma(row3, top, acc3, is_async=True)
            row4 = _row(a, first + 4, BK, FACTOR)
            acc2 = warpgroup_mma(row4, bottom, acc2, is_async=True)
            acc3 = warpgroup_mma(row4, middle, acc3, is_async=True)
            row5 = _row(a, first + 5, BK, FACTOR)
            acc3 = warpgroup_mma(row5, bottom, acc3, is_async=True)
            acc1, acc2, acc3, row3, row4, row5 = warpgroup_mma_wait(0, deps=(acc1, acc2, acc3, row3, row4, row5))
            mbarrier.arrive(empty.index(stage), count=1)
            done += 1

        column = x0 + gl.arange(0, _COLUMNS, layout=gl.SliceLayout(1, ACC))
        o = o0 + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
        bias_value = _loaded(bias, o, o < out_channels, gain, BIAS)
        bias_value = bias_value[None, :] if BIAS else bias_value
        factor = _loaded(strength, 0, True, gain, STRENGTH)
        noises = ()
        for j in gl.static_range(_ROWS // 2):
            inside = (y0 + j < out_height) & (column < out_width)
            at = n * noise_n + (y0 + j) * noise_h + column * noise_w
            noises += (_loaded(noise, at, inside, gain, NOISE),)  # type: ignore[assignment]
        sums = (acc0, acc1, acc2, acc3)
        column = x0 + gl.arange(0, _COLUMNS, layout=gl.SliceLayout(1, STORE))
        o = o0 + gl.arange(0, BN, layout=gl.SliceLayout(0, STORE))
        for j in gl.static_range(_ROWS // 2):
            added = noises[j][:, None] if NOISE else noises[j]  # type: ignore[var-annotated]
            acc = _activated(sums[j], added, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
            inside = ((y0 + j < out_height) & (column < out_width))[:, None] & (o < out_channels)[None, :]
            at = n * y_n + (y0 + j) * y_h + (column * y_w)[:, None] + (o * y_c)[None, :]
            gl.store(y + at, gl.convert_layout(acc, STORE), mask=inside)


@gluon.jit(do_not_specialize=["tiles", "tiles_n", "tiles_x", "tiles_y", "steps", "out_height", "out_width"])
def _conv_halo_kernel(
    x, w, y, noise, strength, bias, tiles, tiles_n, tiles_x, tiles_y, steps, out_height, out_width, out_channels,
    y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp, PAD: gl.constexpr, FLIP: gl.constexpr,
    PER_SAMPLE: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, HELD: gl.constexpr, STAGES: gl.constexpr,
    SLOPE: gl.constexpr, NOISE: gl.constexpr, STRENGTH: gl.constexpr, BIAS: gl.constexpr, CLAMP: gl.constexpr,
):  # fmt: skip
    """HELD: the weights of the three columns are brought once, and stay in shared memory."""
    a = gl.allocate_shared_memory(x.dtype, [STAGES * (_ROWS + 2)] + x.block_type.shape, x.layout)  # noqa: RUF005
    b = gl.allocate_shared_memory(w.dtype, [3 * (3 if HELD else STAGES)] + w.block_type.shape, w.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_multiply, (
                a, b, full, empty, y, noise, strength, bias, tiles, tiles_n, tiles_x, tiles_y, steps, out_height,
                out_width, out_channels, y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp, 0, BN, BK, HELD,
                STAGES, SLOPE, NOISE, STRENGTH, BIAS, CLAMP,
            )),
            (_multiply, (
                a, b, full, empty, y, noise, strength, bias, tiles, tiles_n, tiles_x, tiles_y, steps, out_height,
                out_width, out_channels, y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp, 1, BN, BK, HELD,
                STAGES, SLOPE, NOISE, STRENGTH, BIAS, CLAMP,
            )),
            (_copy, (
                x, w, a, b, full, empty, tiles, tiles_n, tiles_x, tiles_y, steps, PAD, FLIP, PER_SAMPLE, BN, BK, HELD,
                STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def launch_halo(image: Any, weight: Any, processors: int, stages: int, **arguments: Any) -> None:
    """Run the kernel on Triton's descriptors of image, [1, 1, COLUMNS, BK], and weight, [1, BN, BK]."""
    once = arguments["steps"] == arguments["tiles_n"] == 1 and not arguments["PER_SAMPLE"]
    held = once and arguments["BN"] == 32  # there is no room for more
    _conv_halo_kernel[(min(processors, arguments["tiles"]),)](
        x=described(image), w=described(weight), HELD=held, STAGES=stages, **arguments, num_warps=4, maxnreg=168
    )

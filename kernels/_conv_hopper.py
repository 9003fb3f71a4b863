"""The convolution of `_conv` for Hopper, with warps that copy and warps that multiply.

A group of four warps owns a tile of pixels; HALVES such groups, one or two, share the weights. The copying warp runs
ahead through a ring of STAGES buffers and on into the next tiles, so that neither copies nor the epilogue of one group
stop the tensor cores. Programs stay on their multiprocessor and take tile after tile.

float32 is multiplied as TF32: the weights come rounded, the pixels go through registers and are rounded there while the
other group multiplies.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from clone_fast.kernels._epilogue import activated, loaded
from clone_fast.kernels._tf32 import hopper_tf32

_activated, _loaded, _in_tf32 = gluon.jit(activated.fn), gluon.jit(loaded.fn), gluon.jit(hopper_tf32.fn)
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # renamed in Triton 3.7


@gluon.constexpr_function
def accumulator_layout(bn, bits):
    """Of a tile with bn channels on four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, bn, 256 // bits])


@gluon.constexpr_function
def store_layout(bm, bn, bits):
    """A tile [bm, bn] on four warps: the rows of each warp as in the accumulator, 16 bytes of channels in a thread.

    So the conversion from the accumulator stays inside a warp, and four threads write 64 bytes side by side.
    """
    first = 128 // bits
    vector = [[0, 1 << i] for i in range(first.bit_length() - 1)]
    columns = [[0, 1 << i] for i in range((4 * first).bit_length() - 1, bn.bit_length() - 1)]
    blocks = [[1 << i, 0] for i in range(6, bm.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*vector, [8, 0], *columns, *blocks],
        lane_bases=[[0, first], [0, 2 * first], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[bm, bn],
    )


@gluon.jit
def _beyond(tile, tiles_x, phase_y, phase_x, height, width, PAD: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr):
    """Whether a tile of one parity begins below or right of the image."""
    below = 2 * (tile // tiles_x * BH) + phase_y - PAD >= height
    return below | (2 * (tile % tiles_x * BW) + phase_x - PAD >= width)


@gluon.jit
def _tile(
    index, images, tiles_n, tiles_x, tiles_y, splits, steps, out_height, out_width, MODE: gl.constexpr,
    K: gl.constexpr, PAD: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Of one tile of the result: its image, first channel, first of HALVES pixel tiles, part of the sum, parities in y
    and x, taps along x, and the steps of its part of the sum."""
    o0 = index % tiles_n * BN
    index = index // tiles_n
    groups = (tiles_x * tiles_y + HALVES - 1) // HALVES
    first = index % groups * HALVES
    index = index // groups
    split = index % splits
    n = index // splits
    phase_y = 0
    phase_x = 0
    taps_x = K
    taps = K * K
    if MODE == 2:
        phase_y = n // images // 2
        phase_x = n // images % 2
        n = n % images
        taps_x = (K + 1 - phase_x) // 2
        taps = (K + 1 - phase_y) // 2 * taps_x
        # Tiles cover the larger parity; those of the other that lie beyond its last row or column have nothing to do.
        empty = _beyond(first, tiles_x, phase_y, phase_x, out_height, out_width, PAD, BH, BW)
        if HALVES == 2:
            empty &= _beyond(first + 1, tiles_x, phase_y, phase_x, out_height, out_width, PAD, BH, BW)
        taps = gl.where(empty, 0, taps)
    total = taps * steps
    return n, o0, first, split, phase_y, phase_x, taps_x, split * total // splits, (split + 1) * total // splits


@gluon.jit
def _copy(
    x, x_odd, odd_x, odd_odd, w, a, b, full, empty, tiles, images, tiles_n, tiles_x, tiles_y, splits, steps, out_height,
    out_width,
    MODE: gl.constexpr, K: gl.constexpr, PAD: gl.constexpr, FLIP: gl.constexpr, PER_SAMPLE: gl.constexpr,
    TRANSPOSED_WEIGHT: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    HALVES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: for every tile, tap and BK channels, the groups' pixels and their common weights.

    For stride 2, x has the even rows and columns, and the other three the rest, odd rows first.
    """
    done = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, o0, first, _, phase_y, phase_x, taps_x, begin, end = _tile(
            index, images, tiles_n, tiles_x, tiles_y, splits, steps, out_height, out_width, MODE, K, PAD, BH, BW, BN,
            HALVES,
        )  # fmt: skip
        sample = n if PER_SAMPLE else 0
        for step in range(begin, end):
            tap = step // steps
            c0 = step % steps * BK
            dy = tap // taps_x
            dx = tap % taps_x
            if MODE == 2:
                weight_tap = (phase_y + 2 * dy) * K + phase_x + 2 * dx
                iy = -dy
                ix = -dx
            else:
                weight_tap = K * K - 1 - tap if FLIP else tap
                iy = dy - PAD
                ix = dx - PAD
            weight_tap += sample * K * K
            stage = done % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), done // STAGES & 1 ^ 1)
            mbarrier.expect(ready, (HALVES * BH * BW + BN) * BK * (w.dtype.primitive_bitwidth // 8))
            for half in gl.static_range(HALVES):
                y0 = (first + half) // tiles_x * BH
                x0 = (first + half) % tiles_x * BW
                target = a.index(HALVES * stage + half)
                if MODE == 1:
                    row = y0 + (iy + 2 * K) // 2 - K
                    column = x0 + (ix + 2 * K) // 2 - K
                    if iy % 2 == 0:
                        if ix % 2 == 0:
                            _load(x, [n, row, column, c0], ready, target)
                        else:
                            _load(x_odd, [n, row, column, c0], ready, target)
                    else:
                        if ix % 2 == 0:
                            _load(odd_x, [n, row, column, c0], ready, target)
                        else:
                            _load(odd_odd, [n, row, column, c0], ready, target)
                else:
                    _load(x, [n, y0 + iy, x0 + ix, c0], ready, target)
            if TRANSPOSED_WEIGHT:
                _load(w, [weight_tap, c0, o0], ready, b.index(stage))
            else:
                _load(w, [weight_tap, o0, c0], ready, b.index(stage))
            done += 1


@gluon.jit
def _pixels(y0, x0, m, phase_y, phase_x, height, width, MODE: gl.constexpr, PAD: gl.constexpr, BW: gl.constexpr):
    """Row, column, and whether it lies in the image, of pixel m of a tile."""
    row = y0 + m // BW
    column = x0 + m % BW
    if MODE == 2:
        row = 2 * row + phase_y - PAD
        column = 2 * column + phase_x - PAD
    return row, column, (row >= 0) & (row < height) & (column >= 0) & (column < width)


@gluon.jit
def _place(
    n, y0, x0, o0, phase_y, phase_x, height, width, channels, y_n, y_c, y_h, y_w, MODE: gl.constexpr,
    PAD: gl.constexpr, BM: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where the elements of a tile of the result lie in memory, and which of them there are."""
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    o = o0 + gl.arange(0, BN, layout=gl.SliceLayout(0, LAYOUT))
    row, column, inside = _pixels(y0, x0, m, phase_y, phase_x, height, width, MODE, PAD, BW)
    at = n * y_n + (row * y_h + column * y_w)[:, None] + (o * y_c)[None, :]
    return at, inside[:, None] & (o < channels)[None, :]


@gluon.jit
def _multiply(
    a, b, full, empty, y, noise, strength, bias, other, tiles, images, tiles_n, tiles_x, tiles_y, splits, steps,
    out_height, out_width, out_channels, y_split, y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp,
    HALF: gl.constexpr, MODE: gl.constexpr, K: gl.constexpr, PAD: gl.constexpr, TRANSPOSED_WEIGHT: gl.constexpr,
    BH: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, HALVES: gl.constexpr,
    STAGES: gl.constexpr, SLOPE: gl.constexpr, NOISE: gl.constexpr, STRENGTH: gl.constexpr, BIAS: gl.constexpr,
    CLAMP: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """One group of four warps: products, epilogue and result of its tile of every group of tiles."""
    BM: gl.constexpr = BH * BW
    ACC: gl.constexpr = accumulator_layout(BN, a.dtype.primitive_bitwidth)
    STORE: gl.constexpr = store_layout(BM, BN, y.dtype.element_ty.primitive_bitwidth)
    IN_TF32: gl.constexpr = a.dtype.primitive_bitwidth == 32
    ADDEND: gl.constexpr = ACC if IN_TF32 else STORE  # of 8 bytes in a thread, and nothing spills, or of 16
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=1)
    done = 0
    for index in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, o0, first, split, phase_y, phase_x, _, begin, end = _tile(
            index, images, tiles_n, tiles_x, tiles_y, splits, steps, out_height, out_width, MODE, K, PAD, BH, BW, BN,
            HALVES,
        )  # fmt: skip
        y0 = (first + HALF) // tiles_x * BH
        x0 = (first + HALF) % tiles_x * BW
        m = gl.arange(0, BM, layout=gl.SliceLayout(1, ACC))
        o = o0 + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
        row, column, inside = _pixels(y0, x0, m, phase_y, phase_x, out_height, out_width, MODE, PAD, BW)
        noise_value = _loaded(noise + n * noise_n, row * noise_h + column * noise_w, inside, gain, NOISE)
        bias_value = _loaded(bias, o, o < out_channels, gain, BIAS)
        factor = _loaded(strength, 0, True, gain, STRENGTH)
        if ADD:  # the sum begins with it: there are no registers to hold it beside
            at, written = _place(
                n, y0, x0, o0, phase_y, phase_x, out_height, out_width, out_channels, y_n, y_c, y_h, y_w, MODE, PAD, BM,
                BW, BN, ADDEND,
            )  # fmt: skip
            acc = gl.convert_layout(gl.load(other + at, mask=written, other=0.0), ACC).to(gl.float32)
        else:
            acc = gl.zeros([BM, BN], dtype=gl.float32, layout=ACC)
        for step in range(begin, end):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            pixels = a.index(HALVES * stage + HALF).reshape([BM, BK])
            if IN_TF32:
                pixels = _in_tf32(pixels.load(FACTOR))
            if TRANSPOSED_WEIGHT:
                weights = b.index(stage).reshape([BK, BN])
            else:
                weights = b.index(stage).reshape([BN, BK]).permute([1, 0])
            acc = warpgroup_mma(pixels, weights, acc, is_async=True)
            if IN_TF32:
                # Before the product is there nothing else may use these registers; the other group multiplies on.
                acc, pixels = warpgroup_mma_wait(num_outstanding=0, deps=(acc, pixels))
                mbarrier.arrive(empty.index(stage), count=1)
            else:
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=step > begin)
            done += 1
        if not IN_TF32:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), count=1, pred=end > begin)

        noise_value = noise_value[:, None] if NOISE else noise_value
        bias_value = bias_value[None, :] if BIAS else bias_value
        acc = _activated(acc, noise_value, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
        value = gl.convert_layout(acc.to(y.dtype.element_ty), STORE)
        at, written = _place(
            n, y0, x0, o0, phase_y, phase_x, out_height, out_width, out_channels, y_n, y_c, y_h, y_w, MODE, PAD, BM, BW,
            BN, STORE,
        )  # fmt: skip
        gl.store(y + split * y_split + at, value, mask=written)


SIZES = [
    "tiles",
    "images",
    "tiles_n",
    "tiles_x",
    "tiles_y",
    "splits",
    "steps",
    "out_height",
    "out_width",
]


@gluon.jit(do_not_specialize=SIZES)
def _conv_hopper_kernel(
    x, x_odd, odd_x, odd_odd, w, y, noise, strength, bias, other, tiles, images, tiles_n, tiles_x, tiles_y, splits,
    steps, out_height, out_width, out_channels, y_split, y_n, y_c, y_h, y_w, noise_n, noise_h, noise_w, gain, clamp,
    MODE: gl.constexpr, K: gl.constexpr, PAD: gl.constexpr, FLIP: gl.constexpr, PER_SAMPLE: gl.constexpr,
    TRANSPOSED_WEIGHT: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    HALVES: gl.constexpr, STAGES: gl.constexpr, SLOPE: gl.constexpr, NOISE: gl.constexpr, STRENGTH: gl.constexpr,
    BIAS: gl.constexpr, CLAMP: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """See `convolve` of `_conv`; steps: of BK channels."""
    a = gl.allocate_shared_memory(x.dtype, [HALVES * STAGES] + x.block_type.shape, x.layout)  # noqa: RUF005
    b = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=HALVES)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (_multiply, (
                    a, b, full, empty, y, noise, strength, bias, other, tiles, images, tiles_n, tiles_x, tiles_y,
                    splits, steps, out_height, out_width, out_channels, y_split, y_n, y_c, y_h, y_w, noise_n,
                    noise_h, noise_w, gain, clamp, 0, MODE, K, PAD, TRANSPOSED_WEIGHT, BH, BW, BN, BK, 2, STAGES,
                    SLOPE, NOISE, STRENGTH, BIAS, CLAMP, ADD,
                )),
                (_multiply, (
                    a, b, full, empty, y, noise, strength, bias, other, tiles, images, tiles_n, tiles_x, tiles_y,
                    splits, steps, out_height, out_width, out_channels, y_split, y_n, y_c, y_h, y_w, noise_n,
                    noise_h, noise_w, gain, clamp, 1, MODE, K, PAD, TRANSPOSED_WEIGHT, BH, BW, BN, BK, 2, STAGES,
                    SLOPE, NOISE, STRENGTH, BIAS, CLAMP, ADD,
                )),
                (_copy, (
                    x, x_odd, odd_x, odd_odd, w, a, b, full, empty, tiles, images, tiles_n, tiles_x, tiles_y, splits,
                    steps, out_height, out_width, MODE, K, PAD, FLIP, PER_SAMPLE, TRANSPOSED_WEIGHT, BH, BW, BN, BK,
                    2, STAGES,
                )),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (
                    a, b, full, empty, y, noise, strength, bias, other, tiles, images, tiles_n, tiles_x, tiles_y,
                    splits, steps, out_height, out_width, out_channels, y_split, y_n, y_c, y_h, y_w, noise_n,
                    noise_h, noise_w, gain, clamp, 0, MODE, K, PAD, TRANSPOSED_WEIGHT, BH, BW, BN, BK, 1, STAGES,
                    SLOPE, NOISE, STRENGTH, BIAS, CLAMP, ADD,
                )),
                (_copy, (
                    x, x_odd, odd_x, odd_odd, w, a, b, full, empty, tiles, images, tiles_n, tiles_x, tiles_y, splits,
                    steps, out_height, out_width, MODE, K, PAD, FLIP, PER_SAMPLE, TRANSPOSED_WEIGHT, BH, BW, BN, BK,
                    1, STAGES,
                )),
            ],
            [1],
            [40],
        )  # fmt: skip


GLUON_DTYPES = {"float32": gl.float32, "float16": gl.float16, "bfloat16": gl.bfloat16}


def described(descriptor: Any) -> TensorDescriptor:
    """Triton's descriptor with a layout in shared memory, as this kernel wants it."""
    dtype = GLUON_DTYPES[str(descriptor.base.dtype).removeprefix("torch.")]
    layout = gl.NVMMASharedLayout.get_default_for(descriptor.block_shape, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape, layout)


def launch_hopper(image: list[Any], weight: Any, processors: int, halves: int, stages: int, **arguments: Any) -> None:
    """Run the kernel on Triton's descriptors of image and weight; one group of warps: two programs per processor."""
    programs = processors if halves == 2 else 2 * processors
    images = [described(part) for part in image]
    x, x_odd, odd_x, odd_odd = images if len(images) == 4 else images * 4
    _conv_hopper_kernel[(min(programs, arguments["tiles"]),)](
        x=x, x_odd=x_odd, odd_x=odd_x, odd_odd=odd_odd, w=described(weight), HALVES=halves, STAGES=stages, **arguments,
        num_warps=4, maxnreg=168 if halves == 2 else 128,
    )  # fmt: skip

"""A convolution as one matrix product per filter tap, with everything that may follow it done on the accumulator.

A program owns a tile of BH x BW pixels and BN channels of the result. For every tap and every BK channels it multiplies
the pixels that the tap sees, [BH*BW, BK], by the tap's weights, [BK, BN]. On Hopper the copy engine brings both through
tensor descriptors and fills with zeros what lies outside the image, so padding costs nothing; where a descriptor cannot
describe the memory, the same kernel reads through pointers and masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels import _conv_tuning as tuning
from clone_fast.kernels._conv_memory import described_image, described_weight, taps_first
from clone_fast.kernels._epilogue import Epilogue, activated, loaded, strides

# How the result's pixels see the input: (o + d - pad), (2 o + d - pad), or the adjoint of the latter.
SAME, DOWN, UP = 0, 1, 2


@triton.jit(do_not_specialize=["height", "width", "rows", "columns", "out_height", "out_width"])
def _conv_kernel(
    x,
    w,
    y,
    noise,
    strength,
    bias,
    other,
    height,
    width,
    channels,
    rows,
    columns,
    out_height,
    out_width,
    out_channels,
    x_n,
    x_c,
    x_h,
    x_w,
    w_n,
    w_tap,
    w_o,
    w_i,
    y_split,
    y_n,
    y_c,
    y_h,
    y_w,
    noise_n,
    noise_h,
    noise_w,
    gain,
    clamp,
    MODE: tl.constexpr,
    K: tl.constexpr,
    PAD: tl.constexpr,
    FLIP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED_WEIGHT: tl.constexpr,
    STEPS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SLOPE: tl.constexpr,
    NOISE: tl.constexpr,
    STRENGTH: tl.constexpr,
    BIAS: tl.constexpr,
    CLAMP: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of rows x columns pixels; STEPS = ceil(channels / BK). See `convolve` for the meaning of the rest."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(out_channels, BN)
    tiles_x = tl.cdiv(columns, BW)
    tiles_y = tl.cdiv(rows, BH)
    tile_n = pid % tiles_n
    pid = pid // tiles_n
    tile_x = pid % tiles_x
    pid = pid // tiles_x
    tile_y = pid % tiles_y
    pid = pid // tiles_y
    split = pid % SPLIT
    pid = pid // SPLIT
    # For UP the pixels of one parity in y and in x share their taps: 2 x 2, 2 x 1, 1 x 2 or 1 x 1 of a 3 x 3 filter.
    n = pid
    phase_y = 0
    phase_x = 0
    if MODE == 2:
        n = pid % (tl.num_programs(0) // (4 * SPLIT * tiles_n * tiles_x * tiles_y))
        phase = pid // (tl.num_programs(0) // (4 * SPLIT * tiles_n * tiles_x * tiles_y))
        phase_y = phase // 2
        phase_x = phase % 2
    y0 = tile_y * BH
    x0 = tile_x * BW
    o0 = tile_n * BN
    taps_x = K
    taps = K * K
    if MODE == 2:
        taps_x = (K + 1 - phase_x) // 2
        taps = (K + 1 - phase_y) // 2 * taps_x
    sample = n if PER_SAMPLE else 0

    m = tl.arange(0, BH * BW)
    row = y0 + m // BW
    column = x0 + m % BW
    y_row = 2 * row + phase_y - PAD if MODE == 2 else row
    y_column = 2 * column + phase_x - PAD if MODE == 2 else column
    inside = (y_row >= 0) & (y_row < out_height) & (y_column >= 0) & (y_column < out_width)
    o = o0 + tl.arange(0, BN)
    noise_value = loaded(noise + n * noise_n, y_row * noise_h + y_column * noise_w, inside, gain, NOISE)
    bias_value = loaded(bias, o, o < out_channels, gain, BIAS)
    factor = loaded(strength, 0, True, gain, STRENGTH)
    total = taps * STEPS
    acc = tl.zeros((BH * BW, BN), dtype=tl.float32)
    if ADD:
        acc += tl.load(
            other + n * y_n + (y_row * y_h + y_column * y_w)[:, None] + (o * y_c)[None, :],
            mask=inside[:, None] & (o < out_channels)[None, :],
            other=0.0,
        )
    for step in range(split * total // SPLIT, (split + 1) * total // SPLIT):
        tap = step // STEPS
        c0 = (step % STEPS) * BK
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
        if DESCRIPTORS:
            a = x.load([n, y0 + iy, x0 + ix, c0]).reshape(BH * BW, BK)
            if TRANSPOSED_WEIGHT:
                b = w.load([sample * K * K + weight_tap, c0, o0]).reshape(BK, BN)
            else:
                b = w.load([sample * K * K + weight_tap, o0, c0]).reshape(BN, BK).T
        else:
            stride: tl.constexpr = 2 if MODE == 1 else 1
            c = c0 + tl.arange(0, BK)
            py = row * stride + iy
            px = column * stride + ix
            seen = (py >= 0) & (py < height) & (px >= 0) & (px < width)
            a = tl.load(
                x + n * x_n + (py * x_h + px * x_w)[:, None] + (c * x_c)[None, :],
                mask=seen[:, None] & (c < channels)[None, :],
                other=0.0,
            )
            b = tl.load(
                w + sample * w_n + weight_tap * w_tap + (c * w_i)[:, None] + (o * w_o)[None, :],
                mask=(c < channels)[:, None] & (o < out_channels)[None, :],
                other=0.0,
            )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    noise_value = noise_value[:, None] if NOISE else noise_value
    bias_value = bias_value[None, :] if BIAS else bias_value
    acc = activated(acc, noise_value, factor, bias_value, gain, clamp, SLOPE, NOISE, STRENGTH, BIAS, CLAMP)
    tl.store(
        y + split * y_split + n * y_n + (y_row * y_h + y_column * y_w)[:, None] + (o * y_c)[None, :],
        acc.to(y.dtype.element_ty),
        mask=inside[:, None] & (o < out_channels)[None, :],
    )


@dataclass(frozen=True)
class Geometry:
    """F.conv2d or F.conv_transpose2d without its numbers: a filter k x k, stride 1 or 2, and the result's size."""

    k: int
    stride: int
    padding: int
    transposed: bool
    height: int
    width: int

    @staticmethod
    def of(x: Tensor, k: int, stride: int, padding: int, transposed: bool) -> Geometry:
        """That of a convolution of x [N, I, H, W]."""
        if transposed:
            height, width = ((size - 1) * stride + k - 2 * padding for size in x.shape[2:])
        else:
            height, width = ((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])
        return Geometry(k, stride, padding, transposed, height, width)

    @property
    def mode(self) -> int:
        if self.stride == 1:
            return SAME
        return UP if self.transposed else DOWN

    @property
    def flip(self) -> bool:
        """A transposed convolution of stride 1 is the plain one with its taps reversed."""
        return self.transposed and self.stride == 1

    @property
    def pad(self) -> int:
        return self.k - 1 - self.padding if self.flip else self.padding

    @property
    def tiled(self) -> tuple[int, int]:
        """Rows and columns that tiles have to cover; for UP, those of one of the four parities."""
        if self.mode == UP:
            return (self.height + self.pad + 1) // 2, (self.width + self.pad + 1) // 2
        return self.height, self.width


def convolve(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    y: Tensor,
    epilogue: Epilogue | None = None,
    config: tuning.Config | None = None,
) -> Tensor:
    """Convolve x [N, I, H, W] with weight [O, I, k, k] or [N, O, I, k, k] into y, of any strides.

    Returns:
        y, finished; or where the sum was split, its parts [S, N, O, H', W'] in float32, which `fir` has to finish
        into y with the same epilogue.
    """
    n, channels = x.shape[:2]
    out_channels = y.shape[1]
    mode, k = geometry.mode, geometry.k
    rows, columns = geometry.tiled

    def chosen(descriptors: bool) -> tuning.Config:
        shape = (mode, k, rows, columns, n, channels, out_channels, x.dtype, x.device)
        return tuning.choose(*shape, descriptors)

    config = config or chosen(True)
    # The kernels with divided warps multiply float32 as TF32.
    w, transposed = taps_first(weight, x.element_size() == 2, config.halves > 0 and x.dtype == torch.float32)
    image = weights = None
    # A tile of several rows would go through registers here, and was seen to come out wrong there.
    if config.halves or (config.bh == 1 and mode != DOWN and tuning.has_copy_engine(x.device)):
        image = described_image(x, [1 if config.halo else config.bh, config.bw, config.bk], mode == DOWN)
        weights = described_weight(w, [config.bn, config.bk], transposed)
    use = image is not None and weights is not None
    if config.halves and not use:
        config = chosen(False)
    out, finish = y, epilogue or Epilogue()
    if config.split > 1:
        parts = torch.empty([config.split, n, geometry.height, geometry.width, out_channels], device=x.device)
        out, finish = parts.permute(0, 1, 4, 2, 3), Epilogue()
    tiles = triton.cdiv(rows, config.bh), triton.cdiv(columns, config.bw), triton.cdiv(out_channels, config.bn)
    images = n * (4 if mode == UP else 1)
    target = out[0] if config.split > 1 else out
    common = {
        "y": out,
        "out_height": geometry.height,
        "out_width": geometry.width,
        "out_channels": out_channels,
        **strides("y", target),
        "PAD": geometry.pad,
        "FLIP": geometry.flip,
        "PER_SAMPLE": w.shape[0] > 1,
        "BN": config.bn,
        "BK": config.bk,
        **finish.arguments(y),
    }
    if config.halo and image:
        from clone_fast.kernels._conv_halo import launch_halo

        launch_halo(
            image[0],
            weights,
            tuning.architecture(x.device)[1],
            config.stages,
            tiles=tiles[0] * tiles[1] * tiles[2] * n,
            tiles_n=tiles[2],
            tiles_x=tiles[1],
            tiles_y=tiles[0],
            steps=triton.cdiv(channels, config.bk),
            **common,
        )
        return out
    common |= {
        **finish.addition(y),
        "y_split": out.stride(0) if config.split > 1 else 0,
        "MODE": mode,
        "K": k,
        "TRANSPOSED_WEIGHT": transposed,
        "BH": config.bh,
        "BW": config.bw,
    }
    if config.halves:
        from clone_fast.kernels._conv_hopper import launch_hopper

        groups = triton.cdiv(tiles[0] * tiles[1], config.halves)
        launch_hopper(
            image,
            weights,
            tuning.architecture(x.device)[1],
            config.halves,
            config.stages,
            tiles=groups * tiles[2] * config.split * images,
            images=n,
            tiles_y=tiles[0],
            tiles_x=tiles[1],
            tiles_n=tiles[2],
            splits=config.split,
            steps=triton.cdiv(channels, config.bk),
            **common,
        )
        return out
    _conv_kernel[(tiles[0] * tiles[1] * tiles[2] * config.split * images,)](
        x=image[0] if image and use else x,
        w=weights if use else w,
        height=x.shape[2],
        width=x.shape[3],
        channels=channels,
        rows=rows,
        columns=columns,
        **strides("x", x),
        w_n=w.stride(0),
        w_tap=w.stride(1),
        w_o=w.stride(2),
        w_i=w.stride(3),
        DESCRIPTORS=use,
        STEPS=triton.cdiv(channels, config.bk),
        SPLIT=config.split,
        PRECISION="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        **common,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out

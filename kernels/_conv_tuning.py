"""Block sizes of the convolution, chosen ahead of time; every entry was checked against the reference on its GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from clone_fast.kernels._device import capability, multiprocessors

# Gluon, in which the kernel with divided warps is written, has had this form since Triton 3.6.
GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
SHARED_MEMORY = {75: 48, 80: 160, 86: 96, 89: 96, 90: 222}  # KB that the stages of one program may take


@dataclass(frozen=True)
class Config:
    """A tile of bh x bw pixels and bn channels, bk channels of the input a step; split: programs that share a sum."""

    bh: int
    bw: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int = 1
    halves: int = 0  # groups of four warps that multiply in the Hopper kernel, 0 for the general one
    halo: bool = False  # the kernel that brings a row of pixels once for three taps; bh counts the rows of both groups


def architecture(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and the number of multiprocessors; Triton's interpreter plays an sm_90."""
    major, minor = capability(device)
    return 10 * major + minor, multiprocessors(device)


def divides_warps(device: torch.device) -> bool:
    """Whether the kernels with divided warps run: on Hopper, not in Triton's interpreter."""
    return GLUON and device.type != "cpu" and architecture(device)[0] == 90


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors are hardware; before Hopper they would be slower than pointers."""
    return architecture(device)[0] >= 90


def power(value: int, low: int, high: int) -> int:
    """The power of two at or above value, between two others."""
    return max(low, min(high, triton.next_power_of_2(value)))


def default(
    rows: int, columns: int, images: int, steps: int, in_channels: int, out_channels: int, itemsize: int, arch: int,
    processors: int,
) -> Config:  # fmt: skip
    """A tile that fits the image, the channels and the chip; sums are split where too few programs would run.

    rows, columns: pixels of one image (of one phase); images: N times phases; steps: taps.
    """
    bk = power(in_channels, 16, 128 // itemsize)
    bn = power(out_channels, 16, 128)
    bm = 128
    bw = power(columns, 1, bm)
    bh = power(rows, 1, bm // bw)
    if bh * bw < 64:
        bh = 64 // bw

    def programs(bh: int, bw: int, bn: int) -> int:
        return images * triton.cdiv(rows, bh) * triton.cdiv(columns, bw) * triton.cdiv(out_channels, bn)

    if bn == 128 and programs(bh, bw, bn) < processors:
        bn = 64
    if bh * bw == 128 and programs(bh, bw, bn) < processors:
        bh, bw = (bh // 2, bw) if bh > 1 else (1, bw // 2)
    split, total = 1, steps * triton.cdiv(in_channels, bk)
    while split < 16 and programs(bh, bw, bn) * split * 2 <= processors * 2 and total // (split * 2) >= 4:
        split *= 2
    budget = SHARED_MEMORY.get(arch, 96) * 1024 // ((bh * bw + bn) * bk * itemsize)
    return Config(bh, bw, bn, bk, 4, max(1, min(4, budget)), split)


def hopper(
    mode: int, rows: int, columns: int, images: int, steps: int, in_channels: int, out_channels: int, itemsize: int,
    processors: int,
) -> Config:  # fmt: skip
    """The same for the kernel with divided warps; a tile is that of one group of four warps."""
    bk = power(in_channels, 16, 128 // itemsize)
    bn = power(out_channels, 32, 128)
    for bm, halves in ((128, 2), (64, 2), (64, 1)):
        # The four parities of mode 2 have a row or a column more than a power of two: narrow tiles waste less there.
        bw = power(columns, 1, bm) if mode != 2 else power(columns // 2, 1, 8)
        bh = bm // bw
        programs = images * triton.cdiv(rows, bh) * triton.cdiv(columns, bw) * triton.cdiv(out_channels, bn)
        if programs >= 0.9 * halves * processors:
            break
    split, total = 1, steps * triton.cdiv(in_channels, bk)
    while split < 8 and programs * split * 2 <= processors and total // (split * 2) >= 4:
        split *= 2
    stages = (216 if halves == 2 else 104) * 1024 // ((halves * bm + bn) * bk * itemsize)
    return Config(bh, bw, bn, bk, 4, min(8, stages), split, halves)


# For compute capability, mode (0: stride 1, 1: stride 2, 2: transposed with stride 2), rows of the tiled result rounded
# down to a power of two, channels of the result and batch (1, or more): the fastest of those measured with 3x3 filters,
# half precision and as many channels in as out, each within the error of its dtype.
TABLE: dict[int, dict[tuple[int, int, int, bool], Config]] = {
    90: {
        (0, 4, 512, False): Config(16, 4, 64, 64, 4, 6, 8, 1),
        (0, 4, 512, True): Config(16, 4, 64, 64, 4, 6, 8, 1),
        (0, 8, 512, False): Config(8, 8, 64, 64, 4, 6, 8, 1),
        (0, 8, 512, True): Config(8, 8, 128, 64, 4, 4, 8, 1),
        (0, 16, 512, False): Config(4, 16, 128, 64, 4, 4, 8, 1),
        (0, 16, 512, True): Config(4, 16, 128, 64, 4, 6, 4, 2),
        (0, 32, 512, False): Config(2, 32, 64, 64, 4, 8, 2, 2),
        (0, 32, 512, True): Config(2, 32, 128, 64, 4, 6, 1, 2),
        (0, 64, 512, False): Config(1, 64, 128, 64, 4, 6, 1, 2),
        (0, 64, 512, True): Config(2, 64, 128, 64, 4, 4, 1, 2),
        (0, 128, 256, False): Config(8, 16, 128, 64, 4, 4, 1, 2),
        (0, 128, 256, True): Config(1, 128, 128, 64, 4, 4, 1, 2),
        (0, 256, 128, False): Config(1, 128, 128, 64, 4, 3, 1, 1),
        (0, 256, 128, True): Config(8, 16, 128, 64, 4, 4, 1, 2),
        (0, 512, 64, False): Config(1, 128, 64, 64, 4, 4, 1, 1),
        (0, 512, 64, True): Config(1, 128, 64, 64, 4, 4, 1, 1),
        (1, 32, 512, False): Config(2, 32, 128, 64, 4, 6, 2, 2),
        (1, 64, 256, False): Config(1, 64, 128, 64, 4, 4, 1, 1),
        (2, 64, 512, False): Config(8, 8, 256, 64, 4, 4, 1, 2),
        (2, 64, 512, True): Config(8, 8, 256, 64, 4, 4, 1, 2),
        (2, 256, 128, False): Config(8, 8, 128, 64, 4, 6, 1, 2),
    },
}


def choose(
    mode: int, k: int, rows: int, columns: int, images: int, in_channels: int, out_channels: int, dtype: torch.dtype,
    device: torch.device, descriptors: bool,
) -> Config:  # fmt: skip
    """The configuration of a convolution: from the table of this chip, or by rule for the shape.

    rows, columns: pixels of one image (of one parity, for mode 2); descriptors: the kernel with divided warps may run.
    """
    arch, processors = architecture(device)
    size, like = (1 << (pixels.bit_length() - 1) for pixels in (rows, columns))
    hopper_runs = descriptors and divides_warps(device)
    if hopper_runs and k == 3 and dtype.itemsize == 2 and size == like and in_channels >= 64:
        found = TABLE[arch].get((mode, size, out_channels, images > 1))
        if found:
            return found
    if hopper_runs and dtype == torch.float32 and (mode, k) == (0, 3) and max(in_channels, out_channels) <= 64:
        across = triton.cdiv(columns, 64)
        if 64 * across <= 1.25 * columns and images * triton.cdiv(rows, 8) * across >= 0.9 * processors:
            return Config(8, 64, power(out_channels, 32, 64), 32, 4, 2, halves=2, halo=True)
    taps = (k * k + 3) // 4 if mode == 2 else k * k
    images *= 4 if mode == 2 else 1
    shape = (rows, columns, images, taps, in_channels, out_channels, dtype.itemsize)
    return hopper(mode, *shape, processors) if hopper_runs else default(*shape, arch, processors)

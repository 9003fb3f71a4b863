"""Block sizes of the weight gradient, chosen ahead of time; every entry was checked against float64 on that GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """What one program of the weight gradient works on.

    Attributes:
        ty, tx: taps of one program.
        bh, bw: pixels of one step of its sum.
        bb, ba: channels of b and of a.
        warps, stages: of the launch.
        per_sm: programs that fit on a multiprocessor at once.
    """

    ty: int
    tx: int
    bh: int
    bw: int
    bb: int
    ba: int
    warps: int
    stages: int
    per_sm: int


def capability(x: Tensor) -> tuple[int, int]:
    """Of the device that x lies on; without one, of the GPU that the kernels are compiled ahead of time for."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _width(channels: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(channels)), most)


# (bytes of an element, stride, channels of the wider image at most) -> block for 3 x 3 taps.
NINE_TAPS = {
    (2, 1, 32): Block(3, 3, 1, 64, 32, 32, 4, 3, 2),
    (2, 1, 64): Block(3, 3, 1, 64, 64, 64, 8, 3, 1),
    (2, 1, 1 << 30): Block(1, 3, 1, 64, 128, 128, 8, 3, 1),
    (2, 2, 64): Block(3, 3, 1, 64, 64, 32, 4, 3, 1),
    (2, 2, 1 << 30): Block(1, 3, 1, 64, 128, 128, 8, 3, 1),
    (4, 1, 32): Block(3, 3, 1, 32, 32, 32, 4, 3, 2),
    (4, 1, 1 << 30): Block(1, 3, 1, 32, 64, 64, 8, 3, 2),
    (4, 2, 1 << 30): Block(1, 3, 1, 32, 64, 64, 8, 3, 2),
}
ONE_TAP = {
    (2, 1, 1 << 30): Block(1, 1, 1, 64, 128, 128, 8, 4, 1),
    (2, 2, 1 << 30): Block(1, 1, 1, 64, 128, 128, 8, 4, 1),
    (4, 1, 1 << 30): Block(1, 1, 1, 32, 64, 64, 4, 4, 2),
    (4, 2, 1 << 30): Block(1, 1, 1, 32, 64, 64, 4, 4, 2),
}


def tiles(device: tuple[int, int], dtype: torch.dtype, ca: int, cb: int, k: int, stride: int, size: list[int]) -> Block:
    """The block for the route "tiles", fitted to few channels and small images."""
    table = ONE_TAP if k == 1 else NINE_TAPS
    width = max(ca, cb)
    key = min(key for key in table if key[:2] == (dtype.itemsize, stride) and width <= key[2])
    block = table[key]
    pixels = block.bh * block.bw
    bw = min(pixels, max(4 if stride == 1 else 16, triton.next_power_of_2(size[1])))
    bh = pixels // bw if stride == 1 else 1
    return replace(block, bh=bh, bw=bw, bb=_width(cb, block.bb), ba=_width(ca, block.ba))


def pointers(dtype: torch.dtype, ca: int, cb: int) -> Block:
    """The block for the route "pointers"; bw counts pixels in reading order."""
    return Block(1, 1, 1, 128 if dtype.itemsize == 2 else 64, _width(cb, 64), _width(ca, 64), 4, 2, 4)


def route(device: tuple[int, int], dtype: torch.dtype, ca: int, cb: int, k: int, stride: int, size: list[int]) -> str:
    """ "tiles", or "cudnn" where that was measured to be faster."""
    return "tiles"


@functools.cache
def _best_splits(slots: int, programs: int, tiles: int, outputs: int, pixels: int) -> int:
    def cost(splits: int) -> float:
        """Microseconds: the matrix units, idle in the last wave, then the sums of the splits through the L2 cache."""
        work = 2e-9 * outputs * tiles * pixels / 0.6
        waves = -(-programs * splits // slots) * slots / (programs * splits)
        return work * waves * (-(-tiles // splits) * splits / tiles) + (splits > 1) * (2 + 2e-6 * splits * outputs)

    return min(range(1, min(tiles, max(1, 4 * slots // programs)) + 1), key=cost)


def splits(x: Tensor, programs: int, tiles: int, per_sm: int, outputs: int, pixels: int) -> int:
    """Into how many parts to cut the sum over `tiles` steps of `pixels` each, so that the GPU is full and no fuller."""
    return _best_splits(_processors(x.device) * per_sm, programs, tiles, outputs, pixels)


def addition(size: int, splits: int) -> tuple[int, int]:
    """(results, splits) of a step of the second pass: enough programs for a GPU, enough loads in flight in each."""
    block = min(max(32, triton.next_power_of_2(size) // 512), 1024)
    return block, min(triton.next_power_of_2(splits), 4096 // block)

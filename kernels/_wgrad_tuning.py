"""Block sizes of the weight gradient, chosen ahead of time; every entry was checked against float64 on that GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from clone_fast.kernels._device import multiprocessors

ANY = 1 << 30  # channels


@dataclass(frozen=True)
class Block:
    """What one program of the weight gradient works on.

    Attributes:
        ty, tx: taps of one program.
        bh, bw: pixels of one step of its sum.
        bb, ba: channels of b and of a.
        warps, stages: of the launch.
        per_sm: programs that fit on a multiprocessor at once.
        latency: of a step, in microseconds, where nothing else bounds it.
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
    latency: float = 0.35


def _width(channels: int, most: int) -> int:
    return min(max(16, triton.next_power_of_2(channels)), most)


# The tables below are of this compute capability; where nobody has measured, a block that every GPU has room for.
MEASURED = (9, 0)
ANYWHERE = {2: Block(1, 1, 1, 32, 64, 64, 4, 2, 2), 4: Block(1, 1, 1, 32, 32, 64, 4, 2, 2)}
# (bytes of an element, stride) -> {channels of the wider image at most: block}, for 3 x 3 taps.
NINE_TAPS = {
    (2, 1): {
        32: Block(3, 3, 1, 64, 32, 32, 2, 3, 4),
        64: Block(3, 1, 1, 64, 64, 64, 4, 3, 2),
        256: Block(1, 1, 1, 64, 128, 128, 4, 3, 2),
        ANY: Block(1, 3, 1, 64, 128, 64, 4, 3, 1),
    },
    (2, 2): {
        64: Block(1, 3, 1, 64, 64, 32, 4, 4, 2),
        128: Block(1, 3, 1, 64, 64, 64, 4, 3, 2),
        ANY: Block(1, 3, 1, 64, 128, 64, 4, 3, 1),
    },
    (4, 1): {
        32: Block(3, 3, 1, 32, 32, 32, 2, 3, 4),
        64: Block(3, 3, 1, 32, 32, 64, 4, 3, 2),
    },
    (4, 2): {
        64: Block(1, 3, 1, 32, 64, 32, 2, 3, 3),
    },
}
# stride -> the same for more than 256 channels of an image not wider than 16, where the last entry spills registers.
NARROW = {1: Block(1, 1, 1, 64, 128, 128, 4, 3, 2), 2: Block(1, 3, 1, 64, 64, 64, 4, 3, 2)}
# bytes of an element -> block for 1 x 1.
ONE_TAP = {2: Block(1, 1, 1, 64, 128, 128, 4, 3, 2), 4: Block(1, 1, 1, 32, 32, 128, 4, 3, 2)}


def tiles(device: tuple[int, int], dtype: torch.dtype, ca: int, cb: int, k: int, stride: int, size: list[int]) -> Block:
    """The block for the route "tiles", fitted to few channels and small images."""
    if device != MEASURED:
        block = ANYWHERE[dtype.itemsize]
    elif k == 1:
        block = ONE_TAP[dtype.itemsize]
    else:
        table = NINE_TAPS[dtype.itemsize, stride]
        width = min(width for width in table if max(ca, cb) <= width)
        block = NARROW[stride] if width == ANY and size[1] <= 16 else table[width]
    pixels = block.bh * block.bw
    bw = min(pixels, max(4 if stride == 1 else 16, triton.next_power_of_2(size[1])))
    bh = pixels // bw if stride == 1 else 1
    # With stride 2 the columns of one parity have a descriptor of their own: all tap columns in one program.
    tx = k if stride == 2 else block.tx
    return replace(block, tx=tx, bh=bh, bw=bw, bb=_width(cb, block.bb), ba=_width(ca, block.ba))


def pointers(dtype: torch.dtype, ca: int, cb: int, exact: bool) -> Block:
    """The block for the route "pointers"; bw counts pixels in reading order: few in full float32, for short chains."""
    pixels = 16 if exact else 128 if dtype.itemsize == 2 else 64
    return Block(1, 1, 1, pixels, _width(cb, 64), _width(ca, 64), 4, 2, 4, latency=0.8 if exact else 1.5)


def is_exact(a: Tensor, b: Tensor) -> bool:
    """Whether to multiply in full float32: where TF32 is forbidden or, as in PyTorch, channels are few."""
    return a.dtype == torch.float32 and (not torch.backends.cudnn.allow_tf32 or min(a.shape[1], b.shape[1]) < 16)


def route(device: tuple[int, int], dtype: torch.dtype, ca: int, cb: int, k: int, stride: int, size: list[int]) -> str:
    """ "tiles", or "cudnn" where that was measured to be faster: in TF32 with more than 64 channels."""
    return "cudnn" if dtype == torch.float32 and k > 1 and max(ca, cb) > 64 else "tiles"


@functools.cache
def _best_splits(slots: int, programs: int, tiles: int, outputs: int, pixels: int, latency: float) -> int:
    def cost(splits: int) -> float:
        """Microseconds: the matrix units, idle in the last wave, or a step's latency; then the sums of the splits."""
        waves, steps = -(-programs * splits // slots), -(-tiles // splits)
        work = 2e-9 / 0.6 * outputs * pixels * steps / programs * slots
        return waves * max(work, latency * steps) + (splits > 1) * (2 + 2e-6 * splits * outputs)

    return min(range(1, min(tiles, max(1, 4 * slots // programs)) + 1), key=cost)


def splits(x: Tensor, programs: int, tiles: int, block: Block, outputs: int) -> int:
    """Into how many parts to cut the sum over `tiles` steps, so that the GPU is full and no fuller."""
    slots = multiprocessors(x.device) * block.per_sm
    return _best_splits(slots, programs, tiles, outputs, block.bh * block.bw, block.latency)


def addition(size: int, splits: int) -> tuple[int, int]:
    """(results, splits) of a step of the second pass: enough programs for a GPU, enough loads in flight in each."""
    block = min(max(32, triton.next_power_of_2(size) // 512), 1024)
    return block, min(triton.next_power_of_2(splits), 4096 // block)

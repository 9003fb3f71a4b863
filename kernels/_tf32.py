"""TF32 rounded to nearest: the tensor cores cut the mantissa after ten bits, so they are given zeros to cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers of a program that only rounds


@triton.jit
def in_tf32(x, ROUND: tl.constexpr):
    """x, or where ROUND the nearest TF32 to it; halves away from zero."""
    if ROUND:
        more = tl.where(x == x, 0x1000, 0)  # the carry would turn some NaN into zero
        return ((x.to(tl.int32, bitcast=True) + more) & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def hopper_tf32(x):
    """The nearest TF32 to x by one instruction, which only Hopper and later have; halves to even."""
    return tl.inline_asm_elementwise("cvt.rn.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _nearest_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, in_tf32(tl.load(x + i, mask=i < size), True), mask=i < size)


def nearest(x: Tensor) -> Tensor:
    """x, float32 in any layout, rounded to TF32 in a pass of its own: for what is multiplied by others."""
    y = torch.empty_like(x)  # dense, in the order of x's strides
    x = x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)
    _nearest_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=4)
    return y

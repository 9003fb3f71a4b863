"""TF32 rounded to nearest: the tensor cores cut the mantissa after ten bits, so they are given zeros to cut."""

from __future__ import annotations

import triton
import triton.language as tl


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

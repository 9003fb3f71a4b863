"""bias_act in Triton: forward, first and second gradient, for the nine activations and any axis of the bias.

Memory is seen as a matrix [rows, columns] with the columns in a row. Where the bias belongs to the last axis in memory
(channels_last, matrices), a column has its channel; otherwise (contiguous images), a row has. Every tensor is read or
written once. The gradient of the bias is summed in two steps, in an order that is always the same.

Offsets have 32 bits: a tensor has less than 2^31 elements, and where they may wrap around, beyond its end, is masked.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._activations import activation, curvature, times_slope
from clone_fast.kernels._dense import dtype_reason, extents, layout_of

WARPS = 8
VECTORS = {"forward": 4, "gradient": 2, "second": 2}  # 16-byte accesses of a thread to each tensor
# How many programs a gradient with a sum for the bias gets, about. By column each leaves a sum for every channel.
PROGRAMS_BY_ROW, PROGRAMS_BY_COLUMN = 132 * 8, 132 * 4


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _bias(b, m, k, C, HAS_BIAS: tl.constexpr, BY_ROW: tl.constexpr):
    """The bias of rows m and columns k, in a shape that broadcasts against [rows, columns]."""
    if not HAS_BIAS:
        bias = tl.zeros([1, 1], tl.float32)
    elif BY_ROW:
        bias = tl.load(b + m % C).to(tl.float32)[:, None]
    else:
        bias = tl.load(b + k % C).to(tl.float32)[None, :]
    return bias


@triton.jit
def _limited(y, clamp):
    return tl.where(y > clamp, clamp, tl.where(y < -clamp, -clamp, y))


@triton.jit
def _gradient(g, z, alpha, gain, clamp, ACT: tl.constexpr, HAS_CLAMP: tl.constexpr):
    """g times the derivative of clamp(gain * act(z))."""
    dz = times_slope(g * gain, z, alpha, ACT)
    if HAS_CLAMP:
        y = gain * activation(z, alpha, ACT)
        dz = tl.where((y >= clamp) | (y <= -clamp), 0.0, dz)
    return dz


@triton.jit(do_not_specialize=["M", "C"])
def elementwise_kernel(
    x,
    dy,
    v,
    b,
    out,
    M,
    K,
    C,
    alpha,
    gain,
    clamp,
    ACT: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    BY_ROW: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out [M, K]: KIND is "forward" (of x), "gradient" (of x, dy) or "second" (of x, dy, v)."""
    tiles = tl.cdiv(K, BK)
    m = (tl.program_id(0) // tiles) * BM + tl.arange(0, BM)
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + _bias(b, m, k, C, HAS_BIAS, BY_ROW)
    if KIND == "forward":
        result = gain * activation(z, alpha, ACT)
        if HAS_CLAMP:
            result = _limited(result, clamp)
    elif KIND == "gradient":
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        result = _gradient(g, z, alpha, gain, clamp, ACT, HAS_CLAMP)
    else:
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        result = w * g * gain * curvature(z, ACT)
        if HAS_CLAMP:
            y = gain * activation(z, alpha, ACT)
            result = tl.where((y >= clamp) | (y <= -clamp), 0.0, result)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "C", "steps"])
def gradients_kernel(
    x,
    dy,
    b,
    dx,
    partial,
    M,
    K,
    C,
    steps,
    alpha,
    gain,
    clamp,
    ACT: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    BY_ROW: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """dx [M, K], and partial sums of it [pieces, C]: over `steps` tiles along a row BY_ROW, down otherwise."""
    m, k = tl.arange(0, BM), tl.arange(0, BK)
    if BY_ROW:
        chunk = steps * BK
        pieces = tl.cdiv(K, chunk)
        piece = tl.program_id(0) % pieces
        m += (tl.program_id(0) // pieces) * BM
        start, end = piece * chunk, tl.minimum(K, (piece + 1) * chunk)
    else:
        chunk = steps * BM
        tiles = tl.cdiv(K, BK)
        piece = tl.program_id(0) // tiles
        k += (tl.program_id(0) % tiles) * BK
        start, end = piece * chunk, tl.minimum(M, (piece + 1) * chunk)
    bias = _bias(b, m, k, C, True, BY_ROW)
    total = tl.zeros([BM, BK], tl.float32)
    for first in range(start, end, BK if BY_ROW else BM):
        if BY_ROW:
            inside = (m < M)[:, None] & (first + k < end)[None, :]
            at = m[:, None] * K + (first + k)[None, :]
        else:
            inside = (first + m < end)[:, None] & (k < K)[None, :]
            at = (first + m)[:, None] * K + k[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + bias
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dz = _gradient(g, z, alpha, gain, clamp, ACT, HAS_CLAMP)
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=inside)
        total += tl.where(inside, dz, 0.0)
    if BY_ROW:
        to = ((m // C).to(tl.int64) * pieces + piece) * C + m % C
        tl.store(partial + to, tl.sum(total, axis=1), mask=m < M)
    else:
        tl.store(partial + piece.to(tl.int64) * K + k, tl.sum(total, axis=0), mask=k < K)


@triton.jit(do_not_specialize=["count", "C"])
def sum_kernel(partial, db, count, C, BP: tl.constexpr, BC: tl.constexpr):
    """db [C], from partial [count, C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BP, BC], tl.float32)
    for first in range(0, count, BP):
        p = first + tl.arange(0, BP)
        inside = (p < count)[:, None] & (c < C)[None, :]
        total += tl.load(partial + p.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)
    tl.store(db + c, tl.sum(total, axis=0).to(db.dtype.element_ty), mask=c < C)


# ---- launches ------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """How dense memory is cut: [rows, columns], in tiles of tile_rows x tile_columns."""

    rows: int
    columns: int
    channels: int  # of row m: m % channels; of column k: k % channels
    by_row: bool
    tile_rows: int
    tile_columns: int


def _matrix(x: Tensor, b: Tensor | None, dim: int, vectors: int) -> Matrix:
    lanes = 16 // x.element_size()
    tile = WARPS * 32 * lanes * vectors
    outer, channels, inner = extents(x, dim)
    if b is None:
        rows, columns, by_row = 1, outer * channels * inner, True
    elif inner > 1:
        rows, columns, by_row = outer * channels, inner, True
    else:  # several rows count as one where Triton then sees that 16 bytes may be read at once: RGB in channels_last
        fold = 16 // math.gcd(channels, 16)
        fold = fold if outer % fold == 0 else 1
        rows, columns, by_row = outer // fold, channels * fold, False
    # Few widths, so that few kernels are compiled; the images of a StyleGAN are powers of 4.
    widths = (16, 64, 256, 1024, tile) if by_row else (16, 32, 64, 128, 256)
    tile_columns = min([width for width in widths if width >= columns] or [min(tile, widths[-1])])
    return Matrix(rows, columns, channels, by_row, tile // tile_columns, tile_columns)


def supports(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    return dtype_reason(x)


def _elementwise(
    kind: str,
    inputs: list[Tensor],
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    layout = layout_of(inputs[0])
    inputs = [one.contiguous(memory_format=layout) for one in inputs]
    x, dy, v = (inputs + inputs[:1] * 2)[:3]
    out = torch.empty_like(x, memory_format=layout)
    matrix = _matrix(x, b, dim, VECTORS[kind])
    tiles = triton.cdiv(matrix.rows, matrix.tile_rows) * triton.cdiv(matrix.columns, matrix.tile_columns)
    elementwise_kernel[(tiles,)](
        x,
        dy,
        v,
        x if b is None else b.contiguous(),
        out,
        matrix.rows,
        matrix.columns,
        matrix.channels,
        *_numbers(alpha, gain, clamp),
        ACT=act,
        KIND=kind,
        HAS_BIAS=b is not None,
        HAS_CLAMP=clamp is not None,
        BY_ROW=matrix.by_row,
        BM=matrix.tile_rows,
        BK=matrix.tile_columns,
        num_warps=WARPS,
    )
    return out


def _numbers(*values: float | None) -> list[float]:
    return [float(value or 0.0) for value in values]


def launch(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    """clamp(gain * act(x + b)), in x's shape, dtype and layout."""
    return _elementwise("forward", [x], b, dim, act, alpha, gain, clamp)


def launch_backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    want_db: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx like x, db like b or None): the gradient at x + b, 0 where the result stands at the clamp or beyond."""
    if b is None or not want_db:
        return _elementwise("gradient", [x, dy], b, dim, act, alpha, gain, clamp), None
    layout = layout_of(x)
    x, dy, b = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout), b.contiguous()
    dx, db = torch.empty_like(x, memory_format=layout), torch.empty_like(b)
    matrix = _matrix(x, b, dim, VECTORS["gradient"])
    across = triton.cdiv(matrix.rows, matrix.tile_rows), triton.cdiv(matrix.columns, matrix.tile_columns)
    programs = PROGRAMS_BY_ROW if matrix.by_row else PROGRAMS_BY_COLUMN
    steps = max(1, across[0] * across[1] // programs)  # tiles of a program
    if matrix.by_row:
        pieces = triton.cdiv(across[1], steps)
        programs, count = across[0] * pieces, matrix.rows // matrix.channels * pieces
    else:
        pieces = triton.cdiv(across[0], steps)
        programs, count = across[1] * pieces, matrix.columns // matrix.channels * pieces
    partial = torch.empty(count * matrix.channels, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {"ACT": act, "HAS_CLAMP": clamp is not None, "BY_ROW": matrix.by_row}
    gradients_kernel[(programs,)](
        x,
        dy,
        b,
        dx,
        partial,
        matrix.rows,
        matrix.columns,
        matrix.channels,
        steps,
        *_numbers(alpha, gain, clamp),
        **options,
        BM=matrix.tile_rows,
        BK=matrix.tile_columns,
        num_warps=WARPS,
    )
    wide = 4 if matrix.channels <= 4 else 8  # few channels for a program, so that many programs share the work
    sum_kernel[(triton.cdiv(matrix.channels, wide),)](
        partial, db, count, matrix.channels, BP=4096 // wide, BC=wide, num_warps=WARPS
    )
    return dx, db


def launch_second(
    v: Tensor,
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """v * dy * (the derivative of the slope at x + b), in x's shape, dtype and layout."""
    return _elementwise("second", [x, dy, v], b, dim, act, alpha, gain, clamp)

"""The weights of a modulated convolution, and the way back from their gradient to the weight and the styles.

    w'[n, o, i, :, :] = weight[o, i, :, :] * styles[n, i] * d[n, o],
    d[n, o] = (sum over i, y, x of (weight * styles)^2 + eps)^-1/2          (StyleGAN2, equation 3)

One program makes the filter of one output channel. A tile is [input channels, taps]: that is how the weight lies in
memory; the result, whose taps come first, is the tile transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _modulate_kernel(
    weight,
    styles,
    out,
    samples,
    channels,
    w_n,
    w_o,
    w_i,
    w_tap,
    s_n,
    s_i,
    eps,
    fan_in,
    TAPS: tl.constexpr,
    OWN: tl.constexpr,
    DEMODULATE: tl.constexpr,
    NORMALISE: tl.constexpr,
    TINY_VALUE: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    """out [N, k, k, O, I]; programs (o, share of the samples).

    OWN: every sample has a weight of its own.
    NORMALISE: scales weights and styles to what float16 can hold; the demodulation cancels both factors again.
    """
    o = tl.program_id(0)
    i = tl.arange(0, BI)[:, None]
    tap = tl.arange(0, BT)[None, :]
    inside = (i < channels) & (tap < TAPS)
    weight += o * w_o + i * w_i + tap * w_tap
    w = tl.load(weight, mask=inside & (not OWN), other=0.0).to(tl.float32)
    if NORMALISE:
        w *= 1.0 / (tl.sqrt(fan_in) * tl.maximum(tl.max(tl.abs(w)), TINY_VALUE))
    across = tl.arange(0, BI)[None, :]
    down = tl.arange(0, BT)[:, None]
    for n in range(tl.program_id(1), samples, tl.num_programs(1)):
        if OWN:
            w = tl.load(weight + n * w_n, mask=inside, other=0.0).to(tl.float32)
            if NORMALISE:
                w *= 1.0 / (tl.sqrt(fan_in) * tl.maximum(tl.max(tl.abs(w)), TINY_VALUE))
        s = tl.load(styles + n * s_n + i * s_i, mask=i < channels, other=0.0).to(tl.float32)
        if NORMALISE:
            s *= 1.0 / tl.maximum(tl.max(tl.abs(s)), TINY_VALUE)
        product = w * s
        if DEMODULATE:
            product *= tl.rsqrt(tl.sum(product * product) + eps)
        at = ((n * TAPS + down) * tl.num_programs(0) + o) * channels + across
        # Rounded before it is turned: half the way through shared memory.
        turned = tl.trans(product.to(out.dtype.element_ty))
        tl.store(out + at, turned, mask=(across < channels) & (down < TAPS))


@triton.jit
def _modulate_backward_kernel(
    dw,
    weight,
    styles,
    dweight,
    styles_sums,
    samples,
    channels,
    dw_n,
    dw_o,
    dw_i,
    dw_tap,
    w_n,
    w_o,
    w_i,
    w_tap,
    d_n,
    d_o,
    d_i,
    d_tap,
    s_n,
    s_i,
    eps,
    TAPS: tl.constexpr,
    OWN: tl.constexpr,
    DEMODULATE: tl.constexpr,
    EPS_OF_SIZE: tl.constexpr,
    TINY_VALUE: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    """dweight like weight, and styles_sums [N, O, I], the part of every o in the gradient of the styles. Programs (o).

    The gradient of the product w s is h = d dw - d^3 (sum of dw w s) w s; then dweight = sum over n of s h, and
    dstyles = sum over o and the taps of w h.
    EPS_OF_SIZE: eps is relative to the largest weight and style, which is what NORMALISE amounts to.
    """
    o = tl.program_id(0)
    i = tl.arange(0, BI)[:, None]
    tap = tl.arange(0, BT)[None, :]
    inside = (i < channels) & (tap < TAPS)
    weight += o * w_o + i * w_i + tap * w_tap
    dweight += o * d_o + i * d_i + tap * d_tap
    w = tl.load(weight, mask=inside & (not OWN), other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(w))
    total = tl.zeros((BI, BT), dtype=tl.float32)
    # Read the way it lies in memory, taps first, and turned in registers.
    across = tl.arange(0, BI)[None, :]
    down = tl.arange(0, BT)[:, None]
    dw += o * dw_o + across * dw_i + down * dw_tap
    for n in range(samples):
        if OWN:
            w = tl.load(weight + n * w_n, mask=inside, other=0.0).to(tl.float32)
            largest = tl.max(tl.abs(w))
        s = tl.load(styles + n * s_n + i * s_i, mask=i < channels, other=0.0).to(tl.float32)
        grad = tl.load(dw + n * dw_n, mask=(across < channels) & (down < TAPS), other=0.0).to(tl.float32)
        grad = tl.trans(grad)
        if DEMODULATE:
            factor = eps
            if EPS_OF_SIZE:
                size = largest * tl.max(tl.abs(s))
                factor = tl.maximum(eps * size * size, TINY_VALUE)
            product = w * s
            d = tl.rsqrt(tl.sum(product * product) + factor)
            lost = d * tl.sum(grad * product) * d * d  # in this order nothing overflows where the weights are zero
            grad = d * grad - lost * product
        if OWN:
            tl.store(dweight + n * d_n, (s * grad).to(dweight.dtype.element_ty), mask=inside)
        else:
            total += s * grad
        dstyle = tl.sum(w * grad, axis=1, keep_dims=True)
        tl.store(styles_sums + (n * tl.num_programs(0) + o) * channels + i, dstyle, mask=i < channels)
    if not OWN:
        tl.store(dweight, total.to(dweight.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(x, out, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """out[n, c] = sum of x[n, r, c] over r. Programs (block of columns, n)."""
    n = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, rows, BR):
        r = start + tl.arange(0, BR)[:, None]
        total += tl.load(x + (n * rows + r) * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    total = tl.sum(total, axis=0)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    tl.store(out + n * columns + c, total.to(out.dtype.element_ty), mask=c < columns)


def _blocks(in_channels: int, k: int, elements: int) -> tuple[int, int, int]:
    """(input channels, taps, warps) of a program that holds one whole filter, `elements` of it in each warp."""
    bi, bt = triton.next_power_of_2(in_channels), triton.next_power_of_2(k * k)
    return bi, bt, min(max(4, bi * bt // elements), 32)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """(sample, o, i, tap) of [(N,) O, I, taps]; one weight for all samples has none for them."""
    return (0, *weight.stride()) if weight.ndim == 3 else weight.stride()


def modulate(weight: Tensor, styles: Tensor, demodulate: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """weight * styles * d in dtype, computed in float32 and rounded once.

    Args:
        weight: [O, I, k, k], or [N, O, I, k, k] where every sample has its own; styles: [N, I]; float32, float16 or
            bfloat16, any strides.
        eps: inside the root of the demodulation. For a result in float16 it counts relative to the largest weight and
            style, which is what normalising both first amounts to.

    Returns:
        [N, O, I, k, k], in memory [N, k, k, O, I].
    """
    n = styles.shape[0]
    o, i, k, _ = weight.shape[-4:]
    out = torch.empty([n, k, k, o, i], dtype=dtype, device=weight.device)
    flat = weight.flatten(-2)  # a view, unless the taps lie in a strange order
    bi, bt, warps = _blocks(i, k, 1024)
    # A filter is read once for all samples where there are filters enough to fill a GPU.
    _modulate_kernel[(o, n if o < 128 or weight.ndim == 5 else 1)](
        flat,
        styles,
        out,
        n,
        i,
        *_strides(flat),
        *styles.stride(),
        eps,
        float(i * k * k),
        TAPS=k * k,
        OWN=weight.ndim == 5,
        DEMODULATE=demodulate,
        NORMALISE=demodulate and dtype == torch.float16,
        TINY_VALUE=TINY,
        BI=bi,
        BT=bt,
        num_warps=warps,
    )
    return out.permute(0, 3, 4, 1, 2)


def modulate_backward(
    dw: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of `modulate(weight, styles, demodulate, eps, dtype)` for its gradient dw.

    Where eps is relative to the largest weight and style, its own tiny gradient to these two is left out.

    Args:
        dw: [N, O, I, k, k], any dtype of the above, any strides.

    Returns:
        (like weight, like styles), each in its dtype; sums in float32.
    """
    n = styles.shape[0]
    o, i, k, _ = weight.shape[-4:]
    flat, dw = weight.flatten(-2), dw.flatten(3)
    dweight = torch.empty_like(flat)
    dstyles = torch.empty([n, i], dtype=styles.dtype, device=styles.device)
    sums = torch.empty([n, o, i], dtype=torch.float32, device=weight.device)
    relative = demodulate and dtype == torch.float16
    bi, bt, warps = _blocks(i, k, 512)
    _modulate_backward_kernel[(o,)](
        dw,
        flat,
        styles,
        dweight,
        sums,
        n,
        i,
        *dw.stride(),
        *_strides(flat),
        *_strides(dweight),
        *styles.stride(),
        eps * i * k * k if relative else eps,
        TAPS=k * k,
        OWN=weight.ndim == 5,
        DEMODULATE=demodulate,
        EPS_OF_SIZE=relative,
        TINY_VALUE=TINY,
        BI=bi,
        BT=bt,
        num_warps=warps,
    )
    columns = 16
    _add_rows[(triton.cdiv(i, columns), n)](sums, dstyles, o, i, BR=256, BC=columns, num_warps=4)
    return dweight.unflatten(-1, (k, k)), dstyles

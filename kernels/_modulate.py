"""The weights of a modulated convolution, and the way back from their gradient to the weight and the styles.

    w'[n, o, i, :, :] = weight[o, i, :, :] * styles[n, i] * d[n, o],
    d[n, o] = (sum over i, y, x of (weight * styles)^2 + eps)^-1/2          (StyleGAN2, equation 3)

One program makes the filter of one output channel, as a vector of input channels for every tap: so it may read taps
that lie side by side (from the L1 cache, after the first) and write them apart, and nothing has to be turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
FORWARD, BACKWARD = 18, 36  # elements of a filter that a thread holds
REGISTERS = 128  # of a thread on the way back: 512 filters of 512 channels run at once on an H100


@triton.jit
def _loaded(pointer, step, mask, TAPS: tl.constexpr):
    """What lies at the pointer for every tap, `step` apart, in float32."""
    found = ()
    for tap in tl.static_range(TAPS):
        found += (tl.load(pointer + tap * step, mask=mask, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return found


@triton.jit
def _scaled(values, factor, TAPS: tl.constexpr):
    found = ()
    for tap in tl.static_range(TAPS):
        found += (values[tap] * factor,)  # type: ignore[assignment]
    return found


@triton.jit
def _added(x, y, TAPS: tl.constexpr, BT: tl.constexpr):
    """The sum of x y over the taps, as a tree: BT is the power of two at or above TAPS."""
    level = ()
    for tap in tl.static_range(TAPS):
        level += (x[tap] * y[tap],)  # type: ignore[assignment]
    for step in tl.static_range(6):
        if BT >> (step + 1) > 0:
            pairs = ()
            for j in tl.static_range(BT >> (step + 1)):
                if j + (BT >> (step + 1)) < TAPS:
                    pairs += (level[j] + level[j + (BT >> (step + 1))],)  # type: ignore[assignment]
                elif j < TAPS:
                    pairs += (level[j],)  # type: ignore[assignment]
            level = pairs
    return level[0]  # type: ignore[misc]


@triton.jit
def _largest(values, TAPS: tl.constexpr):
    found = tl.abs(values[0])
    for tap in tl.static_range(1, TAPS):
        found = tl.maximum(found, tl.abs(values[tap]))
    return tl.max(found)


@triton.jit
def _stored(pointer, i_step, tap_step, values, channels, TAPS: tl.constexpr, SIDE_BY_SIDE: tl.constexpr,
            BI: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Write the taps, one after the other; or, where they lie side by side, joined to rows."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    i = tl.arange(0, BI)
    if SIDE_BY_SIDE:
        rows = ()
        for tap in tl.static_range(BT):
            rows += (values[tap if tap < TAPS else 0].to(dtype),)  # type: ignore[assignment]
        # A join adds a dimension behind all others: what is joined first is the highest bit of the tap.
        for level in tl.static_range(6):
            if BT >> (level + 1) > 0:
                pairs = ()
                for j in tl.static_range(BT >> (level + 1)):
                    pairs += (tl.join(rows[j], rows[j + (BT >> (level + 1))]),)  # type: ignore[assignment]
                rows = pairs
        tap_of = tl.arange(0, BT)[None, :]
        i = i[:, None]
        at = pointer + i * i_step + tap_of * tap_step
        joined = rows[0].reshape(BI, BT)  # type: ignore[misc]
        tl.store(at, joined, mask=(i < channels) & (tap_of < TAPS))
    else:
        for tap in tl.static_range(TAPS):
            tl.store(pointer + i * i_step + tap * tap_step, values[tap].to(dtype), mask=i < channels)


@triton.jit
def _modulate_kernel(
    weight,
    styles,
    out,
    kept_s,
    kept_d,
    energy,
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
    smallest,
    TAPS: tl.constexpr,
    STYLED: tl.constexpr,
    OWN: tl.constexpr,
    DEMODULATE: tl.constexpr,
    NORMALISE: tl.constexpr,
    KEEP: tl.constexpr,
    TINY_VALUE: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    """out [N, k, k, O, I]; programs (o, share of the samples).

    OWN: every sample has a weight of its own. STYLED: there are styles; else the weight is put in order, no more.
    NORMALISE: scales weights and styles to what float16 can hold; the demodulation cancels both factors again.
    KEEP: the factors, too: kept_s [N, I], none closer to zero than `smallest`, kept_d [N, O], energy [O, I].
    """
    o = tl.program_id(0)
    i = tl.arange(0, BI)
    inside = i < channels
    weight += o * w_o + i * w_i
    w = _loaded(weight, w_tap, inside & (not OWN), TAPS)
    if NORMALISE:
        w = _scaled(w, 1.0 / (tl.sqrt(fan_in) * tl.maximum(_largest(w, TAPS), TINY_VALUE)), TAPS)
    for n in range(tl.program_id(1), samples, tl.num_programs(1)):
        s = 1.0
        if STYLED:
            s = tl.load(styles + n * s_n + i * s_i, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            s = tl.where(tl.abs(s) < smallest, tl.where(s < 0, -smallest, smallest), s)
            if o == 0:
                tl.store(kept_s + n * channels + i, s, mask=inside)
        if NORMALISE:
            s *= 1.0 / tl.maximum(tl.max(tl.abs(s)), TINY_VALUE)
        if OWN:
            own = _loaded(weight + n * w_n, w_tap, inside, TAPS)
            if NORMALISE:
                own = _scaled(own, 1.0 / (tl.sqrt(fan_in) * tl.maximum(_largest(own, TAPS), TINY_VALUE)), TAPS)
        else:
            own = w
        product = _scaled(own, s, TAPS)
        outputs = tl.num_programs(0)
        if DEMODULATE:
            d = tl.rsqrt(tl.sum(_added(product, product, TAPS, BT)) + eps)
            product = _scaled(product, d, TAPS)
            if KEEP:
                tl.store(kept_d + n * outputs + o, d)
                if n == 0:
                    tl.store(energy + o * channels + i, _added(own, own, TAPS, BT), mask=inside)
        at = out + (n * TAPS * outputs + o) * channels
        _stored(at, 1, outputs * channels, product, channels, TAPS, False, BI, BT)


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
    STYLED: tl.constexpr,
    OWN: tl.constexpr,
    DEMODULATE: tl.constexpr,
    EPS_OF_SIZE: tl.constexpr,
    TINY_VALUE: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
):
    """dweight like weight, and styles_sums [N, O, I], the part of every o in the gradient of the styles. Programs (o).

    The gradient of the product w s is h = d dw - d^3 (sum of dw w s) w s; then dweight = sum over n of s h, and
    dstyles = sum over o and the taps of w h.
    EPS_OF_SIZE: eps is relative to the largest weight and style, which is what NORMALISE amounts to.
    """
    o = tl.program_id(0)
    i = tl.arange(0, BI)
    inside = i < channels
    weight += o * w_o + i * w_i
    dweight += o * d_o
    dw += o * dw_o + i * dw_i
    shared = _loaded(weight, w_tap, inside & (not OWN), TAPS)
    total = ()
    for _ in tl.static_range(TAPS):
        total += (tl.zeros((BI,), dtype=tl.float32),)  # type: ignore[assignment]
    for n in range(samples):
        grad = _loaded(dw + n * dw_n, dw_tap, inside, TAPS)
        s = 1.0
        if STYLED:
            s = tl.load(styles + n * s_n + i * s_i, mask=inside, other=0.0).to(tl.float32)
        if OWN:
            w = _loaded(weight + n * w_n, w_tap, inside, TAPS)
        else:
            w = shared
        if DEMODULATE:
            factor = eps
            if EPS_OF_SIZE:
                size = _largest(w, TAPS) * tl.max(tl.abs(s))
                factor = tl.maximum(eps * size * size, TINY_VALUE)
            product = _scaled(w, s, TAPS)
            d = tl.rsqrt(tl.sum(_added(product, product, TAPS, BT)) + factor)
            # In this order nothing overflows where the weights are zero.
            lost = d * tl.sum(_added(grad, product, TAPS, BT)) * d * d
            changed = ()
            for tap in tl.static_range(TAPS):
                changed += (d * grad[tap] - lost * product[tap],)  # type: ignore[assignment]
            grad = changed
        if STYLED:
            dstyle = _added(w, grad, TAPS, BT)
            tl.store(styles_sums + (n * tl.num_programs(0) + o) * channels + i, dstyle, mask=inside)
        if OWN:
            _stored(dweight + n * d_n, d_i, d_tap, _scaled(grad, s, TAPS), channels, TAPS, SIDE_BY_SIDE, BI, BT)
        else:
            added = ()
            for tap in tl.static_range(TAPS):
                added += (total[tap] + s * grad[tap],)  # type: ignore[assignment]
            total = added
    if not OWN:
        _stored(dweight, d_i, d_tap, total, channels, TAPS, SIDE_BY_SIDE, BI, BT)


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


def _warps(bi: int, taps: int, elements: int) -> int:
    """Of a program that holds a whole filter, about `elements` of it in each thread."""
    return min(max(2, triton.next_power_of_2(triton.cdiv(bi * taps, 32 * elements))), 32)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """(sample, o, i, tap) of [(N,) O, I, taps]; one weight for all samples has none for them."""
    return (0, *weight.stride()) if weight.ndim == 3 else weight.stride()


def modulate(
    weight: Tensor,
    styles: Tensor | None,
    demodulate: bool,
    eps: float,
    dtype: torch.dtype,
    kept: tuple[Tensor | None, ...] = (None, None, None),
    smallest: float = 0.0,
) -> Tensor:
    """weight * styles * d in dtype, computed in float32 and rounded once.

    Args:
        weight: [O, I, k, k], or [N, O, I, k, k] where every sample has its own; styles: [N, I]; float32, float16 or
            bfloat16, any strides. Without styles, and demodulation, the weight is put into dtype and order.
        eps: inside the root of the demodulation. For a result in float16 it counts relative to the largest weight and
            style, which is what normalising both first amounts to.
        kept, smallest: what `_factors.launch_factored` returns besides, to be written to.

    Returns:
        [N, O, I, k, k], in memory [N, k, k, O, I]; without styles [O, I, k, k], of a weight of four dimensions.
    """
    n = 1 if styles is None else styles.shape[0]
    o, i, k, _ = weight.shape[-4:]
    out = torch.empty([n, k, k, o, i], dtype=dtype, device=weight.device)
    flat = weight.flatten(-2)  # a view, unless the taps lie in a strange order
    bi = triton.next_power_of_2(i)
    # A filter is read once for all samples where there are filters enough to fill a GPU.
    _modulate_kernel[(o, n if o < 128 or weight.ndim == 5 else 1)](
        flat,
        styles,
        out,
        *kept,
        n,
        i,
        *_strides(flat),
        *((0, 0) if styles is None else styles.stride()),
        eps,
        float(i * k * k),
        smallest,
        TAPS=k * k,
        STYLED=styles is not None,
        OWN=weight.ndim == 5 or n == 1,
        DEMODULATE=demodulate,
        NORMALISE=demodulate and dtype == torch.float16,
        KEEP=kept[0] is not None,
        TINY_VALUE=TINY,
        BI=bi,
        BT=triton.next_power_of_2(k * k),
        num_warps=_warps(bi, k * k, FORWARD),
    )
    out = out.permute(0, 3, 4, 1, 2)
    return out[0] if styles is None else out


def modulate_backward(
    dw: Tensor, weight: Tensor, styles: Tensor | None, demodulate: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `modulate(weight, styles, demodulate, eps, dtype)` for its gradient dw.

    Where eps is relative to the largest weight and style, its own tiny gradient to these two is left out.

    Args:
        dw: [N, O, I, k, k], or without styles [O, I, k, k], any dtype of the above, any strides.

    Returns:
        (like weight, like styles), each in its dtype; sums in float32.
    """
    n = 1 if styles is None else styles.shape[0]
    dw = dw[None] if styles is None else dw
    o, i, k, _ = weight.shape[-4:]
    flat, dw = weight.flatten(-2), dw.flatten(3)
    dweight = torch.empty_like(flat)
    sums = None if styles is None else torch.empty([n, o, i], dtype=torch.float32, device=weight.device)
    relative = demodulate and dtype == torch.float16
    bi, bt = triton.next_power_of_2(i), triton.next_power_of_2(k * k)
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
        *((0, 0) if styles is None else styles.stride()),
        eps * i * k * k if relative else eps,
        TAPS=k * k,
        STYLED=styles is not None,
        OWN=weight.ndim == 5 or n == 1,
        DEMODULATE=demodulate,
        EPS_OF_SIZE=relative,
        TINY_VALUE=TINY,
        SIDE_BY_SIDE=k > 1 and dweight.stride(-1) == 1,
        BI=bi,
        BT=bt,
        num_warps=_warps(bi, k * k, BACKWARD),
        maxnreg=REGISTERS if n == 1 or weight.ndim == 5 else None,
    )
    dweight = dweight.unflatten(-1, (k, k))
    if styles is None:
        return dweight, None
    dstyles = torch.empty([n, i], dtype=styles.dtype, device=styles.device)
    columns = 8  # 32 bytes of each row
    rows = min(triton.next_power_of_2(o), 512)
    _add_rows[(triton.cdiv(i, columns), n)](sums, dstyles, o, i, BR=rows, BC=columns, num_warps=4)
    return dweight, dstyles

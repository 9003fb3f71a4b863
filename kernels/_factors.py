"""The weights of a modulated convolution with their factors, and the gradients to these by sums over images.

    made[n, o, i, :, :] = weight[o, i, :, :] * s[n, i] * d[n, o]
    ds[n, i] = sum over the pixels of x dx / s
    dd[n, o] = sum over the pixels of g c / d        (c: the convolution alone)

The way to dd is half gone when these kernels begin: `_act_backward`, which has g and the result in hand, leaves sums of
its programs. Each program here writes sums of its own, too, which a second, small kernel adds, always in the same
order; images of few pixels take one program for all of a channel's and no second kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._act_backward import ELEMENTS, WARPS, shares_of
from clone_fast.kernels._act_kernels import sum_of_rows
from clone_fast.kernels._dense import layout_of
from clone_fast.kernels._modulate import modulate

FEW_PIXELS = 1024  # of an image whose channels one program adds alone
FEW_CHANNELS, FEW_CHANNELS_APART = 16, 4  # that it adds, where channels are innermost and where pixels are
STEP = 8192  # elements that it reads at once
COLUMNS = 8  # channels that a program of a second pass adds: 32 bytes of each row, of ROWS rows at a time
ROWS = 512


@triton.jit
def _added_rows(sums, factor, out, block, rows, channels, BR: tl.constexpr, BC: tl.constexpr):
    """out[c] = (sum of sums[r, c] over r) / factor[c], for a block of channels."""
    line = sum_of_rows(sums, block, rows, channels, BR, BC)
    c = block * BC + tl.arange(0, BC)
    tl.store(out + c, line / tl.load(factor + c, mask=c < channels, other=1.0), mask=c < channels)


@triton.jit
def _factor_kernel(
    x,
    dx,
    s,
    sums,
    ds,
    dots,
    d,
    dd,
    channels,
    pixels,
    shares,
    blocks,
    dots_rows,
    outputs,
    CHANNELS_LAST: tl.constexpr,
    DIRECT: tl.constexpr,
    DEMODULATED: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
):
    """Programs (share of the pixels and block of channels, then one for every BO outputs; n).

    sums: [N, shares, channels], what `_add_factor` adds; where DIRECT the only share's are ds.
    """
    pid, n = tl.program_id(0), tl.program_id(1)
    if pid < shares * blocks:
        share = pid % shares
        block = pid // shares
        c = block * BC + tl.arange(0, BC)[None, :]
        total = tl.zeros((BP, BC), dtype=tl.float32)
        for start in range(share * BP, pixels, shares * BP):
            p = start + tl.arange(0, BP)[:, None]
            inside = (p < pixels) & (c < channels)
            if CHANNELS_LAST:
                at = (n * pixels + p) * channels + c
            else:
                at = (n * channels + c) * pixels + p
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            total += value * tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
        line = tl.sum(total, axis=0)
        c = block * BC + tl.arange(0, BC)
        if DIRECT:
            place = n * channels + c
            tl.store(ds + place, line / tl.load(s + place, mask=c < channels, other=1.0), mask=c < channels)
        else:
            tl.store(sums + (n * shares + share) * channels + c, line, mask=c < channels)
    elif DEMODULATED:
        first = n * outputs
        _added_rows(
            dots + first * dots_rows, d + first, dd + first, pid - shares * blocks, dots_rows, outputs, BR, BO
        )  # fmt: skip


@triton.jit
def _add_factor(sums, factor, out, rows, channels, BR: tl.constexpr, BC: tl.constexpr):
    """Programs (block of channels, n)."""
    at = tl.program_id(1) * channels
    _added_rows(sums + at * rows, factor + at, out + at, tl.program_id(0), rows, channels, BR, BC)


@triton.jit
def _factored_backward_kernel(
    ds, dd, s, d, energy, dstyles, channels, outputs, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """dstyles = ds - s * sum over o of dd d^3 energy. Programs (block of channels, n)."""
    n = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    total = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, outputs, BR):
        o = start + tl.arange(0, BR)[:, None]
        factor = tl.load(d + n * outputs + o, mask=o < outputs, other=0.0)
        lost = tl.load(dd + n * outputs + o, mask=o < outputs, other=0.0) * factor * factor * factor
        total += lost * tl.load(energy + o * channels + c, mask=(o < outputs) & (c < channels), other=0.0)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    at, inside = n * channels + c, c < channels
    value = tl.load(ds + at, mask=inside, other=0.0) - tl.load(s + at, mask=inside, other=0.0) * tl.sum(total, axis=0)
    tl.store(dstyles + at, value.to(dstyles.dtype.element_ty), mask=inside)


def launch_factored(
    weight: Tensor, styles: Tensor, demodulate: bool, eps: float, dtype: torch.dtype, smallest: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`modulate`, with what the weights are made of.

    Args:
        weight: [O, I, k, k]. styles: [N, I]. dtype: float32 or bfloat16.
        smallest: what styles closer to zero become, with their sign.

    Returns:
        made [N, O, I, k, k] in memory order [N, k, k, O, I]; in float32 s [N, I], d [N, O] and the energies [O, I], the
        sum of weight^2 over the taps. Without demodulation no d and no energies.
    """
    (n, i), o = styles.shape, weight.shape[0]
    shapes = ([n, i], [n, o] if demodulate else None, [o, i] if demodulate else None)
    s, d, energy = (
        None if shape is None else torch.empty(shape, dtype=torch.float32, device=weight.device) for shape in shapes
    )
    made = modulate(weight, styles, demodulate, eps, dtype, (s, d, energy), smallest)
    return made, s, d, energy  # type: ignore[return-value]  # there is an s


def launch_factor_gradients(
    x: Tensor, dx: Tensor, s: Tensor, dots: Tensor | None, d: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(ds, dd) in float32.

    Args:
        x, dx: [N, I, H, W], in any layout; the fastest is x's for both. s: [N, I], not zero anywhere.
        dots: of `launch_act_backward`, [N, any, O]. d: [N, O]. Without either there is no dd.
    """
    n, channels, height, width = x.shape
    pixels = height * width
    layout = layout_of(x)
    last = layout is torch.channels_last
    x, dx = x.contiguous(memory_format=layout), dx.contiguous(memory_format=layout)
    direct = pixels <= FEW_PIXELS
    if direct:
        bc = min(triton.next_power_of_2(channels), FEW_CHANNELS if last else FEW_CHANNELS_APART)
        bp = min(triton.next_power_of_2(pixels), STEP // bc)
    else:
        bc = min(triton.next_power_of_2(channels), 1024 if last else 8)
        bp = max(1, min(ELEMENTS // bc, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(channels, bc)
    shares = 1 if direct else shares_of(x.device, triton.cdiv(pixels, bp), n * blocks)
    ds = torch.empty([n, channels], dtype=torch.float32, device=x.device)
    sums = ds if direct else torch.empty([n, shares, channels], dtype=torch.float32, device=x.device)
    dd = None if dots is None or d is None else torch.empty_like(d)
    outputs, rows = (0, 1) if dots is None or dd is None else (dots.shape[2], dots.shape[1])
    _factor_kernel[(shares * blocks + triton.cdiv(outputs, COLUMNS), n)](
        x,
        dx,
        s,
        sums,
        ds,
        dots,
        d,
        dd,
        channels,
        pixels,
        shares,
        blocks,
        rows,
        outputs,
        CHANNELS_LAST=last,
        DIRECT=direct,
        DEMODULATED=dd is not None,
        BC=bc,
        BP=bp,
        BR=min(triton.next_power_of_2(rows), ROWS),
        BO=COLUMNS,
        num_warps=8 if bc * bp > 2 * ELEMENTS else WARPS,
    )
    if not direct:
        block = min(triton.next_power_of_2(shares), ROWS)
        grid = (triton.cdiv(channels, COLUMNS), n)
        _add_factor[grid](sums, s, ds, shares, channels, BR=block, BC=COLUMNS, num_warps=WARPS)
    return ds, dd


def launch_factored_backward(
    ds: Tensor, dd: Tensor, s: Tensor, d: Tensor, energy: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of the styles [N, I], in dtype, from those of the factors, ds [N, I] and dd [N, O].

    s, d, energy: as of `launch_factored`, with demodulation.
    """
    outputs, channels = energy.shape
    dstyles = torch.empty_like(s, dtype=dtype)
    block = min(triton.next_power_of_2(outputs), ROWS)
    _factored_backward_kernel[(triton.cdiv(channels, COLUMNS), len(s))](
        ds.contiguous(),
        dd.contiguous(),
        s,
        d,
        energy,
        dstyles,
        channels,
        outputs,
        BR=block,
        BC=COLUMNS,
        num_warps=WARPS,
    )
    return dstyles

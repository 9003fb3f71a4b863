"""minibatch_stddev in Triton: one launch each way.

Forward, the program of a sample and a feature copies that sample's channels and finds the feature of its whole group:
as often as the group has samples, but beside one another, and no launch has to wait for another. Backward, a program
has a block of channels and pixels in all samples of a group, and sums what came to the group's feature for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clone_fast.kernels._dense import dtype_reason, layout_of
from clone_fast.kernels._place import place

LARGEST_GROUP = 1024
TILE = 32768  # numbers of a group that a program holds at once, forward
BACKWARD_TILE = 2048  # and backward, where it is the blocks that fill the GPU
LARGEST_BLOCK = 4096  # of those, how many of one sample
EACH = 32  # numbers for each thread, in 16 warps up to twice as many


@triton.jit
def _deviations(value, there, G: tl.constexpr):
    """Values [GP, BLOCK] of a group's samples less their mean, zero where there are none; sqrt(variance + eps)."""
    value = tl.where(there, value.to(tl.float32), 0.0)
    centred = tl.where(there, value - (tl.sum(value, axis=0) / G)[None, :], 0.0)
    return centred, tl.sqrt_rn(tl.sum(centred * centred, axis=0) / G + 1e-8)


@triton.jit
def _forward_kernel(
    x, y, groups, features, channels, pixels, x_n, x_c, x_p, y_n, y_c, y_p,
    G: tl.constexpr, GP: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [N, C + F, P] from x [N, C, P]: one sample and one feature, of `channels` channels."""
    n = tl.program_id(0) // features
    f = tl.program_id(0) % features
    g = tl.arange(0, GP)[:, None]
    members = x + (n % groups + g * groups) * x_n
    count = channels * pixels
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        c, p = place(at, channels, pixels, INNER)
        c += f * channels
        there = (g < G) & inside[None, :]
        value = tl.load(members + (c * x_c + p * x_p)[None, :], mask=there, other=0.0)
        own = tl.load(x + n * x_n + c * x_c + p * x_p, mask=inside)
        tl.store(y + n * y_n + c * y_c + p * y_p, own, mask=inside)
        _, deviation = _deviations(value, there, G)
        total += tl.where(inside, deviation, 0.0)
    feature = tl.sum(total) / count
    at = y + n * y_n + (features * channels + f) * y_c
    for start in range(0, pixels, BLOCK):
        p = start + tl.arange(0, BLOCK)
        tl.store(at + p * y_p, tl.zeros([BLOCK], tl.float32) + feature, mask=p < pixels)


@triton.jit
def _backward_kernel(
    dy, x, dx, groups, features, channels, pixels, dy_n, dy_c, dy_p, x_n, x_c, x_p, dx_n, dx_c, dx_p,
    G: tl.constexpr, GP: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """dx [N, C, P] from dy [N, C + F, P]: a block of one feature's channels and pixels, in all samples of a group."""
    count = channels * pixels
    blocks = tl.cdiv(count, BLOCK)
    m = tl.program_id(0) // blocks // features
    f = tl.program_id(0) // blocks % features
    g = tl.arange(0, GP)[:, None]
    n = m + g * groups
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    c, p = place(at, channels, pixels, INNER)
    c += f * channels
    there = (g < G) & (at < count)[None, :]
    value = tl.load(x + n * x_n + (c * x_c + p * x_p)[None, :], mask=there, other=0.0)
    straight = tl.load(dy + n * dy_n + (c * dy_c + p * dy_p)[None, :], mask=there, other=0.0).to(tl.float32)
    came = tl.zeros([GP, PIXELS], tl.float32)
    for start in range(0, pixels, PIXELS):
        q = start + tl.arange(0, PIXELS)[None, :]
        mine = dy + n * dy_n + (features * channels + f) * dy_c + q * dy_p
        came += tl.load(mine, mask=(g < G) & (q < pixels), other=0.0).to(tl.float32)
    slope = tl.sum(tl.sum(came, axis=1), axis=0) / count / G
    centred, deviation = _deviations(value, there, G)
    result = straight + centred * (slope / deviation)[None, :]
    tl.store(dx + n * dx_n + (c * dx_c + p * dx_p)[None, :], result, mask=there)


def supports(x: Tensor, group: int, num_channels: int) -> str | None:
    """None: the call can run; otherwise the reason why not."""
    if group > LARGEST_GROUP:
        return f"groups of up to {LARGEST_GROUP} samples, got {group}"
    return dtype_reason(x)


def _pixels(x: Tensor) -> Tensor:
    """x [N, C, H, W] as [N, C, H * W], a copy where rows do not follow one another or 32 bits do not reach its end."""
    if sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) >= 2**31:
        x = x.contiguous()
    return x.flatten(2)


def _options(x: Tensor, group: int, count: int, tile: int) -> dict[str, int | bool]:
    """The shape of a program's tile and its threads. count: numbers of one feature in a sample."""
    members = triton.next_power_of_2(group)
    block = min(triton.next_power_of_2(count), max(tile // members, 1), LARGEST_BLOCK)
    inner = layout_of(x) is torch.channels_last
    warps = min(max(members * block // (32 * EACH), 4), 16)
    return {"G": group, "GP": members, "INNER": inner, "BLOCK": block, "num_warps": warps}


def launch(x: Tensor, group: int, num_channels: int) -> Tensor:
    """[N, C + F, H, W] in x's dtype and layout: x, and each feature of sample n's group, n mod (N / group)."""
    n, c, h, w = x.shape
    y = torch.empty([n, c + num_channels, h, w], dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    channels, flat, out = c // num_channels, _pixels(x), y.flatten(2)
    _forward_kernel[(n * num_channels,)](
        flat, out, n // group, num_channels, channels, h * w, *flat.stride(), *out.stride(),
        **_options(x, group, channels * h * w, TILE),
    )  # fmt: skip
    return y


def launch_backward(dy: Tensor, x: Tensor, group: int, num_channels: int) -> Tensor:
    """dx in x's dtype and layout, from dy [N, C + F, H, W] in any layout."""
    n, c, h, w = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    channels, came, flat, out = c // num_channels, _pixels(dy), _pixels(x), dx.flatten(2)
    options = _options(x, group, channels * h * w, BACKWARD_TILE)
    programs = n // group * num_channels * triton.cdiv(channels * h * w, options["BLOCK"])
    _backward_kernel[(programs,)](
        came, flat, out, n // group, num_channels, channels, h * w, *came.stride(), *flat.stride(), *out.stride(),
        PIXELS=min(triton.next_power_of_2(h * w), 64), **options,
    )  # fmt: skip
    return dx

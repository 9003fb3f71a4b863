"""What stands between the gradient of a modulated convolution's result and that of its convolution, in one pass.

With y = clamp(gain * act(z)) and z = conv + strength * noise + bias, it turns dy into g = dz and adds g up: over the
pixels for the bias, over the channels for the noise, over both for the noise's strength. The mask is read off y. Each
program writes sums of its own; a second, small kernel adds these, always in the same order, and is launched by itself:
nothing but an optimiser waits for it. Where asked it adds up g conv, too, over the pixels of each sample: `_factors`
adds those programs' sums.

Where an image of few channels is drawn of y by a 1x1 kernel w (ToRGB), and dimage is its gradient, dy + w^T dimage
takes the place of dy, and the sums of dimage y to w, and of dimage to a bias, go along: y is read once for all of it,
and the gradient that w sends back is never in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from clone_fast.kernels._act_kernels import _act_backward_kernel, _add_sums
from clone_fast.kernels._dense import SLOPES, dtype_reason, layout_of, rounded
from clone_fast.kernels._device import multiprocessors

ELEMENTS = 2048  # of a tile
ELEMENTS_DRAWN = 1024  # where it has three sums more
ADDED = 512  # of a step of the second pass
WARPS = 4
PROGRAMS_PER_SM = 8
PROGRAMS_WITH_DOTS = 5  # whose registers leave room for no more
PROGRAMS_DRAWN = 8
STAGES_DRAWN = 3  # tiles under way: what a thread reads at once is not enough to hide the memory's latency
FEW = 4  # channels, at most, of the image
LONGEST = 32  # tiles that a program adds of float32 images: the error of a sum grows with its length
TILES = 4  # of a program at least where the GPU is full, so that few sums are left for the second pass
COLUMNS = 8  # channels that a program of the second pass adds: 32 bytes of each row, of ROWS rows at a time
ROWS = 1024


def supports_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> str | None:
    """None where `launch_act_backward` can run, else the reason why not."""
    if act not in SLOPES:
        return f"only {', '.join(SLOPES)} are fused, got {act!r}"
    if gain <= 0:
        return f"gain must be positive to read the activation's sign off its result, got {gain}"
    return dtype_reason(dy) or dtype_reason(y)


def shares_of(device: torch.device, tiles: int, blocks: int, programs: int = PROGRAMS_PER_SM) -> int:
    """How many programs of the first pass share the tiles: as many as a GPU holds, fewer where that leaves them little.

    Yet one for each processor if there are tiles enough; and all have as many tiles, but for the last.
    """
    count = multiprocessors(device)
    shares = min(max(tiles // TILES, triton.cdiv(count, blocks)), max(1, programs * count // blocks), tiles)
    return triton.cdiv(tiles, triton.cdiv(tiles, shares))


def launch_act_backward(
    dy: Tensor,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None = None,
    want_dots: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """g, the programs' sums for the noise, its strength and the bias, and the dots; what is not wanted is None.

    Args:
        dy, y: [N, C, H, W], the gradient of the result and the result, in any layout; the fastest is y's for both.
        noise: [H, W], [1, 1, H, W] or [N, 1, H, W]. noise_strength: scalar, or None for 1.
        act: "linear", "relu" or "lrelu" (slope 0.2). gain: positive. clamp: of the result, or None.
        bias: [C], what z contains of it; for the dots alone.

    Returns:
        g in dy's dtype and y's layout: dy itself where its factor is 1 everywhere. The sums [any times the noise's
        elements], [any] and [any, C] in float32, of g before it is rounded: what `launch_act_sums` adds; the gradient
        of the noise itself, where there is nothing to add. dots [N, any, C] in float32, which added up over the middle
        are the sums of g conv over the pixels.
    """
    given = (noise, noise_strength, bias, act, gain, clamp, want_noise, want_strength, want_bias, want_dots)
    return _launch(dy, y, *given, None)[:5]


class Drawn(NamedTuple):
    """The image drawn of a result, see `launch_drawn_act_backward`."""

    dimage: Tensor
    weight: Tensor
    image: Tensor | None
    clamp: float | None
    want_weight: bool
    want_bias: bool


def supports_drawn_act_backward(
    dy: Tensor | None,
    dimage: Tensor,
    y: Tensor,
    image_weight: Tensor,
    image: Tensor | None,
    image_clamp: float | None,
    *rest: object,
) -> str | None:
    """None where `launch_drawn_act_backward` can run, else the reason why not."""
    few, channels, k = image_weight.shape[-4:-1]
    if k != 1 or few > FEW or few >= channels:
        return f"only images of up to {FEW} channels by a 1x1 kernel from more, got {few} of {channels} by {k}x{k}"
    reason = dtype_reason(dimage) or dtype_reason(image_weight)
    return reason or supports_act_backward(y if dy is None else dy, y, *rest[:8])  # type: ignore[arg-type]


def launch_drawn_act_backward(
    dy: Tensor | None,
    dimage: Tensor,
    y: Tensor,
    image_weight: Tensor,
    image: Tensor | None,
    image_clamp: float | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    bias: Tensor | None,
    want_dots: bool,
    want_image_weight: bool,
    want_image_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`launch_act_backward` where conv(y, image_weight) + bias is an image, whose gradient goes along.

    Args:
        dy: [N, C, H, W], None for zeros: without what comes through the image.
        dimage: [N, F, H, W], the gradient of the image, in any layout and floating dtype; F is at most FEW.
        image_weight: [F, C, 1, 1], or [N, F, C, 1, 1], every sample's own, in any memory order.
        image, image_clamp: where |image| [N, F, H, W] is not below the clamp, dimage counts as 0; None for no clamp.

    Returns:
        What `launch_act_backward` does, g in y's dtype where there is no dy, and the programs' sums in float32 to
        image_weight [any, F C], which `launch_pointwise_sums` adds, and to a bias of the image [any, F], which
        `launch_act_sums` does; None where not wanted.
    """
    drawn = Drawn(dimage, image_weight, image, image_clamp, want_image_weight, want_image_bias)
    wanted = (want_noise, want_strength, want_bias, want_dots)
    return _launch(dy, y, noise, noise_strength, bias, act, gain, clamp, *wanted, drawn)


def _launch(
    dy: Tensor | None,
    y: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    want_noise: bool,
    want_strength: bool,
    want_bias: bool,
    want_dots: bool,
    drawn: Drawn | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    n, channels, height, width = y.shape
    pixels = height * width
    layout = layout_of(y)
    last = layout is torch.channels_last
    y, dy = y.contiguous(memory_format=layout), None if dy is None else dy.contiguous(memory_format=layout)
    changes = drawn is not None or act != "linear" or clamp is not None or gain != 1.0
    g = torch.empty_like(y if dy is None else dy) if dy is None or changes else dy
    if noise is None:
        want_noise = want_strength = False
    if not (changes or want_noise or want_strength or want_bias or want_dots):
        return g, None, None, None, None, None, None

    # Channels last: all channels of some pixels. Else few channels of many pixels, more where they are to be added.
    bc = min(triton.next_power_of_2(channels), 1024 if last else 32 if want_noise else 8)
    elements = ELEMENTS if drawn is None else ELEMENTS_DRAWN
    bp = max(1, min(elements // bc, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(channels, bc)
    tiles_p = triton.cdiv(pixels, bp)
    tiles = tiles_p * n
    if drawn is not None:
        shares = shares_of(y.device, tiles_p, n * blocks, PROGRAMS_WITH_DOTS if want_dots else PROGRAMS_DRAWN)
        if y.dtype == torch.float32:
            shares = max(shares, triton.cdiv(tiles_p, LONGEST))
        shares *= n
    elif want_dots:
        shares = n * shares_of(y.device, tiles_p, n * blocks, PROGRAMS_WITH_DOTS)
    else:
        shares = shares_of(y.device, tiles, blocks)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=y.device)

    samples = 1 if noise is None else noise.numel() // pixels
    direct = samples == n and blocks == 1
    bias_sums = sums(shares, channels) if want_bias else None
    strength_sums = sums(blocks * shares) if want_strength else None
    noise_sums = None
    if want_noise and noise is not None:
        noise_sums = noise.new_empty(noise.shape) if direct else sums(blocks * n * pixels)
    dots = sums(n, shares // n, channels) if want_dots else None
    exact = None if clamp is None else rounded(clamp, y.dtype)
    few, w, dimage, image, limit, w_sums, dimage_sums = 0, None, None, None, 0.0, None, None
    if drawn is not None:
        few, w = drawn.weight.shape[-4], drawn.weight
        if drawn.image is not None and drawn.clamp is not None:
            image, limit = drawn.image.contiguous(memory_format=layout_of(drawn.image)), rounded(drawn.clamp, y.dtype)
        dimage = drawn.dimage.contiguous(memory_format=layout_of(drawn.dimage))
        w_sums = sums(shares, few * channels) if drawn.want_weight else None
        dimage_sums = sums(shares, few) if drawn.want_bias else None
    _act_backward_kernel[(shares, blocks)](
        dy,
        y,
        None if noise is None else noise.contiguous(),
        noise_strength,
        None if bias is None else bias.contiguous(),
        g,
        bias_sums,
        noise_sums,
        strength_sums,
        dots,
        dimage,
        image,
        w,
        w_sums,
        dimage_sums,
        channels,
        pixels,
        tiles_p,
        tiles,
        samples,
        w.stride(0) if w is not None and w.ndim == 5 else 0,
        0 if w is None else w.stride(-3),
        0 if w is None else w.stride(-4),
        gain,
        exact or 0.0,
        limit,
        SLOPE=SLOPES[act],
        CLAMP=clamp is not None,
        GRADIENT=changes,
        CHANNELS_LAST=last,
        DIRECT=direct,
        SCALED=noise_strength is not None,
        NOISY=noise is not None,
        BIASED=bias is not None,
        WANT_NOISE=want_noise,
        WANT_STRENGTH=want_strength,
        WANT_BIAS=want_bias,
        WANT_DOTS=want_dots,
        HAS_DY=dy is not None,
        FEW=few,
        FEW_LAST=dimage is not None and layout_of(dimage) is torch.channels_last,
        DRAWN_LAST=image is not None and layout_of(image) is torch.channels_last,
        LIMITED=image is not None,
        WANT_W=w_sums is not None,
        WANT_DIMAGE=dimage_sums is not None,
        BC=bc,
        BP=bp,
        STAGES=1 if drawn is None else STAGES_DRAWN,
        num_warps=WARPS,
    )
    return g, noise_sums, strength_sums, bias_sums, dots, w_sums, dimage_sums


def launch_act_sums(
    noise_sums: Tensor | None,
    strength_sums: Tensor | None,
    bias_sums: Tensor | None,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dnoise, dstrength, dbias) of the sums that `launch_act_backward` left; None for those that it did not.

    Returns:
        dnoise in noise's shape and dtype, dstrength [] and dbias [C] in the dtype given, rounded once.
    """
    some = next((sums for sums in (noise_sums, strength_sums, bias_sums) if sums is not None), None)
    if some is None:
        return None, None, None
    shares, channels = (0, 0) if bias_sums is None else bias_sums.shape
    dbias = None if bias_sums is None else some.new_empty([channels], dtype=dtype)
    dstrength = None if strength_sums is None else some.new_empty([], dtype=dtype)
    dnoise, parts, size = noise_sums, 0, 0
    if noise is not None and noise_sums is not None and noise_sums.ndim == 1:
        dnoise, size = some.new_empty(noise.shape, dtype=noise.dtype), noise.numel()
        parts = noise_sums.numel() // size
    programs = triton.cdiv(channels, COLUMNS) + (strength_sums is not None) + triton.cdiv(size, ADDED)
    if programs:
        _add_sums[(programs,)](
            bias_sums,
            dbias,
            strength_sums,
            dstrength,
            noise_sums if parts else None,
            dnoise if parts else None,
            noise_strength,
            channels,
            shares,
            0 if strength_sums is None else strength_sums.numel(),
            parts,
            size,
            SCALED=noise_strength is not None,
            WANT_STRENGTH=strength_sums is not None,
            ADD_NOISE=parts > 0,
            WANT_BIAS=bias_sums is not None,
            BLOCK=ADDED,
            BR=min(triton.next_power_of_2(max(1, shares)), ROWS),
            BC=COLUMNS,
            num_warps=WARPS,
        )
    return dnoise, dstrength, dbias

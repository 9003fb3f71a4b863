"""The way back through a 1x1 convolution of few channels on one side, images as a rule: fromRGB and toRGB, in one pass.

    g[n, o] = dy * gain * slope                   0 where |y| >= clamp; float32, and never in memory
    dx[n, i] = sum over o of w[n, o, i] * g[n, o]
    dw[n, o, i] = sum over the pixels of g[n, o] * x[n, i]
    dbias[o] = sum over n and the pixels of g[n, o]

The image of many channels is read once, and the time is that of its bytes; tensor cores would have nothing to multiply.
Products are float32 in full whatever the dtype. Each program writes sums of its own, which small kernels add, always in
the same order, and are launched by themselves: the layers before wait for dx, and nothing but an optimiser for the
rest. Few pixels take one program for all of a channel's, and leave nothing to be added.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clone_fast.kernels._act_backward import COLUMNS, FEW, LONGEST, ROWS, shares_of, supports_act_backward
from clone_fast.kernels._dense import SLOPES, layout_of, rounded
from clone_fast.kernels._pointwise_kernels import add_shares, few_inputs_kernel, few_outputs_kernel

WHOLE = 1024  # channels, at most, of a block that has to hold all of them
PIXELS = 2**25  # of an image, at most: within a tile offsets have 32 bits
ELEMENTS = 1024  # of a tile: 16 bytes of half precision for each thread
BLOCK = 64  # channels of a tile: 128 bytes of half precision
BLOCK_APART = 32  # where pixels are innermost, and whose tile may hold all channels there
WARPS = 4
STAGES = 3  # tiles under way: what a thread reads at once is not enough to hide the memory's latency
PROGRAMS_PER_SM = 16
FEW_TILES = 4  # that one program adds alone


def supports_pointwise_backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_dx: bool,
    want_dw: bool,
    want_bias: bool,
) -> str | None:
    """None where `launch_pointwise_backward` can run, else the reason why not."""
    outputs, inputs, k = weight.shape[-4:-1]
    if k != 1:
        return f"only 1x1 kernels, got {k}x{k}"
    if min(outputs, inputs) > FEW:
        return f"only up to {FEW} channels on one side, got {inputs} and {outputs}"
    if inputs <= outputs and want_dx and outputs > WHOLE:
        return f"the sum over the outputs goes up to {WHOLE} channels, got {outputs}"
    if x.shape[2] * x.shape[3] > PIXELS:
        return f"only up to {PIXELS} pixels, got {list(x.shape[2:])}"
    if not (want_dx or want_dw):
        return "without dx and dw act_backward is all that there is to do"
    if not dy.dtype == y.dtype == x.dtype == weight.dtype:
        return f"all must have one dtype, got {dy.dtype}, {y.dtype}, {x.dtype} and {weight.dtype}"
    return supports_act_backward(dy, y, None, None, act, gain, clamp, False, False, want_bias)


def launch_pointwise_backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    gain: float,
    clamp: float | None,
    want_dx: bool,
    want_dw: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, dbias) of y = clamp(gain * act(conv(x, weight) + ...)), 1x1, or sums; what is not wanted is None.

    Args:
        dy, y: [N, O, H, W], the gradient of the result and the result; x: [N, I, H, W]; in any layout.
        weight: [O, I, 1, 1], or [N, O, I, 1, 1], every sample's own, in any memory order; I or O is at most FEW.
        act: "linear", "relu" or "lrelu" (slope 0.2). gain: positive. clamp: of the result, or None.

    Returns:
        dx in x's layout. dw like the weight and contiguous, and dbias [O]; where programs share their pixels these
        programs' sums in float32: [any, elements of one weight], which `launch_pointwise_sums` adds, and [any, O],
        which `launch_act_sums` does. Sums are float32, and rounded once.
    """
    outputs, inputs = weight.shape[-4:-2]
    n, _, height, width = x.shape
    pixels = height * width
    few_inputs = inputs <= outputs
    few, channels = (inputs, outputs) if few_inputs else (outputs, inputs)
    whole = few_inputs and want_dx
    layout_y, layout_x = layout_of(y), layout_of(x)
    if whole and channels > BLOCK:
        layout_y = torch.channels_last  # or a tile of all channels has a pixel or two
    # The few outputs are read column by column, in any layout: a copy of an image's gradient would be a pass more.
    layout_dy = layout_y if few_inputs else layout_of(dy)
    dy = dy.contiguous(memory_format=layout_dy)
    if act == "linear" and clamp is None:
        y, layout_y = dy, layout_dy
    else:
        y = y.contiguous(memory_format=layout_y)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_x) if want_dx else None
    x = x.contiguous(memory_format=layout_x) if want_dw else x

    last = (layout_y if few_inputs else layout_x) is torch.channels_last
    images = n
    if weight.ndim == 4 and layout_dy is layout_y is layout_x is torch.channels_last and n * pixels < 2**30:
        images, pixels = 1, n * pixels  # of one weight, one after the other
    weights = n if weight.ndim == 5 else 1
    bc = triton.next_power_of_2(channels)
    bc = bc if whole else min(bc, BLOCK if last else BLOCK_APART)
    bp = max(1, min(ELEMENTS // bc, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(channels, bc)
    shares = _shares(x, triton.cdiv(pixels, bp), images, blocks)
    programs = images * shares
    columns = few * channels
    add_dw, add_bias = programs > weights, programs > 1

    def sums(columns: int) -> Tensor:
        return torch.empty([programs, columns], dtype=torch.float32, device=x.device)

    dw = dbias = None
    if want_dw:
        dw = sums(columns) if add_dw else torch.empty_like(weight, memory_format=torch.contiguous_format)
    if want_bias:
        dbias = sums(outputs) if add_bias else y.new_empty([outputs])
    kernel = few_inputs_kernel if few_inputs else few_outputs_kernel
    kernel[(programs, blocks)](
        dy,
        y,
        x,
        weight,
        dx,
        dw,
        dbias,
        channels,
        pixels,
        shares,
        weight.stride(0) if weight.ndim == 5 else 0,
        weight.stride(-4 if few_inputs else -3),
        weight.stride(-3 if few_inputs else -4),
        columns,
        *((1, channels) if add_dw else _place(weight)),
        gain,
        0.0 if clamp is None else rounded(clamp, y.dtype),
        FEW=few,
        SLOPE=SLOPES[act],
        CLAMP=clamp is not None,
        WIDE_LAST=last,
        FEW_LAST=(layout_x if few_inputs else layout_y) is torch.channels_last,
        WANT_DX=want_dx,
        WANT_DW=want_dw,
        WANT_BIAS=want_bias,
        BC=bc,
        BP=bp,
        LANES=min(32, max(triton.next_power_of_2(few), bc * x.element_size() // 16)),
        STAGES=STAGES,
        num_warps=WARPS,
        **({} if few_inputs else {"DY_LAST": layout_dy is torch.channels_last}),
    )
    return dx, dw, dbias


def launch_pointwise_sums(sums: Tensor, weight: Tensor) -> Tensor:
    """dw of the programs' sums that `launch_pointwise_backward` left of this weight, like it and contiguous."""
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    programs, columns = sums.shape
    weights = dw.numel() // columns
    shares = programs // weights
    add_shares[(triton.cdiv(columns, COLUMNS), weights)](
        sums,
        dw,
        max(weight.shape[-4:-2]),
        columns,
        shares,
        *_place(weight),
        BR=min(triton.next_power_of_2(shares), ROWS),
        BC=COLUMNS,
        num_warps=WARPS,
    )
    return dw


def _place(weight: Tensor) -> tuple[int, int]:
    """Strides of the many channels and of the few in a contiguous weight."""
    outputs, inputs = weight.shape[-4:-2]
    return (inputs, 1) if inputs <= outputs else (1, inputs)


def _shares(x: Tensor, tiles: int, images: int, blocks: int) -> int:
    """How many programs share the tiles of an image and block of channels."""
    if tiles <= FEW_TILES:
        return 1
    shares = shares_of(x.device, tiles, images * blocks, PROGRAMS_PER_SM)
    longest = LONGEST if x.dtype == torch.float32 else tiles
    return max(shares, triton.cdiv(tiles, longest))

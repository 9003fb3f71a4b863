"""modulated_conv2d with up=2 or down=2 in CUDA C++: the convolution, the filter and all that follows in one kernel."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast._compiler import constant_result
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, epilogue_reason, on_16_bytes, pointer, stream
from clone_fast.cuda.modulated_conv2d import _in_layout_of, _number
from clone_fast.kernels._dense import SLOPES

COMPUTE_CAPABILITY = (9, 0)  # the only one; its instructions are in no other
CHANNELS = 16  # their numbers are multiples of it
IN_CHANNELS = 64  # at most, for up=2: with more, the convolution and the filter in two kernels are faster
DOWN_IN_CHANNELS = (32, 64)
DOWN_OUT_CHANNELS = 128  # at most: every 64 of them filter again
KEPT_IN_CHANNELS = 32  # at most: with 64 a block has one team, and to store what it filters doubles its time


def supports(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor | None,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
) -> str | None:
    """None where `launch` can run, else the reason why not."""
    if (up, down) not in ((2, 1), (1, 2)):
        return f"no kernel for up={up}, down={down}"
    reason = epilogue_reason(act, gain)
    if reason:
        return reason
    if resample_filter is None or any(size != 4 for size in resample_filter.shape):
        return "the filter must be [4, 4] or [4]"
    if resample_filter.dtype != torch.float32:
        return "the filter must be float32"
    if x.dtype == torch.float32:
        return "no kernel for float32"
    return dtype_reason(x) or _weight_reason(weight, down) or _device_reason(x.device.index)


def _weight_reason(weight: Tensor, down: int) -> str | None:
    out_channels, in_channels, k = weight.shape[-4], weight.shape[-3], weight.shape[-1]
    if k != 3:
        return f"a 3x3 kernel, not {k}x{k}"
    if out_channels % CHANNELS or in_channels % CHANNELS:
        return f"channels must be multiples of {CHANNELS}, got {out_channels} and {in_channels}"
    if down == 2:
        if in_channels in DOWN_IN_CHANNELS and out_channels <= DOWN_OUT_CHANNELS:
            return None
        return f"32 or 64 input and at most {DOWN_OUT_CHANNELS} output channels, not {in_channels} and {out_channels}"
    if in_channels > IN_CHANNELS:
        return f"at most {IN_CHANNELS} input channels, not {in_channels}"
    return None


@constant_result
def _device_reason(device: int) -> str | None:
    """A compiler does not ask devices."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != COMPUTE_CAPABILITY:
        return f"needs compute capability 9.0, this device has {major}.{minor}"
    return None


def launch(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """y [N, O, H * up / down, W * up / down] of x [N, I, H, W] and finished weights [O, I, 3, 3] or [N, O, I, 3, 3].

    y = clamp(gain * act(conv + noise * noise_strength + bias)), in x's dtype and layout, summed in float32. What lies
    between the convolution and the filter is rounded to x's dtype, as is the result. A NaN or an infinity spreads to
    the whole 4 x 4 filtered pixels of which it would reach one.
    """
    return _launched(
        False, x, weight, noise, noise_strength, bias, resample_filter, up, down, act, gain, clamp
    )[0]


def supports_kept(*args: Any) -> str | None:
    """None where `launch_kept` should run, else the reason why not."""
    if args[7] != 2:
        return "only what is filtered before the convolution can be kept"
    if args[1].shape[-3] > KEPT_IN_CHANNELS:
        return f"with more than {KEPT_IN_CHANNELS} input channels a filter and a convolution are faster"
    return supports(*args)


def launch_kept(*args: Any) -> tuple[Tensor, Tensor]:
    """With the arguments of `launch`, down=2: y, and x filtered [N, I, H + 1, W + 1], which the convolution reads.

    That is upfirdn2d's result, rounded to x's dtype, in x's layout.
    """
    y, filtered = _launched(True, *args)
    assert filtered is not None  # for the type checker
    return y, filtered


def _launched(
    keep_filtered: bool,
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor,
    up: int,
    down: int,
    act: str,
    gain: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor | None]:
    n, in_channels, height, width = x.shape
    out_channels, size = weight.shape[-4], (height * up // down, width * up // down)
    dense = dense_pixels(x)
    # [.., 3, 3, O, I]: modulate's own order
    taps = on_16_bytes(weight.to(x.dtype).movedim((-2, -1), (-4, -3)).contiguous())
    noise, noise_strength, bias = (_number(value, x) for value in (noise, noise_strength, bias))
    resample_filter = resample_filter.contiguous()
    y = torch.empty([n, out_channels, *size], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    filtered = None
    if keep_filtered:
        size_of_it = [n, in_channels, height + 1, width + 1]
        filtered = torch.empty(size_of_it, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    op = _C.ResampledConv(
        dtype=DTYPES[x.dtype],
        n=n,
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        x=dense.data_ptr(),
        weight=taps.data_ptr(),
        y=y.data_ptr(),
        filter=resample_filter.data_ptr(),
        noise=pointer(noise),
        strength=pointer(noise_strength),
        bias=pointer(bias),
        weight_stride=taps.stride(0) if taps.ndim == 5 and n > 1 else 0,
        noise_stride=size[0] * size[1] if noise is not None and noise.ndim == 4 and noise.shape[0] > 1 else 0,
        filter_rank=resample_filter.ndim,
        floats=tuple(value is not None and value.dtype == torch.float32 for value in (noise, noise_strength, bias)),
        gain=gain,
        slope=SLOPES[act],
        clamp=inf if clamp is None else clamp,
        filtered=pointer(filtered),
    )
    run = _C.resampled_conv_up if up == 2 else _C.resampled_conv_down
    run(op, stream(x))
    return _in_layout_of(y, x), None if filtered is None else _in_layout_of(filtered, x)

"""modulated_conv2d in CUDA C++: the 3x3 convolution of at most 64 channels, everything fused, with the 1x1 convolution
to the image where one follows, and its weight gradient.

The steps are those of `clone_fast.kernels.modulated_conv2d`; what is missing here, or is refused with a reason, runs
there. What follows a convolution lies, on the way back, in `_act_backward.py`, resampling by 2 in `_resampled_conv.py`,
its convolutions of stride 2 alone in `_strided_conv.py`, the filter behind these in `_finish.py`, what begins the
gradient of an upsampling one in `_act_fir.py`, what ends that of a downsampling one in `_fir_act.py`, and the 1x1
convolution of an image, with its result at half the size, in `_branch.py`, the way back there in `_branch_backward.py`.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from clone_fast import _C
from clone_fast._compiler import constant_result
from clone_fast.cuda import DTYPES, dense_pixels, dtype_reason, epilogue_reason, pointer, stream
from clone_fast.cuda._act_backward import (
    launch_act_backward,
    launch_drawn_act_backward,
    supports_act_backward,
    supports_drawn_act_backward,
)
from clone_fast.cuda._act_fir import launch_act_fir, supports_act_fir
from clone_fast.cuda._branch import launch_branch, supports_branch
from clone_fast.cuda._branch_backward import launch_branch_backward, supports_branch_backward
from clone_fast.cuda._finish import composes, launch_finish, supports_finish
from clone_fast.cuda._fir_act import launch_fir_act, supports_fir_act
from clone_fast.cuda._strided_conv import (
    launch_dgrad_weight,
    launch_strided,
    supports_dgrad_weight,
    supports_strided,
)
from clone_fast.kernels._dense import SLOPES, layout_of

__all__ = [
    "composes",
    "launch",
    "launch_act_backward",
    "launch_act_fir",
    "launch_branch",
    "launch_branch_backward",
    "launch_conv",
    "launch_dgrad_weight",
    "launch_drawn",
    "launch_drawn_act_backward",
    "launch_finish",
    "launch_fir_act",
    "launch_kept",
    "launch_wgrad",
    "supports",
    "supports_act_backward",
    "supports_act_fir",
    "supports_branch",
    "supports_branch_backward",
    "supports_conv",
    "supports_dgrad_weight",
    "supports_drawn",
    "supports_drawn_act_backward",
    "supports_finish",
    "supports_fir_act",
    "supports_kept",
    "supports_wgrad",
]

CHANNELS = 64  # at most
DRAWN_CHANNELS = 4  # at most


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
    if (up, down) != (1, 1):
        from clone_fast.cuda import _resampled_conv  # which takes its helpers from here

        return _resampled_conv.supports(
            x, weight, noise, noise_strength, bias, resample_filter, up, down, act, gain, clamp
        )
    reason = epilogue_reason(act, gain)
    if reason:
        return reason
    return supports_conv(x, weight, 1, weight.shape[-1] // 2, False)


def launch(
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
) -> Tensor:
    """The convolution of x [N, I, H, W] with finished weights [O, I, 3, 3] or [N, O, I, 3, 3] and all that follows it.

    y = clamp(gain * act(conv + noise * noise_strength + bias)), in x's dtype and layout, summed in float32 and rounded
    once.
    """
    if (up, down) != (1, 1):
        from clone_fast.cuda import _resampled_conv  # which takes its helpers from here

        if resample_filter is None:
            raise ValueError(f"modulated_conv2d: resample_filter is needed for up={up}, down={down}, got None")
        return _resampled_conv.launch(
            x, weight, noise, noise_strength, bias, resample_filter, up, down, act, gain, clamp
        )
    return _conv3x3(x, weight, False, noise, noise_strength, bias, SLOPES[act], gain, clamp)


def supports_kept(*args: Any) -> str | None:
    """None where `launch_kept` can run, else the reason why not."""
    from clone_fast.cuda import _resampled_conv  # as above

    return _resampled_conv.supports_kept(*args)


def launch_kept(*args: Any) -> tuple[Tensor, Tensor]:
    """With the arguments of `launch`, down=2: its result, and what the convolution reads, x filtered."""
    from clone_fast.cuda import _resampled_conv  # as above

    return _resampled_conv.launch_kept(*args)


def supports_conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> str | None:
    """None where `launch_conv` can run, else the reason why not."""
    k = weight.shape[-1]
    if stride == 2:
        return supports_strided(x, weight, transposed)
    if (k, stride, padding) != (3, 1, 1):
        return f"a 3x3 kernel with stride 1 and padding 1, not {k}x{k} with stride {stride} and padding {padding}"
    return _reason(x, weight.shape[-3], weight.shape[-4], "modulated_conv2d_3x3_fits")


def launch_conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    """The bare convolution, or with `transposed` its adjoint; the weight is [.., O, I, 3, 3] with O of the result.

    With stride 1 a weight is read where it lies as long as its O or I is the dimension with stride 1 and the rest is on
    16 bytes.
    """
    if stride == 2:
        return launch_strided(x, weight, padding, transposed)
    return _conv3x3(x, weight, transposed, None, None, None, 1.0, 1.0, None)


def supports_drawn(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    rgb_weight: Tensor,
    rgb_bias: Tensor | None,
    rgb_clamp: float | None,
) -> str | None:
    """None where `launch_drawn` can run, else the reason why not."""
    channels, k = rgb_weight.shape[-4], rgb_weight.shape[-1]
    if k != 1:
        return f"draws by a 1x1 kernel, not {k}x{k}"
    if not 1 <= channels <= DRAWN_CHANNELS:
        return f"draws 1 to {DRAWN_CHANNELS} channels, not {channels}"
    if rgb_weight.dtype != x.dtype:
        return f"rgb_weight must have x's dtype {x.dtype}, got {rgb_weight.dtype}"
    return supports(x, weight, noise, noise_strength, bias, None, 1, 1, act, gain, clamp)


def launch_drawn(
    x: Tensor,
    weight: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    rgb_weight: Tensor,
    rgb_bias: Tensor | None,
    rgb_clamp: float | None,
    portable: bool = False,
    blocks: int = 0,
) -> tuple[Tensor, Tensor]:
    """y as `launch` makes it, and what a 1x1 convolution draws of it: rgb = clamp(conv(y, rgb_weight) + rgb_bias).

    rgb_weight is [F, O, 1, 1] or [N, F, O, 1, 1] in x's dtype, of any strides, with F from 1 to 4; rgb_bias [F]. rgb is
    [N, F, H, W] in x's dtype and layout: summed in float32 over the channels of the rounded y, and rounded once.
    `portable` and `blocks` are those of `_conv3x3`.
    """
    n, _, height, width = x.shape
    channels = rgb_weight.shape[-4]
    rgb_bias = _number(rgb_bias, x)
    rgb = torch.empty([n, channels, height, width], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    wf, wc = rgb_weight.stride()[-4:-2]
    drawing = _C.Drawing(
        channels=channels,
        weight=rgb_weight.data_ptr(),
        bias=pointer(rgb_bias),
        rgb=rgb.data_ptr(),
        weight_strides=(rgb_weight.stride(0) if rgb_weight.ndim == 5 and len(rgb_weight) > 1 else 0, wf, wc),
        bias_float=rgb_bias is not None and rgb_bias.dtype == torch.float32,
        clamp=inf if rgb_clamp is None else rgb_clamp,
    )
    epilogue = (noise, noise_strength, bias, SLOPES[act], gain, clamp)
    y = _conv3x3(x, weight, False, *epilogue, portable, blocks, drawing)
    return y, _in_layout_of(rgb, x)


def supports_wgrad(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool, dtype: torch.dtype = torch.float32
) -> str | None:
    """None where `launch_wgrad` can run, else the reason why not."""
    if (k, stride, padding) != (3, 1, 1):
        return f"a 3x3 kernel with stride 1 and padding 1, not {k}x{k} with stride {stride} and padding {padding}"
    return _reason(a, a.shape[1], b.shape[1], "modulated_conv2d_3x3_wgrad_fits")


def launch_wgrad(
    a: Tensor, b: Tensor, k: int, stride: int, padding: int, per_sample: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """r[n, cb, ca, dy, dx] = sum over p of b[n, cb, p] * a[n, ca, p + (dy, dx) - 1], or summed over n; in dtype."""
    n, _, height, width = a.shape
    results = n if per_sample else 1
    partials = _C.modulated_conv2d_3x3_wgrad_partials(n, height, width, results)
    return _wgrad3x3(a, b, per_sample, partials).to(dtype)


def _wgrad3x3(a: Tensor, b: Tensor, per_sample: bool, partials: int, portable: bool = False) -> Tensor:
    """The weight gradient by so many blocks for each result; `portable` as in `_conv3x3`."""
    n, channels_a, height, width = a.shape
    channels_b, results = b.shape[1], n if per_sample else 1
    a, b = dense_pixels(a), dense_pixels(b.to(a.dtype))
    floats = _C.modulated_conv2d_3x3_wgrad_floats(channels_a, channels_b)
    partial = torch.empty([results, partials, floats], dtype=torch.float32, device=a.device)
    y = torch.empty([results, 3, 3, channels_b, channels_a], dtype=torch.float32, device=a.device)
    op = _C.Conv3x3Wgrad(
        dtype=DTYPES[a.dtype],
        n=n,
        height=height,
        width=width,
        channels_a=channels_a,
        channels_b=channels_b,
        results=results,
        partials=partials,
        a=a.data_ptr(),
        b=b.data_ptr(),
        partial=partial.data_ptr(),
        y=y.data_ptr(),
        portable=portable,
    )
    _C.modulated_conv2d_3x3_wgrad(op, stream(a))
    y = y.permute(0, 3, 4, 1, 2)
    return y if per_sample else y[0]


@constant_result
def _fits(kernel: str, device: int, from_channels: int, to_channels: int) -> bool:
    """Whether a kernel runs on this device; a compiler does not look into the extension."""
    found: bool = getattr(_C, kernel)(device, from_channels, to_channels)
    return found


def _reason(x: Tensor, from_channels: int, to_channels: int, kernel: str) -> str | None:
    """What speaks against a kernel between so many channels in x's dtype, on x's device."""
    reason = dtype_reason(x)
    if reason or x.dtype == torch.float32:
        return reason or "no kernel for float32"
    if any(count % 8 or count > CHANNELS for count in (from_channels, to_channels)):
        return f"channels must be multiples of 8 and at most {CHANNELS}, got {from_channels} and {to_channels}"
    if not _fits(kernel, x.device.index, from_channels, to_channels):
        return "needs compute capability 8.0 and more shared memory than this device has"
    return None


def _in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """y, which is channels_last, in the layout of a result of x."""
    return y.contiguous(memory_format=layout_of(x))


def _readable(weight: Tensor) -> Tensor:
    """The weight itself where O or I is innermost and the rest on 16 bytes, else a copy in order [.., k, k, O, I]."""
    strides = weight.stride()
    aligned = weight.data_ptr() % 16 == 0 and all(stride == 1 or stride % 8 == 0 for stride in strides)
    if aligned and 1 in strides[-4:-2] and 0 not in strides[-4:]:
        return weight
    return weight.movedim((-4, -3), (-2, -1)).contiguous().movedim((-2, -1), (-4, -3))


def _number(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A small tensor that the kernel reads as it is: x's dtype or float32, without gaps."""
    if value is None:
        return None
    return (value if value.dtype in (x.dtype, torch.float32) else value.float()).contiguous()


def _conv3x3(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    slope: float,
    gain: float,
    clamp: float | None,
    portable: bool = False,
    blocks: int = 0,
    drawing: _C.Drawing | None = None,
) -> Tensor:
    """The kernel. For tests, `portable` takes mma.sync also where wgmma is to be had, `blocks` bounds how many run."""
    n, in_channels, height, width = x.shape
    out_channels = weight.shape[-4]
    dense, weight = dense_pixels(x), _readable(weight.to(x.dtype))
    noise, noise_strength, bias = (_number(value, x) for value in (noise, noise_strength, bias))
    y = torch.empty([n, out_channels, height, width], dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    wo, wi, wy, wx = weight.stride()[-4:]
    wn = weight.stride(0) if weight.ndim == 5 and len(weight) > 1 else 0
    first = weight.data_ptr()
    if transposed:  # the taps in reverse
        first += 2 * (wy + wx) * weight.element_size()
        wy, wx = -wy, -wx
    op = _C.Conv3x3(
        dtype=DTYPES[x.dtype],
        n=n,
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        x=dense.data_ptr(),
        weight=first,
        y=y.data_ptr(),
        noise=pointer(noise),
        strength=pointer(noise_strength),
        bias=pointer(bias),
        weight_strides=(wn, wo, wi, wy, wx),
        noise_stride=height * width if noise is not None and noise.ndim == 4 and noise.shape[0] > 1 else 0,
        weight_rows=wi == 1,
        floats=tuple(value is not None and value.dtype == torch.float32 for value in (noise, noise_strength, bias)),
        positive=gain,
        negative=gain * slope,
        clamp=inf if clamp is None else clamp,
        portable=portable,
        blocks=blocks,
    )
    if drawing is None:
        _C.modulated_conv2d_3x3(op, stream(x))
    else:
        _C.modulated_conv2d_3x3_drawn(op, drawing, stream(x))
    return _in_layout_of(y, x)

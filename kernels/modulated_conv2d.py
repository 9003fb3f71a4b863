"""modulated_conv2d in Triton: the steps from which clone_fast/ops makes the op and its gradients.

Weights come finished (`modulate`), shared [O, I, k, k] or per sample [N, O, I, k, k]. The fused forward and the bare
convolution run on one implicit GEMM in channels_last memory, see `_conv`; `route` says where cuDNN stands in for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clone_fast.kernels._act_backward import (
    launch_act_backward,
    launch_act_sums,
    launch_drawn_act_backward,
    supports_act_backward,
    supports_drawn_act_backward,
)
from clone_fast.kernels._conv import Geometry, convolve
from clone_fast.kernels._conv_memory import COPIED, copied_on_16_bytes, on_16_bytes
from clone_fast.kernels._conv_tuning import divides_warps
from clone_fast.kernels._dense import SLOPES, layout_of
from clone_fast.kernels._epilogue import Epilogue
from clone_fast.kernels._factors import launch_factor_gradients, launch_factored, launch_factored_backward
from clone_fast.kernels._fir_epilogue import fir
from clone_fast.kernels._modulate import modulate as launch_modulate
from clone_fast.kernels._modulate import modulate_backward as launch_modulate_backward
from clone_fast.kernels._pointwise_backward import (
    launch_pointwise_backward,
    launch_pointwise_sums,
    supports_pointwise_backward,
)
from clone_fast.kernels._wgrad import launch_wgrad, supports_wgrad

__all__ = [
    "launch",
    "launch_act_backward",
    "launch_act_sums",
    "launch_conv",
    "launch_conv_add",
    "launch_conv_finish",
    "launch_drawn_act_backward",
    "launch_factor_gradients",
    "launch_factored",
    "launch_factored_backward",
    "launch_finish",
    "launch_modulate",
    "launch_modulate_backward",
    "launch_pointwise_backward",
    "launch_pointwise_sums",
    "launch_wgrad",
    "route",
    "supports",
    "supports_act_backward",
    "supports_conv",
    "supports_conv_add",
    "supports_conv_finish",
    "supports_drawn_act_backward",
    "supports_finish",
    "supports_pointwise_backward",
    "supports_wgrad",
]

BARE = Epilogue()


def route(x: Tensor, weight: Tensor) -> str:
    """What multiplies: "triton", or "cudnn" for float32 unless Hopper's copy engine brings it as TF32.

    Full float32 has no tensor cores. In TF32 those of Hopper cut the mantissas of both factors, 2.8 times the error of
    rounding them and of one sign: only the kernels with divided warps round them first.
    """
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return "triton"
    channels = x.shape[1]
    describable = channels >= 16 and channels % 4 == 0 and min(x.shape[2:]) >= 2
    return "triton" if torch.backends.cudnn.allow_tf32 and divides_warps(x.device) and describable else "cudnn"


def describe(x: Tensor, weight: Tensor, *_: object) -> str:
    """What multiplies, for `clone_fast.explain`."""
    return {"triton": "multiplied in Triton", "cudnn": "multiplied by cuDNN"}[route(x, weight)]


def _dtype_reason(x: Tensor) -> str | None:
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"{str(x.dtype).removeprefix('torch.')} runs on the reference only"


def supports_conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> str | None:
    """None, or why `launch_conv` cannot run."""
    if _dtype_reason(x):
        return _dtype_reason(x)
    if weight.dtype != x.dtype:
        return f"weight must have x's dtype {x.dtype}, got {weight.dtype}"
    if stride not in (1, 2):
        return f"strides are 1 and 2, got {stride}"
    return None


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
    """None, or why `launch` cannot run. A weight of another dtype is taken: the op converts it as it modulates it."""
    return _epilogue_reason(act, gain) or _dtype_reason(x)


def _epilogue_reason(act: str, gain: float) -> str | None:
    if act not in SLOPES:
        return f"fused activations are {', '.join(SLOPES)}, got {act}"
    if gain <= 0:
        return f"the fused gain is positive, got {gain}"
    return None


def supports_finish(
    z: Tensor,
    resample_filter: Tensor,
    padding: list[int],
    filter_gain: float,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> str | None:
    """None, or why `launch_finish` cannot run."""
    return _epilogue_reason(act, gain) or _dtype_reason(z)


def supports_conv_finish(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> str | None:
    """None, or why `launch_conv_finish` cannot run."""
    return _epilogue_reason(act, gain) or supports_conv(x, weight, stride, padding, False)


def supports_conv_add(x: Tensor, weight: Tensor, other: Tensor) -> str | None:
    """None, or why `launch_conv_add` cannot run."""
    k = weight.shape[-1]
    if k != 1:
        return f"only a 1x1 kernel adds on its way, not {k}x{k}: others multiply longer than an addition takes"
    return supports_conv(x, weight, 1, 0, False)


def _empty(x: Tensor, channels: int, height: int, width: int, *, like_x: bool) -> Tensor:
    """[N, channels, height, width] in x's dtype; in x's layout, or channels_last."""
    layout = layout_of(x) if like_x else torch.channels_last
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


def _readable(x: Tensor) -> Tensor:
    """x itself where its channels are innermost or few, else a copy in channels_last.

    In float32 the kernels that round read through the copy engine alone. In half precision one whose channels do not
    end on 16 bytes is copied, too: it would be read number by number, nine times.
    """
    if x.element_size() == 2 and x.shape[1] >= COPIED and divides_warps(x.device) and not on_16_bytes(x):
        return copied_on_16_bytes(x)
    spread = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    nested = x.stride(0) >= x.stride(2) >= x.stride(3) >= x.shape[1] and x.stride(1) == 1
    few = x.shape[1] < 8
    if spread < 2**31 and (nested or few) and (few or x.dtype != torch.float32 or on_16_bytes(x)):
        return x
    return x.clone(memory_format=torch.channels_last)


def _library_conv(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """PyTorch's convolution, a loop over the samples where each has weights of its own."""
    if weight.ndim == 5:
        pairs = zip(x.split(1), weight, strict=True)
        return torch.cat([_library_conv(image, own, geometry) for image, own in pairs])
    if geometry.transposed:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=geometry.stride, padding=geometry.padding)
    return F.conv2d(x, weight, stride=geometry.stride, padding=geometry.padding)


def _unfinished(x: Tensor, weight: Tensor, geometry: Geometry, y: Tensor, epilogue: Epilogue) -> Tensor:
    """y, finished; or what `fir` has to finish into y: the library's result, or the parts of a split sum."""
    if route(x, weight) == "cudnn":
        return _library_conv(x, weight, geometry)
    return convolve(_readable(x), weight, geometry, y, epilogue)


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry, y: Tensor, epilogue: Epilogue) -> Tensor:
    z = _unfinished(x, weight, geometry, y, epilogue)
    same = z.dtype == y.dtype and z.shape == y.shape and z.stride() == y.stride()
    return z if z is y or (same and epilogue is BARE) else fir(z, y, epilogue=epilogue)


def launch_conv(x: Tensor, weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    """F.conv2d(x, weight, stride, padding), or the transposed convolution with the same weight [.., O, I, k, k].

    The gradient of conv(x, weight, 1, p) to x is launch_conv(dy, weight.transpose(-3, -4), 1, p, True): no copy of the
    weight is made for it in half precision.
    """
    geometry = Geometry.of(x, weight.shape[-1], stride, padding, transposed)
    y = _empty(x, weight.shape[-4], geometry.height, geometry.width, like_x=True)
    return _convolved(x, weight, geometry, y, BARE)


def launch_conv_finish(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """F.conv2d(x, weight, stride, padding) with what follows it: clamp(gain * act(conv + noise * strength + bias))."""
    geometry = Geometry.of(x, weight.shape[-1], stride, padding, False)
    y = _empty(x, weight.shape[-4], geometry.height, geometry.width, like_x=True)
    return _convolved(x, weight, geometry, y, Epilogue(noise, noise_strength, bias, act, gain, clamp))


def launch_conv_add(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """F.conv2d(x, weight) + other, 1x1, summed in float32 and rounded once; other of any layout, and of x's dtype or a
    smaller one."""
    geometry = Geometry.of(x, 1, 1, 0, False)
    y = _empty(x, weight.shape[-4], geometry.height, geometry.width, like_x=True)
    return _convolved(x, weight, geometry, y, Epilogue(other=other))


def launch_finish(
    z: Tensor,
    resample_filter: Tensor,
    padding: list[int],
    filter_gain: float,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """clamp(gain * act(FIR(z) + noise * noise_strength + bias)): what follows an upsampling convolution.

    The FIR is upfirdn2d's without resampling, padding [x0, x1, y0, y1].
    """
    (_, c, h, w), (x0, x1, y0, y1), f = z.shape, padding, resample_filter
    y = _empty(z, c, h + y0 + y1 - f.shape[0] + 1, w + x0 + x1 - f.shape[-1] + 1, like_x=True)
    epilogue = Epilogue(noise, noise_strength, bias, act, gain, clamp)
    return fir(z, y, f, (x0, y0), filter_gain=filter_gain, epilogue=epilogue)


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
    """clamp(gain * act(conv + noise * noise_strength + bias)); see `clone_fast.ops.modulated_conv2d`."""
    epilogue = Epilogue(noise, noise_strength, bias, act, gain, clamp)
    k, out_channels, (height, width) = weight.shape[-1], weight.shape[-4], x.shape[2:]
    y = _empty(x, out_channels, height * up // down, width * up // down, like_x=True)
    if up == 1 and down == 1:
        return _convolved(x, weight, Geometry.of(x, k, 1, k // 2, False), y, epilogue)
    f = resample_filter
    taps = (1, 1) if f is None else (f.shape[-1], f.shape[0])  # x, y
    if up == 2:
        geometry = Geometry.of(x, k, 2, 0, True)
        z = _empty(x, out_channels, geometry.height, geometry.width, like_x=False)
        z = _unfinished(x, weight, geometry, z, BARE)
        pad_x, pad_y = ((size + 1) // 2 + k // 2 - (k - 1) for size in taps)
        return fir(z, y, f, (pad_x, pad_y), filter_gain=4.0, epilogue=epilogue)
    pad_x, pad_y = ((size - 1) // 2 + (k // 2 if k > 1 else 0) for size in taps)
    if k == 1:
        z = _empty(x, x.shape[1], height // 2, width // 2, like_x=False)
        return _convolved(fir(x, z, f, (pad_x, pad_y), step=2), weight, Geometry.of(z, 1, 1, 0, False), y, epilogue)
    z = _empty(x, x.shape[1], height + k - 2, width + k - 2, like_x=False)
    return _convolved(fir(x, z, f, (pad_x, pad_y)), weight, Geometry.of(z, k, 2, 0, False), y, epilogue)

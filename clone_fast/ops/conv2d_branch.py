"""conv2d_branch: the convolution that a discriminator begins with, and its result at half the resolution for the skip.

On the way back the gradients of both add up where the activation begins, and the sum is of all channels. As two ops it
was written by the one and read by the other, though little is left of it behind a 1x1 kernel of an image's channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops import finished_weights, upfirdn2d_add
from clone_fast.ops.conv2d_down import _resolved
from clone_fast.ops.convolution_gradients import _pointwise_summed, convolution_gradients
from clone_fast.ops.dispatch import launch_step, resolve, step_if_any
from clone_fast.ops.modulated_conv2d import modulated_conv2d
from clone_fast.ops.registration import Recorded, empty_result, like, register
from clone_fast.ops.resampling_gradients import ONE, TWO
from clone_fast.ops.upfirdn2d import adjoint, shrinking_padding

__all__ = ["conv2d_branch"]

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, str act, float gain, float? clamp, Tensor resample_filter, int[] padding, "
    "str shrink_backend"
)
DIFFERENTIABLE = [0, 1, 2]  # the first arguments


def _convolution(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the convolution, as `finished_weights` takes them, of those above."""
    x, weight, bias, *activation = args[:6]
    return (x, weight, None, None, bias, None, 1, 1, *activation)


def _run(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    *call, f, padding, shrink_backend = args
    both: tuple[Tensor, Tensor] | None = step_if_any("modulated_conv2d", "branch", backend, *call, f, padding)
    if both is not None:
        return both
    y = finished_weights.run(backend, *_convolution(args))
    return y, launch_step("upfirdn2d", "", shrink_backend, y, f, ONE, TWO, padding, False, 1.0)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight = args[:2]
    n, _, height, width = x.shape
    channels = weight.shape[-4]
    return (
        empty_result(x, [n, channels, height, width]),
        empty_result(x, [n, channels, height // 2, width // 2]),
    )


def _gradients(recorded: Recorded, grads: list[Any], wanted: list[int]) -> Sequence[Tensor | None]:
    (y, _), (dy, dshrunk) = recorded.results, grads
    if dy is not None and dshrunk is not None and not torch.is_grad_enabled():
        flags = [i in wanted for i in DIFFERENTIABLE]
        of_all = _backward_op(dy, dshrunk, y, *recorded.args, flags, recorded.backend)
        return [of_all[i] for i in wanted]
    *_, f, padding, shrink_backend = recorded.args
    total: Any = upfirdn2d_add.joined(dy, dshrunk, y.shape[2:], f, padding, shrink_backend)
    convolution = Recorded(_convolution(recorded.args), (y,), recorded.backend)
    places = [{0: 0, 1: 1, 2: 4}[i] for i in wanted]  # among its arguments
    return finished_weights.gradients(convolution, [total], places)


def _run_backward(backend: str, dy: Tensor, dshrunk: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """A gradient for each of DIFFERENTIABLE; an empty tensor where none is wanted."""
    *inputs, wanted = args
    found = zip(_first_gradients(backend, dy, dshrunk, y, inputs, wanted), inputs[:3], wanted, strict=True)
    return tuple(like(grad, one) if want else y.new_empty([0]) for grad, one, want in found)


def _first_gradients(
    backend: str, dy: Tensor, dshrunk: Tensor, y: Tensor, inputs: Sequence[Any], wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients to x, weight and bias, None where not wanted."""
    x, weight, bias, *activation, f, padding, shrink_backend = inputs
    up, down, pads = adjoint(y.shape[2:], dshrunk.shape[2:], f, ONE, TWO, padding)
    if weight.shape[-1] == 1:
        in_one_pass = (dy, dshrunk, y, x, weight, *activation, *wanted, f, pads, True, 1.0)
        found = step_if_any("modulated_conv2d", "branch_backward", backend, *in_one_pass)
        if found is not None:
            dx, *parts = found
            dw, _, _, dbias = _pointwise_summed(backend, parts, weight, bias)
            return [dx, dw, dbias]
    dy = upfirdn2d_add.run(shrink_backend, dshrunk, dy, f, up, down, pads, True, 1.0)
    want_dx, want_dw, want_bias = wanted
    call = (*_convolution(inputs), [want_dx, want_dw, False, False, want_bias])
    dx, dw, _, _, dbias = convolution_gradients(backend, dy, y, *call)
    return [dx, dw, dbias]


def _fake_backward(dy: Tensor, dshrunk: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted, inputs = args[-1], args[:3]
    return tuple(torch.empty_like(one) if want else y.new_empty([0]) for one, want in zip(inputs, wanted, strict=True))


_op = register(
    "conv2d_branch",
    f"({ARGUMENTS}) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    gradients=_gradients,
    differentiable=DIFFERENTIABLE,
    keep_results=True,
)
_backward_op = register(
    "conv2d_branch_backward",
    f"(Tensor dy, Tensor dshrunk, Tensor y, {ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
)


def conv2d_branch(
    x: Tensor,
    weight: Tensor,
    resample_filter: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a discriminator of StyleGAN2 reads its image with, and the beginning of the skip (Karras et al. 2020).

    y = modulated_conv2d(x, weight, None, demodulate=False, bias=bias, act=act, gain=gain, clamp=clamp)
    shrunk = downsample2d(y, resample_filter)

    Args:
        x: [N, I, H, W], floating point.
        weight: [O, I, k, k]. Where k is 1, I at most 4 and O 8, 16, 32 or 64, the way back may be one pass.
        resample_filter: float32 [fh, fw] or [taps]. Gets no gradient.
        bias, act, gain, clamp: as of `modulated_conv2d`.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        y [N, O, H, W] and shrunk [N, O, H // 2, W // 2] in x's dtype and layout; differentiable to x, weight and bias,
        twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    activation: dict[str, Any] = {"bias": bias, "act": act, "gain": gain, "clamp": clamp}
    padding = shrinking_padding(x, resample_filter, TWO)
    given, fused, chosen = _resolved(x, weight, backend, **activation)
    # x stands for y, too
    shrinking = resolve("upfirdn2d", backend, x, resample_filter, ONE, TWO, padding, False, 1.0)
    if fused and "reference" not in (chosen, shrinking) and min(x.shape[2:]) > 1:
        both: tuple[Tensor, Tensor] = _op(x, *given, *fused, resample_filter, padding, shrinking, chosen)
        return both
    y = modulated_conv2d(x, weight, None, demodulate=False, **activation, backend=backend)
    return upfirdn2d_add.downsampled_branch(y, resample_filter, backend=backend)

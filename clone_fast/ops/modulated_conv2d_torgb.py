"""modulated_conv2d_torgb: the last convolution of a block of StyleGAN2, and the image that ToRGB draws of it.

On the way back the gradient of what is drawn and that of the next block come together in the pass over the activation:
as two ops they were two images of all channels, added up in a third pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops import finished_weights
from clone_fast.ops.checks import check_activation, check_tensor
from clone_fast.ops.convolution_gradients import drawn_gradients
from clone_fast.ops.dispatch import resolve, runs_step, step_if_any
from clone_fast.ops.factored_weights import by_weights, factors, serves
from clone_fast.ops.modulated_conv2d import (
    UNCHANGED,
    check_arguments,
    fused_activation,
    in_dtype,
    modulated_conv2d,
    modulated_weights,
)
from clone_fast.ops.registration import Recorded, composite_gradients, empty_result, like, register
from clone_fast.ops.streams import aside
from clone_fast.reference.bias_act import ACTIVATIONS, activation_defaults

__all__ = ["modulated_conv2d_torgb"]

IMAGE_LANE = "image"  # who draws waits for it: `streams.joined`
SAME = (None, 1, 1)  # no filter, and nothing resampled
# positions: 0 to 4, 8 and 9 are the convolution's, its weight or that one's factors; 10 and 11 the image's
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? noise, Tensor? noise_strength, Tensor? bias, str act, float gain, float? clamp, "
    "Tensor? s, Tensor? d, Tensor rgb_weight, Tensor? rgb_bias, float? rgb_clamp"
)
DIFFERENTIABLE = [0, 1, 2, 3, 4, 8, 9, 10, 11]


def _run(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, _, _, rgb_weight, rgb_bias, rgb_clamp = args
    of_image = (rgb_weight, rgb_bias, rgb_clamp)
    both: tuple[Tensor, Tensor] | None = step_if_any("modulated_conv2d", "drawn", backend, *inputs, *of_image)
    if both is not None:
        return both
    x, y = inputs[0], finished_weights.run(backend, *inputs[:5], *SAME, *inputs[5:])
    draw = partial(finished_weights.run, backend, y, rgb_weight, None, None, rgb_bias, *SAME, *UNCHANGED[:2], rgb_clamp)
    # beside the next blocks, which do not need it
    reads = [one for one in (y, rgb_weight, rgb_bias) if one is not None]
    return y, aside(x.device, IMAGE_LANE, draw, reads)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, rgb_weight = args[0], args[1], args[10]
    n, _, height, width = x.shape
    return tuple(empty_result(x, [n, one.shape[-4], height, width]) for one in (weight, rgb_weight))  # type: ignore[return-value]


def _apart(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    """What the op computes, of ops that may be differentiated twice."""
    x, weight, *epilogue, act, gain, clamp, s, d, rgb_weight, rgb_bias, rgb_clamp = args
    inputs = (x, weight, *epilogue, *SAME, act, gain, clamp)
    y = finished_weights.convolve(*inputs, backend) if s is None else by_weights(backend, *inputs, s, d)
    return y, finished_weights.convolve(y, rgb_weight, None, None, rgb_bias, *SAME, *UNCHANGED[:2], rgb_clamp, backend)


def _gradients(recorded: Recorded, grads: list[Any], wanted: list[int]) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        used = [i for i, grad in enumerate(grads) if grad is not None]

        def results(*args: Any) -> list[Tensor]:
            both = _apart(recorded.backend, *args)
            return [both[i] for i in used]

        return composite_gradients(results, recorded.args, wanted, [grads[i] for i in used])
    flags = [i in wanted for i in DIFFERENTIABLE]
    found = _backward_op(*recorded.results, *grads, *recorded.args, flags, recorded.backend)
    return [found[DIFFERENTIABLE.index(i)] for i in wanted]


def _run_backward(
    backend: str, y: Tensor, rgb: Tensor, dy: Tensor | None, drgb: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """A gradient for each of DIFFERENTIABLE; an empty tensor where none is wanted."""
    *inputs, wanted = args
    found = drawn_gradients(backend, dy, torch.zeros_like(rgb) if drgb is None else drgb, y, rgb, *args)
    return tuple(
        like(grad, inputs[i]) if want else y.new_empty([0])
        for i, grad, want in zip(DIFFERENTIABLE, found, wanted, strict=True)
    )


def _fake_backward(y: Tensor, rgb: Tensor, dy: Tensor | None, drgb: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *inputs, wanted = args
    return tuple(
        torch.empty_like(inputs[i]) if want else y.new_empty([0])
        for i, want in zip(DIFFERENTIABLE, wanted, strict=True)
    )


_op = register(
    "modulated_conv2d_torgb",
    f"({ARGUMENTS}) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    gradients=_gradients,
    differentiable=DIFFERENTIABLE,
    keep_results=True,
)
_backward_op = register(
    "modulated_conv2d_torgb_backward",
    f"(Tensor y, Tensor rgb, Tensor? dy, Tensor? drgb, {ARGUMENTS}, bool[] wanted) -> ({', '.join(['Tensor'] * 9)})",
    run=_run_backward,
    fake=_fake_backward,
)


def modulated_conv2d_torgb(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    rgb_weight: Tensor,
    rgb_styles: Tensor,
    *,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    rgb_bias: Tensor | None = None,
    rgb_clamp: float | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What ends a block of StyleGAN2's generator (Karras et al. 2020, figure 7): its last features, and their image.

    y = modulated_conv2d(x, weight, styles, noise=..., noise_strength=..., bias=..., act=..., gain=..., clamp=...)
    rgb = modulated_conv2d(y, rgb_weight, rgb_styles, demodulate=False, bias=rgb_bias, clamp=rgb_clamp)

    Args:
        x, weight, styles, noise, noise_strength, bias, act, gain, clamp, eps: as of `modulated_conv2d`.
        rgb_weight: [F, O, 1, 1]. The way back is one pass for images of up to 4 channels, drawn of more.
        rgb_styles: [N, O], factors of the channels of y.
        rgb_bias: [F]. rgb_clamp: of the image, or None.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        y [N, O, H, W] and rgb [N, F, H, W] in x's dtype and layout; differentiable to all tensors, twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "modulated_conv2d_torgb"
    limit = check_arguments(x, weight, styles, 1, 1, None, True, noise, noise_strength, bias, act, gain, clamp, eps)
    n, out_channels = len(x), weight.shape[-4]
    check_tensor(op, "rgb_weight", rgb_weight, x, ["F", out_channels, 1, 1])
    check_tensor(op, "rgb_styles", rgb_styles, x, [n, out_channels])
    if rgb_bias is not None:
        check_tensor(op, "rgb_bias", rgb_bias, x, [rgb_weight.shape[0]])
    check_activation(op, "linear", rgb_clamp, ACTIVATIONS)
    fused = fused_activation(act, activation_defaults(act, None, gain)[1], limit)
    last = fused or UNCHANGED
    chosen = resolve("modulated_conv2d", backend, x, weight, noise, noise_strength, bias, *SAME, *last)
    backward = (None, x, x, rgb_weight, x, rgb_clamp, noise, noise_strength, *last, False, False, False)
    if chosen == "reference" or not (fused and runs_step("modulated_conv2d", "drawn_act_backward", *backward)):
        y = modulated_conv2d(
            x, weight, styles, noise=noise, noise_strength=noise_strength, bias=bias, act=act, gain=gain, clamp=clamp,
            eps=eps, backend=chosen,
        )  # fmt: skip
        options = {"demodulate": False, "bias": rgb_bias, "clamp": rgb_clamp, "backend": chosen}
        return y, modulated_conv2d(y, rgb_weight, rgb_styles, **options)  # type: ignore[arg-type]
    made, s, d = _weights(x, weight, styles, float(eps), chosen)
    of_image = modulated_weights(rgb_weight, rgb_styles, x, False, float(eps), chosen, lane="rgb weights")
    small = [in_dtype(one, x) for one in (noise, noise_strength, bias, rgb_bias)]
    rgb_limit = None if rgb_clamp is None else float(rgb_clamp)
    both: tuple[Tensor, Tensor] = _op(
        x, made.to(x.dtype), *small[:3], *last, s, d, of_image.to(x.dtype), small[3], rgb_limit, chosen
    )
    return both


def _weights(
    x: Tensor, weight: Tensor, styles: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The convolution's, and their factors s and d where the gradient goes to these."""
    if serves(x, weight, styles):
        made, s, d = factors(x, weight, styles, True, eps, backend)
        return made.detach(), s, d  # its gradient goes by the factors alone; zeros for it would be a pass over it
    return modulated_weights(weight, styles, x, True, eps, backend), None, None

"""modulated_conv2d: StyleGAN2's convolutions with everything around them, as one op.

On a fast backend it is two launches: `modulated_weights`, tiny, gives every sample its weights; the registered op
convolves with finished weights, shared or per sample, and does all the rest. Where the weight is frozen, and x and
styles are not, the two are those of `factored_weights`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clone_fast.ops import finished_weights
from clone_fast.ops.bias_act import bias_act
from clone_fast.ops.checks import (
    check_activation,
    check_filter,
    check_image,
    check_number,
    check_odd,
    check_result,
    check_tensor,
    describe,
)
from clone_fast.ops.dispatch import launch_step, resolve, step_backend
from clone_fast.ops.factored_weights import factored_conv2d, serves
from clone_fast.ops.registration import Recorded, as_result, composite_gradients, like, register, without_autocast
from clone_fast.ops.resampling_gradients import remembered, with_dgrad_weight
from clone_fast.ops.streams import made_beside
from clone_fast.reference import modulated_conv2d as spec
from clone_fast.reference.bias_act import ACTIVATIONS, activation_defaults

__all__ = ["modulated_conv2d"]

UNCHANGED = ("linear", 1.0, None)  # act, gain and clamp that do nothing
FUSED = ("linear", "relu", "lrelu")  # what a convolution's epilogue can do, and undo from its result, with a gain > 0


def _weights_reference(
    weight: Tensor, styles: Tensor | None, demodulate: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    if styles is None:
        return weight.to(dtype)
    return spec.modulated_weights(weight, styles, demodulate=demodulate, eps=eps, dtype=dtype)


def _run_weights(backend: str, weight: Tensor, styles: Tensor | None, *options: Any) -> Tensor:
    if backend == "reference":
        return finished_weights.empty(weight, styles, options[-1]).copy_(_weights_reference(weight, styles, *options))
    made: Tensor = launch_step("modulated_conv2d", "modulate", backend, weight, styles, *options)
    return made


def _run_weights_backward(
    backend: str, dw: Tensor, weight: Tensor, styles: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dweight, dstyles = launch_step("modulated_conv2d", "modulate_backward", backend, dw, weight, styles, *options)
    return like(dweight, weight), dw.new_empty([0]) if styles is None else like(dstyles, styles)


def _weights_gradients(recorded: Recorded, grads: list[Tensor], wanted: list[int]) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled() or recorded.backend == "reference":
        return composite_gradients(_weights_reference, recorded.args, wanted, grads[0])
    found = _weights_backward_op(grads[0], *recorded.args, recorded.backend)
    return [found[i] for i in wanted]


_WEIGHTS = "Tensor weight, Tensor? styles, bool demodulate, float eps, ScalarType dtype"
_weights_op = register(
    "modulated_weights",
    f"({_WEIGHTS}) -> Tensor",
    run=_run_weights,
    fake=lambda weight, styles, *options: finished_weights.empty(weight, styles, options[-1]),
    gradients=_weights_gradients,
    differentiable=[0, 1],
)
_weights_backward_op = register(
    "modulated_weights_backward",
    f"(Tensor dw, {_WEIGHTS}) -> (Tensor, Tensor)",
    run=_run_weights_backward,
    fake=lambda dw, weight, styles, *options: (
        torch.empty_like(weight),
        dw.new_empty([0]) if styles is None else torch.empty_like(styles),
    ),
)


def modulated_weights(
    weight: Tensor,
    styles: Tensor | None,
    x: Tensor,
    demodulate: bool,
    eps: float,
    used_by: str,
    up: int = 1,
    down: int = 1,
    lane: str = "weights",
) -> Tensor:
    """By a kernel that any backend may convolve with; without styles put in order once, for both directions.

    used_by: the backend of the convolution, which has this up and down.
    """
    backend = step_backend("modulated_conv2d", "modulate")
    in_order = backend == "reference" or weight.ndim == 5 or weight.shape[-1] == 1 or x.dtype.itemsize != 2
    if styles is None and in_order:
        return weight
    # beside, also for the sake of its gradient, for which the layers before this one need not wait
    args = (weight, styles, demodulate, eps, x.dtype, backend)
    make = functools.partial(with_dgrad_weight, lambda: (_weights_op(*args),), x, used_by, up, down)
    made = made_beside(x.device, lane, make, reads=[weight] if styles is None else [weight, styles])
    return remembered(made, 1)[0]


@without_autocast
def _exact(x: Tensor, weight: Tensor, styles: Tensor | None, **options: Any) -> Tensor:
    return as_result(spec.modulated_conv2d(x, weight, styles, **options), x)


def in_dtype(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A small tensor as x's kernels read it; None stays."""
    return None if value is None else value.to(x.dtype)


def fused_activation(act: str, gain: float, clamp: float | None) -> tuple[str, float, float | None] | None:
    """These, where they are done with the convolution; None where they are a pass of their own behind it."""
    return (act, gain, clamp) if act in FUSED and gain > 0 else None


def check_arguments(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None,
    up: int,
    down: int,
    resample_filter: Tensor | None,
    demodulate: bool,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    gain: float | None,
    clamp: float | None,
    eps: float,
) -> float | None:
    """Raise what `modulated_conv2d` says; the clamp as a number."""
    op = "modulated_conv2d"
    check_image(op, "x", x)
    n, in_channels, height, width = x.shape
    check_tensor(op, "weight", weight, x, ["O", in_channels, "k", "k"], [n, "O", in_channels, "k", "k"])
    out_channels, _ = check_odd(op, weight, in_channels)
    if styles is not None:
        check_tensor(op, "styles", styles, x, [n, in_channels])
    elif demodulate:
        raise ValueError(f"{op}: demodulate=True needs styles [{n}, {in_channels}], got None")
    if (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise ValueError(f"{op}: up and down must be 1 or 2 and not both 2, got up={up!r}, down={down!r}")
    if down == 2 and (height % 2 or width % 2):
        raise ValueError(f"{op}: x must have an even height and width for down=2, got {describe(x)}")
    if up == 2 or down == 2:
        check_filter(op, "resample_filter", resample_filter, x)
    size = (height * up // down, width * up // down)
    check_result(op, [n, out_channels, *size])
    if noise is not None:
        check_tensor(op, "noise", noise, x, size, (1, 1, *size), (n, 1, *size))
    if noise_strength is not None:
        check_tensor(op, "noise_strength", noise_strength, x, [])
    if bias is not None:
        check_tensor(op, "bias", bias, x, [out_channels])
    check_activation(op, act, clamp, ACTIVATIONS)
    check_number(op, "gain", gain)
    check_number(op, "eps", eps)
    return None if clamp is None else float(clamp)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor | None,
    *,
    up: int = 1,
    down: int = 1,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    eps: float = 1e-8,
    backend: str = "auto",
) -> Tensor:
    """Modulate, convolve, demodulate, add noise and bias, activate (Karras et al. 2020, StyleGAN2, section 2.2).

    y = clamp(gain * act(conv(x, w') + noise_strength * noise + bias)) with w'[n,o,i] = weight[o,i] * styles[n,i], and
    with demodulation w'[n,o] / sqrt(sum of w'[n,o]^2 + eps). The convolution is a correlation that keeps the size.
    up=2 is a transposed convolution with stride 2 followed by the filter with gain 4; down=2 the filter followed by a
    convolution with stride 2.

    Args:
        x: [N, I, H, W], floating point.
        weight: [O, I, k, k], k odd, shared over the batch; or [N, O, I, k, k], every sample with its own.
        styles: [N, I], the factor of every input channel; None for the plain convolution of a discriminator.
        up, down: 1 or 2, not both 2.
        resample_filter: float32 [fh, fw] or [taps], as of `setup_filter`; needed where up or down is 2.
        demodulate: bring the modulated weights of every output channel to unit norm; needs styles.
        noise: [H', W'], [1, 1, H', W'] or [N, 1, H', W'] at the size of the result, added before the bias; or None.
        noise_strength: scalar tensor, the factor of the noise; None for 1.
        bias: [O].
        act, gain, clamp: as in `bias_act`. Linear, relu and lrelu with a gain > 0 are done with the convolution, the
            others in a pass of their own.
        eps: inside the square root of the demodulation; 1e-8 on the unscaled weights is NVIDIA's convention.
        backend: "auto", "reference", "triton" or "cuda".

    In float16 with demodulation weights and styles are normalised first, as NVIDIA's networks do, so that nothing
    overflows; bfloat16 has the range and takes no such branch.

    Returns:
        [N, O, H * up / down, W * up / down] in x's dtype and layout; differentiable to x, weight, styles, noise,
        noise_strength and bias, twice and more.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend was named and cannot run this call.
    """
    op = "modulated_conv2d"
    limit = check_arguments(
        x, weight, styles, up, down, resample_filter, demodulate, noise, noise_strength, bias, act, gain, clamp, eps
    )
    _, gain_value = activation_defaults(act, None, gain)
    last = fused_activation(act, gain_value, limit)
    geometry = (resample_filter, up, down, *(last or UNCHANGED))
    chosen = resolve(op, backend, x, weight, noise, noise_strength, bias, *geometry)
    if chosen == "reference":
        exact: Tensor = _exact(
            x,
            weight,
            styles,
            up=up,
            down=down,
            resample_filter=resample_filter,
            demodulate=demodulate,
            noise=noise,
            noise_strength=noise_strength,
            bias=bias,
            act=act,
            gain=gain_value,
            clamp=limit,
            eps=float(eps),
        )
        return exact
    rest = (*(in_dtype(value, x) for value in (noise, noise_strength, bias)), *geometry)
    if styles is not None and serves(x, weight, styles):
        y = factored_conv2d(x, weight, styles, demodulate, float(eps), *rest, backend=chosen)
    else:
        made = modulated_weights(weight, styles, x, demodulate, float(eps), chosen, up, down)
        y = finished_weights.convolve(x, made.to(x.dtype), *rest, chosen)
    return y if last else bias_act(y, act=act, gain=gain_value, clamp=limit, backend=chosen)
